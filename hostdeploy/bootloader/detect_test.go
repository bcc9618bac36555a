package bootloader

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf16"
)

// fakeMachine makes a /sys and a boot directory.
func fakeMachine(t *testing.T, efi bool, info string, files []string) (sys, boot string) {
	t.Helper()
	sys, boot = t.TempDir(), t.TempDir()
	write := func(dir, name string, data []byte) {
		t.Helper()
		full := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if efi {
		write(sys, "firmware/efi/x", nil)
	}
	if info != "" {
		data := []byte{6, 0, 0, 0}
		for _, u := range utf16.Encode([]rune(info + "\x00")) {
			data = append(data, byte(u), byte(u>>8))
		}
		write(sys, "firmware/efi/efivars/LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f", data)
	}
	for _, name := range files {
		write(boot, name, nil)
	}
	return sys, boot
}

// TestDetectOtherDirectory: a loader that booted the system may not read the directory
// that is called the boot file system.
func TestDetectOtherDirectory(t *testing.T) {
	stray := []string{"EFI/systemd/systemd-bootx64.efi"}
	for _, c := range []struct {
		name, info string
		files      []string
		fat        bool
		want       error
		say        string
	}{
		{"systemd-boot's ESP is elsewhere", "systemd-boot 257", stray, false, ErrBootDir, "mount the EFI system partition"},
		{"a copy of systemd-boot beside GRUB", "", append([]string{"grub/grub.cfg"}, stray...), false, nil, "grub-efi"},
		{"a copy of systemd-boot alone", "", stray, false, ErrNone, "is not FAT"},
		{"GRUB's files are elsewhere", "GRUB 2.12", stray, true, ErrBootDir, "grub/grub.cfg"},
	} {
		sys, boot := fakeMachine(t, true, c.info, c.files)
		old := isFAT
		isFAT = func(string) bool { return c.fat }
		l, err := DetectIn(Paths{Boot: boot}, sys)
		isFAT = old
		if !errors.Is(err, c.want) || err == nil && l.Name() != c.say || err != nil && !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: got %v, %v, want %v and %q", c.name, l, err, c.want, c.say)
		}
		if errors.Is(err, ErrBootDir) && !strings.Contains(err.Error(), "--bootloader") {
			t.Errorf("%s: the error does not say what to do: %v", c.name, err)
		}
	}
}

func TestDetect(t *testing.T) {
	fakeFAT(t)
	for _, c := range []struct {
		name, want, info string
		efi              bool
		files            []string
	}{
		{"systemd-boot says so", "systemd-boot", "systemd-boot 257.13-1~deb13u1", true, []string{"grub/grub.cfg"}},
		{"GRUB says so", "grub-efi", "GRUB 2.12", true, []string{"EFI/systemd/systemd-bootx64.efi", "grub/grubenv"}},
		{"systemd-boot's file", "systemd-boot", "", true, []string{"EFI/SYSTEMD/SYSTEMD-BOOTX64.EFI", "grub/grub.cfg"}},
		{"another one says so", "grub-efi", "refind", true, []string{"grub/grub.cfg"}},
		{"GRUB under BIOS", "grub-bios", "", false, []string{"grub/grub.cfg", "EFI/systemd/systemd-bootx64.efi"}},
		{"extlinux", "extlinux", "", false, []string{"extlinux/ldlinux.sys", "extlinux/extlinux.conf"}},
		{"U-Boot", "u-boot", "", false, []string{"extlinux/extlinux.conf"}},
		{"U-Boot with EFI", "u-boot", "", true, []string{"extlinux/extlinux.conf"}},
		{"LILO", "lilo", "", false, []string{"lilo/lilo.conf"}},
		{"nothing", "", "", false, []string{"loader/loader.conf"}},
		{"nothing under UEFI", "", "", true, []string{"extlinux/ldlinux.sys"}},
	} {
		sys, boot := fakeMachine(t, c.efi, c.info, c.files)
		l, err := DetectIn(Paths{Boot: boot}, sys)
		if c.want == "" {
			if !errors.Is(err, ErrNone) || !strings.Contains(err.Error(), "grub/grub.cfg") {
				t.Errorf("%s: got error %v, want %v and what was looked for", c.name, err, ErrNone)
			}
		} else if err != nil || l.Name() != c.want {
			t.Errorf("%s: got %v, %v, want %s", c.name, l, err, c.want)
		}
	}
	for _, name := range []string{"", "grub-legacy"} {
		if _, err := ByName(name, Paths{}); !errors.Is(err, ErrUnknown) || !strings.Contains(err.Error(), "extlinux") {
			t.Errorf("%q: got error %v, want %v and the names", name, err, ErrUnknown)
		}
		if _, err := InstallerByName(name); !errors.Is(err, ErrUnknown) {
			t.Errorf("%q: got error %v, want %v", name, err, ErrUnknown)
		}
	}
	if l, err := ByName("grub", Paths{}); err != nil || l.Name() != "grub" {
		t.Errorf("grub: got %v, %v", l, err)
	}
}

