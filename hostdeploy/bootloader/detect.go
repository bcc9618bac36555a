package bootloader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf16"
)

// loaders is the table of what there is. GRUB has two names, since installing it under
// UEFI and under BIOS are two things; as a menu they are one.
var loaders = []struct {
	name      string
	loader    func(name string, p Paths) Loader
	installer Installer
}{
	{"systemd-boot", func(_ string, p Paths) Loader { return systemdBoot{entryDir{p}} }, systemdBootInstaller{}},
	{"grub-efi", newGrub, grubEFIInstaller{}},
	{"grub-bios", newGrub, grubBIOSInstaller{}},
	{"extlinux", func(_ string, p Paths) Loader { return newExtlinux(p) }, extlinuxInstaller{}},
	{"u-boot", func(_ string, p Paths) Loader { return uboot{entryDir{p}} }, ubootInstaller{}},
	{"lilo", func(_ string, p Paths) Loader { return newLilo(p) }, liloInstaller{}},
}

func newGrub(name string, p Paths) Loader { return grub{entryDir{p}, name} }

// Names returns what ByName and InstallerByName take.
func Names() []string {
	names := make([]string, len(loaders))
	for i, l := range loaders {
		names[i] = l.name
	}
	return names
}

// ByName returns a loader's menu. "grub" is taken for either GRUB. The error is ErrUnknown.
func ByName(name string, p Paths) (Loader, error) {
	for _, l := range loaders {
		if l.name == name {
			return l.loader(name, p), nil
		}
	}
	if name == "grub" {
		return newGrub(name, p), nil
	}
	return nil, unknown(name)
}

// InstallerByName returns what installs a loader. The error is ErrUnknown.
func InstallerByName(name string) (Installer, error) {
	for _, l := range loaders {
		if l.name == name {
			return l.installer, nil
		}
	}
	return nil, unknown(name)
}

func unknown(name string) error {
	return fmt.Errorf("%w: got %q, want one of %s", ErrUnknown, name, strings.Join(Names(), ", "))
}

// Detect finds the loader that booted the running system. Errors are ErrNone, which says
// what was looked for, and ErrBootDir.
func Detect(p Paths) (Loader, error) { return DetectIn(p, "/sys") }

// DetectIn is Detect with another directory in the place of /sys.
//
// What the loader itself said in the EFI variable LoaderInfo comes first
// (https://systemd.io/BOOT_LOADER_INTERFACE/), then what lies on the boot file system.
// What the loader said is not enough: it may read another directory than this one.
// systemd-boot reads the ESP and the XBOOTLDR partition, and of file systems FAT, unless
// someone gave it a driver for another one: that someone can name the loader.
func DetectIn(p Paths, sys string) (Loader, error) {
	_, err := os.Stat(filepath.Join(sys, "firmware", "efi"))
	efi := err == nil
	if efi {
		info := loaderInfo(sys)
		switch {
		case strings.HasPrefix(info, "systemd-boot "):
			if !isFAT(p.Boot) {
				return nil, fmt.Errorf("%w: systemd-boot booted this system and reads FAT alone, which %q is not; mount the EFI system partition there (umount /boot/efi, say, and mount it at /boot), or --bootloader names the loader that shall be used",
					ErrBootDir, p.Boot)
			}
			return ByName("systemd-boot", p)
		case strings.HasPrefix(info, "GRUB "):
			if found, err := globFold(p.Boot, "grub/grub*"); err != nil {
				return nil, fmt.Errorf("looking for GRUB's files: %w", err)
			} else if !found {
				return nil, fmt.Errorf("%w: GRUB booted this system, and %q has no grub/grub.cfg; mount there what GRUB reads, or --bootloader names the loader that shall be used",
					ErrBootDir, p.Boot)
			}
			return ByName("grub-efi", p)
		}
	}
	var tried []string
	for _, c := range []struct {
		name    string
		efi     bool // only under UEFI
		bios    bool // never under UEFI
		pattern string
	}{
		{"systemd-boot", true, false, "EFI/systemd/systemd-boot*.efi"},
		{"grub-efi", true, false, "grub/grub.cfg"},
		{"grub-bios", false, true, "grub/grub.cfg"},
		{"extlinux", false, true, "extlinux/ldlinux.sys"},
		{"lilo", false, true, "lilo/lilo.conf"},
		{"u-boot", false, false, "extlinux/extlinux.conf"},
	} {
		if c.efi && !efi || c.bios && efi {
			continue
		}
		if c.name == "systemd-boot" && !isFAT(p.Boot) {
			tried = append(tried, fmt.Sprintf("%s (%s is not FAT)", c.name, p.Boot))
			continue
		}
		found, err := globFold(p.Boot, c.pattern)
		if err != nil {
			return nil, fmt.Errorf("looking for a boot loader: %w", err)
		}
		if found {
			return ByName(c.name, p)
		}
		tried = append(tried, fmt.Sprintf("%s (%s)", c.name, filepath.Join(p.Boot, c.pattern)))
	}
	how := "a BIOS machine's"
	if efi {
		how = "a UEFI machine's, whose LoaderInfo names none of them,"
	}
	return nil, fmt.Errorf("%w: %s loader was looked for: %s", ErrNone, how, strings.Join(tried, ", "))
}

// loaderInfo reads the name and version that the loader left in an EFI variable: four
// bytes of attributes, then UTF-16 with a zero at its end. "" for none.
func loaderInfo(sys string) string {
	data, err := os.ReadFile(filepath.Join(sys, "firmware", "efi", "efivars", "LoaderInfo-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"))
	if err != nil || len(data) < 4 {
		return ""
	}
	var text []uint16
	for data = data[4:]; len(data) >= 2; data = data[2:] {
		text = append(text, binary.LittleEndian.Uint16(data))
	}
	return strings.TrimRight(string(utf16.Decode(text)), "\x00")
}

// globFold reports whether a file matches a pattern, in any case: FAT keeps none, and
// other programs write there, too.
func globFold(dir, pattern string) (bool, error) {
	head, rest, deeper := strings.Cut(pattern, "/")
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	for _, e := range list {
		if ok, err := filepath.Match(strings.ToLower(head), strings.ToLower(e.Name())); err != nil || !ok {
			continue
		}
		if !deeper {
			return true, nil
		}
		if !e.IsDir() {
			continue
		}
		if ok, err := globFold(filepath.Join(dir, e.Name()), rest); ok || err != nil {
			return ok, err
		}
	}
	return false, nil
}
