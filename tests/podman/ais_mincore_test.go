package podman

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mincore tells for each page of a mapping whether it is in memory. (Package unix has
// the number only.)
func mincore(m []byte) ([]byte, error) {
	page := os.Getpagesize()
	vec := make([]byte, (len(m)+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&vec[0])))
	if errno != 0 {
		return nil, errno
	}
	return vec, nil
}
