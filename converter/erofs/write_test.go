package erofs_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/tree"
)

const conformance = "testdata/conformance"

// read returns a file's content, decompressed if its name ends in .gz.
func read(tb testing.TB, name string) []byte {
	tb.Helper()
	f, err := os.Open(name)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	var r io.Reader = f
	if strings.HasSuffix(name, ".gz") {
		if r, err = gzip.NewReader(f); err != nil {
			tb.Fatal(err)
		}
	}
	b, err := io.ReadAll(r)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func parse(tb testing.TB, text []byte, o dump.Options) *tree.Tree {
	tb.Helper()
	t, err := dump.Parse(bytes.NewReader(text), o)
	if err != nil {
		tb.Fatal(err)
	}
	return t
}

func write(tb testing.TB, t *tree.Tree, f erofs.Format) []byte {
	tb.Helper()
	var b bytes.Buffer
	if err := erofs.Write(&b, t, erofs.Options{Format: f}); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// A vector is a dump with the image that libcomposefs makes from it.
type vector struct {
	name   string
	text   []byte
	format erofs.Format
	sha256 string
	strict bool
}

// notStrict are the dumps that tests/test-checksums.sh of composefs parses without
// CFS_PARSE_STRICT.
var notStrict = map[string]bool{
	"no-newline.dump":                      true,
	"longlink.dump":                        true,
	"honggfuzz-longlink-unterminated.dump": true,
}

// vectors are all, but for the largest, of 64,000 inodes, in -short mode.
func vectors(tb testing.TB) []vector {
	tb.Helper()
	sums, err := filepath.Glob(conformance + "/*.sha256")
	if err != nil || len(sums) == 0 {
		tb.Fatalf("no vectors in %s: %v", conformance, err)
	}
	var vs []vector
	for _, sum := range sums {
		file := strings.TrimSuffix(sum, ".sha256")
		if testing.Short() && filepath.Base(file) == "cs9-x86_64-developer.dump.gz" {
			continue
		}
		v := vector{
			name:   filepath.Base(file),
			text:   read(tb, file),
			format: erofs.Auto,
			sha256: strings.TrimSpace(string(read(tb, sum))),
		}
		v.strict = !notStrict[v.name]
		if b, err := os.ReadFile(file + ".version"); err == nil {
			switch strings.TrimSpace(string(b)) {
			case "0":
				v.format = erofs.V0
			case "1":
				v.format = erofs.V1
			default:
				tb.Fatalf("%s.version: %q", file, b)
			}
		}
		vs = append(vs, v)
	}
	return vs
}

func TestConformance(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(v.name, func(t *testing.T) {
			image := write(t, parse(t, v.text, dump.Options{Strict: v.strict}), v.format)
			sum := sha256.Sum256(image)
			if got := hex.EncodeToString(sum[:]); got != v.sha256 {
				t.Errorf("got %s, want %s", got, v.sha256)
			}
		})
	}
}
