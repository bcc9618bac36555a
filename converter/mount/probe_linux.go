package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
)

// Probe finds out what the kernel and the filesystem of a directory can do. All
// mounts are made in a namespace of its own and all files are unlinked: nothing is
// left behind, also if the process is killed. It takes some milliseconds.
func Probe(dir string) Features {
	f := Features{Dir: existing(dir)}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		f.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	f.FsVerity = support(explainVerity(f.Dir, tryVerity(f.Dir)))
	f.UserNS = support(tryUserNS())

	p := prober{f: &f}
	image, err := tempFile(f.Dir, emptyImage())
	if err != nil {
		image, err = tempFile(os.TempDir(), emptyImage())
	}
	if err == nil {
		p.image = image
		err = inPrivate(p.run)
		image.Close()
	}
	if err != nil {
		if errors.Is(err, unix.EPERM) {
			err = fmt.Errorf("%w (be root, or have CAP_SYS_ADMIN)", err)
		}
		f.Privilege = support(err)
	}
	for _, s := range []*Support{&f.Privilege, &f.Erofs, &f.File, &f.FileStacks, &f.Loop, &f.Overlay,
		&f.DataOnly, &f.LayerFds, &f.Whiteouts, &f.VerityOpt} {
		if !s.OK && s.Why == "" {
			s.Why = NotTried
		}
	}
	return f
}

// existing returns dir or the nearest directory above it that exists.
func existing(dir string) string {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return dir
	}
	for abs != "/" {
		if fi, err := os.Stat(abs); err == nil && fi.IsDir() {
			break
		}
		abs = filepath.Dir(abs)
	}
	return abs
}

// tempFile returns an unlinked file with some content, open for reading only.
func tempFile(dir string, data []byte) (*os.File, error) {
	w, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o600)
	if err != nil {
		if w, err = os.CreateTemp(dir, ".particle-probe-"); err != nil {
			return nil, err
		}
		defer os.Remove(w.Name()) // after it was opened again
	}
	defer w.Close()
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	return os.Open(fdPath(w))
}

// tryVerity enables fs-verity on a temporary file or, where none can be made, asks
// for the directory's.
func tryVerity(dir string) error {
	f, err := tempFile(dir, []byte("x"))
	if err != nil {
		return hasVerity(dir)
	}
	defer f.Close()
	if err := fsverity.Enable(f, fsverity.SHA256); err != nil {
		return err
	}
	_, err = fsverity.Measure(f)
	return err
}

// explainVerity words the usual reasons why a directory has no fs-verity.
func explainVerity(dir string, err error) error {
	if !errors.Is(err, fsverity.ErrUnsupported) {
		return err
	}
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil && st.Type == unix.EXT4_SUPER_MAGIC {
		if _, err := os.Stat("/sys/fs/ext4/features/verity"); err == nil {
			return fmt.Errorf("the ext4 filesystem of %q has no fs-verity: enable it with tune2fs -O verity DEVICE", dir)
		}
		return errors.New("this kernel was built without fs-verity (CONFIG_FS_VERITY)")
	}
	return fmt.Errorf("the filesystem of %q has no fs-verity; ext4, btrfs and f2fs can have it", dir)
}

// tryUserNS starts a program that does not exist in a new user namespace: the
// namespace is made first.
func tryUserNS() error {
	for file, bad := range map[string]string{
		"/proc/sys/kernel/unprivileged_userns_clone":             "0",
		"/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1",
	} {
		if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) == bad {
			return fmt.Errorf("%s is %s", file, bad)
		}
	}
	_, err := syscall.ForkExec("/dev/null/missing", []string{"missing"}, &syscall.ProcAttr{
		Sys: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER},
	})
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return nil
	}
	return fmt.Errorf("making a user namespace: %w", err)
}

type prober struct {
	f     *Features
	image *os.File
	base  string // where the tmpfs is
}

// run tries everything, in a private mount namespace. An error means that it may
// not mount at all.
func (p *prober) run() error {
	tmpfs, err := openFilesystem("tmpfs")
	if err != nil {
		return err
	}
	defer tmpfs.close()
	tmp, err := tmpfs.mount(0)
	if err != nil {
		return err
	}
	defer tmp.Close()
	if err := attachPrivate(tmp); err != nil {
		return err
	}
	p.base = fdPath(tmp)
	defer unix.Unmount(p.base, unix.MNT_DETACH)
	for _, dir := range []string{"a", "b", "erofs", "overlay", "up", "up/d", "low", "low/d"} {
		if err := os.Mkdir(p.base+"/"+dir, 0o755); err != nil {
			return err
		}
	}
	p.f.Privilege = support(nil)
	p.overlays()
	p.erofs()
	return nil
}

