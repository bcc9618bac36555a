package hostdeploy

import (
	"bytes"
	"context"
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
	abs, err := filepath.Abs(dir)
	if err == nil {
		abs, err = filepath.EvalSymlinks(abs)
	}
	if err != nil {
		return nil, fmt.Errorf("looking for the file system of %q: %w", dir, err)
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var fs *FileSystem
	err = mount.ParseMountinfo(f, func(e mount.Entry) error {
		below := abs == e.Target || e.Target == "/" || strings.HasPrefix(abs, e.Target+"/")
		// Of several mounts the longest target counts, and the last one at it.
		if below && (fs == nil || len(e.Target) >= len(fs.Target)) {
			fs = &FileSystem{Target: e.Target, Device: e.Source, Type: e.Type, Subvolume: e.Root}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the mounts: %w", err)
	}
	if fs == nil || !strings.HasPrefix(fs.Device, "/dev/") {
		return nil, fmt.Errorf("%q is not on a file system of a disk: got %+v", dir, fs)
	}
	out, err := exec.CommandContext(ctx, "blkid", "-c", "/dev/null", "-o", "value", "-s", "UUID", fs.Device).Output()
	if fs.UUID = string(bytes.TrimSpace(out)); err != nil || fs.UUID == "" {
		return nil, fmt.Errorf("asking blkid for the UUID of %s, which has %q: got %q (%v)", fs.Device, dir, fs.UUID, err)
	}
	return fs, nil
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
	if fs.Type == "vfat" {
		options = "umask=0077"
	}
	return fmt.Sprintf("UUID=%s %s %s %s 0 2\n", fs.UUID, at, fs.Type, options)
}
