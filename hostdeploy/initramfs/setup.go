package initramfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
)

// Options say where to set up a root. Root must be set.
type Options struct {
	// Root is the directory at which the physical root is mounted: "/root" in
	// initramfs-tools, "/sysroot" in dracut and on a running system.
	Root string
	// Cmdline is the kernel command line; for [PrepareNext] that of the boot entry.
	Cmdline string
	// Run is for the report and for what mounts need meanwhile: [RunDir] for "".
	Run string
	// Progress is told, now and then, how many objects of how many have got fs-verity.
	// Calls come one at a time. It may be nil.
	Progress func(done, total int)
}

// Setup puts the root that the command line asks for in the place of the physical root.
// It is for the initramfs: what was mounted at Options.Root moves to /sysroot below.
// Errors name what was wrong and what can be done, in lines of their own; after most
// of them nothing has been changed but, perhaps, files that have fs-verity now.
func Setup(ctx context.Context, o Options) (*Report, error) {
	s, err := newSetup(o)
	if err != nil {
		return nil, err
	}
	defer s.close()
	if err := s.prepare(ctx); err != nil {
		return nil, err
	}
	if err := s.pivot(); err != nil {
		return nil, err
	}
	s.linkVolatileRoot()
	return s.finish(o.Root, reportName)
}

// PrepareNext sets up a root at target, "/run/nextroot", for "systemctl soft-reboot".
// Whoever calls it knows that the running kernel is the right one. The physical root
// stays where it is. A root that was prepared there before goes.
func PrepareNext(ctx context.Context, o Options, target string) (*Report, error) {
	s, err := newSetup(o)
	if err != nil {
		return nil, err
	}
	defer s.close()
	if err := s.prepare(ctx); err != nil {
		return nil, err
	}
	if err := CancelNext(target); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return nil, fmt.Errorf("preparing the next root: %w", err)
	}
	if err := s.attach(target); err != nil {
		unmountAll(target)
		return nil, err
	}
	// The report of the running system may be the one that would be overwritten.
	if now, err := readFor(s.run, "/"); err == nil {
		if err := now.write(s.run, reportName); err != nil {
			unmountAll(target)
			return nil, err
		}
	}
	r, err := s.finish(target, nextName)
	if err != nil {
		unmountAll(target)
	}
	return r, err
}

// CancelNext takes away what PrepareNext has set up at target, if anything.
func CancelNext(target string) error {
	for isMount(target) {
		if err := unmountAll(target); err != nil {
			return fmt.Errorf("unmounting %q: %w", target, err)
		}
	}
	return nil
}

// A placed mount waits for its place in the new root.
type placed struct {
	from *os.File // detached
	at   *os.File // the directory in the new root, O_PATH
	name string
}

// A setup is one root on its way. Nothing is visible before pivot or attach.
type setup struct {
	o      Options
	run    string
	args   *Args
	report *Report

	noVerity bool // the store has fs-verity in parts, at best

	phys   *os.File // the physical root, O_PATH
	root   *os.File // the new root, a detached mount
	mounts []placed
	files  []*os.File
	temp   []string // directories in which something is mounted meanwhile
}

func newSetup(o Options) (*setup, error) {
	s := &setup{o: o, run: o.Run, report: &Report{Kernel: kernelRelease()}}
	if s.run == "" {
		s.run = RunDir
	}
	var err error
	if s.args, err = ParseArgs(o.Cmdline); err != nil {
		return nil, err
	}
	if len(s.args.Images) == 0 && s.args.Manifest == "" {
		return nil, ErrNotDeployed
	}
	s.report.Warnings = s.args.Warnings
	if s.phys, err = os.OpenFile(o.Root, unix.O_PATH|os.O_RDONLY|unix.O_DIRECTORY, 0); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRoot, err)
	}
	s.files = append(s.files, s.phys)
	if !isMount(o.Root) {
		s.close()
		return nil, fmt.Errorf("%w: nothing is mounted at %q\ncheck root= on the kernel command line", ErrRoot, o.Root)
	}
	return s, nil
}

