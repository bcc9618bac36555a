package hostdeploy

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	debversion "github.com/knqyf263/go-deb-version"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// A System is the operating system that an image holds, as far as booting it goes.
type System struct {
	// Release has the fields of os-release(5).
	Release map[string]string
	// Kernels are the bootable kernels, the newest first.
	Kernels []Kernel
	// Args are the kernel arguments of the image for the architecture.
	Args Args
}

// A Kernel is one kernel of an image: Linux with Initrd, or a unified kernel image.
type Kernel struct {
	Version string // as uname -r; the file's name where a UKI does not say
	// Linux, Initrd and UKI are regular files of the image's tree.
	Linux, Initrd, UKI *tree.Node
	// Path of Linux or UKI in the image, for people; InitrdPath likewise.
	Path, InitrdPath string
}

// An Opener opens the content of a file. (*store.Store).OpenObject is what it needs.
type Opener interface {
	OpenObject(fsverity.Digest) (*os.File, error)
}

// Find looks for what is needed to boot the system in a tree. Kernels are found where
// Debian and Ubuntu install them (/boot/vmlinuz-VERSION, /boot/initrd.img-VERSION),
// where other systems have them (/usr/lib/modules/VERSION/vmlinuz and initramfs.img), and as
// unified kernel images (/boot/EFI/Linux/*.efi, /usr/lib/modules/VERSION/*.efi).
// arch is the image's (GOARCH). A tree without kernels is no error.
func Find(t *tree.Tree, objects Opener, arch string) (*System, error) {
	s := &System{Release: map[string]string{}}
	for _, name := range []string{"etc/os-release", "usr/lib/os-release"} {
		n, err := resolve(t, name)
		if errors.Is(err, errNoFile) {
			continue
		} else if err != nil {
			return nil, err
		}
		data, err := readNode(objects, n, 1<<20)
		if err != nil {
			return nil, fmt.Errorf("reading the image's %s: %w", name, err)
		}
		s.Release = parseRelease(data)
		break
	}
	if err := s.findKernels(t); err != nil {
		return nil, err
	}
	var err error
	s.Args, err = imageArgs(t, arch, func(n *tree.Node) ([]byte, error) { return readNode(objects, n, maxKargs) })
	return s, err
}

// Name returns the system's name for the boot menu.
func (s *System) Name() string {
	for _, key := range []string{"PRETTY_NAME", "NAME", "ID"} {
		if v := s.Release[key]; v != "" {
			return v
		}
	}
	return "Linux"
}

// Kernel returns the kernel of a version, the newest for "".
func (s *System) Kernel(version string) (*Kernel, error) {
	if len(s.Kernels) == 0 {
		return nil, fmt.Errorf("%w: there is none in /boot/vmlinuz-VERSION, /usr/lib/modules/VERSION/vmlinuz, /boot/EFI/Linux or /usr/lib/modules/VERSION/*.efi; install linux-image-amd64 in the image, for example", ErrNoKernel)
	}
	if version == "" {
		return &s.Kernels[0], nil
	}
	var have []string
	for i, k := range s.Kernels {
		if k.Version == version {
			return &s.Kernels[i], nil
		}
		have = append(have, k.Version)
	}
	return nil, fmt.Errorf("%w: no version %q; it has %s", ErrNoKernel, version, strings.Join(have, ", "))
}

func (s *System) findKernels(t *tree.Tree) error {
	seen := map[string]bool{}
	add := func(k Kernel) {
		if !seen[k.Version] {
			seen[k.Version] = true
			s.Kernels = append(s.Kernels, k)
		}
	}
	modules, err := children(t, "usr/lib/modules")
	if err != nil {
		return err
	}
	for _, version := range modules {
		dir := path.Join("usr/lib/modules", version)
		files, err := children(t, dir)
		if err != nil {
			return err
		}
		for _, f := range files {
			if strings.HasSuffix(f, ".efi") {
				if n, err := regular(t, path.Join(dir, f)); n != nil || err != nil {
					if err != nil {
						return err
					}
					add(Kernel{Version: version, UKI: n, Path: "/" + path.Join(dir, f)})
				}
			}
		}
		k, err := pair(t, version, path.Join(dir, "vmlinuz"), path.Join(dir, "initramfs.img"), path.Join(dir, "initrd.img"), path.Join(dir, "initrd"))
		if err != nil {
			return err
		}
		if k != nil {
			add(*k)
		}
	}
	boot, err := children(t, "boot")
	if err != nil {
		return err
	}
	for _, f := range boot {
		for _, prefix := range []string{"vmlinuz-", "vmlinux-"} {
			version, ok := strings.CutPrefix(f, prefix)
			if !ok {
				continue
			}
			k, err := pair(t, version, path.Join("boot", f), "boot/initrd.img-"+version, "boot/initramfs-"+version+".img", "boot/initrd-"+version)
			if err != nil {
				return err
			}
			if k != nil {
				add(*k)
			}
		}
	}
	ukis, err := children(t, "boot/EFI/Linux")
	if err != nil {
		return err
	}
	for _, f := range ukis {
		if !strings.HasSuffix(f, ".efi") {
			continue
		}
		n, err := regular(t, path.Join("boot/EFI/Linux", f))
		if err != nil {
			return err
		}
		if n != nil {
			add(Kernel{Version: strings.TrimSuffix(f, ".efi"), UKI: n, Path: "/boot/EFI/Linux/" + f})
		}
	}
	slices.SortStableFunc(s.Kernels, func(a, b Kernel) int { return compareVersions(b.Version, a.Version) })
	return nil
}

