package disk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A target is the block device or image file that is worked on.
type target struct {
	path   string
	device bool
	have   int64 // bytes; the length of a file before, 0 for one that is missing
	size   int64 // bytes; what it will be
	sector int

	f       *os.File // for reading and writing; of a device, exclusively
	lock    *os.File // has the flock: a loop device holds on to f after this process
	key     string   // names it among all disks, for what is left of a killed run
	created bool
	keep    bool // the file was finished
}

// resolve follows symbolic links as far as there is something. The path it returns is
// absolute, so it cannot be taken for an option of a program.
func resolve(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if real, err := filepath.EvalSymlinks(abs); err == nil {
		return real, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return abs, nil
}

// openTarget finds out how large the disk is, or will be, and changes nothing.
func openTarget(path string, o Options) (*target, error) {
	path, err := resolve(path)
	if err != nil {
		return nil, err
	}
	t := &target{path: path, sector: o.Sector, size: o.Size}
	fi, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if dir := filepath.Dir(path); dir == "/dev" || strings.HasPrefix(dir, "/dev/") {
			return nil, err // a file there would be none of a disk
		}
		if o.Size == 0 {
			return nil, fmt.Errorf("%w: there is no such file, and no size to make one", ErrOptions)
		}
	case err != nil:
		return nil, err
	case fi.Mode().IsRegular():
		t.have = fi.Size()
		if t.size, err = fileSize(t.have, o); err != nil {
			return nil, err
		}
	case fi.Mode()&fs.ModeDevice != 0 && fi.Mode()&fs.ModeCharDevice == 0:
		t.device = true
		if t.size, t.sector, err = deviceSize(path); err != nil {
			return nil, err
		}
		if o.Size != 0 && o.Size != t.size {
			return nil, fmt.Errorf("%w: the device has %d bytes, not the %d asked for", ErrOptions, t.size, o.Size)
		}
	default:
		return nil, fmt.Errorf("%w: it is neither a block device nor a file", ErrOptions)
	}
	return t, nil
}

// fileSize is the length that an image file of have bytes gets.
func fileSize(have int64, o Options) (int64, error) {
	switch {
	case have == 0 && o.Size == 0:
		return 0, fmt.Errorf("%w: the file is empty, and no size is given", ErrOptions)
	case have == 0 || o.Wipe && o.Size != 0:
		return o.Size, nil
	case o.Size != 0 && o.Size != have:
		return 0, fmt.Errorf("%w: the file has %d bytes, not the %d asked for; only one that is wiped is resized", ErrOptions, have, o.Size)
	case have%int64(o.Sector) != 0:
		return 0, fmt.Errorf("%w: the file has %d bytes, want a multiple of %d", ErrOptions, have, o.Sector)
	}
	return have, nil
}

// deviceSize asks a block device for its length and that of its sectors, in bytes.
func deviceSize(path string) (size int64, sector int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	if sector, err = unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET); err != nil {
		return 0, 0, fmt.Errorf("asking for the sectors' length: %w", err)
	}
	if size, err = f.Seek(0, 2); err != nil {
		return 0, 0, err
	}
	if sector != 512 && sector != 4096 {
		return 0, 0, fmt.Errorf("%w: got sectors of %d bytes, want 512 or 4096", ErrOptions, sector)
	}
	return size, sector, nil
}

