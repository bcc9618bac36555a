package layer

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// need returns the path of a program, or skips the test.
func need(t *testing.T, program, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("%s is missing: install Debian's package %s", program, pkg)
	}
	return path
}

func run(t *testing.T, dir, name string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return out
}

// content makes what the tars below hold: one of each thing that a user may make.
func content(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(root, "d", strings.Repeat("long", 40)), 0o755))
	must(os.WriteFile(filepath.Join(root, "d", strings.Repeat("long", 40), strings.Repeat("n", 90)), []byte("content"), 0o640))
	must(os.WriteFile(filepath.Join(root, "d/file"), bytes.Repeat([]byte("file"), 500), 0o755))
	must(os.Chmod(filepath.Join(root, "d/file"), 0o755|os.ModeSetuid))
	must(os.Link(filepath.Join(root, "d/file"), filepath.Join(root, "hard")))
	must(os.Symlink("d/file", filepath.Join(root, "soft")))
	must(os.WriteFile(filepath.Join(root, "empty"), nil, 0o600))
	// Holes at the start, in the middle and at the end.
	f, err := os.Create(filepath.Join(root, "sparse"))
	must(err)
	for i := range 20 {
		_, err = f.WriteAt([]byte(fmt.Sprintf("data %d", i)), int64(1+i)*300_000)
		must(err)
	}
	must(f.Truncate(8_000_000))
	must(f.Close())
	must(os.WriteFile(filepath.Join(root, "big"), bytes.Repeat([]byte("0123456789abcde\n"), 100_000), 0o644))
	for _, name := range []string{"d/file", "d", "."} {
		must(os.Chtimes(filepath.Join(root, name), time.Time{}, time.Unix(1_600_000_000, 0)))
	}
	return root
}

// checkContent checks a tree of content. Long names need a format that has them.
func checkContent(t *testing.T, root string, tr *tree.Tree) {
	t.Helper()
	for _, name := range []string{"sparse", "big", "d/file"} {
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		n := tr.Lookup(name)
		if n == nil || n.File == nil || n.File.Size != int64(len(data)) || n.File.Object != fsverity.Sum(fsverity.SHA256, data) {
			t.Errorf("%s: got %+v", name, n)
		}
	}
	if n := tr.Lookup("d/file"); n.Mode != tree.TypeRegular|0o4755 || n.MtimeSec != 1_600_000_000 {
		t.Errorf("d/file: got %+v", n.Stat)
	}
	if tr.Lookup("d/file") != tr.Lookup("hard") {
		t.Error("hard is no link to d/file")
	}
	if n := tr.Lookup("soft"); n.Target != "d/file" {
		t.Errorf("soft: got %+v", n)
	}
	if n := tr.Lookup("d/" + strings.Repeat("long", 40) + "/" + strings.Repeat("n", 90)); n == nil || string(n.File.Inline) != "content" {
		t.Errorf("long name: got %+v", n)
	}
}

func TestGNUTar(t *testing.T) {
	program := need(t, "tar", "tar")
	root := content(t)
	for _, args := range [][]string{
		{"--format=gnu"},
		{"--format=oldgnu"},
		{"--format=pax"},
		{"--format=posix", "--pax-option=globexthdr.name=g,comment=test"},
		{"--format=ustar", "--exclude=*long*"},
		{"--format=v7", "--exclude=*long*"},
		{"--format=gnu", "--sparse"},
		{"--format=oldgnu", "--sparse"},
		{"--format=pax", "--sparse", "--sparse-version=0.0"},
		{"--format=pax", "--sparse", "--sparse-version=0.1"},
		{"--format=pax", "--sparse", "--sparse-version=1.0"},
		{"--format=gnu", "--owner=x:4000000000", "--mtime=@-5"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			plain := run(t, root, program, append(args, "--sort=name", "-c", ".")...)
			res, _ := readAll(t, plain, plain)
			switch {
			case len(args) > 1 && strings.HasPrefix(args[1], "--exclude"):
				if res.Tree.Lookup("big") == nil || res.Tree.Lookup("hard") != res.Tree.Lookup("d/file") {
					t.Errorf("got %s", show(res.Tree))
				}
			case len(args) > 2 && strings.HasPrefix(args[2], "--mtime"):
				if n := res.Tree.Lookup("big"); n.MtimeSec != 0 || n.UID != 4_000_000_000 {
					t.Errorf("got %+v", n.Stat)
				}
			default:
				checkContent(t, root, res.Tree)
			}
		})
	}
}

