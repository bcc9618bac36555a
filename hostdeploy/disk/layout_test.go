package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/hostdeploy/bootloader"
)

func TestLayout(t *testing.T) {
	const gib = 1 << 30
	type part struct {
		role        Role
		start, size int64 // MiB
	}
	for _, test := range []struct {
		name   string
		size   int64
		sector int
		o      Options
		want   []part
		err    error
		says   string
	}{
		{"efi", 8 * gib, 512, Options{Layout: efi}, []part{{RoleESP, 1, 512}, {RoleRoot, 513, 7678}}, nil, ""},
		{"grub", 8 * gib, 512, Options{Layout: grubBIOS}, []part{{RoleBIOS, 1, 1}, {RoleBoot, 2, 512}, {RoleRoot, 514, 7677}}, nil, ""},
		{"extlinux", 8 * gib, 512, Options{Layout: extlinux}, []part{{RoleBoot, 1, 512}, {RoleRoot, 513, 7678}}, nil, ""},
		{"odd length", 8*gib - 512, 512, Options{Layout: efi}, []part{{RoleESP, 1, 512}, {RoleRoot, 513, 7677}}, nil, ""},
		{"rounded up", 8 * gib, 512, Options{Layout: efi, BootSize: 100<<20 + 1}, []part{{RoleESP, 1, 101}, {RoleRoot, 102, 8089}}, nil, ""},
		{"just large enough", 514<<20 + 64<<20, 512, Options{Layout: efi}, []part{{RoleESP, 1, 512}, {RoleRoot, 513, 64}}, nil, ""},
		{"a sector less", 514<<20 + 64<<20 - 512, 512, Options{Layout: efi}, nil, ErrSize, "got 606076416 bytes, want 578 MiB"},
		{"room for the root", 4 * gib, 512, Options{Layout: efi, RootMin: 4 * gib}, nil, ErrSize, "got 4096 MiB, want 4610 MiB"},
		{"xfs", 600 << 20, 512, Options{Layout: efi, FS: XFS}, nil, ErrSize, "want 814 MiB"},
		{"nothing", 0, 512, Options{}, nil, ErrSize, "got 0 MiB"},
		{"small ESP", 8 * gib, 512, Options{Layout: efi, BootSize: 32 << 20}, nil, ErrSize, "got 32 MiB, want 33 MiB"},
		{"ESP of long sectors", 8 * gib, 4096, Options{Layout: efi, BootSize: 256 << 20}, nil, ErrSize, "got 256 MiB, want 257 MiB"},
		{"small /boot", 8 * gib, 512, Options{BootSize: 1 << 20}, nil, ErrSize, "got 1 MiB, want 16 MiB"},
		{"root", 8 * gib, 512, Options{FS: "zfs"}, nil, ErrOptions, `got "zfs"`},
		{"sectors", 8 * gib, 512, Options{Sector: 2048}, nil, ErrOptions, "got sectors of 2048 bytes"},
		{"size", 8 * gib, 512, Options{Size: 1000}, nil, ErrOptions, "multiple of 512"},
		{"negative", 8 * gib, 512, Options{BootSize: -1}, nil, ErrOptions, "none below 0"},
	} {
		parts, err := Layout(test.size, test.sector, test.o)
		if !errors.Is(err, test.err) || err != nil && !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: got error %v, want %v that says %q", test.name, err, test.err, test.says)
		}
		var got []part
		for _, p := range parts {
			got = append(got, part{p.Role, p.Start >> 20, p.Size >> 20})
		}
		if fmt.Sprint(got) != fmt.Sprint(test.want) {
			t.Errorf("%s: got %v, want %v", test.name, got, test.want)
		}
	}
}

// TestTypes has the types from the specifications, by the letters that sgdisk prints.
func TestTypes(t *testing.T) {
	for arch, want := range map[string]string{"amd64": "4f68bce3-e8cd-4db1-96e7-fbcaf984b709", "arm64": "b921b045-1df0-41c3-af44-4c6f280d3fae", "mips": typeLinux} {
		parts, err := Layout(8<<30, 512, Options{Layout: efi, Arch: arch})
		if err != nil || parts[1].Type != want {
			t.Errorf("%s: got %q, %v, want %q", arch, parts[1].Type, err, want)
		}
	}
	for arch, kind := range rootTypes {
		if roleOf(kind) != RoleRoot {
			t.Errorf("%s: %s is no root", arch, kind)
		}
	}
}

