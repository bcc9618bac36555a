package layer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// sample is a tar of some text and some noise, about 3 MB.
func sample() []byte {
	rnd := rand.NewChaCha8([32]byte{1})
	noise := make([]byte, 1_200_000)
	rnd.Read(noise)
	return tarOf(dir("a/"), file("a/noise", string(noise)), file("a/text", strings.Repeat("some text ", 150_000)), file("a/small", "x"), file("empty", ""))
}

// pack compresses with this package.
func pack(t testing.TB, data []byte, c Compression) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := NewCompressor(&buf, c, CompressorOptions{})
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestCompressions(t *testing.T) {
	plain := sample()
	half := len(plain) / 2
	skippable := append(binary.LittleEndian.AppendUint32([]byte("\x5e\x2a\x4d\x18"), 5), "hello"...)
	trailing := append(bytes.Clone(plain), bytes.Repeat([]byte("trailing"), 30_000)...)
	for _, c := range []struct {
		name        string
		blob, plain []byte
		want        Compression
	}{
		{"plain", plain, plain, None},
		{"gzip", pack(t, plain, Gzip), plain, Gzip},
		{"gzip members", append(pack(t, plain[:half], Gzip), pack(t, plain[half:], Gzip)...), plain, Gzip},
		{"zstd", pack(t, plain, Zstd), plain, Zstd},
		{"zstd frames", append(pack(t, plain[:half], Zstd), pack(t, plain[half:], Zstd)...), plain, Zstd},
		{"zstd with skippable frames", bytes.Join([][]byte{skippable, pack(t, plain, Zstd), skippable}, nil), plain, Zstd},
		{"bytes behind the tar", trailing, trailing, None},
		{"compressed bytes behind the tar", pack(t, trailing, Gzip), trailing, Gzip},
		{"empty", nil, nil, None},
		{"empty gzip", pack(t, nil, Gzip), nil, Gzip},
		{"no end blocks", plain[:len(plain)-1024], plain[:len(plain)-1024], None},
		{"one end block", plain[:len(plain)-512], plain[:len(plain)-512], None},
	} {
		t.Run(c.name, func(t *testing.T) {
			res, _ := readAll(t, c.blob, c.plain)
			if res.Compression != c.want {
				t.Errorf("got %s, want %s", res.Compression, c.want)
			}
		})
	}
}

// TestSmallReads checks that the size of the source's reads does not matter, not
// even to where the recorded stream is cut.
func TestSmallReads(t *testing.T) {
	plain := append(sample(), bytes.Repeat([]byte("t"), 200_000)...)
	var want []part
	for i, wrap := range []func(io.Reader) io.Reader{func(r io.Reader) io.Reader { return r }, iotest.HalfReader, iotest.DataErrReader} {
		rec := &recorded{}
		if _, err := Read(context.Background(), wrap(bytes.NewReader(pack(t, plain, Zstd))), newMemory(), rec, Options{}); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			want = rec.parts
		} else if fmt.Sprint(rec.parts) != fmt.Sprint(want) {
			t.Errorf("%d: the recorded stream differs", i)
		}
	}
	if longest := len(want[len(want)-2].inline); longest != inlineRun {
		t.Errorf("got a run of %d bytes, want %d", longest, inlineRun)
	}
}

