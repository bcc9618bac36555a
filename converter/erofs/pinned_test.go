package erofs_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// The trees of the digests that composefs-rs has pinned
// (crates/composefs/tests/mkfs.rs).
const (
	emptyDump  = "/ 0 40755 2 0 0 0 0.0 - - -\n"
	simpleDump = emptyDump +
		"/blkdev 0 60000 1 0 0 123 0.0 - - -\n" +
		"/chrdev 0 20000 1 0 0 123 0.0 - - -\n" +
		"/fifo 0 10000 1 0 0 0 0.0 - - -\n" +
		"/regular-external 1234 100000 1 0 0 0 0.0 " + objectPath + " - " + objectHex + "\n" +
		"/regular-inline 4 100000 1 0 0 0 0.0 - hihi -\n" +
		"/socket 0 140000 1 0 0 0 0.0 - - -\n" +
		"/symlink 7 120000 1 0 0 0 0.0 /target - -\n"
)

func TestPinned(t *testing.T) {
	made := func(text string, f erofs.Format) []byte {
		return write(t, parse(t, []byte(text), dump.Options{Strict: true}), f)
	}
	// composefs-rs takes no inline content of this size.
	var special string
	for line := range strings.Lines(string(read(t, conformance+"/special_v1.dump"))) {
		if !strings.HasPrefix(line, "/inline-large") {
			special += line
		}
	}
	for _, c := range []struct {
		name  string
		image []byte
		want  string
	}{
		{"empty V0", made(emptyDump, erofs.V0), "8f589e8f57ecb88823736b0d857ddca1e1068a23e264fad164b28f7038eb3682"},
		{"empty V1", made(emptyDump, erofs.V1), "14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63"},
		{"empty V2", emptyV2(), "086b702a519b57d6ef5aea6f8b3f2be24355cd1fb835cd80fb4e3d388b24d5a5"},
		{"simple V0", made(simpleDump, erofs.V0), "9f3f5620ee0c54708516467d0d58741e7963047c7106b245d94c298259d0fa01"},
		{"simple V1", made(simpleDump, erofs.V1), "ad6db6427568a1e4fdc772cbab7b6063f5eb4b33cb62982a740ba9213e5962b5"},
		{"simple V2", simpleV2(), "a8fcd41f8b313bede69f462f2af0a38d64b99a6333f5df884ea9ab4037fac722"},
		{"special V1", made(special, erofs.V1), "b1c78c25db8638be5b9b483472d32ee9624d8d32ded626a91cd536116e8df97c"},
	} {
		if got := fsverity.Sum(fsverity.SHA256, c.image).String(); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}

// TestReadV2 reads images that composefs-rs wrote, or would have.
func TestReadV2(t *testing.T) {
	if got := printDump(t, readImage(t, emptyV2())); got != emptyDump {
		t.Errorf("empty: got\n%swant\n%s", got, emptyDump)
	}
	if got := printDump(t, readImage(t, simpleV2())); got != simpleDump {
		t.Errorf("simple: got\n%swant\n%s", got, simpleDump)
	}
	// There is no escaping of whiteouts and no room for the object store.
	b := simpleV2()
	le.PutUint32(b[46*32+16:], 0)
	if n := readImage(t, b).Lookup("/chrdev"); n == nil || !n.IsWhiteout() {
		t.Errorf("whiteout: got %v", n)
	}
}

func TestInfo(t *testing.T) {
	tr := parse(t, []byte(strings.Replace(emptyDump, "0.0", "5.7", 1)), dump.Options{})
	tr.Root.Xattrs = map[string]string{"system.posix_acl_access": "x"}
	for _, c := range []struct {
		format  erofs.Format
		version int
	}{{erofs.V0, 0}, {erofs.V1, 1}, {erofs.Auto, 0}} {
		image := write(t, tr, c.format)
		info, err := erofs.ReadInfo(bytes.NewReader(image))
		if err != nil {
			t.Fatal(err)
		}
		if info.Version != c.version || !info.HasACL || info.Inodes != 257 || int(info.Blocks)*4096 != len(image) ||
			info.BuildTime.UnixNano() != 5_000_000_007 {
			t.Errorf("%s: got %+v", c.format, info)
		}
	}
	tr.Root.Dir["w"] = tree.NewWhiteout()
	if info, err := erofs.ReadInfo(bytes.NewReader(write(t, tr, erofs.Auto))); err != nil || info.Version != 1 {
		t.Errorf("with a whiteout: got %+v, %v, want version 1", info, err)
	}
}

func TestFormatFor(t *testing.T) {
	for _, c := range []struct {
		min, max int
		want     erofs.Format
		ok       bool
	}{
		{0, 0, erofs.V0, true}, {0, 1, erofs.Auto, true}, {1, 1, erofs.V1, true}, {1, 0, erofs.V1, true},
		{2, 2, 0, false}, {0, 2, 0, false}, {-1, 0, 0, false},
	} {
		if got, err := erofs.FormatFor(c.min, c.max); got != c.want || (err == nil) != c.ok {
			t.Errorf("%d, %d: got %s, %v, want %s", c.min, c.max, got, err, c.want)
		}
	}
}

// TestSHA512 has objects of both algorithms in one image.
func TestSHA512(t *testing.T) {
	text := emptyDump +
		"/a 100 100644 1 0 0 0 0.0 " + objectPath + " - " + objectHex + "\n" +
		"/b 100 100644 1 0 0 0 0.0 5a/" + objectHex[2:] + objectHex + " - " + objectHex + objectHex + "\n" +
		"/c 100 100644 1 0 0 0 0.0 - - " + objectHex + objectHex + "\n"
	image := write(t, parse(t, []byte(text), dump.Options{Strict: true}), erofs.V1)
	if got := printDump(t, readImage(t, image)); got != text {
		t.Errorf("got\n%swant\n%s", got, text)
	}
	// struct ovl_metacopy: version, length, flags, algorithm, digest.
	if want := "\x00\x44\x00\x02" + strings.Repeat("Z", 64); !bytes.Contains(image, []byte(want)) {
		t.Error("the image has no metacopy of SHA-512")
	}
	objects, err := erofs.Objects(bytes.NewReader(image), int64(len(image)))
	if err != nil || len(objects) != 2 || objects[0].String() != objectHex || objects[1].String() != objectHex+objectHex {
		t.Errorf("objects: got %v, %v", objects, err)
	}
}

// TestObjects compares Objects with the tree.
func TestObjects(t *testing.T) {
	text := read(t, conformance+"/cs9-x86_64-developer.dump.gz")
	tr := parse(t, text, dump.Options{})
	want := map[fsverity.Digest]bool{}
	_ = tr.Walk(func(_ string, n *tree.Node) error {
		if n.IsRegular() && !n.File.Object.IsZero() {
			want[n.File.Object] = true
		}
		return nil
	})
	image := write(t, tr, erofs.V1)
	got, err := erofs.Objects(bytes.NewReader(image), int64(len(image)))
	if err != nil || len(got) != len(want) {
		t.Fatalf("got %d objects, %v, want %d", len(got), err, len(want))
	}
	for i, d := range got {
		if !want[d] || i > 0 && got[i-1].String() >= d.String() {
			t.Errorf("object %d: %s is unknown or out of order", i, d)
		}
	}
}
