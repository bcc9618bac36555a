package fsverity

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrUnsupported is returned by Enable and Measure where the kernel or the
// filesystem has no fs-verity, ErrNotEnabled by Measure for a file without it.
var (
	ErrUnsupported = errors.New("fs-verity is not supported here")
	ErrNotEnabled  = errors.New("fs-verity is not enabled on this file")
)

// Enable makes the file immutable and its reads checked by the kernel
// (FS_IOC_ENABLE_VERITY). f must be open for reading only and nobody may have it
// open for writing. A file that has fs-verity already is left as it is.
func Enable(f *os.File, alg Algorithm) error {
	arg := unix.FsverityEnableArg{
		Version:        1,
		Hash_algorithm: uint32(alg),
		Block_size:     BlockSize,
	}
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_ENABLE_VERITY, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(f)
	switch errno {
	case 0, unix.EEXIST:
		return nil
	case unix.EOPNOTSUPP, unix.ENOTTY, unix.EINVAL:
		// EINVAL: the filesystem's block size or the algorithm is not supported.
		return fmt.Errorf("enabling fs-verity on %q: %w (%v)", f.Name(), ErrUnsupported, errno)
	}
	return fmt.Errorf("enabling fs-verity on %q: %w", f.Name(), errno)
}

// Measure asks the kernel for the digest of a file that has fs-verity enabled
// (FS_IOC_MEASURE_VERITY). It takes constant time: nothing is read.
func Measure(f *os.File) (Digest, error) {
	var arg struct {
		alg, size uint16
		sum       [maxSize]byte
	}
	arg.size = maxSize
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.FS_IOC_MEASURE_VERITY, uintptr(unsafe.Pointer(&arg)))
	runtime.KeepAlive(f)
	switch errno {
	case 0:
		return New(Algorithm(arg.alg), arg.sum[:arg.size])
	case unix.ENODATA:
		return Digest{}, fmt.Errorf("measuring %q: %w", f.Name(), ErrNotEnabled)
	case unix.EOPNOTSUPP, unix.ENOTTY:
		return Digest{}, fmt.Errorf("measuring %q: %w", f.Name(), ErrUnsupported)
	}
	return Digest{}, fmt.Errorf("measuring %q: %w", f.Name(), errno)
}
