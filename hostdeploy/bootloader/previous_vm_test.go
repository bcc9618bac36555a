package bootloader

import (
	"errors"
	"slices"
	"testing"
)

// TestBootPrevious boots the system that was there before, by way of our menu: by itself
// where there is no entry of ours, and after one that cannot be loaded.
func TestBootPrevious(t *testing.T) {
	loaders := loadersDir(t)
	needRoot(t)
	for _, lost := range []bool{false, true} {
		in := grubBIOSInstaller{}
		d := newDisk(t, in.Layout())
		boot := t.TempDir()
		putPrevious(t, boot, "grub/grub.cfg", "set default=1\nset timeout=0\nmenuentry none { true }\n"+
			"menuentry Debian {\n  linux /particle-k/vmlinuz console=ttyS0 quiet panic=-1 n=99\n  initrd /particle-k/initrd\n}\n")
		target := Target{Root: loaders, Boot: boot, Disk: d.file, BootNumber: d.number, BIOSBootStart: mib, BIOSBootSize: mib, Serial: "115200"}
		if err := in.Install(t.Context(), target); errors.Is(err, ErrMissing) {
			t.Skip(err)
		} else if err != nil {
			t.Fatal(err)
		}
		fast(t, boot)
		putSystem(t, loaders, boot)
		if lost {
			e := vmEntry(1, "")
			e.Linux = "/particle-k/missing"
			add(t, grub{entryDir{Paths{Boot: boot}}, "grub-bios"}, e)
		}
		d.fill(t, in.Layout(), boot)
		if got, want := numbers(d.run(t, seaBIOS(t)...)), []string{"99"}; !slices.Equal(got, want) {
			t.Errorf("a kernel that is missing: %t: booted %q, want %q", lost, got, want)
		}
	}
}

// TestBootPreviousExtlinux is the same for extlinux, which has no fall back from a kernel
// that is missing.
func TestBootPreviousExtlinux(t *testing.T) {
	loaders := loadersDir(t)
	needRoot(t)
	d, boot, finish := mountedDisk(t, extlinuxInstaller{}.Layout())
	putPrevious(t, boot.dir, "extlinux/extlinux.conf", "DEFAULT l0\nPROMPT 0\nTIMEOUT 1\nLABEL l0\n  LINUX /particle-k/vmlinuz\n"+
		"  INITRD /particle-k/initrd\n  APPEND console=ttyS0 quiet panic=-1 n=99\n")
	target := Target{Root: loaders, Boot: boot.dir, Mounted: true, Disk: d.file, BootDevice: boot.device, BootNumber: d.number, Serial: "115200"}
	if err := (extlinuxInstaller{}).Install(t.Context(), target); errors.Is(err, ErrMissing) {
		t.Skip(err)
	} else if err != nil {
		t.Fatal(err)
	}
	putSystem(t, loaders, boot.dir)
	finish()
	if got, want := numbers(d.run(t, seaBIOS(t)...)), []string{"99"}; !slices.Equal(got, want) {
		t.Errorf("booted %q, want %q", got, want)
	}
}