// TestTable writes tables of disks of many lengths and has them judged. Files of terabytes
// are holes.
func TestTable(t *testing.T) {
	need(t, "sgdisk", "sfdisk")
	for _, size := range []int64{700 << 20, 700<<20 + 512, 2<<40 - 512, 2 << 40, 2<<40 + 512, 3 << 40} {
		for _, layout := range []bootloader.Layout{efi, grubBIOS, extlinux} {
			path := filepath.Join(t.TempDir(), "disk")
			f, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := f.Truncate(size); err != nil {
				t.Skipf("the file system of %q takes no files of %d bytes: %v", path, size, err)
			}
			code := noise(1, mbrEntries)
			if _, err := f.WriteAt(code, 0); err != nil {
				t.Fatal(err)
			}
			parts, err := Layout(size, 512, Options{Layout: layout})
			if err != nil {
				t.Fatal(err)
			}
			d := Disk{Partitions: parts}
			if err := d.makeIDs(); err != nil {
				t.Fatal(err)
			}
			if err := writeTable(f, size, 512, parts, !layout.ESP); err != nil {
				t.Fatal(err)
			}
			if out := tool(t, "sgdisk", "-v", path); !strings.Contains(out, "No problems found") {
				t.Errorf("%d: sgdisk -v: %s", size, out)
			}
			if out := tool(t, "sfdisk", "--verify", path); !strings.Contains(out, "No errors detected") {
				t.Errorf("%d: sfdisk --verify: %s", size, out)
			}
			got := make([]byte, mbrEntries)
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, code) {
				t.Errorf("%d: the boot code was changed (%v)", size, err)
			}
			c, err := Inspect(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			if len(c.Partitions) != len(parts) || c.Table != "gpt" {
				t.Errorf("%d: got %+v", size, *c)
				continue
			}
			for i, p := range parts {
				p.FS, p.FSUUID, p.Label = "", "", "" // none yet
				if c.Partitions[i] != p {
					t.Errorf("%d: got %+v, want %+v", size, c.Partitions[i], p)
				}
			}
		}
	}
}

// TestProtect has the bytes of UEFI 2.10, table 5.4.
func TestProtect(t *testing.T) {
	for _, test := range []struct {
		sectors int64
		bios    bool
		active  byte
		length  uint32
	}{{2048, false, 0, 2047}, {2048, true, 0x80, 2047}, {1 << 32, false, 0, 0xffffffff}, {1<<32 + 1, false, 0, 0xffffffff}, {1 << 40, true, 0x80, 0xffffffff}} {
		mbr := [mbrSize]byte(bytes.Repeat([]byte{0x5a}, mbrSize))
		protect(&mbr, test.sectors, test.bios)
		want := append(bytes.Repeat([]byte{0x5a}, 446), test.active, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0)
		want = binary.LittleEndian.AppendUint32(want, test.length)
		want = append(append(want, make([]byte, 48)...), 0x55, 0xaa)
		if !bytes.Equal(mbr[:], want) {
			t.Errorf("%d sectors, BIOS %v: got %x, want %x", test.sectors, test.bios, mbr[440:], want[440:])
		}
	}
}

// TestIDs: no UUID comes twice, and blkid's form is right.
func TestIDs(t *testing.T) {
	seen := map[string]bool{}
	for range 20 {
		parts, err := Layout(8<<30, 512, Options{Layout: bootloader.Layout{ESP: true, BIOSBoot: true}})
		if err != nil {
			t.Fatal(err)
		}
		d := Disk{Partitions: parts}
		if err := d.makeIDs(); err != nil {
			t.Fatal(err)
		}
		for _, p := range parts {
			for _, id := range []string{p.UUID, p.FSUUID} {
				if id != "" && seen[id] {
					t.Errorf("%q comes twice", id)
				}
				seen[id] = true
			}
			if p.Role == RoleESP && (len(p.FSUUID) != 9 || p.FSUUID[4] != '-') {
				t.Errorf("got %q", p.FSUUID)
			}
		}
	}
}
