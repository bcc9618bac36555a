// Package mount mounts composefs images.
//
// A composefs image is an EROFS filesystem that holds all metadata, while the
// contents of its files lie in object directories. [Mount] stacks an overlay of the
// two: the EROFS mount is the lower layer, the object directories are data-only
// layers, which a file's trusted.overlay.redirect xattr points into
// (Linux Documentation/filesystems/overlayfs.rst, "Data-only lower layers"; what
// libcomposefs does is in its lcfs-mount.c). The EROFS mount itself is visible
// nowhere.
//
// What kernels can do differs: EROFS on a file (6.12) or a loop device, detached
// mounts as layers (6.15) or attached ones, lowerdir+ (6.7), "::" (6.5), verity=
// (6.6). Mount tries the newest way first and takes the next one that the kernel
// accepts; [Probe] tells in advance.
//
// Left out: kernels before 5.8, which have no LOOP_CONFIGURE; mounting in a user
// namespace, where the kernel refuses EROFS; and what is mounted on top by others
// (/etc, /var, containers).
package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
)

// Errors of this package, wrapped with what was being done.
var (
	// ErrNotImage says that a file is not a composefs image, or is cut short.
	ErrNotImage = errors.New("not a composefs image")
	// ErrNoVerity says that the kernel has no fs-verity digest of the image, and
	// one is required.
	ErrNoVerity = errors.New("image has no fs-verity")
	// ErrWrongDigest says that the image has another digest than it must have.
	ErrWrongDigest = errors.New("image has the wrong fs-verity digest")
	// ErrOptions says that options are missing or exclude each other.
	ErrOptions = errors.New("bad mount options")
	// ErrNotMounted says that nothing, or no composefs image, is mounted at a place.
	ErrNotMounted = errors.New("no composefs image is mounted here")
	// ErrUnsupported says that this kernel has no way to do it.
	ErrUnsupported = errors.New("not supported by this kernel")
)

// A Verity says whether the kernel must check each file's fs-verity digest when it
// is opened (overlayfs verity=require).
type Verity int

const (
	VerityOff     Verity = iota
	VerityTry            // where the kernel can and the objects (a sample of them) have fs-verity
	VerityRequire        // always; with Options.Digest the image itself must have fs-verity too
)

// Options says what to mount. Image or Path, and Objects must be set.
type Options struct {
	Path  string   // of the image
	Image *os.File // the image, open for reading; instead of Path

	// Objects are the directories that hold file contents, in the order in which
	// they are searched.
	Objects []string
	// Digest is what the image must have; the zero Digest accepts any.
	Digest fsverity.Digest
	Verity Verity
	// ObjectsChecked is the caller's word that each object's digest was compared
	// when it was stored. It is true of a store of Particle and makes the difference
	// between the states Checked and None.
	ObjectsChecked bool

	// Upper and Work are the directories of an overlay that takes writes. Either both
	// are set or neither is.
	Upper, Work string
	// ReadOnly forbids writing although there is an Upper. Without one nothing can
	// be written anyway.
	ReadOnly bool
	// UserNS is a user namespace (/proc/PID/ns/user) whose mapping of ids the image
	// is shown in.
	UserNS *os.File
	// Name becomes part of the mount's source, "composefs:Name"; see [List]. It is
	// cut where it is longer than the kernel takes.
	Name string
	// Loop forbids to mount the image file directly. It is for mounts that others
	// stack on, on kernels where [Features].FileStacks is not ok.
	Loop bool
}

// A Verification is an honest statement about who checks the contents of a mount.
type Verification string

const (
	// Enforced: the kernel checks the image and each file against their digests
	// whenever they are read.
	Enforced Verification = "enforced"
	// Checked: image and files had the right digests when they were compared, the
	// image just now, the files when they were stored.
	Checked Verification = "checked"
	// None: at least one of the two was never compared.
	None Verification = "none"
)

// State is what a mount has come to be.
type State struct {
	Verification Verification    `json:"verification"`
	Why          string          `json:"why"`                // of Verification
	Digest       fsverity.Digest `json:"digest"`             // of the image; zero if nobody asked for it
	Measured     bool            `json:"measured"`           // Digest is the kernel's and holds for each read
	Verity       bool            `json:"verity"`             // the overlay has verity=require
	Loop         bool            `json:"loop"`               // the image is on a loop device
	Warnings     []string        `json:"warnings,omitempty"` // for people
}

// Mount mounts an image on the directory target.
func Mount(target string, opts Options) (State, error) {
	f, st, err := Detached(opts)
	if err != nil {
		return State{}, err
	}
	defer f.Close()
	if err := Attach(f, target); err != nil {
		return State{}, err
	}
	return st, nil
}