func (s *setup) close() {
	for _, dir := range slices.Backward(s.temp) {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err == nil {
			os.Remove(dir)
		}
	}
	for _, f := range s.files {
		f.Close()
	}
}

func (s *setup) warn(format string, args ...any) {
	s.report.Warnings = append(s.report.Warnings, fmt.Sprintf(format, args...))
}

// prepare makes all mounts, detached.
func (s *setup) prepare(ctx context.Context) error {
	if s.args.Manifest != "" {
		return s.prepareManifest(ctx)
	}
	if err := s.writable(); err != nil {
		return err
	}
	st, err := store.Open(filepath.Join(s.o.Root, storeDir))
	if errors.Is(err, store.ErrNotStore) {
		return fmt.Errorf("%w: %w\nroot= names a file system that Particle did not install to, or the wrong one", ErrRoot, err)
	} else if err != nil {
		return fmt.Errorf("%w: %w", ErrRoot, err)
	}
	img, err := s.choose(st)
	if err != nil {
		return err
	}
	if err := s.enableVerity(ctx, st, img); err != nil {
		return err
	}
	if err := s.mountImage(st, img); err != nil {
		return err
	}
	if err := s.state(); err != nil {
		return err
	}
	if err := s.movePhysical(); err != nil {
		return err
	}
	return s.checkInit()
}

// writable makes the physical root writable where that is needed: initramfs-tools
// mounts it read-only when "rw" is not on the command line.
func (s *setup) writable() error {
	if s.args.TransientEtc && s.args.TransientVar {
		if _, err := os.Lstat(filepath.Join(s.o.Root, verityMark)); err != nil {
			return nil
		}
	}
	if err := remountWritable(s.o.Root); err != nil {
		return fmt.Errorf("%w: remounting %q to write to it: %w\n"+
			"a disk that cannot be written boots with particle.etc=transient particle.var=transient", ErrRoot, s.o.Root, err)
	}
	return nil
}

// choose returns the first image that the store has. One that cannot be looked up is noted
// and does not keep the next from booting.
func (s *setup) choose(st *store.Store) (Image, error) {
	var tried []string
	var bad error
	for _, img := range s.args.Images {
		digest := img.Digest.String()
		_, err := st.ImageDigest(digest)
		if err == nil {
			return img, nil
		}
		if !errors.Is(err, store.ErrNotFound) {
			s.warn("looking for image %s: %v", digest, err)
			bad = errors.Join(bad, err)
		}
		tried = append(tried, digest)
	}
	err := fmt.Errorf("%w: %s", ErrImage, strings.Join(tried, ", "))
	if bad != nil {
		return Image{}, fmt.Errorf("%w\n%w\nchoose another entry in the boot menu, and run \"particle store fsck\" there", err, bad)
	}
	return Image{}, fmt.Errorf("%w\nchoose another entry in the boot menu; \"particle hostdeploy switch\" deploys the image again", err)
}

// mountImage mounts the image, detached.
func (s *setup) mountImage(st *store.Store, img Image) error {
	o := mount.Options{
		Objects:        []string{st.ObjectsDir()},
		Digest:         img.Digest,
		Verity:         mount.VerityRequire,
		ObjectsChecked: true,
		Name:           img.Digest.String(),
	}
	switch {
	case s.noVerity:
		o.Verity = mount.VerityOff
	case img.Insecure:
		o.Verity = mount.VerityTry
	}
	r := s.report
	r.Digest, r.Insecure = img.Digest, img.Insecure
	if s.args.TransientRoot {
		upper, err := s.tmpfs("root")
		if err != nil {
			return err
		}
		o.Upper, o.Work = filepath.Join(upper, "upper"), filepath.Join(upper, "work")
		r.Transient = append(r.Transient, "root")
	}
	f, _, err := st.OpenImage(img.Digest.String())
	switch {
	case errors.Is(err, store.ErrVerity):
		return fmt.Errorf("%w: %w\nthe image was changed, or is damaged: choose another entry in the boot menu, and run \"particle store fsck\" there", ErrVerity, err)
	case errors.Is(err, store.ErrNotFound):
		return fmt.Errorf("%w: %w\nchoose another entry in the boot menu; \"particle hostdeploy switch\" deploys the image again", ErrImage, err)
	case err != nil:
		return fmt.Errorf("%w: %w", ErrImage, err)
	}
	s.files = append(s.files, f)
	o.Image = f
	root, state, err := mount.Detached(o)
	switch {
	case errors.Is(err, mount.ErrNoVerity):
		return fmt.Errorf("%w: %w\n%s", ErrVerity, err, verityAdvice)
	case errors.Is(err, mount.ErrWrongDigest):
		return fmt.Errorf("%w\nthe image was changed, or is damaged: choose another entry in the boot menu, and run \"particle store fsck --scrub\" there", err)
	case err != nil:
		return err
	}
	s.files = append(s.files, root)
	s.root = root
	r.Verification, r.Why, r.ImageDigest, r.Measured, r.Loop = state.Verification, state.Why, state.Digest, state.Measured, state.Loop
	r.Warnings = append(r.Warnings, state.Warnings...)
	return nil
}

