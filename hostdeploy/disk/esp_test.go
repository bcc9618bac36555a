package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/fat32"
	"golang.org/x/sys/unix"
)

// espFiles are what the ESP of a host has, and names that are not easy.
func espFiles() map[string][]byte {
	dir := "particle-" + strings.Repeat("5f0c", 16) + "/"
	files := map[string][]byte{
		"EFI/BOOT/BOOTX64.EFI":               noise(1, 130000),
		"EFI/systemd/systemd-bootx64.efi":    noise(1, 130000),
		"loader/loader.conf":                 []byte("timeout 3\n"),
		"loader/loader.con":                  []byte("the same short name"),
		"loader/loader.config":               []byte("and again"),
		"loader/entries.srel":                []byte("type1\n"),
		"loader/random-seed":                 noise(2, 32),
		"loader/empty":                       nil,
		dir + "vmlinuz":                      noise(3, 12<<20+1),
		dir + "initrd":                       noise(4, 50<<20),
		"Mixed Case+[brackets], and;more=.X": []byte("x"),
		"ünï-日本語.conf":                       []byte("unicode"),
		"lower.txt":                          []byte("a"),
		"UPPER.TXT/nested/deep/er/file":      []byte("b"),
		strings.Repeat("l", 255):             []byte("long"),
		".hidden":                            []byte("dot"),
		"one-cluster":                        noise(5, 4096),
	}
	for i := range 300 { // more than one cluster of entries
		files[fmt.Sprintf("loader/entries/particle-%d+3-1.conf", i)] = fmt.Appendf(nil, "version %d\n", i)
	}
	return files
}

// TestESP reads back byte by byte with mtools, and with go-diskfs as one who did not write.
func TestESP(t *testing.T) {
	for _, test := range []struct {
		sector int
		size   int64
	}{{512, 512 << 20}, {512, 128 << 20}, {4096, 512 << 20}} {
		t.Run(fmt.Sprintf("%d/%d", test.sector, test.size>>20), func(t *testing.T) {
			needLoops(t)
			need(t, "mkfs.vfat", "mcopy")
			path := filepath.Join(t.TempDir(), "disk.img")
			d := create(t, path, Options{Layout: efi, Size: 1 << 30, Sector: test.sector, BootSize: test.size})
			files := espFiles()
			stamp := time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)
			for name, data := range files {
				write(t, filepath.Join(d.Boot(), name), data)
				if err := os.Chtimes(filepath.Join(d.Boot(), name), stamp, stamp); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Mkdir(filepath.Join(d.Boot(), "EFI/Linux"), 0o755); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if err := d.Finish(t.Context()); err != nil {
				t.Fatal(err)
			}
			took := time.Since(start)
			t.Logf("62 MB and %d files took %v", len(files), took)
			if took > 20*time.Second {
				t.Errorf("62 MB took %v", took)
			}
			p := d.Partition(RoleESP)
			dev, _ := attachPart(t, path, p, test.sector)
			tool(t, "fsck.vfat", "-n", dev)
			out := filepath.Join(t.TempDir(), "out")
			if err := os.Mkdir(out, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Setenv("LC_ALL", "C.UTF-8")
			t.Setenv("TZ", "UTC0")
			tool(t, "mcopy", "-s", "-m", "-i", dev, "::/", out)
			checkTree(t, "mtools", os.DirFS(out), files)
			fi, err := os.Stat(filepath.Join(out, "loader/loader.conf"))
			if err != nil || !fi.ModTime().Equal(stamp) {
				t.Errorf("time stamp: got %v (%v), want %v", fi.ModTime(), err, stamp)
			}

			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			other, err := fat32.Read(file.New(f, true), p.Size, p.Start, int64(test.sector))
			if err != nil {
				t.Fatal(err)
			}
			for name, want := range files {
				if len(want) == 0 {
					continue // it takes cluster 0, which such a file has, for an error
				}
				got, err := other.ReadFile(name)
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("go-diskfs reads %q: %v, equal %v", name, err, bytes.Equal(got, want))
				}
			}
		})
	}
}

