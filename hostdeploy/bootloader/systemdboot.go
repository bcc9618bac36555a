package bootloader

import (
	"context"
	"fmt"
	"path"
	"strings"
)

// systemdBoot is systemd-boot(7). It reads the entries itself and counts in the names of
// their files: at each boot it renames "particle-12+3.conf" to "particle-12+2-1.conf",
// and systemd-bless-boot(8) may take the counter away before Good does.
type systemdBoot struct{ entryDir }

func (systemdBoot) Name() string { return "systemd-boot" }

func (systemdBoot) Tries() Tries {
	return Tries{Max: 100, How: "in the names of the entries' files"}
}

func (l systemdBoot) Entries(warn func(format string, args ...any)) ([]Entry, error) {
	records, _, err := l.read(warn)
	return entriesOf(records), err
}

func (l systemdBoot) Check(e Entry) error { return e.check(l.Tries().Max, true) }

func (l systemdBoot) Add(e Entry) error {
	if err := l.Check(e); err != nil {
		return err
	}
	if err := l.write(&e, e.Counter); err != nil {
		return err
	}
	// Last, since what was the default may be all that boots so far.
	if err := l.p.freeOrder(); err != nil {
		return err
	}
	return settle(l.p.Boot)
}

func (l systemdBoot) Remove(id string) error {
	if err := l.remove(id); err != nil {
		return err
	}
	return settle(l.p.Boot)
}

func (l systemdBoot) Good(id string) error {
	if err := l.good(id); err != nil {
		return err
	}
	return settle(l.p.Boot)
}

func (l systemdBoot) Sync() error {
	if err := l.tidy(); err != nil {
		return err
	}
	if err := l.p.freeOrder(); err != nil {
		return err
	}
	return settle(l.p.Boot)
}

// systemdBootInstaller copies systemd-boot to where firmware looks when it has no boot
// variable: EFI/BOOT. A random seed is not written: one in an image would be shared.
type systemdBootInstaller struct{}

func (systemdBootInstaller) Layout() Layout { return Layout{ESP: true} }

func (systemdBootInstaller) Install(ctx context.Context, t Target) error {
	if err := installSystemdBoot(t); err != nil {
		return fmt.Errorf("installing systemd-boot: %w", err)
	}
	return settle(t.Boot)
}

func installSystemdBoot(t Target) error {
	const dir = "usr/lib/systemd/boot/efi"
	img, err := openImage(t.Root)
	if err != nil {
		return err
	}
	defer img.Close()
	for _, a := range efiArchs {
		name := "systemd-boot" + a.name + ".efi"
		// A signed one is for Secure Boot; firmware without it takes either.
		data, err := img.first(path.Join(dir, name+".signed"), path.Join(dir, name))
		if err != nil {
			return err
		}
		if data == nil {
			continue
		}
		if err := t.checkESP(); err != nil {
			return err
		}
		for _, to := range []string{path.Join("EFI/systemd", name), a.fallback()} {
			if err := t.put(to, data); err != nil {
				return err
			}
		}
		return Paths{Boot: t.Boot}.installSettings(t.Serial)
	}
	return fmt.Errorf("%w: the image has no /%s/systemd-boot*.efi (Debian package systemd-boot-efi)", ErrMissing, dir)
}

// efiArch is a machine type as UEFI programs have it in their names (UEFI
// specification, "Removable Media Boot Behavior"), and as GRUB names it.
type efiArch struct{ name, grub string }

var efiArchs = []efiArch{{"x64", "x86_64-efi"}, {"aa64", "arm64-efi"}, {"ia32", "i386-efi"}, {"riscv64", "riscv64-efi"}}

// fallback is the path that firmware boots from without a boot variable.
func (a efiArch) fallback() string { return "EFI/BOOT/BOOT" + strings.ToUpper(a.name) + ".EFI" }
