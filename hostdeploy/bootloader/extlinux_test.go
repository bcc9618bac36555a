package bootloader

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

func TestExtlinuxConfig(t *testing.T) {
	e := entry(2, &Counter{Left: 1})
	e.Title, e.Initrd, e.Options = " ^a 'b' ", []string{"/a", "/b"}, `x="y z" '$\`
	got := extlinuxConfig([]record{{Entry: e}, {Entry: entry(1, nil)}}, "particle-1", settings{timeout: 3, serial: "115200"}, true, nil)
	const want = `SERIAL 0 115200
# Made by Particle from loader/entries: changes are lost.
UI menu.c32
PROMPT 0
TIMEOUT 30
DEFAULT particle-1

LABEL particle-2
  MENU LABEL a 'b'
  LINUX /particle-2/vmlinuz
  INITRD /a,/b
  APPEND x="y z" '$\

LABEL particle-1
  MENU LABEL Debian (particle 1)
  LINUX /particle-1/vmlinuz
  INITRD /particle-1/initrd
  APPEND root=UUID=1 n=1
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestUBootConfig(t *testing.T) {
	e := entry(2, nil)
	e.Options = `a=$b 'c'`
	e.Extra = []bls.Field{{Key: "devicetree", Value: "x.dtb"}, {Key: "devicetree-overlay", Value: "/a.dtbo /b.dtbo"}}
	got := ubootConfig([]record{{Entry: e}, {Entry: entry(1, nil)}}, settings{timeout: 0}, map[string]bool{"/particle-1/dtbs": true}, nil)
	const want = `# Made by Particle from loader/entries: changes are lost.
menu title Particle
prompt 0
timeout 1
default particle-2

label particle-2
  menu label Debian (particle 2)
  linux /particle-2/vmlinuz
  initrd /particle-2/initrd
  fdt /x.dtb
  fdtoverlays /a.dtbo /b.dtbo
  append a=\$b \'c\'

label particle-1
  menu label Debian (particle 1)
  linux /particle-1/vmlinuz
  initrd /particle-1/initrd
  fdtdir /particle-1/dtbs
  append root=UUID=1 n=1
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestUBootTrees finds the directory of device trees beside a kernel, wherever the boot
// file system is mounted.
func TestUBootTrees(t *testing.T) {
	boot := t.TempDir()
	l := uboot{entryDir{Paths{Boot: boot, Prefix: "/boot"}}}
	if err := os.MkdirAll(filepath.Join(boot, "particle-1/dtbs"), 0o755); err != nil {
		t.Fatal(err)
	}
	e := entry(1, nil)
	e.Linux = "/boot/particle-1/vmlinuz"
	add(t, l, e)
	if menu := readMenu(t, boot, "extlinux/extlinux.conf"); !strings.Contains(menu, "\n  fdtdir /boot/particle-1/dtbs\n") {
		t.Errorf("got\n%s", menu)
	}
}

// ubootExpand does with a command line what U-Boot does, for one without variables that
// are set: the states of cli_simple_process_macros.
func ubootExpand(in string) string {
	var out strings.Builder
	var prev byte
	quoted := false
	for i := 0; i < len(in); i++ {
		c := in[i]
		if !quoted && c == '\\' && prev != '\\' {
			if i++; i == len(in) {
				break
			}
			prev, c = c, in[i]
		}
		switch {
		case !quoted && c == '\'' && prev != '\\':
			quoted = true
		case quoted && c == '\'' && prev != '\\':
			quoted = false
		case !quoted && c == '$' && prev != '\\':
			return out.String() + "<expanded>"
		default:
			out.WriteByte(c)
		}
		prev = c
	}
	return out.String()
}

func FuzzUBootQuote(f *testing.F) {
	for _, s := range []string{"a b", `\`, `\\`, `\\\$x'`, `$$''\$'\'`, `'a'\'b'`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got := ubootExpand(ubootQuote(s)); got != s {
			t.Fatalf("%q became %q by way of %q", s, got, ubootQuote(s))
		}
	})
}

func TestADV(t *testing.T) {
	items := []advItem{{2, []byte("menu")}, {advBootOnce, []byte("particle-12")}}
	data, err := formatADV(items)
	if err != nil {
		t.Fatal(err)
	}
	same := func(a, b advItem) bool { return a.tag == b.tag && bytes.Equal(a.data, b.data) }
	for _, broken := range []int{0, 100, 511, 512, 700, 1023} { // one copy is enough
		d := bytes.Clone(data)
		d[broken] ^= 1
		if got, err := parseADV(d); err != nil || !slices.EqualFunc(got, items, same) {
			t.Errorf("byte %d broken: got %q, %v", broken, got, err)
		}
	}
	d := bytes.Clone(data)
	d[9] ^= 1
	d[512+9] ^= 1
	if _, err := parseADV(d); !errors.Is(err, ErrMenu) {
		t.Errorf("both broken: got error %v, want %v", err, ErrMenu)
	}
	if _, err := formatADV([]advItem{{1, make([]byte, 255)}, {2, make([]byte, 255)}}); !errors.Is(err, ErrMenu) {
		t.Errorf("too much: got error %v, want %v", err, ErrMenu)
	}
	boot := t.TempDir()
	name := advFile(filepath.Join(boot, "extlinux/ldlinux.sys"))
	if err := name.arm("x"); !errors.Is(err, ErrMissing) {
		t.Errorf("no loader: got error %v, want %v", err, ErrMissing)
	}
	installFakeExtlinux(t, boot)
	before, _ := os.ReadFile(string(name))
	if err := name.arm("particle-1"); err != nil {
		t.Fatal(err)
	}
	if got, err := name.armed(); err != nil || got != "particle-1" {
		t.Errorf("got %q, %v", got, err)
	}
	if err := name.arm(""); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.ReadFile(string(name)); !bytes.Equal(after, before) {
		t.Error("ldlinux.sys is not what it was")
	}
}

func FuzzADV(f *testing.F) {
	empty, err := formatADV(nil)
	if err != nil {
		f.Fatal(err)
	}
	one, err := formatADV([]advItem{{1, []byte("x")}, {255, nil}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(empty[8 : advSize-4])
	f.Add(one[8 : advSize-4])
	f.Fuzz(func(t *testing.T, body []byte) {
		// A body with the right marks, whatever is in it.
		c := make([]byte, advSize-12)
		copy(c, body)
		items := advItems(c)
		data, err := formatADV(items)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseADV(data)
		if err != nil || !slices.EqualFunc(again, items, func(a, b advItem) bool { return a.tag == b.tag && bytes.Equal(a.data, b.data) }) {
			t.Fatalf("got %q, %v, want %q", again, err, items)
		}
		parseADV(body)
	})
}