// Detached mounts an image nowhere and returns the root of the mount. It is gone
// when the file is closed, unless [Attach] has given it a place.
func Detached(opts Options) (*os.File, State, error) {
	if err := opts.check(); err != nil {
		return nil, State{}, err
	}
	img := opts.Image
	if img == nil {
		f, err := os.Open(opts.Path)
		if err != nil {
			return nil, State{}, fmt.Errorf("opening image: %w", err)
		}
		defer f.Close()
		img = f
	}
	fail := func(err error) (*os.File, State, error) {
		return nil, State{}, fmt.Errorf("mounting image %q: %w", img.Name(), err)
	}
	hdr, err := readHeader(img)
	if err != nil {
		return fail(err)
	}
	var st State
	if err := opts.compare(img, &st); err != nil {
		return fail(err)
	}

	m := mounter{opts: opts, image: img, header: hdr}
	m.verity = opts.Verity == VerityRequire || opts.Verity == VerityTry && veritySupported(opts.Objects)
	root, err := m.mount()
	if err != nil && m.verity && opts.Verity == VerityTry && errors.Is(err, unix.EINVAL) {
		m.verity = false
		root, err = m.mount()
	}
	if err != nil {
		return fail(err)
	}
	st.Verity, st.Loop, st.Warnings = m.verity, m.onLoop, m.warnings
	if m.verity && !veritySupported(opts.Objects) {
		st.Warnings = append(st.Warnings, "verity is required and objects have no fs-verity: their files will not open")
	}
	opts.judge(&st)
	return root, st, nil
}

// Attach gives a detached mount a place in the file hierarchy. It follows symbolic
// links, as mount(2) does.
func Attach(f *os.File, target string) error {
	err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, target,
		unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS)
	if fi, serr := os.Stat(target); err != nil && serr == nil && !fi.IsDir() {
		err = unix.ENOTDIR // move_mount(2) says EINVAL
	}
	if err != nil {
		return fmt.Errorf("mounting on %q: %w", target, err)
	}
	return nil
}

func (o *Options) check() error {
	bad := func(what string) error { return fmt.Errorf("%w: %s", ErrOptions, what) }
	switch {
	case o.Path == "" && o.Image == nil:
		return bad("no image")
	case o.Path != "" && o.Image != nil:
		return bad("both a path and an open image")
	case len(o.Objects) == 0:
		return bad("no object directory")
	case (o.Upper == "") != (o.Work == ""):
		return bad("upper and work directory go together")
	}
	for _, s := range append([]string{o.Name, o.Upper, o.Work}, o.Objects...) {
		if strings.Contains(s, "\x00") {
			return bad(fmt.Sprintf("%q has a NUL byte", s))
		}
	}
	return nil
}

// compare finds the image's digest where there is one to compare with, or fs-verity
// is required.
func (o *Options) compare(img *os.File, st *State) error {
	d, err := fsverity.Measure(img)
	switch {
	case err == nil:
		st.Digest, st.Measured = d, true
	case o.Verity == VerityRequire && !o.Digest.IsZero():
		return fmt.Errorf("%w: %v", ErrNoVerity, err)
	}
	if o.Digest.IsZero() {
		return nil
	}
	if !st.Measured {
		if st.Digest, _, err = fsverity.Read(o.Digest.Algorithm(), newReader(img)); err != nil {
			return fmt.Errorf("reading it: %w", err)
		}
	}
	if st.Digest != o.Digest {
		return fmt.Errorf("%w: got %s %s, want %s %s", ErrWrongDigest,
			st.Digest.Algorithm(), st.Digest, o.Digest.Algorithm(), o.Digest)
	}
	return nil
}

// judge derives the verification from what is known.
func (o *Options) judge(st *State) {
	expected := !o.Digest.IsZero() // and compared, or there would be no mount
	switch {
	case expected && st.Measured && st.Verity:
		st.Verification, st.Why = Enforced, "the kernel checks the image and every file"
	case !expected:
		st.Verification, st.Why = None, "no digest of the image was given to compare with"
	case !o.ObjectsChecked && !st.Verity:
		st.Verification, st.Why = None, "the image has its digest, the files were not compared"
	case !st.Measured && st.Verity:
		st.Verification, st.Why = Checked, "the kernel checks the files, the image was compared now"
	case st.Measured:
		st.Verification, st.Why = Checked, "the kernel checks the image, the files were compared when they were stored"
	default:
		st.Verification, st.Why = Checked, "the image was compared now, the files when they were stored"
	}
}

// veritySupported reports whether all directories are on filesystems with fs-verity
// and a sample of their objects has it. A store that began on a filesystem without it
// has objects that verity=require would not let anybody open.
func veritySupported(dirs []string) bool {
	for _, dir := range dirs {
		if hasVerity(dir) != nil || !sampleVerity(dir) {
			return false
		}
	}
	return true
}

// sampleVerity looks at an object in each of some subdirectories.
func sampleVerity(dir string) bool {
	const samples = 8
	for _, sub := range someNames(dir, samples) {
		for _, name := range someNames(filepath.Join(dir, sub), 1) {
			f, err := os.OpenFile(filepath.Join(dir, sub, name), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
			if err != nil {
				return false
			}
			_, err = fsverity.Measure(f)
			f.Close()
			if err != nil {
				return false
			}
		}
	}
	return true
}

// someNames returns up to n names in a directory, none if it is not one.
func someNames(dir string, n int) []string {
	f, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(n)
	return names
}

// hasVerity returns nil if the filesystem of dir has fs-verity: the kernel then
// says of a directory that it has not enabled it.
func hasVerity(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err = fsverity.Measure(f); err == nil || errors.Is(err, fsverity.ErrNotEnabled) {
		return nil
	}
	return err
}
