package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// packages are Debian's, of the programs that are run.
var packages = map[string]string{
	"blkid": "util-linux", "partx": "util-linux", "wipefs": "util-linux",
	"mkfs.ext4": "e2fsprogs", "mkfs.btrfs": "btrfs-progs", "mkfs.xfs": "xfsprogs",
	"mkfs.vfat": "dosfstools", "fsck.vfat": "dosfstools", "mcopy": "mtools",
}

// supported tells whether this machine has the programs and the kernel the file systems.
func (o Options) supported() error {
	programs := []string{"blkid", "partx", "wipefs", "mkfs." + string(o.FS)}
	kernel := []FS{o.FS}
	if o.Layout.ESP {
		programs = append(programs, "mkfs.vfat", "fsck.vfat", "mcopy")
	} else {
		programs = append(programs, "mkfs.ext4")
		kernel = append(kernel, Ext4)
	}
	var missing, install []string
	for _, p := range programs {
		if _, err := lookPath(p); err != nil {
			missing = append(missing, p)
			if !slices.Contains(install, packages[p]) {
				install = append(install, packages[p])
			}
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("preparing a disk: %s: %w (apt install %s)", strings.Join(missing, ", "), ErrMissing, strings.Join(install, " "))
	}
	for _, k := range kernel {
		fd, err := unix.Fsopen(string(k), unix.FSOPEN_CLOEXEC) // has the module loaded
		if errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("preparing a disk: the kernel's %s: %w (try modprobe %s)", k, ErrMissing, k)
		}
		if err != nil {
			return fmt.Errorf("preparing a disk: may this process mount? opening file system %s: %w", k, err)
		}
		unix.Close(fd)
	}
	return nil
}

// lookPath finds a program, also in the directories that only root has in PATH.
func lookPath(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if p, serr := exec.LookPath(filepath.Join(dir, name)); serr == nil {
			return p, nil
		}
	}
	return "", err
}

// run runs a program to its end and returns its standard output. It is killed when the
// context ends, and when this process does, so that a killed run leaves nobody who
// writes to the disk.
func run(ctx context.Context, name string, args ...string) ([]byte, error) {
	path, err := lookPath(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w (apt install %s)", name, ErrMissing, packages[name])
	}
	cmd := exec.CommandContext(ctx, path, args...)
	var out, msg bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &msg
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "TZ=UTC0", "MTOOLSRC=/dev/null", "MTOOLS_SKIP_CHECK=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 5 * time.Second
	// The signal comes when the thread ends that started the program.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("running %s: %w", name, ctx.Err())
		}
		if text := strings.TrimSpace(msg.String()); text != "" {
			return nil, fmt.Errorf("running %s: %w: %s", name, err, strings.ReplaceAll(text, "\n", "; "))
		}
		return nil, fmt.Errorf("running %s: %w", name, err)
	}
	return out.Bytes(), nil
}

// exitStatus is that of a program that run ran, -1 if it did not end by itself or well.
func exitStatus(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

// format makes the file systems. What may have been in the place of a partition is erased
// first: no mkfs knows all the others' superblocks.
func (d *Disk) format(ctx context.Context) error {
	for _, p := range d.Partitions {
		l := d.parts[p.Role]
		if err := wipefs(ctx, l.path); err != nil {
			return fmt.Errorf("clearing partition %d: %w", p.Number, err)
		}
		var err error
		switch p.Role {
		case RoleBIOS:
			err = zero(l.path, p.Size)
		case RoleESP:
			err = d.formatESP(ctx, p)
		case RoleBoot:
			// Nobody but root writes there: no blocks reserved for it.
			args := append([]string{"-q", "-F", "-m", "0", "-L", p.Label, "-U", p.FSUUID}, d.o.Layout.Ext4Options...)
			_, err = run(ctx, "mkfs.ext4", append(args, l.path)...)
		case RoleRoot:
			err = formatRoot(ctx, p, l.path)
		}
		if err != nil {
			return fmt.Errorf("making the %s file system: %w", p.Role, err)
		}
	}
	return nil
}

// zero overwrites the first bytes of a device.
func zero(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, size), 0)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func formatRoot(ctx context.Context, p Partition, dev string) error {
	switch p.FS {
	case Ext4:
		// Before Linux 6.3, fs-verity needs blocks as long as pages; mke2fs takes shorter
		// ones for small file systems.
		_, err := run(ctx, "mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "verity", "-L", p.Label, "-U", p.FSUUID, dev)
		return err
	case Btrfs:
		_, err := run(ctx, "mkfs.btrfs", "-q", "-f", "-L", p.Label, "-U", p.FSUUID, dev)
		return err
	case XFS:
		_, err := run(ctx, "mkfs.xfs", "-q", "-f", "-L", p.Label, "-m", "uuid="+p.FSUUID, dev)
		return err
	}
	return fmt.Errorf("%w: root file system %q", ErrOptions, p.FS)
}
