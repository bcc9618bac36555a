package mount

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestHeader(t *testing.T) {
	le := binary.LittleEndian
	for name, change := range map[string]func(b []byte) []byte{
		"empty":        func(b []byte) []byte { return nil },
		"short":        func(b []byte) []byte { return b[:superOffset+superSize-1] },
		"magic":        func(b []byte) []byte { b[0]++; return b },
		"version":      func(b []byte) []byte { b[4] = 2; return b },
		"no EROFS":     func(b []byte) []byte { b[superOffset]++; return b },
		"block size":   func(b []byte) []byte { b[superOffset+12] = 9; return b },
		"cut short":    func(b []byte) []byte { return b[:4095] },
		"longer super": func(b []byte) []byte { le.PutUint32(b[superOffset+36:], 2); return b },
		"huge":         func(b []byte) []byte { le.PutUint32(b[superOffset+36:], 1<<32-1); return b },
	} {
		file := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(file, change(emptyImage()), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Mount(t.TempDir(), Options{Path: file, Objects: []string{"/"}})
		if !errors.Is(err, ErrNotImage) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: got %v, want ErrNotImage with the path", name, err)
		}
	}
	if _, err := Mount(t.TempDir(), Options{Path: t.TempDir(), Objects: []string{"/"}}); !errors.Is(err, ErrNotImage) {
		t.Errorf("directory: got %v, want ErrNotImage", err)
	}
	b := emptyImage()
	if h, err := parseHeader(b); err != nil || h.hasACL || h.blocks != 1 {
		t.Errorf("got %+v, %v", h, err)
	}
	b[8] = flagACL
	if h, err := parseHeader(b); err != nil || !h.hasACL {
		t.Errorf("got %+v, %v", h, err)
	}
}

func FuzzHeader(f *testing.F) {
	f.Add(emptyImage()[:superOffset+superSize])
	f.Add(emptyImage()[:100])
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := parseHeader(b)
		if err != nil && !errors.Is(err, ErrNotImage) {
			t.Errorf("got %v, want ErrNotImage", err)
		}
		if err == nil && h.hasACL != (b[8]&1 == 1) {
			t.Errorf("got %+v", h)
		}
	})
}

// Lines as several kernels have written them: 6.18 with descriptors as layers, 6.12
// with lowerdir+, 6.1 with lowerdir=, and others that are no composefs.
const mountinfo = `27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
33 27 0:5 / /dev rw shared:2 - devtmpfs devtmpfs rw,size=12334492k,mode=755
45 27 0:40 / /mnt/a ro,relatime - overlay composefs ro,lowerdir+=/,datadir+=/srv/obj\054ects,redirect_dir=on,metacopy=on
46 27 0:41 / /mnt/with\040space\134\012 rw,relatime shared:7 master:3 - overlay composefs:na\040me rw,lowerdir+=/proc/self/fd/7,datadir+=/a,datadir+=/b,upperdir=/up,workdir=/work,redirect_dir=on,metacopy=on,verity=require
47 27 0:42 / /mnt/old ro - overlay composefs ro,lowerdir=/proc/self/fd/7:/o,redirect_dir=on,metacopy=on
48 27 0:43 / /mnt/colons ro - overlay composefs ro,lowerdir=/m::/o::/p
49 27 0:44 / /merged rw - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
50 27 0:45 / /fake rw - tmpfs composefs rw
51 27 0:46 / /alike rw - overlay composefsx rw
`

func TestMountinfo(t *testing.T) {
	var got []Mounted
	n := 0
	err := ParseMountinfo(strings.NewReader(mountinfo), func(e Entry) error {
		n++
		if m, ok := e.composefs(); ok {
			got = append(got, m)
		}
		return nil
	})
	if err != nil || n != 9 {
		t.Fatalf("got %d lines, %v", n, err)
	}
	want := []Mounted{
		{Target: "/mnt/a", Objects: []string{"/srv/obj,ects"}, ReadOnly: true},
		{Target: "/mnt/with space\\\n", Name: "na me", Objects: []string{"/a", "/b"}, Upper: "/up", Verity: true},
		{Target: "/mnt/old", Objects: []string{"/o"}, ReadOnly: true},
		{Target: "/mnt/colons", Objects: []string{"/o", "/p"}, ReadOnly: true},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}

	first := Entry{}
	ParseMountinfo(strings.NewReader(mountinfo), func(e Entry) error { first = e; return os.ErrExist })
	if want := (Entry{27, 1, "254:0", "/", "/", "rw,relatime", "ext4", "/dev/vda", "rw,discard"}); first != want {
		t.Errorf("got %+v, want %+v", first, want)
	}

	for _, bad := range []string{
		"x",
		"27 1 254:0 / / rw,relatime ext4 /dev/vda rw",
		"27 1 254:0 / / rw - ext4 /dev/vda",
		"x 1 254:0 / / rw - ext4 /dev/vda rw",
		"27 x 254:0 / / rw - ext4 /dev/vda rw",
	} {
		if err := ParseMountinfo(strings.NewReader(bad+"\n"), func(Entry) error { return nil }); err == nil || !strings.Contains(err.Error(), "line 1") {
			t.Errorf("%q: got %v, want an error with the line", bad, err)
		}
	}
	for in, want := range map[string]string{`\040`: " ", `a\134b`: `a\b`, `\04`: `\04`, `\400`: `\400`, `\08x`: `\08x`, `\377`: "\xff", `\`: `\`} {
		if got := unescape(in); got != want {
			t.Errorf("unescape(%q): got %q, want %q", in, got, want)
		}
	}
}

// escape is what the kernel does to a field (fs/seq_file.c, mangle_path).
func escape(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if strings.IndexByte(" \t\n\\#", c) >= 0 {
			b.WriteString("\\" + string([]byte{'0' + c>>6, '0' + c>>3&7, '0' + c&7}))
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

func FuzzMountinfo(f *testing.F) {
	for line := range strings.Lines(mountinfo) {
		f.Add([]byte(line))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ParseMountinfo(bytes.NewReader(b), func(e Entry) error {
			e.composefs()
			e.SuperOption("lowerdir")
			return nil
		})
		// Any name survives the kernel's escapes.
		if s := string(b); unescape(escape(s)) != s {
			t.Errorf("%q: got %q by way of %q", s, unescape(escape(s)), escape(s))
		}
	})
}
