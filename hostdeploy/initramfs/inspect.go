package initramfs

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

// Contents is what an initramfs has of what booting a deployment needs.
type Contents struct {
	// Program: it has particle-init-root.
	Program bool
	// Starter: it has a script or unit that runs the program: "initramfs-tools",
	// "dracut" or "" for none that is known.
	Starter string
	// Modules are the names of kernel modules in it or, as far as it lists them, in the
	// kernel itself; with underscores, sorted.
	Modules []string
}

// Limits of what Inspect reads. A Debian initramfs for all machines has 200 MiB
// unpacked, with firmware of graphics cards 600.
const (
	maxUnpacked = 4 << 30
	maxEntries  = 1 << 20
	maxWindow   = 128 << 20 // of a decompressor
	maxBuiltin  = 4 << 20   // of modules.builtin
)

// Starters are the files that show what runs the program.
var starters = map[string]string{
	"scripts/init-bottom/particle":                            "initramfs-tools",
	"usr/lib/systemd/system/particle-root-setup.service":      "dracut",
	"lib/systemd/system/particle-root-setup.service":          "dracut",
	"usr/lib/dracut/hooks/pre-pivot/10-particle-pre-pivot.sh": "dracut",
	"var/lib/dracut/hooks/pre-pivot/10-particle-pre-pivot.sh": "dracut",
	"lib/dracut/hooks/pre-pivot/10-particle-pre-pivot.sh":     "dracut",
}

// Has reports whether an initramfs can set up the root of a deployment: it has the
// program and something that runs it.
func Has(r io.Reader) (bool, error) {
	c, err := Inspect(r)
	if err != nil {
		return false, err
	}
	return c.Program && c.Starter != "", nil
}

// Missing returns the kernel modules without which no deployment boots and that the
// initramfs lacks, of erofs and overlay. Of an initramfs without any modules, and without
// the list of those in the kernel (modules.builtin), it cannot tell and returns none.
func (c *Contents) Missing() []string {
	var missing []string
	if len(c.Modules) == 0 {
		return nil
	}
	for _, m := range []string{"erofs", "overlay"} {
		if _, found := slices.BinarySearch(c.Modules, m); !found {
			missing = append(missing, m)
		}
	}
	return missing
}

// Inspect reads an initramfs: cpio archives one behind the other, with zeros between
// them, each plain or compressed with gzip, bzip2, xz, lzma, lz4 or zstd (Linux
// Documentation/driver-api/early-userspace/buffer-format.rst). Memory is bounded by
// the compressor's window, at most 128 MiB. Errors are [ErrArchive] and those of r.
func Inspect(r io.Reader) (*Contents, error) {
	in := &inspector{left: maxUnpacked, modules: map[string]bool{}}
	src := &source{r: r}
	if err := in.archives(bufio.NewReaderSize(src, 64<<10), true); err != nil {
		if src.err != nil {
			return nil, fmt.Errorf("reading the initramfs: %w", src.err)
		}
		return nil, fmt.Errorf("%w: %w", ErrArchive, err)
	}
	in.Modules = make([]string, 0, len(in.modules))
	for m := range in.modules {
		in.Modules = append(in.Modules, m)
	}
	slices.Sort(in.Modules)
	return &in.Contents, nil
}

// A source remembers its reader's own error, which no decoder may hide.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

type inspector struct {
	Contents
	modules map[string]bool
	left    int64 // bytes that may still be unpacked
	entries int
}

var errTooLarge = errors.New("it unpacks to more than 4 GiB or a million files")

// archives reads archives until the end. Compressed ones may only be on the outside,
// as for the kernel.
func (in *inspector) archives(r *bufio.Reader, outside bool) error {
	for first := true; ; first = false {
		if err := skipZeros(r); err == io.EOF {
			if first {
				return errors.New("it is empty")
			}
			return nil
		} else if err != nil {
			return err
		}
		head, err := r.Peek(6)
		if err != nil && err != io.EOF {
			return err
		}
		if bytes.HasPrefix(head, []byte("07070")) {
			if err := in.archive(r); err != nil {
				return err
			}
			continue
		}
		if !outside {
			return fmt.Errorf("got the bytes %x where a cpio archive begins", head)
		}
		if err := in.compressed(r, head); err != nil {
			return err
		}
	}
}

// archive reads one cpio archive up to its trailer.
func (in *inspector) archive(r io.Reader) error {
	c := cpio.NewReader(r)
	for {
		h, err := c.Next()
		if err == io.EOF { // the trailer; at the end of input archives finds it out
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading a cpio archive: %w", err)
		}
		if in.entries++; in.entries > maxEntries {
			return errTooLarge
		}
		if h.Mode&cpio.ModeType != cpio.TypeReg && h.Mode&cpio.ModeType != cpio.TypeSymlink {
			continue
		}
		if err := in.file(path.Clean("/" + h.Name)[1:], c, h); err != nil {
			return err
		}
	}
}