// checkTree compares all files; one directory is empty.
func checkTree(t *testing.T, who string, fsys fs.FS, want map[string][]byte) {
	t.Helper()
	var got []string
	err := fs.WalkDir(fsys, ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		got = append(got, path)
		data, err := fs.ReadFile(fsys, path)
		if !bytes.Equal(data, want[path]) {
			t.Errorf("%s: %q is not what was written", who, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range want {
		names = append(names, name)
	}
	slices.Sort(names)
	slices.Sort(got)
	if !slices.Equal(got, names) {
		t.Errorf("%s: got the files %q\nwant %q", who, got, names)
	}
	if fi, err := fs.Stat(fsys, "EFI/Linux"); err != nil || !fi.IsDir() {
		t.Errorf("%s: the empty directory: %v", who, err)
	}
}

// TestFull fills the directory until it takes no more: all of it has to fit on the ESP.
func TestFull(t *testing.T) {
	for _, size := range []int64{40 << 20, 300 << 20} {
		t.Run(fmt.Sprint(size>>20), func(t *testing.T) {
			needLoops(t)
			need(t, "mkfs.vfat", "mcopy")
			d := create(t, filepath.Join(t.TempDir(), "disk.img"), Options{Layout: efi, Size: 1 << 30, BootSize: size})
			free, total, err := Free(d.Boot())
			if err != nil || total > size || total < size*9/10 || free != total {
				t.Errorf("got %d of %d bytes free (%v), want nearly %d", free, total, err, size)
			}
			for i := range 30 {
				write(t, filepath.Join(d.Boot(), fmt.Sprintf("a-directory-%d", i), strings.Repeat("n", 200)), nil)
			}
			fill(t, d.Boot())
			if err := d.Finish(t.Context()); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// fill writes until there is no space left.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "large"))
	if err != nil {
		t.Fatal(err)
	}
	block := noise(1, 1<<20)
	for err == nil {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v, want %v", err, unix.ENOSPC)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestTooFull has more directories than were counted with.
func TestTooFull(t *testing.T) {
	needLoops(t)
	need(t, "mkfs.vfat", "mcopy")
	d := create(t, filepath.Join(t.TempDir(), "disk.img"), Options{Layout: efi, Size: 1 << 30, BootSize: 40 << 20})
	for i := range 1000 {
		if err := os.Mkdir(filepath.Join(d.Boot(), fmt.Sprint(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	fill(t, d.Boot())
	if err := d.Finish(t.Context()); !errors.Is(err, ErrSize) {
		t.Errorf("got %v, want %v", err, ErrSize)
	}
}

// TestCost compares the space that checkFAT counts with what mtools took.
func TestCost(t *testing.T) {
	needLoops(t)
	need(t, "mkfs.vfat", "mcopy", "fsck.vfat")
	for _, size := range []int64{100 << 20, 300 << 20} {
		d := create(t, filepath.Join(t.TempDir(), "disk.img"), Options{Layout: efi, Size: 1 << 30, BootSize: size})
		for name, data := range espFiles() {
			write(t, filepath.Join(d.Boot(), name), data)
		}
		want, err := checkFAT(t.Context(), d.Boot(), d.cluster)
		if err != nil {
			t.Fatal(err)
		}
		free, cluster := d.fatFree, d.cluster
		if err := d.Finish(t.Context()); err != nil {
			t.Fatal(err)
		}
		// "disk: 331 files, 16043/76613 clusters"; the root directory's first is counted.
		dev, _ := attachPart(t, d.Path, d.Partition(RoleESP), 512)
		out := strings.TrimSpace(tool(t, "fsck.vfat", "-n", dev))
		var used, all int64
		if _, err := fmt.Sscanf(out[strings.LastIndex(out, ",")+1:], " %d/%d clusters", &used, &all); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
		// A short name may do without a slot for the long one, so somewhat more is counted.
		if got := (used - 1) * cluster; got > want || got < want-16*cluster {
			t.Errorf("%d MiB: got %d bytes used, want a little less than %d", size>>20, got, want)
		}
		if got := (all - 1) * cluster; got != free {
			t.Errorf("%d MiB: got %d bytes for files, want %d", size>>20, got, free)
		}
	}
}

func TestBadNames(t *testing.T) {
	for name, bad := range map[string]bool{
		"vmlinuz": false, "particle-12+3-0.conf": false, "a b": false, ".x": false, "a,b;c=[d]": false, "日本": false, "ends.in": false,
		"a:b": true, "a?": true, `a\b`: true, "a*": true, "a|b": true, `"`: true, "<": true, ">": true,
		"dot.": true, "space ": true, " space": true, "bell\a": true, "del\x7f": true, "\xff\xfe": true,
		strings.Repeat("x", 255): false, strings.Repeat("x", 256): true, strings.Repeat("😀", 127): false, strings.Repeat("😀", 128): true,
	} {
		err := checkName(name)
		if (err != nil) != bad || err != nil && !errors.Is(err, ErrName) {
			t.Errorf("%q: got %v, want an error: %v", name, err, bad)
		}
	}
}

func TestCheckFAT(t *testing.T) {
	for name, make := range map[string]func(dir string) error{
		"symlink":   func(dir string) error { return os.Symlink("x", dir+"/link") },
		"fifo":      func(dir string) error { return unix.Mkfifo(dir+"/fifo", 0o600) },
		"case":      func(dir string) error { return errors.Join(touch(dir+"/EFI"), touch(dir+"/efi")) },
		"directory": func(dir string) error { return errors.Join(os.Mkdir(dir+"/EFI", 0o755), touch(dir+"/efi")) },
		"name":      func(dir string) error { return touch(dir + "/a:b") },
		"size":      func(dir string) error { return errors.Join(touch(dir+"/f"), os.Truncate(dir+"/f", 1<<32)) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := make(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := checkFAT(t.Context(), dir, 4096); !errors.Is(err, ErrName) {
				t.Errorf("got %v, want %v", err, ErrName)
			}
		})
	}
	dir := t.TempDir()
	if err := errors.Join(touch(dir+"/f"), os.Truncate(dir+"/f", 1<<32-1)); err != nil {
		t.Fatal(err)
	}
	if got, err := checkFAT(t.Context(), dir, 4096); err != nil || got != 1<<32 {
		t.Errorf("got %d, %v, want %d", got, err, int64(1<<32))
	}
}

func touch(path string) error { return os.WriteFile(path, nil, 0o644) }

func TestCostSizes(t *testing.T) {
	if got := Cost([]int64{0, 1, 4096, 4097}, 4096); got != 4*4096 {
		t.Errorf("got %d, want %d", got, 4*4096)
	}
	if _, _, err := Free("/does/not/exist"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want %v", err, fs.ErrNotExist)
	}
}
