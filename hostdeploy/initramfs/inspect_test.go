package initramfs

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// archive makes a cpio archive of regular files: names and contents by turns. A name
// that ends with a slash is a directory.
func archive(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := cpio.NewWriter(&b)
	for i := 0; i < len(files); i += 2 {
		h := &cpio.Header{Name: files[i], Mode: cpio.TypeReg | 0o755, Size: int64(len(files[i+1]))}
		if strings.HasSuffix(h.Name, "/") {
			h.Mode = cpio.TypeDir | 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[i+1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// packers compress with each format of the kernel that Go can write.
var packers = map[string]func(io.Writer) (io.WriteCloser, error){
	"gzip": func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil },
	"zstd": func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) },
	"xz":   func(w io.Writer) (io.WriteCloser, error) { return xz.NewWriter(w) },
	"lzma": func(w io.Writer) (io.WriteCloser, error) { return lzma.NewWriter(w) },
	"lz4": func(w io.Writer) (io.WriteCloser, error) {
		z := lz4.NewWriter(w)
		return z, z.Apply(lz4.LegacyOption(true))
	},
	"lz4 frame": func(w io.Writer) (io.WriteCloser, error) { return lz4.NewWriter(w), nil },
}

func pack(t testing.TB, how string, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := packers[how](&b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// equipped has all that booting needs.
func equipped(t testing.TB) []byte {
	return archive(t, "./", "", "usr/lib/particle/particle-init-root", "program", "scripts/init-bottom/particle", "#!/bin/sh\n",
		"usr/lib/modules/6.12/kernel/fs/erofs/erofs.ko.xz", "x", "usr/lib/modules/6.12/modules.builtin", "kernel/fs/overlayfs/overlay.ko\nkernel/arch/x86/crypto/sha256-ssse3.ko\n")
}

func TestInspect(t *testing.T) {
	early := append(archive(t, "kernel/x86/microcode/GenuineIntel.bin", "microcode"), make([]byte, 600)...)
	full := equipped(t)
	check := func(name string, image []byte) {
		t.Helper()
		c, err := Inspect(iotest.OneByteReader(bytes.NewReader(image)))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		if want := []string{"erofs", "overlay", "sha256_ssse3"}; !c.Program || c.Starter != "initramfs-tools" || !slices.Equal(c.Modules, want) || c.Missing() != nil {
			t.Errorf("%s: got %+v, missing %q", name, c, c.Missing())
		}
		if has, err := Has(bytes.NewReader(image)); !has || err != nil {
			t.Errorf("%s: Has: got %v, %v", name, has, err)
		}
	}
	check("plain", full)
	check("early", slices.Concat(early, full))
	for how := range packers {
		packed := pack(t, how, full)
		check(how, packed)
		check("early, "+how, slices.Concat(early, packed))
	}
	// Compressed parts one behind the other, with zeros between them.
	check("gzip, gzip", slices.Concat(pack(t, "gzip", early), make([]byte, 512), pack(t, "gzip", full)))
	check("gzip, zstd", slices.Concat(pack(t, "gzip", early), pack(t, "zstd", full)))
	check("zstd, plain", slices.Concat(pack(t, "zstd", early), full))
	check("zstd, zstd, gzip", slices.Concat(pack(t, "zstd", early), pack(t, "zstd", early), pack(t, "gzip", full)))
	check("archives in one part", pack(t, "zstd", slices.Concat(early, full)))
	if bzip2, err := exec.LookPath("bzip2"); err == nil {
		cmd := exec.Command(bzip2)
		cmd.Stdin = bytes.NewReader(full)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		check("bzip2", out)
	}
}

// TestInspectForeign has what the compressors of initramfs-tools make.
func TestInspectForeign(t *testing.T) {
	full := equipped(t)
	for _, command := range []string{"zstd -q -1 -T0", "zstd -q -19", "xz --check=crc32", "xz -9 -T2 --check=crc32", "lzma -9", "lz4 -9 -l", "gzip -9n"} {
		args := strings.Fields(command)
		if _, err := exec.LookPath(args[0]); err != nil {
			t.Logf("%s is missing (apt install zstd xz-utils lz4 gzip)", args[0])
			continue
		}
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Stdin = bytes.NewReader(full)
		image, err := cmd.Output()
		if err != nil {
			t.Errorf("%s: %v", command, err)
			continue
		}
		if has, err := Has(bytes.NewReader(image)); !has || err != nil {
			t.Errorf("%s: got %v, %v", command, has, err)
		}
	}
}

func TestHasNot(t *testing.T) {
	program := Program[1:]
	for name, image := range map[string][]byte{
		"nothing of ours": archive(t, "init", "x"),
		"no starter":      archive(t, program, "x"),
		"empty program":   archive(t, program, "", "scripts/init-bottom/particle", ""),
		"no program":      archive(t, "scripts/init-bottom/particle", ""),
		"other place":     archive(t, "x/"+program, "x", "x/scripts/init-bottom/particle", ""),
		"directory":       archive(t, program+"/", "", "scripts/init-bottom/particle", ""),
	} {
		if has, err := Has(bytes.NewReader(image)); has || err != nil {
			t.Errorf("%s: got %v, %v, want false", name, has, err)
		}
	}
	c, err := Inspect(bytes.NewReader(archive(t, "lib/modules/6.12/kernel/fs/ext4/ext4.ko", "")))
	if err != nil || !slices.Equal(c.Missing(), []string{"erofs", "overlay"}) {
		t.Errorf("got %v, %v, want erofs and overlay missing", c.Missing(), err)
	}
	if c, err = Inspect(bytes.NewReader(archive(t, "init", ""))); err != nil || c.Missing() != nil {
		t.Errorf("without any modules: got %v, %v", c.Missing(), err)
	}
}

func TestInspectErrors(t *testing.T) {
	full := equipped(t)
	zst := pack(t, "zstd", full)
	hugeXZ := pack(t, "xz", full)
	// The dictionary's size is in the last byte of the filter's flags; the header's
	// checksum is not looked at before.
	hugeXZ[12+4] = 40
	hugeLZMA := pack(t, "lzma", full)
	binary.LittleEndian.PutUint32(hugeLZMA[1:], 1<<31)
	for name, image := range map[string][]byte{
		"empty":         {},
		"zeros":         make([]byte, 1024),
		"no initramfs":  []byte("#!/bin/sh\necho this is no initramfs"),
		"cut":           full[:200],
		"cut zstd":      zst[:len(zst)/2],
		"junk behind":   append(slices.Clone(full), "junk"...),
		"zstd in gzip":  pack(t, "gzip", zst),
		"huge xz":       hugeXZ,
		"huge lzma":     hugeLZMA,
		"nothing in xz": pack(t, "xz", nil),
		"bad gzip":      []byte("\x1f\x8b\xff"),
	} {
		if _, err := Inspect(bytes.NewReader(image)); !errors.Is(err, ErrArchive) {
			t.Errorf("%s: got %v, want ErrArchive", name, err)
		}
	}
	// An error of the disk is not one of the format.
	broken := io.MultiReader(bytes.NewReader(zst[:len(zst)/2]), iotest.ErrReader(io.ErrClosedPipe))
	if _, err := Inspect(broken); !errors.Is(err, io.ErrClosedPipe) || errors.Is(err, ErrArchive) {
		t.Errorf("got %v, want that of the reader", err)
	}
}

// TestInspectBomb unpacks zeros without end.
func TestInspectBomb(t *testing.T) {
	in := &inspector{left: 1 << 20, modules: map[string]bool{}}
	bomb := pack(t, "zstd", append(archive(t), make([]byte, 8<<20)...))
	src := &source{r: bytes.NewReader(bomb)}
	if err := in.archives(bufio.NewReader(src), true); !errors.Is(err, errTooLarge) {
		t.Errorf("got %v, want errTooLarge", err)
	}
}

// TestStarters compares what Inspect looks for with what the carriers install.
func TestStarters(t *testing.T) {
	for _, f := range Files() {
		if dir, ok := strings.CutPrefix(f.Path, "/usr/share/initramfs-tools/"); ok && filepath.Dir(dir) == "scripts/init-bottom" {
			if starters[dir] != "initramfs-tools" {
				t.Errorf("Inspect does not know %q", dir)
			}
		}
	}
}

func FuzzInspect(f *testing.F) {
	full := equipped(f)
	f.Add(full)
	f.Add(append(archive(f, "kernel/x", "y"), make([]byte, 20)...))
	for how := range packers {
		f.Add(pack(f, how, full))
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		c, err := Inspect(bytes.NewReader(image))
		if err != nil {
			if !errors.Is(err, ErrArchive) {
				t.Errorf("got %v, want ErrArchive", err)
			}
			return
		}
		if !slices.IsSorted(c.Modules) {
			t.Errorf("modules are not sorted: %q", c.Modules)
		}
		// What is in an archive stays in it when another one comes before.
		again, err := Inspect(io.MultiReader(bytes.NewReader(archive(t, "early", "x")), bytes.NewReader(image)))
		if err != nil || again.Program != c.Program || again.Starter != c.Starter || !slices.Equal(again.Modules, c.Modules) {
			t.Errorf("behind another archive: got %+v, %v, want %+v", again, err, c)
		}
	})
}