// TestChunkedFormats reads the seekable formats as the plain streams they also are.
func TestChunkedFormats(t *testing.T) {
	plain := sample()
	section := io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain)))
	for _, c := range []struct {
		name string
		opts []estargz.Option
		want Compression
	}{
		{"eStargz", nil, Gzip},
		{"zstd:chunked", []estargz.Option{estargz.WithCompression(&zstdChunked{Compressor: zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault}})}, Zstd},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := estargz.Build(section, append(c.opts, estargz.WithChunkSize(100_000))...)
			if err != nil {
				t.Fatal(err)
			}
			defer b.Close()
			blob, err := io.ReadAll(b)
			if err != nil {
				t.Fatal(err)
			}
			dec, err := newDecompressor(bytes.NewReader(blob))
			if err != nil {
				t.Fatal(err)
			}
			defer dec.Close()
			uncompressed, err := io.ReadAll(dec)
			if err != nil {
				t.Fatal(err)
			}
			res, _ := readAll(t, blob, uncompressed)
			if res.Compression != c.want || res.DiffID != b.DiffID().String() {
				t.Errorf("got %s, diffID %s; want %s, %s", res.Compression, res.DiffID, c.want, b.DiffID())
			}
			if n := res.Tree.Lookup("a/text"); n == nil || n.File.Size != 1_500_000 {
				t.Errorf("a/text: got %+v", n)
			}
		})
	}
}

type zstdChunked struct {
	zstdchunked.Compressor
	zstdchunked.Decompressor
}

func TestRefusedBlobs(t *testing.T) {
	plain := sample()
	gz, zs := pack(t, plain, Gzip), pack(t, plain, Zstd)
	var wide bytes.Buffer
	w, err := zstd.NewWriter(&wide, zstd.WithWindowSize(256<<20))
	if err != nil {
		t.Fatal(err)
	}
	w.Write(plain)
	w.Flush() // keeps the frame from being declared as small
	w.Write(plain)
	w.Close()
	broken := bytes.Clone(gz)
	broken[len(broken)-5] ^= 1 // the CRC
	for _, c := range []struct {
		name string
		blob []byte
		opts Options
		is   error
		want string
	}{
		{"truncated header", plain[:512+100], Options{}, ErrTruncated, "at byte 512"},
		{"truncated buffered body", tarOf(file("f", strings.Repeat("x", 5000)))[:3000], Options{}, ErrTruncated, `body of "f", whose header is at byte 0`},
		{"truncated small body", tarOf(file("f", "xyz"))[:514], Options{}, ErrTruncated, `body of "f"`},
		{"truncated large body", plain[:1_000_000], Options{}, ErrTruncated, `body of "a/noise", whose header is at byte 512`},
		{"truncated gzip", gz[:len(gz)/2], Options{}, ErrTruncated, "inside a gzip stream"},
		{"gzip without its end", gz[:len(gz)-3], Options{}, ErrTruncated, "inside a gzip stream"},
		{"gzip header alone", gz[:5], Options{}, ErrTruncated, "inside a gzip stream"},
		{"truncated zstd", zs[:len(zs)/2], Options{}, ErrTruncated, "inside a zstd stream"},
		{"garbage after gzip", append(bytes.Clone(gz), "garbage, garbage"...), Options{}, ErrFormat, "behind the end"},
		{"garbage after zstd", append(bytes.Clone(zs), "garbage, garbage"...), Options{}, ErrFormat, "behind the end"},
		{"broken gzip", broken, Options{}, gzip.ErrChecksum, "decompressing the layer (gzip)"},
		{"wide window", wide.Bytes(), Options{}, ErrTooLarge, "128 MiB"},
		{"xz", []byte("\xfd7zXZ\x00\x00\x04\xe6\xd6\xb4"), Options{}, ErrCompression, "found xz"},
		{"lz4", []byte("\x04\x22\x4d\x18\x64\x40\xa7\x00\x00\x00"), Options{}, ErrCompression, "found lz4"},
		{"zip", []byte("PK\x03\x04\x14\x00\x00\x00\x00\x00"), Options{}, ErrCompression, "found zip"},
		{"bomb", gz, Options{MaxSize: int64(len(plain)) - 1}, ErrTooLarge, "--max-layer-size"},
		{"metadata", plain, Options{MaxMetadata: 1000}, ErrTooLarge, "more than 1000 bytes of memory"},
		{"other diffID", gz, Options{DiffID: "sha256:" + strings.Repeat("0", 64)}, ErrDiffID, "want sha256:0000"},
		{"no diffID", gz, Options{DiffID: "sha256:0"}, ErrDiffID, "not a sha256 digest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := failing(t, c.blob, c.opts)
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q of the kind %q", err, c.want, c.is)
			}
		})
	}
}