// overlay mounts an overlay, detached.
func (p *prober) overlay(options ...string) (*os.File, error) {
	fs, err := openFilesystem("overlay")
	if err != nil {
		return nil, err
	}
	defer fs.close()
	for _, opt := range options {
		key, value, _ := strings.Cut(opt, "=")
		if err := fs.setString(key, value); err != nil {
			return nil, err
		}
	}
	return fs.mount(unix.MOUNT_ATTR_RDONLY)
}

// try is overlay for those who only want to know whether it works.
func (p *prober) try(options ...string) Support {
	root, err := p.overlay(options...)
	if err == nil {
		root.Close()
	}
	return support(err)
}

func (p *prober) overlays() {
	a, b := p.base+"/a", p.base+"/b"
	if p.f.Overlay = p.try("metacopy=on", "redirect_dir=on", "lowerdir="+a+":"+b); !p.f.Overlay.OK {
		return
	}
	p.f.DataOnly = p.try("metacopy=on", "redirect_dir=on", "lowerdir="+a+"::"+b)
	p.f.VerityOpt = p.try("metacopy=on", "redirect_dir=on", "verity=require", "lowerdir="+a+":"+b)
	p.f.Whiteouts = support(p.whiteouts())
}

// whiteouts tries the forms of whiteouts and xattrs that survive an overlay below
// (Linux Documentation/filesystems/overlayfs.rst, "Nesting overlayfs mounts").
func (p *prober) whiteouts() error {
	up, low := p.base+"/up", p.base+"/low"
	for _, file := range []string{up + "/d/f", low + "/d/f"} {
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			return err
		}
	}
	for _, x := range [][3]string{
		{up + "/d", "trusted.overlay.opaque", "x"}, // there are whiteouts in it
		{up + "/d/f", "trusted.overlay.whiteout", "y"},
		{up, "trusted.overlay.overlay.opaque", "y"},
	} {
		if err := unix.Setxattr(x[0], x[1], []byte(x[2]), 0); err != nil {
			return fmt.Errorf("setting xattr %s: %w", x[1], err)
		}
	}
	root, err := p.overlay("lowerdir=" + up + ":" + low)
	if err != nil {
		return err
	}
	defer root.Close()
	err = unix.Faccessat(int(root.Fd()), "d/f", unix.F_OK, 0)
	if err == nil {
		return errors.New("a whiteout with an xattr does not hide the file below it")
	}
	if err != unix.ENOENT {
		return err
	}
	var value [8]byte
	if n, err := unix.Getxattr(fdPath(root), "trusted.overlay.opaque", value[:]); err != nil || string(value[:n]) != "y" {
		return fmt.Errorf("an escaped xattr does not show: %v", err)
	}
	return nil
}

func (p *prober) erofs() {
	file, err := mountErofs(fdPath(p.image), false)
	p.f.File = support(err)
	if err == nil {
		defer file.Close()
		p.f.Erofs = support(nil)
		p.f.LayerFds = support(p.layerFds(file))
		p.f.FileStacks = support(p.stacks(file))
	}
	loop, err := p.loop()
	p.f.Loop = support(err)
	if err == nil {
		defer loop.Close()
		p.f.Erofs = support(nil)
		if !p.f.File.OK { // a new kernel may have Dir on a filesystem that cannot
			p.f.LayerFds = support(p.layerFds(loop))
		}
	}
	if !p.f.Erofs.OK {
		p.f.Erofs = support(err)
	}
}

func (p *prober) loop() (*os.File, error) {
	dev, err := openLoop(p.image)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	return mountErofs(dev.Name(), false)
}

// layerFds uses a detached mount as a layer.
func (p *prober) layerFds(f *os.File) error {
	dir, err := os.Open(p.base + "/b")
	if err != nil {
		return err
	}
	defer dir.Close()
	fs, err := openFilesystem("overlay")
	if err != nil {
		return err
	}
	defer fs.close()
	if err := fs.setString("metacopy", "on"); err != nil {
		return err
	}
	if err := fs.setFd("lowerdir+", f); err != nil {
		return err
	}
	if err := fs.setFd("datadir+", dir); err != nil {
		return err
	}
	root, err := fs.mount(unix.MOUNT_ATTR_RDONLY)
	if err == nil {
		root.Close()
	}
	return err
}

// stacks puts two overlays on an EROFS.
func (p *prober) stacks(f *os.File) error {
	attach := func(f *os.File, name string) (string, error) {
		dir := p.base + "/" + name
		err := unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
		return dir, err
	}
	below, err := attach(f, "erofs")
	if err != nil {
		return err
	}
	for _, name := range []string{"overlay", ""} {
		root, err := p.overlay("lowerdir=" + below + ":" + p.base + "/a")
		if err != nil {
			return err
		}
		defer root.Close()
		if name != "" {
			if below, err = attach(root, name); err != nil {
				return err
			}
		}
	}
	return nil
}
