package layer

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
)

// realistic makes a tar shaped like a Debian base image: 3,000 files in 300
// directories, most of them small, some large, text and machine code mixed, about
// 60 MB.
func realistic() []byte {
	rnd := rand.New(rand.NewPCG(3, 4))
	words := make([]string, 2000)
	for i := range words {
		words[i] = fmt.Sprintf("%x", rnd.Uint32()>>(rnd.IntN(20)))
	}
	entries := []entry{dir("./")}
	for d := range 300 {
		parent := fmt.Sprintf("usr/share/dir%03d", d)
		entries = append(entries, dir(parent))
		for f := range 10 {
			size := 100 + int(rnd.ExpFloat64()*12_000)
			if f == 0 && d%20 == 0 {
				size *= 100
			}
			var b strings.Builder
			for b.Len() < size {
				b.WriteString(words[rnd.IntN(len(words))])
				b.WriteByte(" \n\x00"[rnd.IntN(3)])
			}
			entries = append(entries, file(fmt.Sprintf("%s/file%d", parent, f), b.String()))
		}
	}
	return tarOf(entries...)
}

// BenchmarkRead reads a tar of many small and some large files; MB/s are of
// uncompressed bytes.
func BenchmarkRead(b *testing.B) {
	plain := realistic()
	for _, c := range []Compression{None, Gzip, Zstd} {
		blob := pack(b, plain, c)
		b.Run(c.String(), func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := Read(context.Background(), bytes.NewReader(blob), Discard(fsverity.SHA256), nil, Options{}); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(c.String()+"-decompress-only", func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			for b.Loop() {
				d, err := newDecompressor(bytes.NewReader(blob))
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, struct{ io.Reader }{d}); err != nil {
					b.Fatal(err)
				}
				d.Close()
			}
		})
	}
}

// BenchmarkFromChunks makes the tree from the recorded stream.
func BenchmarkFromChunks(b *testing.B) {
	plain := realistic()
	m, rec := newMemory(), &recorded{}
	if _, err := Read(context.Background(), bytes.NewReader(plain), m, rec, Options{}); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(plain)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := FromChunks(context.Background(), rec.chunks(), m.open, m, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReadEntries reads 200,000 empty files; the unit is a layer.
func BenchmarkReadEntries(b *testing.B) {
	entries := make([]entry, 200_000)
	for i := range entries {
		entries[i] = file(fmt.Sprintf("usr/share/dir%04d/file%d", i/50, i), "")
	}
	plain := tarOf(entries...)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Read(context.Background(), bytes.NewReader(plain), Discard(fsverity.SHA256), nil, Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