// verityAdvice says what can be done where fs-verity is asked for and not there.
const verityAdvice = "put a ? before the digest, as in composefs.digest=?v1-sha256-12:…, to boot without;\n" +
	"or create state/enable-verity on the physical root, to have fs-verity enabled on the next boot\n" +
	"(ext4 needs tune2fs -O verity DEVICE for that)"

// state prepares /etc and /var.
func (s *setup) state() error {
	id := s.args.Deployment
	if id == "" {
		id = s.report.Digest.String()
	}
	s.report.Deployment = id
	dir := filepath.Join("deploy", id)
	state, err := openat(s.phys, stateDir, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return fmt.Errorf("%w: %s on the physical root: %w", ErrState, stateDir, err)
	}
	s.files = append(s.files, state)
	for _, d := range []struct {
		name      string
		transient bool
		resolve   uint64
	}{
		{"etc", s.args.TransientEtc, unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS},
		// The link of var leads to another directory of the state, and not out of it.
		{"var", s.args.TransientVar, unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS},
	} {
		f, err := openat(state, filepath.Join(dir, d.name), d.resolve)
		if err != nil {
			return fmt.Errorf("%w: /%s of deployment %s, %s on the physical root: %w\n"+
				"choose another entry in the boot menu; where it is an existing deployment that must boot, make the directory with what belongs into it",
				ErrState, d.name, id, filepath.Join(stateDir, dir, d.name), escapes(err))
		}
		s.files = append(s.files, f)
		var m *os.File
		if d.transient {
			m, err = s.overlay(d.name, f)
			s.report.Transient = append(s.report.Transient, d.name)
		} else {
			m, err = openTree(f, cloned)
		}
		if err != nil {
			return fmt.Errorf("mounting /%s: %w", d.name, err)
		}
		if err := s.place(m, d.name); err != nil {
			return err
		}
	}
	return nil
}

// escapes explains what openat2(2) says of a path that leads out of where it must stay.
func escapes(err error) error {
	if errors.Is(err, unix.EXDEV) {
		return fmt.Errorf("its link leads out of the state: %w", err)
	}
	if errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("it is a symbolic link: %w", err)
	}
	return err
}

// place notes where a detached mount goes. The image must have the directory.
func (s *setup) place(m *os.File, name string) error {
	s.files = append(s.files, m)
	at, err := openat(s.root, name, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return fmt.Errorf("%w: directory /%s: %w\nchoose another entry in the boot menu, and make the directory in the image", ErrSystem, name, escapes(err))
	}
	s.files = append(s.files, at)
	s.mounts = append(s.mounts, placed{m, at, name})
	return nil
}

