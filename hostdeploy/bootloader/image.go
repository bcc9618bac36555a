package bootloader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// An image is the mounted image that a loader's files are taken from. A link in it that
// leads out of it is not followed.
type image struct{ *os.Root }

func openImage(dir string) (image, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return image{}, fmt.Errorf("opening the image: %w", err)
	}
	return image{root}, nil
}

// first reads the first of some files that is there; nil for none.
func (i image) first(names ...string) ([]byte, error) {
	for _, name := range names {
		data, err := i.ReadFile(name)
		if err == nil {
			return data, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("reading /%s of the image: %w", name, err)
		}
	}
	return nil, nil
}

// put writes a file of the boot file system.
func (t Target) put(name string, data []byte) error {
	return updateFile(filepath.Join(t.Boot, name), data)
}

// checkESP tells whether firmware would find what is put there. The error is ErrTarget.
func (t Target) checkESP() error {
	if t.Mounted && !isFAT(t.Boot) {
		return fmt.Errorf("%w: firmware reads its programs from the EFI system partition, which is FAT, and %q is not; mount the partition there", ErrTarget, t.Boot)
	}
	return nil
}

// haveProgram returns where an image has a program. The error is ErrMissing.
func haveProgram(root, name, pkg string) (string, error) {
	for _, dir := range []string{"usr/sbin", "usr/bin", "sbin", "bin"} {
		if _, err := os.Lstat(filepath.Join(root, dir, name)); err == nil {
			return path.Join("/", dir, name), nil
		}
	}
	return "", fmt.Errorf("%w: the image has no program %q (Debian package %s)", ErrMissing, name, pkg)
}

// A bind shows a directory of this system inside the image.
type bind struct{ from, to string }

// run executes a program of the image, in the image, and returns what it prints. It needs
// root. The binds are mounted in a mount namespace of the program's own, so nothing of
// them is left whatever happens.
func run(ctx context.Context, root string, binds []bind, args ...string) (out []byte, err error) {
	if len(binds) == 0 {
		return runHere(ctx, root, args)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The thread shares no working directory with the others from here on: it is never
		// given back, so it ends with this function.
		runtime.LockOSThread()
		err = inNamespace(func() error {
			for _, b := range binds {
				if err := unix.Mount(b.from, filepath.Join(root, b.to), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
					return fmt.Errorf("showing %q in the image as %q: %w", b.from, b.to, err)
				}
			}
			out, err = runHere(ctx, root, args)
			return err
		})
	}()
	<-done
	return out, err
}

// inNamespace calls f in a mount namespace of its own, on a locked thread, and goes back.
// Going back ends the namespace now rather than when the thread does: until then it would
// keep each file system mounted that is in it, and unmounting one would come to nothing.
func inNamespace(f func() error) error {
	home, err := os.Open(fmt.Sprintf("/proc/self/task/%d/ns/mnt", unix.Gettid()))
	if err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	defer home.Close()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	if err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err == nil {
		err = f()
	}
	if serr := unix.Setns(int(home.Fd()), unix.CLONE_NEWNS); err == nil && serr != nil {
		err = fmt.Errorf("leaving a mount namespace: %w", serr)
	}
	return err
}

func runHere(ctx context.Context, root string, args []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	// A file, since grub-mkimage fails where it cannot fsync(2) what it wrote.
	fd, err := unix.MemfdCreate("output", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("making a file for what %q prints: %w", args[0], err)
	}
	out := os.NewFile(uintptr(fd), "output")
	defer out.Close()
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("running %q in the image: %w: %.500s", args, err, bytes.TrimSpace(errs.Bytes()))
	}
	if _, err := out.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	return io.ReadAll(out)
}

// disk opens the disk for its boot sectors: the device where there is one, since a file's
// cache and its loop device's are two things.
func (t Target) disk() (*os.File, error) {
	name := t.Device
	if name == "" {
		name = t.Disk
	}
	if name == "" {
		return nil, fmt.Errorf("%w: a BIOS loader needs the whole disk, and only a file system was given", ErrTarget)
	}
	return os.OpenFile(name, os.O_RDWR, 0)
}

// bootCode is the part of the first sector before the disk's signature and the partition
// table.
const bootCode = 440

// readBootSector reads the first sector of a disk. The error is ErrTarget where there is
// no partition table: the first sector of a partition ends in the same two bytes, and its
// file system would be lost. A table has four entries of 16 bytes: the first byte is 0 or
// 0x80, the fifth is the type (UEFI specification 2.10, table 5.1).
func readBootSector(f *os.File) ([]byte, error) {
	sector := make([]byte, sectorSize)
	if _, err := f.ReadAt(sector, 0); err != nil {
		return nil, fmt.Errorf("reading the first sector: %w", err)
	}
	if sector[510] != 0x55 || sector[511] != 0xaa {
		return nil, fmt.Errorf("%w: the first sector ends in %x, want 55aa: there is no partition table", ErrTarget, sector[510:])
	}
	used := false
	for at := 446; at < 510; at += 16 {
		if sector[at] != 0 && sector[at] != 0x80 {
			return nil, fmt.Errorf("%w: the first sector has no partition table; is %q a partition? the whole disk is wanted", ErrTarget, f.Name())
		}
		used = used || sector[at+4] != 0
	}
	if !used {
		return nil, fmt.Errorf("%w: the partition table in the first sector is empty; is %q a partition? the whole disk is wanted", ErrTarget, f.Name())
	}
	return sector, nil
}

// writeBootCode writes the code of the master boot record, in one sector.
func writeBootCode(f *os.File, code []byte) error {
	if len(code) > bootCode {
		return fmt.Errorf("%w: the boot code has %d bytes, and the first sector has room for %d", ErrMissing, len(code), bootCode)
	}
	sector, err := readBootSector(f)
	if err != nil {
		return err
	}
	clear(sector[:bootCode])
	copy(sector, code)
	if _, err := f.WriteAt(sector, 0); err != nil {
		return fmt.Errorf("writing the boot code: %w", err)
	}
	return f.Sync()
}
