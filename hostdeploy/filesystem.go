package hostdeploy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/particle-os/particle/converter/mount"
)

// A FileSystem is one that is mounted.
type FileSystem struct {
	Target string // where
	Device string // the block device, "/dev/sda2"
	Type   string // "ext4"
	UUID   string // as blkid(8) prints it
	// Subvolume is the directory of the file system that is mounted, "/" for all of it.
	Subvolume string
}

// FileSystemOf finds the file system that a directory is on.
func FileSystemOf(ctx context.Context, dir string) (*FileSystem, error) {
	fs, _, err := mountOf(dir)
	if err != nil {
		return nil, fmt.Errorf("looking for the file system of %q: %w", dir, err)
	}
	if !strings.HasPrefix(fs.Device, "/dev/") {
		return nil, fmt.Errorf("%q is not on a file system of a disk: got %s of %s", dir, fs.Type, fs.Device)
	}
	out, err := exec.CommandContext(ctx, "blkid", "-c", "/dev/null", "-o", "value", "-s", "UUID", fs.Device).Output()
	if err != nil {
		return nil, fmt.Errorf("asking blkid for the UUID of %s, which has %q: %w; it takes root and a disk that can be read", fs.Device, dir, err)
	}
	if fs.UUID = string(bytes.TrimSpace(out)); fs.UUID == "" {
		return nil, fmt.Errorf("the file system of %q on %s has no UUID that blkid can read; it takes root and a disk that can be read", dir, fs.Device)
	}
	return fs, nil
}

// mountOf finds the mount that has a directory, without asking for its UUID, and the path
// of the directory in its file system: "/" at the root.
func mountOf(dir string) (fs *FileSystem, inside string, err error) {
	abs, err := filepath.Abs(dir)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return nil, "", err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	err = mount.ParseMountinfo(f, func(e mount.Entry) error {
		below := abs == e.Target || e.Target == "/" || strings.HasPrefix(abs, e.Target+"/")
		// Of several mounts the longest target counts, and the last one at it.
		if below && (fs == nil || len(e.Target) >= len(fs.Target)) {
			fs = &FileSystem{Target: e.Target, Device: e.Source, Type: e.Type, Subvolume: e.Root}
		}
		return nil
	})
	if err != nil {
		return nil, "", fmt.Errorf("reading the mounts: %w", err)
	}
	if fs == nil {
		return nil, "", errors.New("no mount has it")
	}
	return fs, filepath.Join("/", fs.Subvolume, strings.TrimPrefix(abs, fs.Target)), nil
}

// RootArgs are the kernel arguments that lead to a physical root.
func (fs *FileSystem) RootArgs() Args {
	args := Args{"root=UUID=" + fs.UUID, "rootfstype=" + fs.Type, "rw"}
	if fs.Type == "btrfs" && fs.Subvolume != "/" {
		args = append(args, "rootflags=subvol="+fs.Subvolume)
	}
	return args
}

// Fstab is the line of fstab(5) that mounts the file system at a place.
func (fs *FileSystem) Fstab(at string) string {
	options := "defaults"
	switch {
	case fs.Type == "vfat":
		options = "umask=0077"
	case fs.Type == "btrfs" && fs.Subvolume != "/":
		options = "subvol=" + fs.Subvolume
	}
	return fmt.Sprintf("UUID=%s %s %s %s 0 2\n", fs.UUID, at, fs.Type, options)
}

// CanVerity returns nil where files can have fs-verity, once a kernel has it, or an error
// that says what to do.
func (fs *FileSystem) CanVerity() error {
	var reason string
	switch fs.Type {
	case "btrfs":
		return nil
	case "ext4":
		ok, err := ext4Verity(fs.Device)
		if ok || err != nil {
			return err
		}
		reason = fmt.Sprintf("the ext4 on %s lacks the feature verity: tune2fs -O verity %s turns it on", fs.Device, fs.Device)
	default:
		reason = fs.Type + " has no fs-verity: ext4 and btrfs have"
	}
	return fmt.Errorf("%w: %s; --allow-missing-verity installs without", ErrNoVerity, reason)
}

// ext4Verity reads whether a file system has the feature EXT4_FEATURE_RO_COMPAT_VERITY
// (Linux Documentation/filesystems/ext4/super.rst: the superblock begins at byte 1024,
// s_feature_ro_compat is at 0x64).
func ext4Verity(device string) (bool, error) {
	f, err := os.Open(device)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var super [0x68]byte
	if _, err := f.ReadAt(super[:], 1024); err != nil {
		return false, fmt.Errorf("reading the superblock of %s: %w", device, err)
	}
	const verity = 0x8000
	return binary.LittleEndian.Uint32(super[0x64:])&verity != 0, nil
}