// TestInstallMissing: an image without the loader is refused, with the package's name.
func TestInstallMissing(t *testing.T) {
	for _, name := range Names() {
		in, err := InstallerByName(name)
		if err != nil {
			t.Fatal(err)
		}
		boot := t.TempDir()
		target := Target{Root: t.TempDir(), Boot: boot, Mounted: true, BIOSBootStart: mib, BIOSBootSize: mib, BootNumber: 2}
		err = in.Install(t.Context(), target)
		if name == "u-boot" { // it is on the board
			if err != nil {
				t.Error(err)
			}
			continue
		}
		if !errors.Is(err, ErrMissing) || name != "lilo" && !strings.Contains(err.Error(), "Debian package") {
			t.Errorf("%s: got error %v, want %v and a package", name, err, ErrMissing)
		}
		if left := tree(t, boot); left != "" {
			t.Errorf("%s left\n%s", name, left)
		}
	}
}

// TestInstallLinks: a link in the image does not lead out of it.
func TestInstallLinks(t *testing.T) {
	root, boot, secret := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(root, "usr/lib/systemd/boot/efi")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(secret, filepath.Join(dir, "systemd-bootx64.efi")); err != nil {
		t.Fatal(err)
	}
	err := systemdBootInstaller{}.Install(t.Context(), Target{Root: root, Boot: boot})
	if err == nil || strings.Contains(tree(t, boot), "secret") {
		t.Errorf("got error %v and\n%s", err, tree(t, boot))
	}
}

// TestBootCode keeps the disk's signature and partition table.
func TestBootCode(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk")
	sector := make([]byte, 1024)
	for i := range sector {
		sector[i] = byte(i)
	}
	clear(sector[446:510])
	sector[446], sector[446+4] = 0x80, 0xee
	if err := os.WriteFile(name, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := Target{Disk: name}.disk()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := writeBootCode(f, []byte("code")); !errors.Is(err, ErrTarget) {
		t.Errorf("no partition table: got error %v, want %v", err, ErrTarget)
	}
	sector[510], sector[511] = 0x55, 0xaa
	if err := os.WriteFile(name, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeBootCode(f, []byte("code")); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	clear(sector[:440])
	copy(sector, "code")
	if string(got) != string(sector) {
		t.Errorf("got %x, want %x", got, sector)
	}
	// A file system's first sector: no type in the place of the table, or no table.
	for _, c := range []struct{ at, value byte }{{4, 0}, {16, 0x33}} {
		broken := slices.Clone(sector)
		broken[446+int(c.at)] = c.value
		if err := os.WriteFile(name, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := writeBootCode(f, []byte("code")); !errors.Is(err, ErrTarget) || !strings.Contains(err.Error(), "whole disk") {
			t.Errorf("a partition: got error %v, want %v", err, ErrTarget)
		}
		if got, err := os.ReadFile(name); err != nil || string(got) != string(broken) {
			t.Errorf("a partition was written to: %v", err)
		}
	}
	if err := os.WriteFile(name, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeBootCode(f, make([]byte, 441)); !errors.Is(err, ErrMissing) {
		t.Errorf("too much code: got error %v, want %v", err, ErrMissing)
	}
	if _, err := (Target{}).disk(); !errors.Is(err, ErrTarget) {
		t.Errorf("no disk: got error %v, want %v", err, ErrTarget)
	}
}
