package bootloader

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// signedImage is an image with shim and a signed GRUB that looks in EFI/debian.
func signedImage(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range map[string]string{
		"usr/lib/shim/shimx64.efi.signed": "shim", "usr/lib/shim/mmx64.efi.signed": "mok",
		"usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed": "grub /EFI/debian\x00",
	} {
		putPrevious(t, root, name, text)
	}
	return root
}

// TestInstallGrubEFIPrevious: an ESP leads to the old system until it leads to our menu,
// which leads there, too.
func TestInstallGrubEFIPrevious(t *testing.T) {
	const (
		stub = "EFI/debian/grub.cfg"
		old  = "search.fs_uuid 1234 root\nset prefix=($root)'/boot/grub'\nconfigfile $prefix/grub.cfg\n"
	)
	root := signedImage(t)
	install := func(boot string) error {
		return grubEFIInstaller{}.Install(t.Context(), Target{Root: root, Boot: boot, BootUUID: "12-34"})
	}
	prepare := func() string {
		boot := bootDir(t)
		putPrevious(t, boot, stub, old)
		return boot
	}
	boot := prepare()
	for range 2 {
		if err := install(boot); err != nil {
			t.Fatal(err)
		}
	}
	const saved = "grub/particle-previous.cfg"
	if got := readMenu(t, boot, saved); got != old {
		t.Errorf("saved was %q, want %q", got, old)
	}
	if got := readMenu(t, boot, stub); got != grubStub("12-34") {
		t.Errorf("got %q, want %q", got, grubStub("12-34"))
	}
	if menu := readMenu(t, boot, "grub/grub.cfg"); strings.Count(menu, "\nmenuentry ") != 1 || !strings.Contains(menu, previousTitle) {
		t.Errorf("got menu\n%s", menu)
	}
	if got := readMenu(t, boot, "EFI/BOOT/BOOTX64.EFI"); got != "shim" {
		t.Errorf("got program %q", got)
	}
	want := tree(t, boot)
	n := 0
	for ; ; n++ {
		boot := prepare()
		if !killAt(t, n, func() error { return install(boot) }) {
			break
		}
		menu := readMenu(t, boot, "grub/grub.cfg")
		if readMenu(t, boot, stub) != old && (readMenu(t, boot, saved) != old || !strings.Contains(menu, previousTitle)) {
			t.Errorf("killed at step %d: nothing leads to the old system:\n%s", n, tree(t, boot))
		}
		if readMenu(t, boot, "EFI/BOOT/BOOTX64.EFI") != "" && readMenu(t, boot, stub) == old {
			t.Errorf("killed at step %d: the program is there before what it looks for", n)
		}
		if err := install(boot); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{stub: grubStub("12-34"), saved: old} {
			if got := readMenu(t, boot, name); got != text {
				t.Errorf("killed at step %d, done again: %s is %q, want %q", n, name, got, text)
			}
		}
	}
	if n < 10 {
		t.Errorf("only %d steps were seen of\n%s", n, want)
	}
}

// TestInstallESP: firmware reads no other file system.
func TestInstallESP(t *testing.T) {
	root := signedImage(t)
	putPrevious(t, root, "usr/lib/systemd/boot/efi/systemd-bootx64.efi", "boot")
	old := isFAT
	t.Cleanup(func() { isFAT = old })
	for _, fat := range []bool{false, true} {
		isFAT = func(string) bool { return fat }
		for _, name := range []string{"systemd-boot", "grub-efi"} {
			in, err := InstallerByName(name)
			if err != nil {
				t.Fatal(err)
			}
			boot := t.TempDir()
			err = in.Install(t.Context(), Target{Root: root, Boot: boot, Mounted: true})
			if fat && err != nil || !fat && (!errors.Is(err, ErrTarget) || tree(t, boot) != "") {
				t.Errorf("%s, FAT %t: got error %v and\n%s", name, fat, err, tree(t, boot))
			}
		}
	}
}

// TestCheckActive: the code of the first sector finds the partition by its attribute.
func TestCheckActive(t *testing.T) {
	for active, ok := range map[bool]map[int]bool{true: {1: true, 0: true, 2: false}, false: {1: false, 0: false}} {
		f, err := os.Open(newDisk(t, Layout{Active: active}).file)
		if err != nil {
			t.Fatal(err)
		}
		for number, ok := range ok {
			if err := checkActive(f, number); ok && err != nil || !ok && !errors.Is(err, ErrTarget) {
				t.Errorf("active %t, partition %d: got error %v", active, number, err)
			}
		}
		f.Close()
	}
	name := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(name, make([]byte, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := checkActive(f, 0); !errors.Is(err, ErrTarget) || !strings.Contains(err.Error(), "GPT") {
		t.Errorf("no GPT: got error %v, want %v", err, ErrTarget)
	}
}
