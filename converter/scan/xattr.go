package scan

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/tree"
)

// xattrReader reads the xattrs of one file. Both functions return the length that
// is needed if the buffer is empty.
type xattrReader struct {
	list func(buf []byte) (int, error)
	get  func(name string, buf []byte) (int, error)
}

// fdXattrs reads from a descriptor that is open for reading.
func fdXattrs(fd int) xattrReader {
	return xattrReader{
		func(buf []byte) (int, error) { return unix.Flistxattr(fd, buf) },
		func(name string, buf []byte) (int, error) { return unix.Fgetxattr(fd, name, buf) },
	}
}

// pathXattrs reads of a name in a directory, without opening it: opening a device
// can do something, and a symbolic link cannot be opened for reading. It needs
// /proc.
func pathXattrs(dirfd int, name string) xattrReader {
	path := "/proc/self/fd/" + strconv.Itoa(dirfd) + "/" + name
	return xattrReader{
		func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) },
		func(name string, buf []byte) (int, error) { return unix.Lgetxattr(path, name, buf) },
	}
}

// xattrs reads the xattrs that the options ask for into n.
func (s *scanner) xattrs(n *tree.Node, r xattrReader) error {
	if s.opts.SkipXattrs && !s.opts.OverlayUpper {
		return nil
	}
	list, err := grow(r.list)
	if err == unix.ENOTSUP || len(list) == 0 && err == nil {
		return nil // a filesystem without xattrs, or none here
	}
	if err != nil {
		return fmt.Errorf("listing xattrs: %w", err)
	}
	for key := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		as := key
		if s.opts.OverlayUpper {
			if as, err = overlayKey(key, s.opts.TrustedXattrs); err != nil {
				return err
			}
		}
		// Without its mark an opaque directory would show what it hides.
		mark := s.opts.OverlayUpper && as == tree.OpaqueAttr
		if as == "" || !mark && (s.opts.SkipXattrs || s.opts.UserXattrs && !strings.HasPrefix(key, "user.")) {
			continue
		}
		value, err := grow(func(buf []byte) (int, error) { return r.get(key, buf) })
		if err == unix.ENODATA {
			return fmt.Errorf("reading xattr %q: %w: it was removed", key, ErrChanged)
		}
		if err != nil {
			return fmt.Errorf("reading xattr %q: %w", key, err)
		}
		if n.Xattrs == nil {
			n.Xattrs = map[string]string{}
		}
		n.Xattrs[as] = string(value)
	}
	return tree.CheckXattrs(n.Xattrs)
}

// overlayKey returns the name in a layer's tree of an xattr of an upperdir, "" for
// one that overlayfs keeps for itself (Linux Documentation/filesystems/overlayfs.rst;
// OVL_XATTR_* in fs/overlayfs/overlayfs.h). Overlays of unprivileged users have
// user.overlay.* (mount option userxattr); trusted says that this is none of those.
func overlayKey(key string, trusted bool) (string, error) {
	rest, ok := strings.CutPrefix(key, "trusted.overlay.")
	if !ok && trusted {
		return key, nil
	}
	if !ok {
		if rest, ok = strings.CutPrefix(key, "user.overlay."); !ok {
			return key, nil
		}
	}
	switch rest {
	case "opaque":
		return tree.OpaqueAttr, nil
	case "redirect", "metacopy":
		return "", fmt.Errorf("xattr %q: %w: mount the overlay with redirect_dir=off,metacopy=off, or scan the mounted overlay", key, ErrNotLayer)
	case "origin", "impure", "nlink", "upper", "uuid", "protattr":
		return "", nil
	}
	return key, nil
}

// grow calls f with a buffer that is large enough. It starts with a guess that
// fits nearly always and saves a call.
func grow(f func([]byte) (int, error)) ([]byte, error) {
	var small [256]byte
	buf := small[:]
	for {
		n, err := f(buf)
		switch {
		case err == nil:
			return append([]byte(nil), buf[:n]...), nil
		case err != unix.ERANGE:
			return nil, err
		}
		if n, err = f(nil); err != nil {
			return nil, err
		}
		buf = make([]byte, n+1) // never empty, which would ask for the length
	}
}
