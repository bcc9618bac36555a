package mount

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// openLoop attaches a file, read-only, to a free loop device. The device is set
// free by the kernel once it is neither open nor mounted.
func openLoop(image *os.File) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%w (try modprobe loop)", err)
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
			return nil, err
		}
		cfg := unix.LoopConfig{Fd: uint32(image.Fd())}
		cfg.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR
		copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], image.Name()) // for losetup(8)
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("configuring %s: %w", dev.Name(), err)
		}
	}
	return nil, errors.New("finding a free loop device: others took each one first")
}

// OpenLoop attaches a file, read-only, to a free loop device, for mounts of other
// file systems than EROFS. The kernel sets the device free once it is neither open nor
// mounted.
func OpenLoop(image *os.File) (*os.File, error) { return openLoop(image) }