// claim locks the disk, takes away what a killed run has left mounted and makes sure that
// nobody else uses it.
func (t *target) claim(ctx context.Context) (err error) {
	if !t.device {
		if err := t.openFile(); err != nil {
			return err
		}
	}
	if t.lock, err = os.Open(t.path); err != nil {
		return err
	}
	// udev holds a shared lock while it probes (https://systemd.io/BLOCK_DEVICE_LOCKING), and
	// a program that a killed run was just starting has the run's lock until it runs.
	if !settle(func() bool {
		err = unix.Flock(int(t.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		return !errors.Is(err, unix.EWOULDBLOCK) || ctx.Err() != nil
	}) {
		t.created = false // by us, but it is another's now
		return fmt.Errorf("%w: another program, perhaps an installation, has it locked", ErrBusy)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("locking: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(t.lock.Fd()), &st); err != nil {
		return err
	}
	t.key = keyOf(&st)
	if !t.device {
		if err := t.fill(); err != nil {
			return err
		}
	}
	if err := sweep(t.key); err != nil {
		return err
	}
	// The kernel frees its loop devices, too, once the programs are gone that it ran.
	settle(func() bool {
		_, left, err := loopsOver(&st)
		return !left || err != nil || ctx.Err() != nil
	})
	used, err := uses(&st)
	if err != nil {
		return err
	}
	if len(used) > 0 {
		return fmt.Errorf("%w: %s", ErrBusy, strings.Join(used, ", "))
	}
	if t.device {
		// The kernel knows of users in other namespaces, too, and keeps new ones away.
		t.f, err = os.OpenFile(t.path, os.O_RDWR|unix.O_EXCL, 0)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: the kernel says so; it may be mounted in a container, or part of an array", ErrBusy)
		} else if err != nil {
			return err
		}
	}
	// Better to learn now than when all is erased that loop devices do not work here.
	l, err := attachLoop(t.f, 0, t.size, t.sector)
	if err != nil {
		return err
	}
	return l.close()
}

// openFile opens the image file, or makes it.
func (t *target) openFile() (err error) {
	// It will hold the machine's secrets.
	t.f, err = os.OpenFile(t.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		t.f, err = os.OpenFile(t.path, os.O_RDWR, 0)
	} else {
		t.created = err == nil
	}
	if err != nil {
		return err
	}
	return nil
}

// fill gives an empty image file its length. With the lock held, it makes sure that the
// file is still what it was.
func (t *target) fill() error {
	fi, err := t.f.Stat()
	if err != nil {
		return err
	}
	locked, err := t.lock.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(fi, locked) || fi.Size() != t.have {
		return fmt.Errorf("%w: it changed just now", ErrBusy)
	}
	if t.have > 0 {
		return nil
	}
	if err := t.f.Truncate(t.size); err != nil {
		return fmt.Errorf("giving it %s: %w", mibs(t.size), err)
	}
	return nil
}

// clear makes sure that the disk is empty.
func (t *target) clear(ctx context.Context, wipe bool) error {
	c, err := inspect(ctx, t.f, t.path)
	if err != nil {
		return err
	}
	if !c.Empty() && !wipe {
		return fmt.Errorf("%w: %s", ErrNotEmpty, c)
	}
	if !t.device {
		if wipe {
			if err = t.f.Truncate(0); err == nil {
				err = t.f.Truncate(t.size)
			}
			if err != nil {
				return fmt.Errorf("erasing: %w", err)
			}
		}
		return nil
	}
	if !c.Empty() {
		return wipefs(ctx, t.path)
	}
	return nil
}

// wipefs erases all signatures at which a device is recognised, wherever they are.
func wipefs(ctx context.Context, path string) error {
	_, err := run(ctx, "wipefs", "--all", "--force", "--quiet", path)
	return err
}

// sync makes the disk durable and tells the kernel of its partitions.
func (t *target) sync() error {
	if err := t.f.Sync(); err != nil {
		return fmt.Errorf("making it durable: %w", err)
	}
	if !t.device {
		return syncDir(t.path)
	}
	var err error
	settle(func() bool {
		_, err = unix.IoctlRetInt(int(t.f.Fd()), unix.BLKRRPART)
		return !errors.Is(err, unix.EBUSY)
	})
	// A device that cannot have partitions answers EINVAL (a loop device, say).
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("having the kernel read the partition table: %w", err)
	}
	return nil
}

func (t *target) close() (err error) {
	if t == nil {
		return nil
	}
	if t.created && !t.keep {
		err = os.Remove(t.path)
		t.created = false
	}
	if t.f != nil {
		err = errors.Join(err, t.f.Close())
	}
	if t.lock != nil {
		err = errors.Join(err, t.lock.Close())
	}
	t.f, t.lock = nil, nil
	return err
}