func TestLimitsAreInclusive(t *testing.T) {
	plain := sample()
	if _, err := Read(context.Background(), bytes.NewReader(plain), newMemory(), nil, Options{MaxSize: int64(len(plain))}); err != nil {
		t.Error(err)
	}
}

// TestBzip2 reads what `printf hello | bzip2` makes, and sees no bzip2 in a tar
// whose first name only begins like it.
func TestBzip2(t *testing.T) {
	hello := []byte("BZh91AY&SY\x19\x31\x65\x3d\x00\x00\x00\x81\x00\x02\x44\xa0\x00\x21\x9a\x68\x33\x4d\x07\x33\x8b\xb9\x22\x9c\x28\x48\x0c\x98\xb2\x9e\x80")
	d, err := newDecompressor(bytes.NewReader(hello))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(d); string(got) != "hello" || err != nil || d.compression != Bzip2 {
		t.Errorf("got %q, %v", got, err)
	}
	plain := tarOf(file("BZh91AY", "1"))
	if res, _ := readAll(t, plain, plain); res.Compression != None {
		t.Errorf("got %s", res.Compression)
	}
}

// TestBlobError checks that an error of the blob's reader, which comes with its
// last byte or after it, is neither missed nor hidden.
func TestBlobError(t *testing.T) {
	plain := sample()
	bad := errors.New("digest mismatch")
	for _, c := range []Compression{None, Gzip, Zstd} {
		blob := pack(t, plain, c)
		for _, n := range []int{0, 5, len(blob) / 2, len(blob)} {
			r := io.MultiReader(bytes.NewReader(blob[:n]), iotest.ErrReader(bad))
			if _, err := Read(context.Background(), r, newMemory(), nil, Options{}); !errors.Is(err, bad) || errors.Is(err, ErrTruncated) {
				t.Errorf("%s, after %d bytes: got %v", c, n, err)
			}
		}
	}
}

func TestCompressorIsDeterministic(t *testing.T) {
	data := sample()
	for _, c := range []Compression{Gzip, Zstd} {
		for _, level := range []int{0, 1, 9} {
			var want []byte
			for _, how := range []struct{ concurrency, step int }{{1, len(data)}, {2, 4096}, {7, 1_000_003}, {0, len(data) - 1}} {
				var buf bytes.Buffer
				w, err := NewCompressor(&buf, c, CompressorOptions{Level: level, Concurrency: how.concurrency})
				if err != nil {
					t.Fatal(err)
				}
				for p := data; len(p) > 0; p = p[min(how.step, len(p)):] {
					if _, err := w.Write(p[:min(how.step, len(p))]); err != nil {
						t.Fatal(err)
					}
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				if want == nil {
					want = buf.Bytes()
					readAll(t, want, data)
				} else if !bytes.Equal(want, buf.Bytes()) {
					t.Errorf("%s level %d: %+v changes the output", c, level, how)
				}
			}
			if c == Gzip && !bytes.Equal(want[4:8], make([]byte, 4)) {
				t.Errorf("gzip header has a time: %x", want[:10])
			}
		}
	}
	if _, err := NewCompressor(io.Discard, Bzip2, CompressorOptions{}); !errors.Is(err, ErrCompression) {
		t.Errorf("bzip2: got %v", err)
	}
	if _, err := NewCompressor(io.Discard, Gzip, CompressorOptions{Level: 10}); err == nil {
		t.Error("gzip level 10 accepted")
	}
}

func TestParseCompression(t *testing.T) {
	for _, c := range []Compression{None, Gzip, Zstd, Bzip2} {
		if got, err := ParseCompression(c.String()); got != c || err != nil {
			t.Errorf("%s: got %s, %v", c, got, err)
		}
	}
	if _, err := ParseCompression("xz"); !errors.Is(err, ErrCompression) {
		t.Errorf("xz: got %v", err)
	}
}
