package hostdeploy

import (
	"errors"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/tree"
)

// treeOf builds a tree of paths: a value that begins with "->" is a symbolic link's
// target, a path that ends in a slash is a directory.
func treeOf(files map[string]string) *tree.Tree {
	t := tree.New()
	for name, content := range files {
		dir := t.Root
		elems := strings.Split(strings.Trim(name, "/"), "/")
		for _, e := range elems[:len(elems)-1] {
			if dir.Dir[e] == nil {
				dir.Dir[e] = tree.NewImplied()
			}
			dir = dir.Dir[e]
		}
		last := elems[len(elems)-1]
		switch target, link := strings.CutPrefix(content, "->"); {
		case link:
			dir.Dir[last] = &tree.Node{Stat: tree.Stat{Mode: tree.TypeSymlink | 0o777}, Target: target}
		case strings.HasSuffix(name, "/"):
			if dir.Dir[last] == nil {
				dir.Dir[last] = tree.NewImplied()
			}
		default:
			dir.Dir[last] = &tree.Node{Stat: tree.Stat{Mode: tree.TypeRegular | 0o644}, File: &tree.File{Size: int64(len(content)), Inline: []byte(content)}}
		}
	}
	return t
}

func TestFind(t *testing.T) {
	s, err := Find(treeOf(map[string]string{
		"usr/lib/os-release":                        "ID=debian\nPRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nODD='a\"b'\n# no\nBAD=\"open\nESC=\"\\$x \\y\"\n",
		"etc/os-release":                            "->../usr/lib/os-release",
		"boot/vmlinuz-6.12.9-amd64":                 "nine",
		"boot/initrd.img-6.12.9-amd64":              "initrd nine",
		"boot/vmlinuz-6.12.10-amd64":                "ten",
		"boot/initrd.img-6.12.10-amd64":             "initrd ten",
		"boot/config-6.12.10-amd64":                 "",
		"usr/lib/modules/6.12.10-amd64/modules.dep": "",
		"usr/lib/modules/5.4.0/vmlinuz":             "old",
		"usr/lib/modules/5.4.0/initramfs.img":       "old initrd",
		"boot/EFI/Linux/rescue.efi":                 "uki",
		"boot/vmlinuz-dangling":                     "->nowhere",
		"vmlinuz":                                   "->boot/vmlinuz-6.12.9-amd64",
	}), nil, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	if s.Name() != "Debian GNU/Linux 13 (trixie)" || s.Release["ODD"] != `a"b` || s.Release["ESC"] != `$x \y` || s.Release["BAD"] != "" {
		t.Errorf("release: %q", s.Release)
	}
	var got []string
	for _, k := range s.Kernels {
		got = append(got, k.Version+" "+k.Path+" "+k.InitrdPath)
	}
	want := "6.12.10-amd64 /boot/vmlinuz-6.12.10-amd64 /boot/initrd.img-6.12.10-amd64|" +
		"6.12.9-amd64 /boot/vmlinuz-6.12.9-amd64 /boot/initrd.img-6.12.9-amd64|" +
		"5.4.0 /usr/lib/modules/5.4.0/vmlinuz /usr/lib/modules/5.4.0/initramfs.img|" +
		"rescue /boot/EFI/Linux/rescue.efi "
	if strings.Join(got, "|") != want {
		t.Errorf("kernels:\n got %s\nwant %s", strings.Join(got, "|"), want)
	}
	if k, err := s.Kernel(""); err != nil || string(k.Linux.File.Inline) != "ten" {
		t.Errorf("the newest: %+v, %v", k, err)
	}
	if k, err := s.Kernel("5.4.0"); err != nil || string(k.Initrd.File.Inline) != "old initrd" {
		t.Errorf("by version: %+v, %v", k, err)
	}
	if _, err := s.Kernel("1.2.3"); !errors.Is(err, ErrNoKernel) || !strings.Contains(err.Error(), "6.12.9-amd64") {
		t.Errorf("an unknown version: %v", err)
	}
}

func TestFindNothing(t *testing.T) {
	s, err := Find(treeOf(map[string]string{"usr/": ""}), nil, "amd64")
	if err != nil || len(s.Kernels) != 0 || s.Name() != "Linux" {
		t.Fatalf("got %+v, %v", s, err)
	}
	if _, err := s.Kernel(""); !errors.Is(err, ErrNoKernel) {
		t.Errorf("got %v, want ErrNoKernel", err)
	}
}

func TestResolve(t *testing.T) {
	tr := treeOf(map[string]string{
		"usr/lib/x": "found", "lib": "->usr/lib", "a/b": "->../lib", "abs": "->/usr/lib/x",
		"out": "->../../../../usr/lib/x", "loop": "->loop", "ping": "->pong", "pong": "->ping",
	})
	for name, want := range map[string]string{
		"usr/lib/x": "found", "/lib/x": "found", "a/b/x": "found", "abs": "found", "out": "found", "./usr//lib/../lib/x": "found",
		"nothing": "no such file", "usr/lib/x/y": "no such file", "loop": "symbolic links", "ping/x": "symbolic links",
	} {
		n, err := resolve(tr, name)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = string(n.File.Inline)
		}
		if !strings.Contains(got, want) {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
}
