package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A mounter makes one mount. It is tried again with other settings where a kernel
// refuses the first ones.
type mounter struct {
	opts   Options
	image  *os.File
	header header
	verity bool // verity=require

	onLoop   bool
	warnings []string
}

// mount returns the detached overlay mount.
func (m *mounter) mount() (*os.File, error) {
	m.warnings = nil
	var fileErr error
	if !m.opts.Loop {
		m.onLoop = false
		root, err := m.stack(fdPath(m.image))
		if err == nil {
			return root, nil
		}
		// ENOTBLK: this kernel, or the filesystem that the image is on, has no
		// file-backed EROFS. EINVAL: Linux 6.12.63 to 6.18.4 count such a mount as one
		// stacked filesystem more and may exceed the limit of two.
		if !errors.Is(err, unix.ENOTBLK) && !errors.Is(err, unix.EINVAL) {
			return nil, err
		}
		fileErr = err
	}
	m.onLoop = true
	dev, err := openLoop(m.image)
	if err != nil {
		if fileErr != nil {
			return nil, fmt.Errorf("%w; and with a loop device: %w", fileErr, err)
		}
		return nil, err
	}
	defer dev.Close()
	return m.stack(dev.Name())
}

// stack mounts the EROFS image from source and the overlay on it.
func (m *mounter) stack(source string) (*os.File, error) {
	meta, err := mountErofs(source, m.header.hasACL)
	if err != nil {
		return nil, err
	}
	defer meta.Close()
	if ns := m.opts.UserNS; ns != nil {
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
		if err := unix.MountSetattr(int(meta.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return nil, fmt.Errorf("mapping ids as in %q: %w", ns.Name(), err)
		}
	}
	root, err := m.overlay(meta, byFd)
	if err == nil || !retry(err) {
		return root, err
	}
	// Before Linux 6.15 a layer must be attached somewhere.
	err = inPrivate(func() error {
		var err error
		root, err = m.overlay(meta, byString, byColons, byColon)
		return err
	})
	return root, err
}

// retry reports whether an error may mean that the kernel does not know an option:
// Linux 6.18 says EINVAL, 6.12 EBADF of a descriptor, 6.1 EOPNOTSUPP.
func retry(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EBADF) || errors.Is(err, unix.EOPNOTSUPP)
}

// A layering is a way to tell overlayfs its layers.
type layering int

const (
	byFd     layering = iota // lowerdir+ and datadir+ as descriptors, Linux 6.13; detached ones, 6.15
	byString                 // the same as paths, 6.7
	byColons                 // lowerdir=META::OBJECTS, 6.5
	byColon                  // lowerdir=META:OBJECTS; whiteouts in the image hide the objects
)

// layers are the directories of an overlay above the image.
type layers struct {
	objects     []*os.File
	upper, work *os.File // nil for none
}

// open opens the layers. Layers must be opened in the mount namespace in which they
// are used.
func (o *Options) open() (l layers, err error) {
	open := func(what, dir string) *os.File {
		if err != nil {
			return nil
		}
		var f *os.File
		if f, err = os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
			err = fmt.Errorf("opening %s directory: %w", what, err)
			return nil
		}
		return f
	}
	for _, dir := range o.Objects {
		l.objects = append(l.objects, open("object", dir))
	}
	if o.Upper != "" {
		l.upper, l.work = open("upper", o.Upper), open("work", o.Work)
	}
	if err != nil {
		l.close()
	}
	return l, err
}

func (l *layers) close() {
	for _, f := range append(l.objects, l.upper, l.work) {
		f.Close() // of nil it does nothing
	}
}

// overlay mounts the overlay on a mounted image, detached, in the first of several
// ways that the kernel accepts. But for byFd it must run in a private mount
// namespace.
func (m *mounter) overlay(meta *os.File, ways ...layering) (*os.File, error) {
	l, err := m.opts.open()
	if err != nil {
		return nil, err
	}
	defer l.close()
	if ways[0] != byFd {
		if err := attachPrivate(meta); err != nil {
			return nil, err
		}
		defer unix.Unmount(fdPath(meta), unix.MNT_DETACH)
	}
	for _, how := range ways {
		var root *os.File
		if root, err = m.overlayBy(how, meta, &l); err == nil {
			if how == byColon {
				m.warnings = append(m.warnings, "this kernel has no data-only layers (Linux 6.5): "+
					"what else lies in an object directory than objects shows in the root of the mount")
			}
			return root, nil
		}
		if !retry(err) {
			break
		}
	}
	return nil, err
}

func (m *mounter) overlayBy(how layering, meta *os.File, l *layers) (*os.File, error) {
	fs, err := openFilesystem("overlay")
	if err != nil {
		return nil, err
	}
	defer fs.close()
	source := "composefs"
	if m.opts.Name != "" {
		source += ":" + m.opts.Name
		source = source[:min(len(source), maxString)]
	}
	set := [][2]string{{"source", source}, {"metacopy", "on"}, {"redirect_dir", "on"}}
	if m.verity {
		set = append(set, [2]string{"verity", "require"})
	}
	for _, kv := range set {
		if err := fs.setString(kv[0], kv[1]); err != nil {
			return nil, err
		}
	}
	if err := setLayers(fs, meta, l.objects, how); err != nil {
		return nil, err
	}
	if l.upper != nil {
		if err := setLayer(fs, "upperdir", l.upper, how); err != nil {
			return nil, err
		}
		if err := setLayer(fs, "workdir", l.work, how); err != nil {
			return nil, err
		}
	}
	attrs := 0
	if m.opts.ReadOnly || l.upper == nil {
		attrs = unix.MOUNT_ATTR_RDONLY
	}
	return fs.mount(attrs)
}

func setLayer(fs *filesystem, key string, dir *os.File, how layering) error {
	if how == byFd {
		return fs.setFd(key, dir)
	}
	return fs.setString(key, layerPath(dir, how))
}

func setLayers(fs *filesystem, meta *os.File, objects []*os.File, how layering) error {
	if how == byFd || how == byString {
		if err := setLayer(fs, "lowerdir+", meta, how); err != nil {
			return err
		}
		for _, dir := range objects {
			if err := setLayer(fs, "datadir+", dir, how); err != nil {
				return err
			}
		}
		return nil
	}
	colon := "::"
	if how == byColon {
		colon = ":"
	}
	telling, short := fdPath(meta), fdPath(meta)
	for _, dir := range objects {
		telling += colon + layerPath(dir, how)
		short += colon + fdPath(dir)
	}
	if len(telling) <= maxString {
		return fs.setString("lowerdir", telling)
	}
	return fs.setString("lowerdir", short)
}

// layerPath returns the path to give to overlayfs for an open directory. The real
// path is what mountinfo then shows; where it is too long, needs escapes, or means
// something else by now, the descriptor's name does.
func layerPath(f *os.File, how layering) string {
	path, err := filepath.Abs(f.Name())
	if err != nil || len(path) > maxString || strings.ContainsAny(path, ",:\\") && how != byString {
		return fdPath(f)
	}
	var a, b unix.Stat_t
	if unix.Stat(path, &a) != nil || unix.Fstat(int(f.Fd()), &b) != nil || a.Dev != b.Dev || a.Ino != b.Ino {
		return fdPath(f)
	}
	return path
}