func TestBsdtar(t *testing.T) {
	program := need(t, "bsdtar", "libarchive-tools")
	root := content(t)
	for _, format := range []string{"pax", "paxr", "gnutar"} {
		t.Run(format, func(t *testing.T) {
			plain := run(t, root, program, "--format", format, "-cf", "-", ".")
			res, _ := readAll(t, plain, plain)
			checkContent(t, root, res.Tree)
		})
	}
}

// TestPodman reads the layers of an image that podman has built and saved, in both
// of its archive formats.
func TestPodman(t *testing.T) {
	podman := need(t, "podman", "podman")
	if os.Getuid() != 0 {
		t.Skip("needs root: podman's storage")
	}
	root := content(t)
	if err := os.WriteFile(filepath.Join(root, "Containerfile"), []byte("FROM scratch\nCOPY d /d\nCOPY sparse big /\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	storage := t.TempDir()
	args := []string{"--root", filepath.Join(storage, "root"), "--runroot", filepath.Join(storage, "run"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs"}
	run(t, root, podman, append(args, "build", "--layers", "-q", "-t", "layertest", ".")...)
	for _, format := range []string{"docker-dir", "oci-dir"} {
		out := filepath.Join(storage, format)
		run(t, root, podman, append(args, "save", "--format", format, "-o", out, "layertest")...)
		for _, blob := range layersOf(t, out) {
			data, err := os.ReadFile(blob)
			if err != nil {
				t.Fatal(err)
			}
			dec, err := newDecompressor(bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			var plain bytes.Buffer
			if _, err := plain.ReadFrom(dec); err != nil {
				t.Fatal(err)
			}
			dec.Close()
			res, _ := readAll(t, data, plain.Bytes())
			if res.Entries == 0 {
				t.Errorf("%s: no entries", blob)
			}
		}
	}
}

// layersOf returns the layer blobs below a directory: those that the only manifest
// names.
func layersOf(t *testing.T, dir string) []string {
	t.Helper()
	manifest := filepath.Join(dir, "manifest.json")
	blobs := dir
	if index, err := os.ReadFile(filepath.Join(dir, "index.json")); err == nil {
		var x struct{ Manifests []struct{ Digest string } }
		if err := json.Unmarshal(index, &x); err != nil || len(x.Manifests) != 1 {
			t.Fatalf("index: %v, %+v", err, x)
		}
		blobs = filepath.Join(dir, "blobs", "sha256")
		manifest = filepath.Join(blobs, strings.TrimPrefix(x.Manifests[0].Digest, "sha256:"))
	}
	data, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	var m struct{ Layers []struct{ Digest string } }
	if err := json.Unmarshal(data, &m); err != nil || len(m.Layers) == 0 {
		t.Fatalf("manifest: %v, %+v", err, m)
	}
	var files []string
	for _, l := range m.Layers {
		files = append(files, filepath.Join(blobs, strings.TrimPrefix(l.Digest, "sha256:")))
	}
	return files
}

// TestManySparseParts covers extension headers of old GNU sparse maps, maps of PAX
// 1.0 that take several blocks, and packed bodies below and above the inline limit.
func TestManySparseParts(t *testing.T) {
	program := need(t, "tar", "tar")
	root := t.TempDir()
	write := func(name string, parts int, part string, size int64) []byte {
		f, err := os.Create(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for i := range parts {
			if _, err := f.WriteAt([]byte(part), int64(i)*20_000); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	want := map[string][]byte{
		"many":  write("many", 300, "part", 300*20_000),
		"one":   write("one", 1, "part", 100_000),
		"holes": write("holes", 0, "", 1_000_000),
	}
	for _, args := range [][]string{{"--format=gnu"}, {"--format=pax", "--sparse-version=0.0"}, {"--format=pax", "--sparse-version=0.1"}, {"--format=pax", "--sparse-version=1.0"}} {
		plain := run(t, root, program, append(args, "-cS", "many", "one", "holes")...)
		res, _ := readAll(t, plain, plain)
		for name, data := range want {
			if n := res.Tree.Lookup(name); n == nil || n.File.Object != fsverity.Sum(fsverity.SHA256, data) {
				t.Errorf("%v: %s: got %+v", args, name, n)
			}
		}
	}
}

// TestHostileSparse reads sparse files that lie about their size.
func TestHostileSparse(t *testing.T) {
	sparse := func(realsize, sparseMap, body string) []byte {
		return rawPAX(map[string]string{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.realsize": realsize, "GNU.sparse.size": realsize, "GNU.sparse.numblocks": fmt.Sprint((strings.Count(sparseMap, ",") + 1) / 2), "GNU.sparse.map": sparseMap}, "f", body)
	}
	body := strings.Repeat("x", 1000)
	for _, c := range []struct {
		name string
		in   []byte
		is   error
	}{
		{"exabytes", sparse("1000000000000000000", "0,1000", body), ErrTooLarge},
		{"bytes left over", sparse("2000", "0,900", body), ErrFormat},
		{"bytes left over of a small body", sparse("200", "0,5", "123456"), ErrFormat},
		{"bytes left over of no content", sparse("0", "0,0", body), ErrFormat},
		{"bytes that are missing", sparse("3000", "0,1500", body), ErrFormat},
		{"parts out of order", sparse("3000", "500,500,0,500", body), ErrFormat},
		{"part behind the end", sparse("900", "0,1000", body), ErrFormat},
		{"negative", sparse("-1", "0,1000", body), ErrFormat},
		{"truncated", sparse("3000", "0,1000", body)[:2048+100], ErrTruncated},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := failing(t, c.in, Options{}); !errors.Is(err, c.is) {
				t.Errorf("got %v, want the kind %v", err, c.is)
			}
		})
	}
	good := sparse("3000", "500,500,2000,500", body)
	res, _ := readAll(t, good, good)
	want := strings.Repeat("\x00", 500) + body[:500] + strings.Repeat("\x00", 1000) + body[:500] + strings.Repeat("\x00", 500)
	if n := res.Tree.Lookup("f"); n.File.Object != fsverity.Sum(fsverity.SHA256, []byte(want)) {
		t.Errorf("got %+v", n.File)
	}
}

// rawPAX makes a tar of one file with records that archive/tar would not write.
func rawPAX(records map[string]string, name, body string) []byte {
	var x strings.Builder
	for _, k := range sorted(records) {
		rest := fmt.Sprintf(" %s=%s\n", k, records[k])
		n := len(rest) + 1
		for len(fmt.Sprint(n))+len(rest) != n {
			n++
		}
		fmt.Fprintf(&x, "%d%s", n, rest)
	}
	// A file with the records for its body, whose type is then changed to theirs.
	head := tarOf(file("records", x.String()))
	head = head[:len(head)-1024]
	head[156] = tar.TypeXHeader
	checksum(head[:512])
	return append(head, tarOf(file(name, body))...)
}

// checksum sets the checksum of a header: the sum of its bytes with blanks in its
// own place.
func checksum(block []byte) {
	copy(block[148:156], "        ")
	sum := 0
	for _, c := range block {
		sum += int(c)
	}
	copy(block[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

// TestAbsurdSizes reads headers that promise more than there is; none of that may
// be allocated.
func TestAbsurdSizes(t *testing.T) {
	for _, size := range []string{"77777777777\x00", "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff", "00000400000\x00"} {
		for _, typ := range []byte{tar.TypeReg, tar.TypeXHeader, tar.TypeXGlobalHeader, tar.TypeGNULongName, tar.TypeGNULongLink, tar.TypeGNUSparse} {
			in := tarOf(file("f", "content"))
			in[156] = typ
			copy(in[124:136], size)
			copy(in[257:265], "ustar  \x00")
			checksum(in[:512])
			var err error
			allocated := testing.AllocsPerRun(1, func() { err = failing(t, in, Options{}) })
			if allocated > 10_000 {
				t.Errorf("%q, type %q: %.0f allocations", size, typ, allocated)
			}
			if !errors.Is(err, ErrTruncated) && !errors.Is(err, ErrFormat) {
				t.Errorf("%q, type %q: got %v", size, typ, err)
			}
		}
	}
}
