package hostdeploy

import "errors"

// Errors of this package; test with errors.Is.
var (
	// ErrNotHost: this system was not booted from a deployment, or the directory is no
	// physical root.
	ErrNotHost = errors.New("not a system that Particle deployed")
	// ErrBusy: another run changes the host's deployments.
	ErrBusy = errors.New("another run of particle hostdeploy is at work")
	// ErrNoKernel: the image has no kernel, or not the one that was asked for.
	ErrNoKernel = errors.New("image without a kernel")
	// ErrNoInitrd: the kernel has no initramfs.
	ErrNoInitrd = errors.New("image without an initramfs")
	// ErrNoSetup: the initramfs cannot set up a composefs root.
	ErrNoSetup = errors.New("initramfs without Particle's root set-up")
	// ErrArchitecture: the image is for other machines.
	ErrArchitecture = errors.New("image for another architecture")
	// ErrNoSpace: the boot file system has no room for the kernel.
	ErrNoSpace = errors.New("no space left on the boot file system")
	// ErrReadOnly: the boot file system, or the physical root, cannot be written.
	ErrReadOnly = errors.New("read-only file system")
	// ErrNoDeployment: no deployment fits what was asked for.
	ErrNoDeployment = errors.New("no such deployment")
	// ErrInUse: what is booted, or needed for a way back, is not removed.
	ErrInUse = errors.New("deployment is in use")
	// ErrFormat: a file of a deployment's state is not what it should be.
	ErrFormat = errors.New("bad deployment record")
	// ErrNoVerity: files on the physical root cannot have fs-verity.
	ErrNoVerity = errors.New("no fs-verity")
	// ErrReserved: a kernel argument is one of those that Particle sets itself.
	ErrReserved = errors.New("kernel argument that Particle sets itself")
	// ErrNoImage: the store lacks what the deployment was made of.
	ErrNoImage = errors.New("deployment's image is not in the store")
)
