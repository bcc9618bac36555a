package disk

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"

	"github.com/diskfs/go-diskfs/partition/gpt"
)

// attrActive is the attribute "legacy BIOS bootable" (UEFI specification 2.10, table 5.8):
// syslinux's gptmbr.bin boots the partition that has it.
const attrActive = 1 << 2

// The master boot record (UEFI specification 2.10, section 5.2): boot code, four entries,
// a signature.
const (
	mbrEntries   = 446
	mbrSignature = 510
	mbrSize      = 512
)

// writeTable writes a GPT to a disk: the backup first, then the primary table, then the
// protective MBR, each made durable before the next. bios is for a disk that a BIOS boots.
func writeTable(f *os.File, size int64, sector int, parts []Partition, bios bool) error {
	t := gpt.Table{LogicalSectorSize: sector, PhysicalSectorSize: sector}
	for _, p := range parts {
		e := &gpt.Partition{
			Index: p.Number, Type: gpt.Type(p.Type), Name: p.Name, GUID: p.UUID,
			Start: uint64(p.Start / int64(sector)), End: uint64((p.Start+p.Size)/int64(sector)) - 1,
		}
		if p.Active {
			e.Attributes |= attrActive
		}
		t.Partitions = append(t.Partitions, e)
	}
	if err := t.Write(f, size); err != nil {
		return fmt.Errorf("writing the partition table: %w", err)
	}
	var mbr [mbrSize]byte
	if _, err := f.ReadAt(mbr[:], 0); err != nil {
		return fmt.Errorf("reading the first sector: %w", err)
	}
	protect(&mbr, size/int64(sector), bios)
	_, err := f.WriteAt(mbr[:], 0)
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return fmt.Errorf("writing the protective MBR: %w", err)
	}
	return nil
}

// protect makes a boot record protective (UEFI specification 2.10, section 5.2.3), for a
// disk of so many sectors. Boot code and disk signature before the entries stay.
func protect(mbr *[mbrSize]byte, sectors int64, bios bool) {
	clear(mbr[mbrEntries:])
	e := mbr[mbrEntries:]
	if bios {
		// Some BIOSes boot no disk without an active partition; UEFI ignores the flag.
		e[0] = 0x80
	}
	copy(e[1:4], []byte{0, 2, 0})           // first sector: cylinder 0, head 0, sector 2
	e[4] = 0xee                             // GPT protective
	copy(e[5:8], []byte{0xff, 0xff, 0xff})  // last sector: more than can be said so
	binary.LittleEndian.PutUint32(e[8:], 1) // first sector
	binary.LittleEndian.PutUint32(e[12:], uint32(min(sectors-1, math.MaxUint32)))
	mbr[mbrSignature], mbr[mbrSignature+1] = 0x55, 0xaa
}
