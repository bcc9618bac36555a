package disk

import (
	"crypto/rand"
	"fmt"
	"runtime"
	"slices"

	"github.com/google/uuid"
)

// A Role is what a partition is for.
type Role string

const (
	RoleBIOS  Role = "bios" // GRUB's core image
	RoleESP   Role = "esp"
	RoleBoot  Role = "boot"
	RoleRoot  Role = "root"
	RoleOther Role = "" // not one of ours
)

// A Partition is a part of a disk.
type Partition struct {
	Number int    `json:"number"` // in the table, from 1
	Role   Role   `json:"role,omitempty"`
	Type   string `json:"type"`           // GPT type in lower case, or that of another table
	Name   string `json:"name,omitempty"` // the table's
	Start  int64  `json:"start"`          // bytes
	Size   int64  `json:"size"`           // bytes
	UUID   string `json:"uuid,omitempty"` // of the partition, lower case; made by Create
	Active bool   `json:"active,omitempty"`
	FS     FS     `json:"fs,omitempty"`
	FSUUID string `json:"fsUUID,omitempty"` // as blkid(8) prints it; made by Create
	Label  string `json:"label,omitempty"`  // of the file system
}

// Types of partitions (UEFI specification 2.10, table 5.7; GRUB manual, "BIOS
// installation"; https://uapi-group.org/specifications/specs/discoverable_partitions_specification/).
const (
	typeESP   = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
	typeBoot  = "bc13c2ff-59e6-4262-a352-b275fd6f7172" // XBOOTLDR
	typeBIOS  = "21686148-6449-6e6f-744e-656564454649"
	typeLinux = "0fc63daf-8483-4772-8e79-3d69d8477de4"
)

// rootTypes are the types of root partitions by Go's name of the architecture
// (discoverable partitions specification).
var rootTypes = map[string]string{
	"386":     "44479540-f297-41b2-9af7-d131d5f0458a",
	"amd64":   "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
	"arm":     "69dad710-2ce4-4e3c-b16c-21a1d49abed3",
	"arm64":   "b921b045-1df0-41c3-af44-4c6f280d3fae",
	"loong64": "77055800-792c-4f94-b39a-98c91b762bb6",
	"ppc64le": "c31c45e6-3f39-412e-80fb-4809c4980599",
	"riscv64": "72ec70a6-cf74-40e6-bd49-4bda08e8f224",
	"s390x":   "5eead9a9-fe09-4a1e-a1d7-520d00531306",
}

// roleOf says what a GPT partition of a type is for.
func roleOf(kind string) Role {
	switch kind {
	case typeESP:
		return RoleESP
	case typeBoot:
		return RoleBoot
	case typeBIOS:
		return RoleBIOS
	}
	for _, t := range rootTypes {
		if t == kind {
			return RoleRoot
		}
	}
	return RoleOther
}

const (
	mib = 1 << 20
	// align is where partitions start and end: what the erase blocks of flash and the
	// stripes of arrays divide.
	align = mib
	// tableSize is what a GPT takes at each end of a disk, generously.
	tableSize = align
	// biosBootSize is the length of the partition for GRUB's core image.
	biosBootSize = mib
	// minBoot is the least length of an ext4 /boot.
	minBoot = 16 * mib
)

// rootLimits are what a file system needs at least (mkfs.xfs 6.1 refuses less than 300
// MiB, mkfs.btrfs about 110 MiB), and its label: XFS takes 12 characters.
var rootLimits = map[FS]struct {
	min   int64
	label string
}{
	Ext4:  {64 * mib, "particle-root"},
	Btrfs: {256 * mib, "particle-root"},
	XFS:   {300 * mib, "particleroot"},
}