// pair returns the kernel at a path with the first initramfs that exists, nil where
// there is no such kernel.
func pair(t *tree.Tree, version, linux string, initrds ...string) (*Kernel, error) {
	n, err := regular(t, linux)
	if n == nil || err != nil {
		return nil, err
	}
	k := &Kernel{Version: version, Linux: n, Path: "/" + linux}
	for _, name := range initrds {
		if k.Initrd, err = regular(t, name); err != nil {
			return nil, err
		}
		if k.Initrd != nil {
			k.InitrdPath = "/" + name
			break
		}
	}
	return k, nil
}

// compareVersions orders kernel releases as dpkg orders versions, which knows that
// 6.12.10 is later than 6.12.9; what is no version comes first, by bytes.
func compareVersions(a, b string) int {
	va, errA := debversion.NewVersion(a)
	vb, errB := debversion.NewVersion(b)
	switch {
	case errA == nil && errB == nil:
		if c := va.Compare(vb); c != 0 {
			return c
		}
	case errA == nil:
		return 1
	case errB == nil:
		return -1
	}
	return strings.Compare(a, b)
}

// parseRelease reads os-release(5): lines KEY=VALUE, the value quoted as in a shell.
// Lines that are none are passed over, as systemd does.
func parseRelease(data []byte) map[string]string {
	fields := map[string]string{}
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		line := strings.TrimSpace(s.Text())
		key, value, ok := strings.Cut(line, "=")
		if !ok || line[0] == '#' {
			continue
		}
		if v, ok := unquote(value); ok {
			fields[key] = v
		}
	}
	return fields
}

// unquote undoes the quotes of a value that shells would take as one word. It reports
// false where a quote is not closed.
func unquote(s string) (string, bool) {
	var b strings.Builder
	quote := byte(0)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && quote != '\'':
			if i++; i == len(s) {
				return "", false
			}
			// Within double quotes a backslash stays before ordinary characters.
			if quote == '"' && strings.IndexByte("\"\\$`", s[i]) < 0 {
				b.WriteByte(c)
			}
			b.WriteByte(s[i])
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		case c == quote && quote != 0:
			quote = 0
		default:
			b.WriteByte(c)
		}
	}
	return b.String(), quote == 0
}

// hasModules reports whether the modules of a kernel are in the image. A kernel without
// any boots as far as its initramfs goes.
func hasModules(t *tree.Tree, version string) (bool, error) {
	files, err := children(t, path.Join("usr/lib/modules", version))
	return len(files) > 0, err
}

// errNoFile: a tree has nothing at a path.
var errNoFile = errors.New("no such file in the image")

// maxLinks is how many symbolic links a path may lead through (MAXSYMLINKS of Linux).
const maxLinks = 40

// resolve returns the node at a path of an image, symbolic links followed within it.
func resolve(t *tree.Tree, name string) (*tree.Node, error) {
	links := 0
	at := []*tree.Node{t.Root}
	for rest := name; rest != ""; {
		var elem string
		elem, rest, _ = strings.Cut(rest, "/")
		here := at[len(at)-1]
		switch elem {
		case "", ".":
			continue
		case "..":
			at = at[:max(1, len(at)-1)]
			continue
		}
		n := here.Dir[elem]
		if n == nil {
			return nil, fmt.Errorf("%w: %q", errNoFile, name)
		}
		if n.Type() != tree.TypeSymlink {
			at = append(at, n)
			continue
		}
		if links++; links > maxLinks {
			return nil, fmt.Errorf("looking for %q in the image: more than %d symbolic links", name, maxLinks)
		}
		if strings.HasPrefix(n.Target, "/") {
			at = at[:1]
		}
		rest = n.Target + "/" + rest
	}
	return at[len(at)-1], nil
}

// children returns the names in a directory of an image, none where it is missing.
func children(t *tree.Tree, dir string) ([]string, error) {
	n, err := resolve(t, dir)
	if errors.Is(err, errNoFile) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return n.Names(), nil
}

// regular returns the regular file at a path, nil where there is none.
func regular(t *tree.Tree, name string) (*tree.Node, error) {
	n, err := resolve(t, name)
	if errors.Is(err, errNoFile) || err == nil && !n.IsRegular() {
		return nil, nil
	}
	return n, err
}

// openNode opens the content of a regular file.
func openNode(objects Opener, n *tree.Node) (io.ReadCloser, error) {
	if !n.IsRegular() {
		return nil, errors.New("not a regular file")
	}
	if n.File.Object.IsZero() {
		if int64(len(n.File.Inline)) != n.File.Size {
			return nil, fmt.Errorf("a file of %s bytes without content", strconv.FormatInt(n.File.Size, 10))
		}
		return io.NopCloser(bytes.NewReader(n.File.Inline)), nil
	}
	return objects.OpenObject(n.File.Object)
}

// readNode reads a small file.
func readNode(objects Opener, n *tree.Node, limit int64) ([]byte, error) {
	r, err := openNode(objects, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if n.File.Size > limit {
		return nil, fmt.Errorf("it has %d bytes, want at most %d", n.File.Size, limit)
	}
	return io.ReadAll(io.LimitReader(r, limit))
}
