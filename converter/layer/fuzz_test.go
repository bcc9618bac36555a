package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/tree"
)

// fuzzLimits keep the fuzzer from spending its time on zeros.
var fuzzLimits = Options{MaxSize: 8 << 20, MaxMetadata: 8 << 20}

// FuzzRead reads any bytes as a layer. What is accepted must come back to the bit
// from its recorded stream, give the same tree from there, and survive being
// written as a tar.
func FuzzRead(f *testing.F) {
	for _, seed := range [][]byte{
		nil,
		tarOf(),
		tarOf(dir("./"), dir("a/"), file("a/b", "1"), link("c", "a/b"), symlink("d", "e"), file("a/.wh.x", ""), file("a/.wh..wh..opq", "")),
		tarOf(file("big", strings.Repeat("x", 5000)), char("c", 1, 3), typed(tar.TypeFifo, "f", "")),
		tarOf(xattr(file(strings.Repeat("n", 200), ""), "user.a", "b")),
		tarOf(with(file(strings.Repeat("n", 200), "x"), func(h *tar.Header) { h.Format = tar.FormatGNU })),
		tarOf(dir(".wh..wh.plnk"), file(".wh..wh.plnk/1", "x"), link("l", ".wh..wh.plnk/1")),
		rawPAX(map[string]string{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.realsize": "3000", "GNU.sparse.numblocks": "2", "GNU.sparse.map": "500,50,2000,50"}, "f", strings.Repeat("x", 100)),
		rawPAX(map[string]string{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "3000", "GNU.sparse.name": "g"}, "f", "1\n500\n100\n"+strings.Repeat("\x00", 502)+strings.Repeat("x", 100)),
		oldSparse(),
		pack(f, tarOf(file("a", "1")), Gzip),
		pack(f, tarOf(file("a", "1")), Zstd),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		ctx := context.Background()
		in = fixChecksums(in)
		m, rec := newMemory(), &recorded{}
		res, err := Read(ctx, bytes.NewReader(in), m, rec, fuzzLimits)
		if err != nil {
			return
		}
		dec, err := newDecompressor(bytes.NewReader(in))
		if err != nil {
			t.Fatal(err)
		}
		defer dec.Close()
		plain, err := io.ReadAll(dec)
		if err != nil {
			t.Fatal(err)
		}
		checkRead(t, res, m, rec, plain)
		checkTree(t, res.Tree)

		again, _ := rewrite(t, res.Tree, m)
		if d := tree.Diff(res.Tree, again.Tree); len(d) > 0 {
			t.Errorf("the tar of the tree gives another tree: %v", d)
		}
	})
}

// fixChecksums makes headers of what looks like one, which the fuzzer could not.
func fixChecksums(in []byte) []byte {
	in = bytes.Clone(in)
	for p := in; len(p) >= blockSize; p = p[blockSize:] {
		if string(p[257:262]) == "ustar" {
			checksum(p[:blockSize])
		}
	}
	return in
}

// oldSparse is an old GNU sparse file with one extension header.
func oldSparse() []byte {
	in := tarOf(file("f", strings.Repeat("x", 512)))
	in[156] = tar.TypeGNUSparse
	copy(in[257:265], "ustar  \x00")
	copy(in[483:495], "00000010000\x00") // real size 4096
	copy(in[386:410], "00000000000\x0000000000400\x00")
	in[482] = 1 // extended
	copy(in[124:136], "00000000500\x00")
	checksum(in[:512])
	ext := make([]byte, 512)
	copy(ext, "00000004000\x0000000000100\x00")
	return append(in[:512:512], append(ext, in[512:]...)...)
}

// checkTree checks what all other packages take for granted.
func checkTree(t *testing.T, tr *tree.Tree) {
	err := tr.Walk(func(path string, n *tree.Node) error {
		if len(path) > maxPath+1 {
			t.Errorf("path of %d bytes", len(path))
		}
		if n.IsDir() != (n.Dir != nil) || n.IsRegular() != (n.File != nil) {
			t.Errorf("%q: mode %o and shape do not agree", path, n.Mode)
		}
		for name := range n.Dir {
			if err := tree.CheckName(name); err != nil || strings.HasPrefix(name, whiteoutPrefix) {
				t.Errorf("%q: name %q: %v", path, name, err)
			}
		}
		if n.File != nil && (n.File.Size <= tree.InlineSize) != n.File.Object.IsZero() {
			t.Errorf("%q: %d bytes, object %s", path, n.File.Size, n.File.Object)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// FuzzFromChunks reads any recorded stream: a byte for the kind of the part, two
// for its length, then the bytes, which are inline or an object.
func FuzzFromChunks(f *testing.F) {
	split := func(in []byte, sizes ...int) []byte {
		var b []byte
		for i := 0; len(in) > 0; i++ {
			n := len(in)
			if i < len(sizes) {
				n = sizes[i]
			}
			b = append(b, byte(i%2))
			b = binary.LittleEndian.AppendUint16(b, uint16(n))
			b = append(b, in[:n]...)
			in = in[n:]
		}
		return b
	}
	plain := tarOf(file("a", strings.Repeat("x", 1000)), dir("b"))
	f.Add(split(plain))
	f.Add(split(plain, 512, 1000))
	f.Add(split(plain, 0, len(plain)))
	f.Add(split(plain, 700, 10))
	f.Add(split(oldSparse(), 1024, 512))
	f.Fuzz(func(t *testing.T, in []byte) {
		m := newMemory()
		var parts []part
		var plain []byte
		for len(in) >= 3 {
			n := min(int(binary.LittleEndian.Uint16(in[1:])), len(in)-3)
			data := in[3 : 3+n]
			plain = append(plain, data...)
			if in[0]&1 == 0 {
				parts = append(parts, part{inline: data})
			} else {
				d, _ := m.PutBytes(context.Background(), data)
				size := int64(n)
				if in[0]&2 != 0 {
					size = int64(in[0]) - 100 // a lie
				}
				parts = append(parts, part{object: d, size: size})
			}
			in = in[3+n:]
		}
		tr, err := FromChunks(context.Background(), &chunkList{parts}, m.open, m, fuzzLimits)
		if err != nil {
			return
		}
		checkTree(t, tr)
		// Unless a size lies, the bytes read in one piece give the same tree. (Read
		// is stricter with what looks compressed.)
		if err := Assemble(context.Background(), io.Discard, &chunkList{parts}, m.open); err != nil {
			return
		}
		if c, err := sniff(plain[:min(len(plain), sniffLen)]); c != None || err != nil {
			return
		}
		res, err := Read(context.Background(), bytes.NewReader(plain), newMemory(), nil, fuzzLimits)
		if err != nil {
			t.Fatalf("accepted from chunks only: %v", err)
		}
		if d := tree.Diff(tr, res.Tree); len(d) > 0 {
			t.Errorf("Read gives another tree: %v", d)
		}
	})
}
