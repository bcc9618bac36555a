package bootloader

import (
	"context"
	"encoding/binary"
	"fmt"
	"path"
	"path/filepath"
	"regexp"
	"strings"
)

// grubModules are what the menu needs, and what someone needs who has to repair it.
const grubModules = "normal configfile linux boot chain loadenv test true echo ls cat sleep halt reboot minicmd " +
	"search search_fs_uuid search_fs_file search_label part_gpt part_msdos fat ext2 serial terminal"

// installGrub writes the menu without entries, and the environment block.
func installGrub(t Target) error {
	p := Paths{Boot: t.Boot}
	if err := p.installSettings(t.Serial); err != nil {
		return err
	}
	return grub{entryDir{p}, "grub"}.Sync()
}

// grubEFIInstaller puts GRUB on an ESP: Debian's signed one behind shim where the image
// has both, so that Secure Boot works; else one made by the image's grub-mkimage.
type grubEFIInstaller struct{}

func (grubEFIInstaller) Layout() Layout { return Layout{ESP: true} }

func (grubEFIInstaller) Install(ctx context.Context, t Target) error {
	if err := installGrubEFI(ctx, t); err != nil {
		return fmt.Errorf("installing GRUB for UEFI: %w", err)
	}
	return nil
}

func installGrubEFI(ctx context.Context, t Target) error {
	img, err := openImage(t.Root)
	if err != nil {
		return err
	}
	defer img.Close()
	vendor, files, err := grubSigned(img)
	if err == nil && files == nil {
		vendor = "debian"
		files, err = grubUnsigned(ctx, t, img)
	}
	if err != nil {
		return err
	}
	if err := t.checkESP(); err != nil {
		return err
	}
	// The way to the old system goes through the file that leads to the menu, where the
	// menu itself is on another file system. That file, and the programs that look for it,
	// come after what they lead to.
	stub := path.Join("EFI", vendor, "grub.cfg")
	p := Paths{Boot: t.Boot}
	menu := grub{entryDir{p}, "grub-efi"}.cfg()
	if err := savePrevious(menu, menu); err != nil {
		return err
	}
	if err := savePrevious(menu, filepath.Join(t.Boot, stub)); err != nil {
		return err
	}
	if err := installGrub(t); err != nil {
		return err
	}
	for _, f := range append([]efiFile{{stub, []byte(grubStub(t.BootUUID))}}, files...) {
		if err := t.put(f.name, f.data); err != nil {
			return err
		}
	}
	return settle(t.Boot)
}

// An efiFile is a file of the ESP.
type efiFile struct {
	name string
	data []byte
}

// uuid matches what blkid(8) prints for a file system: hexadecimal digits and "-".
var uuid = regexp.MustCompile(`^[0-9A-Fa-f-]+$`)

// grubStub is the grub.cfg that the EFI program looks for: it hands over to the menu.
// Without a UUID, and where the search finds nothing, $root is where the program itself
// was loaded from.
func grubStub(bootUUID string) string {
	var b strings.Builder
	b.WriteString(madeByUs + "\n")
	if uuid.MatchString(bootUUID) {
		fmt.Fprintf(&b, "search --no-floppy --fs-uuid --set=root %s\n", bootUUID)
	}
	b.WriteString("set prefix=($root)/grub\nconfigfile $prefix/grub.cfg\n")
	return b.String()
}

// efiVendor matches the directory that a signed GRUB has its prefix in.
var efiVendor = regexp.MustCompile(`/EFI/([a-z]+)\x00`)

// grubSigned returns shim and the signed GRUB in the order in which they are to be
// written, and the directory below EFI where that looks for its grub.cfg. There are no
// files where the image lacks one of them.
func grubSigned(img image) (vendor string, files []efiFile, err error) {
	for _, a := range efiArchs {
		shim, err := img.first(fmt.Sprintf("usr/lib/shim/shim%s.efi.signed", a.name))
		if err != nil {
			return "", nil, err
		}
		program, err := img.first(fmt.Sprintf("usr/lib/grub/%s-signed/grub%s.efi.signed", a.grub, a.name))
		if err != nil {
			return "", nil, err
		}
		if shim == nil || program == nil {
			continue
		}
		// MokManager, which shim starts to enrol keys.
		mok, err := img.first(fmt.Sprintf("usr/lib/shim/mm%s.efi.signed", a.name), fmt.Sprintf("usr/lib/shim/mm%s.efi", a.name))
		if err != nil {
			return "", nil, err
		}
		// shim last: without it firmware starts none of them.
		for _, f := range []efiFile{{fmt.Sprintf("EFI/BOOT/mm%s.efi", a.name), mok}, {fmt.Sprintf("EFI/BOOT/grub%s.efi", a.name), program}, {a.fallback(), shim}} {
			if f.data != nil {
				files = append(files, f)
			}
		}
		if m := efiVendor.FindSubmatch(program); m != nil {
			return string(m[1]), files, nil
		}
		return "debian", files, nil
	}
	return "", nil, nil
}

