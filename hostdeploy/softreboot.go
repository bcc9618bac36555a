package hostdeploy

import (
	"context"
	"errors"
	"fmt"

	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// NextRoot is where systemd looks for the root of a soft reboot
// (systemd-soft-reboot.service(8)).
const NextRoot = "/run/nextroot"

// ErrReboot: a deployment cannot be reached without starting another kernel.
var ErrReboot = errors.New("the deployment needs a reboot")

// CanSoftReboot returns ErrReboot, with the reason, unless a plan's deployment has the
// kernel and the initramfs that run.
func (h *Host) CanSoftReboot(p *Plan) error {
	all, err := h.Deployments()
	if err != nil {
		return err
	}
	now := booted(all)
	if now == nil {
		return fmt.Errorf("%w: no deployment of this host is running", ErrReboot)
	}
	if now.BootDigest != p.BootDigest {
		return fmt.Errorf("%w: it has another kernel or initramfs, %s; %s runs", ErrReboot, p.Kernel, now.Kernel)
	}
	// Arguments for the kernel itself would not take effect, and nobody can tell which
	// those are.
	if was, will := rest(now.KArgs), rest(p.KArgs); was != will {
		return fmt.Errorf("%w: it has other kernel arguments, %q; %q are in force", ErrReboot, will, was)
	}
	return nil
}

// rest is what a command line has besides the names of the image and its state.
func rest(k KArgs) string {
	args := argsFor(k)
	args, _ = args.Delete("composefs.digest")
	return args.String()
}

// PrepareSoftReboot mounts the deployment of an applied plan for systemctl soft-reboot.
func (h *Host) PrepareSoftReboot(ctx context.Context, p *Plan) error {
	_, err := initramfs.PrepareNext(ctx, initramfs.Options{Root: h.Root, Cmdline: p.KArgs.All().String(), Run: h.Run}, NextRoot)
	return err
}
