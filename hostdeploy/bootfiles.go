package hostdeploy

import (
	"context"
	"crypto/sha256"
	"debug/pe"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/hostdeploy/bootloader"
	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// bootPrefix begins the names of the directories of kernels on the boot file system.
const bootPrefix = "particle-"

// reserve is what must stay free on a boot file system besides the kernels, in bytes:
// entries, menus and the loader's own files.
const reserve = 1 << 20

// bootFiles are the kernel and initramfs of a deployment, or a UKI, on their way from
// the store to the boot file system.
type bootFiles struct {
	hash  string // SHA-256 of all of them, one after the other, hexadecimal
	files []bootFile
}

type bootFile struct {
	name string
	node *tree.Node
}

// newBootFiles reads the files of a kernel once, for their hash and to see that the
// initramfs can set up the root.
func newBootFiles(ctx context.Context, objects Opener, k *Kernel, force bool) (*bootFiles, error) {
	b := &bootFiles{}
	switch {
	case k.UKI != nil:
		b.files = []bootFile{{"linux.efi", k.UKI}}
	case k.Initrd == nil && !force:
		return nil, fmt.Errorf("%w: kernel %s has none beside it; update-initramfs -c -k %s makes one", ErrNoInitrd, k.Path, k.Version)
	case k.Initrd == nil:
		b.files = []bootFile{{"vmlinuz", k.Linux}}
	default:
		b.files = []bootFile{{"vmlinuz", k.Linux}, {"initrd", k.Initrd}}
	}
	if !force {
		check := checkInitrd
		if k.UKI != nil {
			check = checkUKI
		}
		if err := check(objects, k); err != nil {
			return nil, err
		}
	}
	h := sha256.New()
	for _, f := range b.files {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		r, err := openNode(objects, f.node)
		if err != nil {
			return nil, fmt.Errorf("opening the image's %s: %w", f.name, err)
		}
		_, err = io.Copy(h, r)
		r.Close()
		if err != nil {
			return nil, fmt.Errorf("reading the image's %s: %w", f.name, err)
		}
	}
	b.hash = hex.EncodeToString(h.Sum(nil))
	return b, nil
}

// checkInitrd refuses an initramfs that cannot set up the root of a deployment.
func checkInitrd(objects Opener, k *Kernel) error {
	r, err := openNode(objects, k.Initrd)
	if err != nil {
		return fmt.Errorf("opening %s: %w", k.InitrdPath, err)
	}
	defer r.Close()
	return inspectInitrd(r, k.InitrdPath)
}

func inspectInitrd(r io.Reader, name string) error {
	c, err := initramfs.Inspect(r)
	if err != nil {
		return fmt.Errorf("looking into the initramfs %s: %w; --force deploys it unseen", name, err)
	}
	if !c.Program || c.Starter == "" {
		return fmt.Errorf("%w: %s; install the package particle in the image and end its build with particle prepare", ErrNoSetup, name)
	}
	if missing := c.Missing(); len(missing) > 0 {
		return fmt.Errorf("%w: %s lacks the kernel modules %s; particle prepare makes it again", ErrNoSetup, name, strings.Join(missing, ", "))
	}
	return nil
}

// checkUKI does the same for the initramfs in a unified kernel image, and refuses one
// with a command line of its own: under Secure Boot systemd-stub takes that and not the
// entry's, which names the deployment. The sections are those of the UAPI group's
// specification of unified kernel images.
func checkUKI(objects Opener, k *Kernel) error {
	if k.UKI.File.Object.IsZero() {
		return fmt.Errorf("%w: %s is no unified kernel image: it has %d bytes", ErrNoKernel, k.Path, k.UKI.File.Size)
	}
	f, err := objects.OpenObject(k.UKI.File.Object)
	if err != nil {
		return fmt.Errorf("opening %s: %w", k.Path, err)
	}
	defer f.Close()
	image, err := pe.NewFile(f)
	if err != nil {
		return fmt.Errorf("%w: reading the unified kernel image %s: %w; --force deploys it unseen", ErrNoKernel, k.Path, err)
	}
	if image.Section(".cmdline") != nil {
		return fmt.Errorf("%w: the unified kernel image %s has a command line of its own, .cmdline; build it without one", ErrNoSetup, k.Path)
	}
	s := image.Section(".initrd")
	if s == nil {
		return fmt.Errorf("%w: the unified kernel image %s has none, .initrd", ErrNoInitrd, k.Path)
	}
	// The size on disk is rounded up.
	return inspectInitrd(io.NewSectionReader(f, int64(s.Offset), int64(min(s.Size, s.VirtualSize))), k.Path)
}

// dir is the name of their directory on the boot file system.
func (b *bootFiles) dir() string { return bootPrefix + b.hash }

func (b *bootFiles) size() (n int64) {
	for _, f := range b.files {
		n += f.node.File.Size
	}
	return n
}

// entry fills in the paths of an entry as the loader sees them.
func (b *bootFiles) entry(e *bootloader.Entry, p bootloader.Paths) {
	for _, f := range b.files {
		name := path.Join("/", p.Prefix, b.dir(), f.name)
		switch f.name {
		case "vmlinuz":
			e.Linux = name
		case "initrd":
			e.Initrd = []string{name}
		case "linux.efi":
			e.EFI = name
		}
	}
}

// present reports whether the boot file system has them all. A directory that an entry
// refers to was durable before the entry was there; what is in any other one has to be
// read to be known, since a power loss may have come at any moment.
func (b *bootFiles) present(ctx context.Context, p bootloader.Paths, entries []bootloader.Entry) (bool, error) {
	dir := filepath.Join(p.Boot, b.dir())
	used := slices.Contains(usedBootDirs(entries), b.dir())
	h := sha256.New()
	for _, f := range b.files {
		file, err := os.Open(filepath.Join(dir, f.name))
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		} else if err != nil {
			return false, err
		}
		var n int64
		if used {
			var fi fs.FileInfo
			if fi, err = file.Stat(); err == nil {
				n = fi.Size()
			}
		} else if err = ctx.Err(); err == nil {
			n, err = io.Copy(h, file)
		}
		file.Close()
		if err != nil {
			return false, fmt.Errorf("reading %q: %w", file.Name(), err)
		}
		if n != f.node.File.Size {
			return false, nil
		}
	}
	return used || hex.EncodeToString(h.Sum(nil)) == b.hash, nil
}

