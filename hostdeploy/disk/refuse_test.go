package disk

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lay puts something on an image of 128 MiB.
var lay = map[string]func(t *testing.T, path string){
	"ext4":      func(t *testing.T, path string) { tool(t, "mkfs.ext4", "-q", "-F", path) },
	"btrfs":     func(t *testing.T, path string) { tool(t, "mkfs.btrfs", "-q", "-f", path) },
	"vfat":      func(t *testing.T, path string) { tool(t, "mkfs.vfat", path) },
	"swap":      func(t *testing.T, path string) { tool(t, "mkswap", path) },
	"gpt":       func(t *testing.T, path string) { tool(t, "sgdisk", "-n", "1:0:0", path) },
	"dos":       func(t *testing.T, path string) { sfdisk(t, path, "label: dos\n,50M,c\n,,83\n") },
	"empty gpt": func(t *testing.T, path string) { sfdisk(t, path, "label: gpt\n") },
	"gpt, backup only": func(t *testing.T, path string) {
		tool(t, "sgdisk", "-n", "1:0:0", path)
		poke(t, path, 0, make([]byte, 34*512))
	},
	"gpt of 4096": func(t *testing.T, path string) {
		dev, detach := attachPart(t, path, &Partition{Size: 128 << 20}, 4096)
		defer detach()
		tool(t, "sgdisk", "-n", "1:0:0", dev)
	},
	"LVM":                     func(t *testing.T, path string) { poke(t, path, 512, append([]byte("LABELONE"), lvm()...)) },
	"data of an unknown kind": func(t *testing.T, path string) { poke(t, path, 100<<20, []byte("letter")) },
}

// lvm is the rest of the sector with the label of a physical volume (struct label_header
// of LVM2, and the header behind it): the sector's number, a checksum (wipefs takes
// bad ones, too), the header's offset, the type, the volume's id.
func lvm() []byte {
	b := make([]byte, 512-8)
	b[0], b[12] = 1, 32
	copy(b[16:], "LVM2 001")
	copy(b[24:], "0123456789abcdefghijklmnopqrstuv")
	return b
}

func sfdisk(t *testing.T, path, script string) {
	t.Helper()
	bin, err := lookPath("sfdisk")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, "-q", path)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
}

func poke(t *testing.T, path string, off int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, off); err != nil {
		t.Fatal(err)
	}
}

func blank(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(touch(path), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

func sum(t *testing.T, path string) (sum [sha256.Size]byte) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// TestNotEmpty: what is there is named and stays, until it shall be wiped.
func TestNotEmpty(t *testing.T) {
	for name, put := range lay {
		t.Run(name, func(t *testing.T) {
			needLoops(t)
			need(t, "sgdisk", "sfdisk", "mkfs.btrfs", "mkfs.vfat", "mkfs.ext4", "mcopy")
			path := blank(t, 128<<20)
			put(t, path)
			before := sum(t, path)
			o := Options{BootSize: 16 << 20}
			_, err := Create(t.Context(), path, o)
			word := strings.Fields(strings.ReplaceAll(name, ",", ""))[0]
			word = map[string]string{"empty": "gpt", "LVM": "LVM2_member"}[word] + map[bool]string{true: word}[word != "empty" && word != "LVM"]
			if !errors.Is(err, ErrNotEmpty) || !strings.Contains(err.Error(), word) {
				t.Errorf("got %v, want %v and %q", err, ErrNotEmpty, word)
			}
			if after := sum(t, path); after != before {
				t.Error("the disk was changed")
			}
			o.Wipe = true
			d := create(t, path, o)
			if err := d.Finish(t.Context()); err != nil {
				t.Fatal(err)
			}
			judge(t, d)
			checkInspect(t, d)
		})
	}
	t.Run("zeros", func(t *testing.T) {
		needLoops(t)
		need(t, "sgdisk", "sfdisk", "e2fsck", "tune2fs")
		path := filepath.Join(t.TempDir(), "disk.img")
		write(t, path, make([]byte, 128<<20))
		d := create(t, path, Options{BootSize: 16 << 20})
		if err := d.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		judge(t, d)
	})
}

// loopDisk is a block device: a loop device over a file.
func loopDisk(t *testing.T, size int64) string {
	t.Helper()
	dev, _ := attachPart(t, blank(t, size), &Partition{Size: size}, 512)
	return dev
}

// TestDevice does all on a block device, with what others have left all over it.
func TestDevice(t *testing.T) {
	needLoops(t)
	need(t, "sgdisk", "sfdisk", "e2fsck", "tune2fs", "mkfs.btrfs", "mkfs.vfat", "mcopy")
	dev := loopDisk(t, 1<<30)
	tool(t, "sgdisk", "-n", "1:2048:+400M", "-n", "2:0:0", dev)
	part, detach := attachPart(t, dev, &Partition{Start: 1 << 20, Size: 400 << 20}, 512)
	tool(t, "mkfs.btrfs", "-q", "-f", part) // superblocks at 64 KiB and 64 MiB
	code := bytes.Repeat([]byte{0x90}, 440)
	poke(t, dev, 0, append(code, make([]byte, 6)...))

	_, err := Create(t.Context(), dev, Options{Layout: efi, BootSize: 64 << 20})
	if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), part) {
		t.Errorf("with a loop device on it: got %v, want %v and %q", err, ErrBusy, part)
	}
	detach()
	_, err = Create(t.Context(), dev, Options{Layout: efi, BootSize: 64 << 20})
	if !errors.Is(err, ErrNotEmpty) || !strings.Contains(err.Error(), "btrfs") {
		t.Errorf("got %v, want %v and the btrfs", err, ErrNotEmpty)
	}
	if _, err := Create(t.Context(), dev, Options{Layout: efi, Size: 2 << 30, Wipe: true}); !errors.Is(err, ErrOptions) {
		t.Errorf("a device that shall grow: got %v, want %v", err, ErrOptions)
	}
	d := create(t, dev, Options{Layout: efi, BootSize: 64 << 20, Wipe: true})
	if bt := d.BootTarget(); bt.Device != dev || bt.Disk != dev {
		t.Errorf("got %+v, want the device %q", bt, dev)
	}
	// While it is made, the kernel lets no one else mount it.
	if err := unix.Mount(dev, t.TempDir(), "ext4", 0, ""); !errors.Is(err, unix.EBUSY) {
		t.Errorf("mounting the disk: got %v, want %v", err, unix.EBUSY)
	}
	root := noise(1, 1<<20)
	write(t, filepath.Join(d.Root(), "composefs/objects/00/11"), root)
	write(t, filepath.Join(d.Boot(), "particle-"+strings.Repeat("5f", 32), "vmlinuz"), root)
	if err := d.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkInspect(t, d)
	judge(t, d)
	checkContents(t, d, root, root)
}

