package bootloader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var liloLines = regexp.MustCompile(`(?m)^(default|  label) = .*\n`)

// fakeLilo stands in for lilo: it keeps the labels in the map, as lilo does with the
// kernels, and refuses to boot once what is not there.
func fakeLilo(args ...string) error {
	if len(args) < 2 || args[0] != "-C" {
		return fmt.Errorf("lilo got %q", args)
	}
	dir := filepath.Dir(args[1])
	switch {
	case len(args) == 2:
		conf, err := os.ReadFile(args[1])
		if err != nil {
			return err
		}
		os.Remove(filepath.Join(dir, "map.once"))
		return os.WriteFile(filepath.Join(dir, "map"), []byte(strings.Join(liloLines.FindAllString(string(conf), -1), "")), 0o644)
	case args[2] != "-R":
		return fmt.Errorf("lilo got %q", args)
	case len(args) == 3:
		os.Remove(filepath.Join(dir, "map.once"))
		return nil
	}
	labels, err := os.ReadFile(filepath.Join(dir, "map"))
	if err != nil {
		return err
	}
	if !strings.Contains(string(labels), "  label = "+args[3]+"\n") {
		return fmt.Errorf("lilo has no label %q", args[3])
	}
	return os.WriteFile(filepath.Join(dir, "map.once"), []byte(args[3]), 0o644)
}

func installFakeLilo(t *testing.T, boot string) {
	t.Helper()
	oldID, oldDisk, oldExec := bootID, wholeDisk, execLilo
	t.Cleanup(func() { bootID, wholeDisk, execLilo = oldID, oldDisk, oldExec })
	bootID = filepath.Join(t.TempDir(), "boot_id")
	wholeDisk = func(string) (string, error) { return "/dev/sda", nil }
	execLilo = fakeLilo
	if err := os.WriteFile(bootID, []byte("0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func nextLilo(t *testing.T, boot string) string {
	t.Helper()
	if once := readMenu(t, boot, "lilo/map.once"); once != "" {
		return once
	}
	return menuDefault(readMenu(t, boot, "lilo/map"), "default = ")
}

func bootLilo(t *testing.T, boot, id string) {
	t.Helper()
	os.Remove(filepath.Join(boot, "lilo/map.once"))
	old, err := os.ReadFile(bootID)
	if err == nil {
		err = os.WriteFile(bootID, append([]byte("1"), old...), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestLiloProgram runs a program of that name and looks at what it is called with.
func TestLiloProgram(t *testing.T) {
	boot, bin := t.TempDir(), t.TempDir()
	run := execLilo
	installFakeLilo(t, boot)
	execLilo = run
	t.Setenv("PATH", bin)
	l := newLilo(Paths{Boot: boot, Prefix: "/boot"})
	e := entry(12, nil)
	e.Linux, e.Initrd = "/boot"+e.Linux, []string{"/boot/initrd"}
	e.Options = `a="b c" d=\e`
	if err := l.Add(e); !errors.Is(err, ErrMissing) {
		t.Errorf("without a lilo: got error %v, want %v", err, ErrMissing)
	}
	script := "#!/bin/sh\necho \"$@\" >>" + bin + "/log\nif test -e " + bin + "/fail; then echo broken >&2; exit 1; fi\n"
	if err := os.WriteFile(filepath.Join(bin, "lilo"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := l.Add(e); err != nil {
		t.Fatal(err)
	}
	c := e
	c.ID, c.Generation, c.Counter = "particle-13", 13, &Counter{Left: 1}
	if err := l.Add(c); err != nil {
		t.Fatal(err)
	}
	if err := l.Sync(); err != nil { // nothing to do
		t.Fatal(err)
	}
	log, err := os.ReadFile(filepath.Join(bin, "log"))
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(boot, "lilo/lilo.conf")
	if want := fmt.Sprintf("-C %[1]s\n-C %[1]s\n-C %[1]s -R particle-13\n", conf); string(log) != want {
		t.Errorf("lilo was called with\n%swant\n%s", log, want)
	}
	want := strings.ReplaceAll(`# Made by Particle from loader/entries: changes are lost.
boot = /dev/sda
map = BOOT/lilo/map
lba32
install = menu
prompt
timeout = 30
default = particle-12

image = BOOT/particle-12/vmlinuz
  label = particle-13
  initrd = BOOT/initrd
  literal = "a=\"b c\" d=\\e"

image = BOOT/particle-12/vmlinuz
  label = particle-12
  initrd = BOOT/initrd
  literal = "a=\"b c\" d=\\e"
`, "BOOT", boot)
	if got := readMenu(t, boot, "lilo/lilo.conf"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if err := os.WriteFile(filepath.Join(bin, "fail"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := l.Remove("particle-12"); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("got error %v, want what lilo said", err)
	}
	long := entry(1234567, nil)
	if err := l.Add(long); !errors.Is(err, ErrEntry) {
		t.Errorf("a long label: got error %v, want %v", err, ErrEntry)
	}
}

func TestDiskOf(t *testing.T) {
	sys := t.TempDir()
	part := filepath.Join(sys, "devices/pci/block/cciss!c0d0/cciss!c0d0p2")
	for _, dir := range []string{part, filepath.Join(sys, "dev/block")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(part, "partition"), []byte("2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for link, to := range map[string]string{"104:2": part, "104:0": filepath.Dir(part)} {
		if err := os.Symlink(to, filepath.Join(sys, "dev/block", link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, minor := range []uint32{0, 2} {
		if got, err := diskOf(sys, 104, minor); err != nil || got != "/dev/cciss/c0d0" {
			t.Errorf("104:%d: got %q, %v", minor, got, err)
		}
	}
	if _, err := diskOf(sys, 1, 1); err == nil {
		t.Error("a device that is not there has a disk")
	}
}
