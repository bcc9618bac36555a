package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// loopMark is the name that loop devices of this package have for what they are over.
const loopMark = "particle-disk"

// A loop is a loop device over a part of a disk.
type loop struct {
	// dev keeps the device. It is open for reading only: kernels that forbid writing to
	// mounted devices (CONFIG_BLK_DEV_WRITE_MOUNTED) mount none that is open for writing.
	dev  *os.File
	path string
	info unix.LoopInfo64
}

// attachLoop puts a free loop device over size bytes of a disk. Direct I/O saves a copy of
// everything in memory; where the disk's file system cannot do it, the kernel goes without.
// The kernel frees the device when it is neither open nor mounted.
func attachLoop(disk *os.File, offset, size int64, sector int) (*loop, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("finding a loop device: %w (try modprobe loop; a container has to see the host's /dev)", err)
	}
	defer ctl.Close()
	// Others may take a device that is free between the two calls.
	for range 64 {
		nr, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("finding a free loop device: %w", err)
		}
		dev, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", nr), os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("opening a loop device: %w (a container has to see the host's /dev)", err)
		}
		cfg := unix.LoopConfig{Fd: uint32(disk.Fd()), Size: uint32(sector)}
		cfg.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
		cfg.Info.Offset, cfg.Info.Sizelimit = uint64(offset), uint64(size)
		copy(cfg.Info.File_name[:], loopMark) // losetup(8) takes the file's name from sysfs
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == nil {
			return newLoop(dev)
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("configuring %s: %w", dev.Name(), err)
		}
	}
	return nil, errors.New("finding a free loop device: others took each one first")
}

// newLoop keeps a device that was just configured, which is open for writing.
func newLoop(dev *os.File) (*loop, error) {
	defer dev.Close()
	info, err := unix.IoctlLoopGetStatus64(int(dev.Fd()))
	if err != nil {
		return nil, fmt.Errorf("asking for the state of %s: %w", dev.Name(), err)
	}
	ro, err := os.Open(dev.Name())
	if err != nil {
		return nil, fmt.Errorf("keeping %s: %w", dev.Name(), err)
	}
	return &loop{dev: ro, path: dev.Name(), info: *info}, nil
}

// close flushes and frees the device. It waits a moment for the kernel to let go of the
// disk.
func (l *loop) close() error {
	err := l.dev.Sync()
	if cerr := unix.IoctlSetInt(int(l.dev.Fd()), unix.LOOP_CLR_FD, 0); cerr != nil && !errors.Is(cerr, unix.ENXIO) {
		err = errors.Join(err, fmt.Errorf("freeing %s: %w", l.path, cerr))
	}
	err = errors.Join(err, l.dev.Close())
	if !settle(func() bool {
		info, ierr := loopInfo(l.path)
		return ierr != nil || info.Device != l.info.Device || info.Inode != l.info.Inode || info.Offset != l.info.Offset
	}) {
		err = errors.Join(err, fmt.Errorf("%w: %s does not become free; it may be mounted in another namespace, as in a container", ErrBusy, l.path))
	}
	return err
}

// loopInfo is the state of a loop device, with an error for one that is free.
func loopInfo(path string) (*unix.LoopInfo64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return unix.IoctlLoopGetStatus64(int(f.Fd()))
}

// loopsOver returns the loop devices that are attached to a file or block device, and
// whether some are of this package.
func loopsOver(disk *unix.Stat_t) (found []string, ours bool, err error) {
	dirs, err := filepath.Glob("/sys/block/loop*/loop") // attached ones only
	if err != nil {
		return nil, false, err
	}
	for _, dir := range dirs {
		path := filepath.Join("/dev", filepath.Base(filepath.Dir(dir)))
		info, err := loopInfo(path)
		if err != nil {
			continue // freed meanwhile, or not for this user to see
		}
		if disk.Mode&unix.S_IFMT == unix.S_IFBLK && info.Rdevice == disk.Rdev ||
			disk.Mode&unix.S_IFMT == unix.S_IFREG && info.Device == disk.Dev && info.Inode == disk.Ino {
			found = append(found, path)
			ours = ours || unix.ByteSliceToString(info.File_name[:]) == loopMark
		}
	}
	return found, ours, nil
}