func (in *inspector) file(name string, r io.Reader, h *cpio.Header) error {
	if name == Program[1:] {
		in.Program = in.Program || h.Size > 0
		return nil
	}
	if by, ok := starters[name]; ok {
		in.Starter = by
		return nil
	}
	dir, base := path.Split(name)
	if !strings.Contains("/"+dir, "/lib/modules/") {
		return nil
	}
	if base == "modules.builtin" {
		data, err := readLimited(r, maxBuiltin)
		if err != nil {
			return fmt.Errorf("reading %q: %w", name, err)
		}
		for line := range strings.Lines(string(data)) {
			in.module(path.Base(strings.TrimSpace(line)))
		}
		return nil
	}
	in.module(base)
	return nil
}

// module notes a module by its file: NAME.ko, perhaps compressed.
func (in *inspector) module(file string) {
	name, rest, ok := strings.Cut(file, ".ko")
	if ok && name != "" && (rest == "" || rest[0] == '.') && len(in.modules) < maxEntries {
		in.modules[strings.ReplaceAll(name, "-", "_")] = true
	}
}

// compressed reads the archives in a compressed part.
func (in *inspector) compressed(r *bufio.Reader, head []byte) error {
	kind, dec, err := decompressor(r, head)
	if err != nil {
		return err
	}
	if closer, ok := dec.(io.Closer); ok {
		defer closer.Close()
	}
	limited := &limit{r: dec, left: &in.left}
	if err := in.archives(bufio.NewReader(limited), false); err != nil {
		return fmt.Errorf("%s: %w", kind, err)
	}
	return nil
}

// decompressor knows the magic numbers of Linux lib/decompress.c.
func decompressor(r *bufio.Reader, head []byte) (kind string, dec io.Reader, err error) {
	is := func(magic string) bool { return strings.HasPrefix(string(head), magic) }
	switch {
	case is("\x1f\x8b"), is("\x1f\x9e"):
		z, err := gzip.NewReader(r)
		if err != nil {
			return "gzip", nil, fmt.Errorf("gzip: %w", err)
		}
		z.Multistream(false) // what follows may be compressed in another way
		return "gzip", z, nil
	case is("BZh"):
		return "bzip2", bzip2.NewReader(r), nil
	case is("\xfd7zXZ\x00"):
		if err := checkXZ(r); err != nil {
			return "xz", nil, fmt.Errorf("xz: %w", err)
		}
		dec, err = xz.NewReader(r)
		return "xz", dec, wrap("xz", err)
	case is("\x5d\x00\x00"):
		dec, err = lzma.ReaderConfig{DictCap: maxWindow}.NewReader(r)
		return "lzma", dec, wrap("lzma", err)
	case is("\x02\x21\x4c\x18"), is("\x04\x22\x4d\x18"): // legacy frames, and those of today
		return "lz4", lz4.NewReader(r), nil
	case is("\x28\xb5\x2f\xfd"):
		frame, err := newZstdFrame(r)
		if err != nil {
			return "zstd", nil, fmt.Errorf("zstd: %w", err)
		}
		z, err := zstd.NewReader(frame, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxUnpacked))
		if err != nil {
			return "zstd", nil, fmt.Errorf("zstd: %w", err)
		}
		return "zstd", z.IOReadCloser(), nil
	}
	return "", nil, fmt.Errorf("got the bytes %x, want a cpio archive, or one compressed with gzip, bzip2, xz, lzma, lz4 or zstd", head)
}

func wrap(kind string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", kind, err)
	}
	return nil
}

// checkXZ refuses a dictionary that is too large to be taken on a stranger's word
// (https://tukaani.org/xz/xz-file-format.txt, 3.1 and 5.3.1). It looks at the first
// block only; xz(1) gives all the same one.
func checkXZ(r *bufio.Reader) error {
	head, err := r.Peek(12 + 24)
	if err != nil && err != io.EOF || len(head) < 18 {
		return io.ErrUnexpectedEOF
	}
	block := head[12:]
	i := 2
	for flag := byte(0x40); flag != 0; flag <<= 1 { // the two sizes that may be there
		if block[1]&flag == 0 {
			continue
		}
		for ; i < len(block) && block[i]&0x80 != 0; i++ {
		}
		i++
	}
	if i+2 >= len(block) || block[0] == 0 { // 0: an index, there is no block
		return nil
	}
	if block[i] == 0x21 && block[i+1] == 1 {
		if bits := block[i+2]; bits > 30 { // 30 is 128 MiB
			return fmt.Errorf("got a dictionary of more than %d MiB", maxWindow>>20)
		}
	}
	return nil
}

// skipZeros leaves r at its first byte that is not zero.
func skipZeros(r *bufio.Reader) error {
	for {
		b, err := r.ReadByte()
		if err != nil {
			return err
		}
		if b != 0 {
			return r.UnreadByte()
		}
	}
}

// A limit takes from a common allowance.
type limit struct {
	r    io.Reader
	left *int64
}

func (l *limit) Read(p []byte) (int, error) {
	if *l.left <= 0 {
		return 0, errTooLarge
	}
	n, err := l.r.Read(p[:min(int64(len(p)), *l.left)])
	*l.left -= int64(n)
	return n, err
}

// readLimited reads all of r, and fails where that is more than max bytes.
func readLimited(r io.Reader, max int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, max+1))
	if err == nil && int64(len(data)) > max {
		err = fmt.Errorf("got more than %d bytes", max)
	}
	return data, err
}