// checkRoom compares what they need with what the boot file system has, and will have once
// the kernels are gone that are not used.
func (b *bootFiles) checkRoom(p bootloader.Paths, unused []string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(p.Boot, &st); err != nil {
		return fmt.Errorf("asking for the free space of %q: %w", p.Boot, err)
	}
	block := int64(st.Bsize)
	need := int64(reserve)
	for _, f := range b.files {
		need += (f.node.File.Size + block - 1) / block * block
	}
	free := int64(st.Bavail) * block
	for _, name := range unused {
		n, err := treeSize(filepath.Join(p.Boot, name), block)
		if err != nil {
			return err
		}
		free += n
	}
	if free < need {
		return fmt.Errorf("%w %q: the kernel and its initramfs need %d MiB, %d MiB are free; particle hostdeploy gc removes what is not needed, unpinning a deployment lets it",
			ErrNoSpace, p.Boot, (need+1<<20-1)>>20, free>>20)
	}
	return nil
}

// write copies them to the boot file system and makes them durable. Nothing is renamed:
// FAT has no atomic rename, and a directory with two names, as a power loss can leave it,
// cannot be removed without harm. Nobody looks at the directory before an entry names it.
//
// Kernels that are not used go first: an unfinished one, and those of deployments that were
// staged and never finalized, or are still staged and make room for this one.
func (b *bootFiles) write(ctx context.Context, objects Opener, p bootloader.Paths, unused []string) error {
	for _, name := range unused {
		if err := os.RemoveAll(filepath.Join(p.Boot, name)); err != nil {
			return fmt.Errorf("removing a kernel that nothing uses: %w", err)
		}
	}
	dir := filepath.Join(p.Boot, b.dir())
	if err := os.RemoveAll(dir); err != nil { // damaged, if an entry refers to it
		return fmt.Errorf("removing an unfinished kernel: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("making the kernel's directory: %w", err)
	}
	for _, f := range b.files {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, err := openNode(objects, f.node)
		if err != nil {
			return fmt.Errorf("opening the image's %s: %w", f.name, err)
		}
		err = copyDurably(filepath.Join(dir, f.name), r, f.node.File.Size)
		r.Close()
		if err != nil {
			os.RemoveAll(dir)
			return fmt.Errorf("copying the image's %s to %q: %w", f.name, dir, err)
		}
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	return syncDir(p.Boot)
}

// bootDirs lists the directories of kernels on the boot file system, unfinished ones
// among them.
func bootDirs(p bootloader.Paths) ([]string, error) {
	entries, err := os.ReadDir(p.Boot)
	if err != nil {
		return nil, fmt.Errorf("listing %q: %w", p.Boot, err)
	}
	var dirs []string
	for _, e := range entries {
		hash, ok := strings.CutPrefix(e.Name(), bootPrefix)
		if ok && e.IsDir() && len(hash) == 64 && strings.Trim(hash, "0123456789abcdef") == "" {
			dirs = append(dirs, e.Name())
		}
	}
	return dirs, nil
}

// unusedBootDirs are those of the boot file system that no entry refers to.
func unusedBootDirs(p bootloader.Paths, entries []bootloader.Entry) ([]string, error) {
	dirs, err := bootDirs(p)
	used := usedBootDirs(entries)
	return slices.DeleteFunc(dirs, func(name string) bool { return slices.Contains(used, name) }), err
}

// unusedKernels are the directories of kernels that may make room for another one: no
// entry refers to them, and the running system, whose entry may be lost or not be
// understood, does not boot from them.
func (h *Host) unusedKernels(entries []bootloader.Entry) ([]string, error) {
	dirs, err := unusedBootDirs(h.Paths, entries)
	if err != nil || h.Booted == "" {
		return dirs, err
	}
	have, err := exists(h.stateDir(h.Booted))
	if err != nil || !have {
		return dirs, err // it runs from another disk
	}
	o, err := h.origin(h.Booted)
	if err != nil {
		return nil, nil // nobody can tell
	}
	return slices.DeleteFunc(dirs, func(name string) bool { return name == bootPrefix+o.BootDigest }), nil
}

// usedBootDirs are those that entries refer to.
func usedBootDirs(entries []bootloader.Entry) []string {
	var used []string
	for _, e := range entries {
		for _, name := range slices.Concat([]string{e.Linux, e.EFI}, e.Initrd) {
			if name != "" {
				used = append(used, path.Base(path.Dir(name)))
			}
		}
	}
	return used
}