// addPart tells the kernel of a partition (linux/blkpg.h): this machine's may not know GPT.
func addPart(dev string, p *Partition) error {
	f, err := os.OpenFile(dev, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	part := struct {
		start, length   int64
		number          int32
		devname, volume [64]byte
		_               [4]byte
	}{start: p.Start, length: p.Size, number: int32(p.Number)}
	arg := struct {
		op, flags, datalen int32
		_                  int32
		data               unsafe.Pointer
	}{op: 1, datalen: int32(unsafe.Sizeof(part)), data: unsafe.Pointer(&part)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		return errno
	}
	return nil
}

// TestBusy: what is used is never touched, wiping or not.
func TestBusy(t *testing.T) {
	wipe := Options{BootSize: 16 << 20, Wipe: true}
	refuse := func(t *testing.T, path, word string) {
		t.Helper()
		before := sum(t, path)
		c, err := Inspect(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(strings.Join(c.InUse, " "), word) {
			t.Errorf("Inspect: got %q, want %q", c.InUse, word)
		}
		_, err = Create(t.Context(), path, wipe)
		if !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), word) {
			t.Errorf("got %v, want %v and %q", err, ErrBusy, word)
		}
		if sum(t, path) != before {
			t.Error("the disk was changed")
		}
	}
	t.Run("loop", func(t *testing.T) {
		needLoops(t)
		path := blank(t, 128<<20)
		dev, _ := attachPart(t, path, &Partition{Start: 1 << 20, Size: 100 << 20}, 512)
		refuse(t, path, dev)
	})
	t.Run("mounted", func(t *testing.T) {
		needLoops(t)
		dev := loopDisk(t, 128<<20)
		tool(t, "mkfs.ext4", "-q", "-F", dev)
		dir := t.TempDir()
		if err := unix.Mount(dev, dir, "ext4", unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(dir, 0)
		refuse(t, dev, dir)
	})
	t.Run("btrfs", func(t *testing.T) {
		needLoops(t)
		need(t, "mkfs.btrfs")
		dev := loopDisk(t, 128<<20)
		tool(t, "mkfs.btrfs", "-q", "-f", dev)
		dir := t.TempDir()
		if err := unix.Mount(dev, dir, "btrfs", unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(dir, 0)
		refuse(t, dev, dir)
	})
	t.Run("partition", func(t *testing.T) {
		needLoops(t)
		path := blank(t, 128<<20)
		out := strings.TrimSpace(tool(t, "losetup", "--find", "--show", "--partscan", path))
		defer func() { tool(t, "losetup", "-d", out) }()
		if err := addPart(out, &Partition{Number: 1, Start: 1 << 20, Size: 100 << 20}); err != nil {
			t.Skipf("the kernel takes no partitions: %v", err)
		}
		if !settle(func() bool { _, err := os.Stat(out + "p1"); return err == nil }) {
			t.Skipf("nobody makes the node %sp1", out)
		}
		tool(t, "mkfs.ext4", "-q", "-F", out+"p1")
		dir := t.TempDir()
		if err := unix.Mount(out+"p1", dir, "ext4", unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(dir, 0)
		refuse(t, out, dir)
	})
	t.Run("exclusive", func(t *testing.T) {
		needLoops(t)
		dev := loopDisk(t, 128<<20)
		f, err := os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := Create(t.Context(), dev, wipe); !errors.Is(err, ErrBusy) {
			t.Errorf("got %v, want %v", err, ErrBusy)
		}
	})
	t.Run("twice", func(t *testing.T) {
		needLoops(t)
		need(t, "mkfs.vfat", "mcopy")
		path := filepath.Join(t.TempDir(), "disk.img")
		d := create(t, path, Options{Layout: efi, Size: 1 << 30})
		if _, err := Create(t.Context(), path, Options{Layout: efi, Wipe: true}); !errors.Is(err, ErrBusy) {
			t.Errorf("got %v, want %v", err, ErrBusy)
		}
		write(t, filepath.Join(d.Root(), "file"), nil)
		if err := d.Finish(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestInUse: a directory that somebody uses cannot be unmounted, and Close is honest.
func TestInUse(t *testing.T) {
	needLoops(t)
	need(t, "mkfs.vfat", "mcopy")
	path := filepath.Join(t.TempDir(), "disk.img")
	d := create(t, path, Options{Layout: efi, Size: 1 << 30})
	f, err := os.Open(d.Root())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Finish(t.Context()); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), d.Root()) {
		t.Errorf("got %v, want %v and %q", err, ErrBusy, d.Root())
	}
	f.Close()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the unfinished file: got %v, want %v", err, fs.ErrNotExist)
	}
	if d.Root() != "" || d.Boot() != "" {
		t.Errorf("got the directories %q and %q after the end", d.Root(), d.Boot())
	}
	if err := d.Close(); err != nil {
		t.Errorf("closing again: %v", err)
	}
	var none *Disk
	if err := none.Close(); err != nil {
		t.Error(err)
	}
}

func TestOptions(t *testing.T) {
	needLoops(t)
	need(t, "mkfs.vfat", "mcopy")
	dir := t.TempDir()
	small := blank(t, 1<<20)
	for name, test := range map[string]struct {
		path string
		o    Options
		err  error
	}{
		"missing":          {dir + "/disk.img", Options{}, ErrOptions},
		"missing in /dev":  {"/dev/no-such-disk", Options{Size: 1 << 30}, fs.ErrNotExist},
		"no directory":     {dir + "/no/disk.img", Options{Size: 1 << 30}, fs.ErrNotExist},
		"directory":        {dir, Options{Size: 1 << 30}, ErrOptions},
		"character device": {"/dev/null", Options{Size: 1 << 30}, ErrOptions},
		"too small":        {dir + "/disk.img", Options{Size: 10 << 20}, ErrSize},
		"small file":       {small, Options{}, ErrSize},
		"resize":           {small, Options{Size: 1 << 30}, ErrOptions},
	} {
		if _, err := Create(t.Context(), test.path, test.o); !errors.Is(err, test.err) {
			t.Errorf("%s: got %v, want %v", name, err, test.err)
		}
	}
	if _, err := os.Stat(dir + "/disk.img"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file was made: %v", err)
	}
	// Wiping resizes.
	d := create(t, small, Options{Size: 1 << 30, Wipe: true})
	if err := d.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(small)
	if err != nil || fi.Size() != 1<<30 {
		t.Errorf("got %d bytes, want %d", fi.Size(), 1<<30)
	}
	// Secrets lie in a new file.
	d = create(t, dir+"/disk.img", Options{Size: 1 << 30})
	if err := d.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(dir + "/disk.img"); err != nil || fi.Mode() != 0o600 {
		t.Errorf("got mode %v, want 0600", fi.Mode())
	}
}

func TestMissing(t *testing.T) {
	t.Setenv("PATH", "/no/such/directory")
	path := filepath.Join(t.TempDir(), "disk.img")
	_, err := Create(t.Context(), path, Options{Layout: efi, Size: 1 << 30})
	if !errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), "mcopy") || !strings.Contains(err.Error(), "mtools") {
		t.Errorf("got %v, want %v, the program mcopy and the package mtools", err, ErrMissing)
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file was made: %v", err)
	}
}
