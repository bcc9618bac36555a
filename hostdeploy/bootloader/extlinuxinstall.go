package bootloader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/diskfs/go-diskfs/partition/gpt"
)

// plainExt4 has the features of an ext4 that extlinux, U-Boot and the GRUB of Debian 12
// can read, one by one, because mkfs.ext4 turns on others with each version:
// metadata_csum_seed stops GRUB 2.06, 64bit and metadata_csum stop older loaders.
var plainExt4 = []string{"-O", "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize"}

// extlinuxInstaller has the image's own extlinux make extlinux/ldlinux.sys on the mounted
// boot partition: that notes the sectors where it lies. The code of the master boot
// record looks for the partition with the attribute "legacy BIOS bootable".
type extlinuxInstaller struct{}

func (extlinuxInstaller) Layout() Layout { return Layout{Active: true, Ext4Options: plainExt4} }

func (extlinuxInstaller) Install(ctx context.Context, t Target) error {
	if err := installExtlinux(ctx, t); err != nil {
		return fmt.Errorf("installing extlinux: %w", err)
	}
	return nil
}

func installExtlinux(ctx context.Context, t Target) error {
	if !t.Mounted {
		return fmt.Errorf("%w: extlinux is installed to a mounted boot partition, got the directory %q", ErrTarget, t.Boot)
	}
	program, err := haveProgram(t.Root, "extlinux", "extlinux")
	if err != nil {
		return err
	}
	img, err := openImage(t.Root)
	if err != nil {
		return err
	}
	defer img.Close()
	code, err := img.first("usr/lib/syslinux/mbr/gptmbr.bin", "usr/lib/EXTLINUX/gptmbr.bin")
	if err != nil {
		return err
	}
	if code == nil {
		return fmt.Errorf("%w: the image has no /usr/lib/syslinux/mbr/gptmbr.bin (Debian package syslinux-common)", ErrMissing)
	}
	disk, err := t.disk()
	if err != nil {
		return err
	}
	defer disk.Close()
	if _, err := readBootSector(disk); err != nil {
		return err
	}
	if err := checkActive(disk, t.BootNumber); err != nil {
		return err
	}
	p := Paths{Boot: t.Boot}
	if err := p.installSettings(t.Serial); err != nil {
		return err
	}
	if err := makeDir(filepath.Join(t.Boot, "extlinux")); err != nil {
		return err
	}
	// It finds the device by /proc/mounts and writes to it.
	binds := []bind{{t.Boot, "boot"}, {"/proc", "proc"}, {"/dev", "dev"}, {"/sys", "sys"}}
	if _, err := run(ctx, t.Root, binds, program, "--install", "/boot/extlinux"); err != nil {
		return err
	}
	if _, err := os.Stat(p.ldlinux()); err != nil {
		return fmt.Errorf("extlinux left no ldlinux.sys: %w", err)
	}
	// A menu to choose from, where the image has it.
	for _, name := range []string{"libcom32.c32", "libutil.c32", "menu.c32"} {
		data, err := img.ReadFile(path.Join("usr/lib/syslinux/modules/bios", name))
		if errors.Is(err, fs.ErrNotExist) {
			break
		} else if err != nil {
			return err
		}
		if err := t.put(path.Join("extlinux", name), data); err != nil {
			return err
		}
	}
	if err := newExtlinux(p).Sync(); err != nil {
		return err
	}
	return writeBootCode(disk, code)
}

// checkActive looks whether gptmbr.bin would find the boot partition: it reads a GPT, and
// no other table, for one with the attribute "legacy BIOS bootable" (UEFI specification
// 2.10, table 5.8). A number of 0 is for one that is not known. The error is ErrTarget.
func checkActive(f *os.File, number int) error {
	const active = 1 << 2
	table, err := gpt.Read(f, sectorSize, sectorSize)
	if err != nil {
		return fmt.Errorf("%w: %q has no GPT, which extlinux is installed with here: %w", ErrTarget, f.Name(), err)
	}
	for _, p := range table.Partitions {
		if p.Type != gpt.Unused && p.Attributes&active != 0 && (number == 0 || p.Index == number) {
			return nil
		}
	}
	return fmt.Errorf("%w: the boot partition of %q lacks the attribute \"legacy BIOS bootable\"; sgdisk --attributes=NUMBER:set:2 sets it", ErrTarget, f.Name())
}

// ubootInstaller prepares a boot partition. U-Boot itself is on the board, or where the
// board's maker says.
type ubootInstaller struct{}

func (ubootInstaller) Layout() Layout { return Layout{Active: true, Ext4Options: plainExt4} }

func (ubootInstaller) Install(ctx context.Context, t Target) error {
	p := Paths{Boot: t.Boot}
	if err := p.installSettings(t.Serial); err != nil {
		return fmt.Errorf("installing for U-Boot: %w", err)
	}
	return uboot{entryDir{p}}.Sync()
}
