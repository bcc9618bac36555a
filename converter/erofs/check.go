package erofs

import (
	"fmt"
	"math"
	"strings"

	"github.com/particle-os/particle/converter/tree"
)

// check returns an error if a node has no form as an inode.
func check(n *tree.Node) error {
	switch {
	case n.Mode > 0o177777:
		return fmt.Errorf("mode %o has more bits than st_mode", n.Mode)
	case n.MtimeNsec > 999_999_999:
		return fmt.Errorf("time has %d nanoseconds", n.MtimeNsec)
	}
	size := bodySize
	for name, value := range n.Xattrs {
		switch {
		case name == "":
			return fmt.Errorf("xattr without a name")
		case len(name) > tree.MaxXattr:
			return fmt.Errorf("xattr name %.40q… is too long: got %d bytes, want at most %d", name, len(name), tree.MaxXattr)
		case len(value) > tree.MaxValue:
			return fmt.Errorf("value of xattr %q is too long: got %d bytes, want at most %d", name, len(value), tree.MaxValue)
		}
		size += roundUp(entrySize+len(name)+len("overlay.")+len(value), 4)
	}
	// Room for what the format adds: at most five xattrs of directories or the two
	// of files, one of them with a path.
	const reserve = 5000
	if xattrCount(size)+reserve/4 > math.MaxUint16 {
		return fmt.Errorf("xattrs are too large: got %d bytes", size)
	}

	switch n.Type() {
	case tree.TypeDir, tree.TypeFIFO, tree.TypeSocket:
		return nil
	case tree.TypeChar, tree.TypeBlock:
		if n.Rdev > math.MaxUint32 {
			return fmt.Errorf("device %d:%d does not fit the 32 bits of EROFS", tree.Major(n.Rdev), tree.Minor(n.Rdev))
		}
		return nil
	case tree.TypeSymlink:
		switch {
		case n.Target == "":
			return fmt.Errorf("symbolic link without a target")
		case len(n.Target) > tree.MaxTarget:
			return fmt.Errorf("target is too long: got %d bytes, want at most %d", len(n.Target), tree.MaxTarget)
		case strings.IndexByte(n.Target, 0) >= 0:
			return fmt.Errorf("target %q contains NUL", n.Target)
		}
		return nil
	case tree.TypeRegular:
		return checkFile(n.File)
	}
	return fmt.Errorf("mode %o names no file type", n.Mode)
}

func checkFile(f *tree.File) error {
	switch {
	case f == nil:
		return fmt.Errorf("regular file without a File")
	case f.Size < 0 || f.Size > MaxSize:
		return fmt.Errorf("size %d is out of range: want at most %d", f.Size, int64(MaxSize))
	case len(f.Inline) > 0 && int64(len(f.Inline)) != f.Size:
		return fmt.Errorf("inline content has %d bytes, but size says %d", len(f.Inline), f.Size)
	case len(f.Inline) > MaxInline:
		return fmt.Errorf("inline content is too long: got %d bytes, want at most %d", len(f.Inline), MaxInline)
	case len(f.Payload) > tree.MaxTarget:
		return fmt.Errorf("payload is too long: got %d bytes, want at most %d", len(f.Payload), tree.MaxTarget)
	case f.Payload != tree.NoPayload && strings.IndexByte(f.Payload, 0) >= 0:
		return fmt.Errorf("payload %q contains NUL", f.Payload)
	}
	return nil
}
