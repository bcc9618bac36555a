package disk

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Free says how many bytes of the file system of a directory are free for everybody, and
// how many it has.
func Free(dir string) (free, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("asking for the free space of %q: %w", dir, err)
	}
	unit := int64(st.Frsize)
	if unit == 0 { // kernels may leave it to be the block's
		unit = int64(st.Bsize)
	}
	return int64(st.Bavail) * unit, int64(st.Blocks) * unit, nil
}