// check fills in defaults.
func (o Options) check() (Options, error) {
	if o.FS == "" {
		o.FS = Ext4
	}
	limits, ok := rootLimits[o.FS]
	if !ok {
		return o, fmt.Errorf("%w: got %q as the root's file system, want %q, %q or %q", ErrOptions, o.FS, Ext4, Btrfs, XFS)
	}
	if o.Sector == 0 {
		o.Sector = 512
	}
	if !slices.Contains([]int{512, 4096}, o.Sector) {
		return o, fmt.Errorf("%w: got sectors of %d bytes, want 512 or 4096", ErrOptions, o.Sector)
	}
	if o.Size < 0 || o.Size%int64(o.Sector) != 0 {
		return o, fmt.Errorf("%w: got a size of %d bytes, want a multiple of %d", ErrOptions, o.Size, o.Sector)
	}
	if o.BootSize == 0 {
		o.BootSize = DefaultBootSize
	}
	if o.BootSize < 0 || o.RootMin < 0 {
		return o, fmt.Errorf("%w: got the sizes %d (boot) and %d (root), want none below 0", ErrOptions, o.BootSize, o.RootMin)
	}
	o.RootMin = max(o.RootMin, limits.min)
	if o.Arch == "" {
		o.Arch = runtime.GOARCH
	}
	return o, nil
}

// Layout says which partitions Create would make on a disk of a size in bytes with sectors
// of 512 or 4096 bytes. UUIDs are empty. The error is ErrSize, with what is needed, or
// ErrOptions.
func Layout(size int64, sector int, o Options) ([]Partition, error) {
	o, err := o.check()
	if err != nil {
		return nil, err
	}
	var parts []Partition
	end := int64(tableSize)
	add := func(p Partition, size int64) {
		p.Number, p.Start, p.Size = len(parts)+1, end, size
		end += size
		parts = append(parts, p)
	}
	if o.Layout.BIOSBoot {
		add(Partition{Role: RoleBIOS, Type: typeBIOS, Name: "particle-bios"}, biosBootSize)
	}
	bootSize := (o.BootSize + align - 1) / align * align
	if o.Layout.ESP {
		if want := (fatMin(sector) + align - 1) / align * align; bootSize < want {
			return nil, fmt.Errorf("%w: the ESP: got %s, want %s, the least for FAT32 with sectors of %d bytes", ErrSize, mibs(bootSize), mibs(want), sector)
		}
		add(Partition{Role: RoleESP, Type: typeESP, Name: "particle-esp", FS: vfat, Label: "PARTICLE", Active: o.Layout.Active}, bootSize)
	} else {
		if bootSize < minBoot {
			return nil, fmt.Errorf("%w: /boot: got %s, want %s", ErrSize, mibs(bootSize), mibs(minBoot))
		}
		add(Partition{Role: RoleBoot, Type: typeBoot, Name: "particle-boot", FS: Ext4, Label: "particle-boot", Active: o.Layout.Active}, bootSize)
	}
	kind := rootTypes[o.Arch]
	if kind == "" {
		kind = typeLinux
	}
	root := (size - tableSize) / align * align // where it ends
	if want := end + (o.RootMin+align-1)/align*align + tableSize; root-end < o.RootMin {
		return nil, fmt.Errorf("%w: the disk: got %s, want %s: %s for the root, %s for the boot file system",
			ErrSize, mibs(size), mibs(want), mibs(o.RootMin), mibs(bootSize))
	}
	add(Partition{Role: RoleRoot, Type: kind, Name: "particle-root", FS: o.FS, Label: rootLimits[o.FS].label}, root-end)
	return parts, nil
}

// makeIDs gives partitions and file systems random UUIDs.
func (d *Disk) makeIDs() error {
	for i := range d.Partitions {
		p := &d.Partitions[i]
		id, err := uuid.NewRandom()
		if err != nil {
			return fmt.Errorf("making a UUID: %w", err)
		}
		p.UUID = id.String()
		switch p.FS {
		case "":
		case vfat:
			var b [4]byte
			if _, err := rand.Read(b[:]); err != nil {
				return fmt.Errorf("making a volume id: %w", err)
			}
			p.FSUUID = fmt.Sprintf("%02X%02X-%02X%02X", b[0], b[1], b[2], b[3])
		default:
			if id, err = uuid.NewRandom(); err != nil {
				return fmt.Errorf("making a UUID: %w", err)
			}
			p.FSUUID = id.String()
		}
	}
	return nil
}

// mibs prints a length for people.
func mibs(n int64) string {
	if n%mib != 0 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%d MiB", n/mib)
}