// grubUnsigned makes an EFI program of the image's modules.
func grubUnsigned(ctx context.Context, t Target, img image) ([]efiFile, error) {
	for _, a := range efiArchs {
		dir := path.Join("usr/lib/grub", a.grub)
		if _, err := img.Stat(path.Join(dir, "moddep.lst")); err != nil {
			continue
		}
		mkimage, err := haveProgram(t.Root, "grub-mkimage", "grub-common")
		if err != nil {
			return nil, err
		}
		args := []string{mkimage, "-O", a.grub, "-d", "/" + dir, "-p", "/EFI/debian"}
		data, err := run(ctx, t.Root, nil, append(args, strings.Fields(grubModules+" all_video font gfxterm efifwsetup")...)...)
		if err != nil {
			return nil, err
		}
		return []efiFile{{a.fallback(), data}}, nil
	}
	return nil, fmt.Errorf("%w: the image has neither shim and a signed GRUB nor /usr/lib/grub/*-efi (Debian packages shim-signed and grub-efi-amd64-signed, or grub-efi-amd64-bin)", ErrMissing)
}

// grubBIOSInstaller puts GRUB into the master boot record and the BIOS boot partition.
//
// It does what grub-bios-setup does for such a partition (util/setup.c of GRUB 2.12), but
// needs no device that the kernel knows, so it works on a file:
//
//   - boot.img is the code of the first sector. At 0x5c it gets the sector where the core
//     begins (u64), and the jump at 0x66 becomes two NOPs, so that a BIOS that passes a
//     wrong drive number is not believed (include/grub/i386/pc/boot.h).
//   - The core's first sector, diskboot.img, loads the rest. It ends in a list of blocks of
//     12 bytes: first sector (u64), number of sectors (u16), segment to load to (u16). The
//     core lies in one piece, so the last of these, at 500, is all that is needed; its
//     segment is 0x820 (grub-core/boot/i386/pc/diskboot.S).
//
// Reed-Solomon codes, which grub-bios-setup adds for disks whose gap others write to, are
// left out: the partition is ours.
type grubBIOSInstaller struct{}

func (grubBIOSInstaller) Layout() Layout { return Layout{BIOSBoot: true, Ext4Options: plainExt4} }

func (grubBIOSInstaller) Install(ctx context.Context, t Target) error {
	if err := installGrubBIOS(ctx, t); err != nil {
		return fmt.Errorf("installing GRUB for BIOS: %w", err)
	}
	return nil
}

const (
	sectorSize        = 512
	grubKernelSector  = 0x5c
	grubDriveCheck    = 0x66
	grubBlockList     = sectorSize - 12
	grubKernelSegment = 0x820
	grubMaxCore       = 0xffff * sectorSize
	grubBIOSDir       = "usr/lib/grub/i386-pc"
	grubBIOSModules   = grubModules + " biosdisk"
)

func installGrubBIOS(ctx context.Context, t Target) error {
	if t.BIOSBootStart <= 0 || t.BIOSBootStart%sectorSize != 0 || t.BIOSBootSize < sectorSize || t.BootNumber < 1 {
		return fmt.Errorf("%w: got a BIOS boot partition of %d bytes at %d and boot partition %d; both are needed", ErrTarget, t.BIOSBootSize, t.BIOSBootStart, t.BootNumber)
	}
	img, err := openImage(t.Root)
	if err != nil {
		return err
	}
	defer img.Close()
	boot, err := img.first(path.Join(grubBIOSDir, "boot.img"))
	if err != nil {
		return err
	}
	if len(boot) != sectorSize {
		return fmt.Errorf("%w: /%s/boot.img has %d bytes, want %d (Debian package grub-pc-bin)", ErrMissing, grubBIOSDir, len(boot), sectorSize)
	}
	mkimage, err := haveProgram(t.Root, "grub-mkimage", "grub-common")
	if err != nil {
		return err
	}
	// The drive is the one that the BIOS booted from.
	args := []string{mkimage, "-O", "i386-pc", "-d", "/" + grubBIOSDir, "-p", fmt.Sprintf("(,gpt%d)/grub", t.BootNumber)}
	core, err := run(ctx, t.Root, nil, append(args, strings.Fields(grubBIOSModules)...)...)
	if err != nil {
		return err
	}
	if err := patchGrubCore(core, t.BIOSBootStart/sectorSize, t.BIOSBootSize); err != nil {
		return err
	}
	binary.LittleEndian.PutUint64(boot[grubKernelSector:], uint64(t.BIOSBootStart/sectorSize))
	copy(boot[grubDriveCheck:], "\x90\x90")
	disk, err := t.disk()
	if err != nil {
		return err
	}
	defer disk.Close()
	if _, err := readBootSector(disk); err != nil {
		return err
	}
	if err := installGrub(t); err != nil {
		return err
	}
	// The core is there before the sector that loads it.
	if _, err := disk.WriteAt(core, t.BIOSBootStart); err != nil {
		return fmt.Errorf("writing GRUB's core: %w", err)
	}
	if err := disk.Sync(); err != nil {
		return err
	}
	return writeBootCode(disk, boot[:bootCode])
}

// patchGrubCore notes in a core where it will lie.
func patchGrubCore(core []byte, sector, room int64) error {
	if n := int64(len(core)); n <= sectorSize || n > room || n > grubMaxCore {
		return fmt.Errorf("%w: GRUB's core has %d bytes, and the BIOS boot partition %d", ErrTarget, n, room)
	}
	block := core[grubBlockList:sectorSize]
	if got := binary.LittleEndian.Uint16(block[10:]); got != grubKernelSegment {
		return fmt.Errorf("%w: GRUB's core is loaded to segment %#x, want %#x", ErrMissing, got, grubKernelSegment)
	}
	rest := (len(core) + sectorSize - 1) / sectorSize
	binary.LittleEndian.PutUint64(block, uint64(sector)+1)
	binary.LittleEndian.PutUint16(block[8:], uint16(rest-1))
	return nil
}