// movePhysical prepares /sysroot, and what others may have mounted below the physical
// root already: initramfs-tools moves /dev there.
func (s *setup) movePhysical() error {
	m, err := openTree(s.phys, cloned)
	if err != nil {
		return fmt.Errorf("copying the mount of the physical root: %w", err)
	}
	if err := s.place(m, Sysroot); err != nil {
		return err
	}
	for _, name := range []string{"dev", "proc", "sys", "run"} {
		if !isMount(filepath.Join(s.o.Root, name)) {
			continue
		}
		f, err := openat(s.phys, name, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
		if err != nil {
			return fmt.Errorf("opening /%s of the physical root: %w", name, err)
		}
		s.files = append(s.files, f)
		if m, err = openTree(f, cloned); err != nil {
			return fmt.Errorf("copying the mount of /%s: %w", name, err)
		}
		if err := s.place(m, name); err != nil {
			return err
		}
	}
	return nil
}

// checkInit looks whether the image has an init that can be read: the kernel panics without
// one. /bin/sh does not count, which the kernel and initramfs-tools try last: a shell on the
// console asks nobody for a password, and would keep the machine from falling back.
func (s *setup) checkInit() error {
	names := []string{"sbin/init", "etc/init", "bin/init"}
	if s.args.Init != "" {
		names = []string{s.args.Init}
		// What the state has is the state's.
		if top, _, _ := strings.Cut(strings.TrimLeft(s.args.Init, "/"), "/"); top == "etc" || top == "var" {
			return nil
		}
	}
	for _, name := range names {
		fd, err := openat2(s.root, strings.TrimLeft(name, "/"), unix.O_RDONLY|unix.O_NOCTTY|unix.O_NONBLOCK, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
		if err == nil {
			f := os.NewFile(uintptr(fd), name)
			defer f.Close()
			if info, err := f.Stat(); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
				return nil
			}
			continue
		}
		if err == unix.EIO || err == unix.EBADMSG {
			return fmt.Errorf("%w: opening %q: %w: its object is missing from the store or was changed\nchoose another entry in the boot menu, and run \"particle store fsck --scrub\" there", ErrSystem, "/"+strings.TrimLeft(name, "/"), err)
		}
	}
	return fmt.Errorf("%w: it has no init: looked for %s\nchoose another entry in the boot menu; an image that boots has systemd-sysv, for example, or init= on the kernel command line", ErrSystem, strings.Join(names, ", "))
}

// pivot puts the new root in the place of the physical one.
func (s *setup) pivot() error {
	// A mount below a shared one cannot be moved, and systemd makes all of them shared:
	// so the old mount goes and its copy, which is at hand, takes its place at /sysroot.
	if err := unix.Unmount(s.o.Root, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmounting the physical root %q: %w", s.o.Root, err)
	}
	if err := s.attach(s.o.Root); err != nil {
		unmountAll(s.o.Root)
		if again, openErr := openTree(s.phys, cloned); openErr == nil {
			defer again.Close()
			err = errors.Join(err, attachAt(again, s.o.Root))
		}
		return err
	}
	return nil
}

// attach makes the new root visible at target.
func (s *setup) attach(target string) error {
	if err := mount.Attach(s.root, target); err != nil {
		return err
	}
	for _, m := range s.mounts {
		err := unix.MoveMount(int(m.from.Fd()), "", int(m.at.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		if err != nil {
			return fmt.Errorf("mounting on %q: %w", filepath.Join(target, m.name), err)
		}
	}
	// What was mounted below the physical root was copied with it.
	for _, m := range s.mounts {
		if m.name != Sysroot && m.name != "etc" && m.name != "var" {
			unix.Unmount(filepath.Join(target, Sysroot, m.name), unix.MNT_DETACH)
		}
	}
	return nil
}

// finish writes the report of the root that is at target now.
func (s *setup) finish(target, name string) (*Report, error) {
	var err error
	if s.report.Device, err = deviceOf(target); err != nil {
		return nil, err
	}
	if err := s.report.write(s.run, name); err != nil {
		return nil, err
	}
	return s.report, nil
}

// linkVolatileRoot tells systemd which device stands behind a root that is none. Its
// generator for partitions looks for it, and where the root came by
// root=gpt-auto the system does not boot without
// (https://github.com/systemd/systemd/issues/35017).
func (s *setup) linkVolatileRoot() {
	const auto, link = "/dev/gpt-auto-root", "/run/systemd/volatile-root"
	var st unix.Stat_t
	if unix.Stat(auto, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return
	}
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err == nil {
		err = os.Symlink(fmt.Sprintf("/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), link)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			s.warn("telling systemd of the root's device: %v", err)
		}
	}
}
