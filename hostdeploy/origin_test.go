package hostdeploy

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
)

func anOrigin() *Origin {
	d := fsverity.Sum(fsverity.SHA256, []byte("image"))
	return &Origin{
		Reference: "docker://registry.example/server:13", Manifest: "sha256:" + strings.Repeat("ab", 32),
		BootDigest: strings.Repeat("cd", 32), ID: d.String() + ".2", Digest: d, Version: "2026.11.23",
		Title: "Debian GNU/Linux 13 (trixie) 2026.11.23", Kernel: "6.12.1-amd64",
		Created: time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC), Pinned: true,
		KArgs: KArgs{Boot: Args{"root=UUID=1", "rw"}, Machine: Args{`a="b c"`}, Image: Args{"quiet"}, User: Args{"x"}, Deleted: Args{"quiet"}},
	}
}

func TestOriginRoundTrip(t *testing.T) {
	want := anOrigin()
	data, err := want.marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"[origin]", "container-image-reference=ostree-unverified-image:docker://registry.example/server:13", "boot_type=bls", "manifest_digest=" + want.Manifest} {
		if !strings.Contains(string(data), line+"\n") {
			t.Errorf("the file has no line %q:\n%s", line, data)
		}
	}
	got, err := parseOrigin(data)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	want.Title = "two\nlines"
	if _, err := want.marshal(); !errors.Is(err, ErrFormat) {
		t.Errorf("a title of two lines: got %v, want ErrFormat", err)
	}
}

func TestOriginBad(t *testing.T) {
	good, err := anOrigin().marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"empty":           "",
		"no section":      "[particle\n",
		"no key":          "[particle]\nid\n",
		"short id":        strings.Replace(string(good), "id="+anOrigin().ID, "id=abc", 1),
		"path as id":      strings.Replace(string(good), "id="+anOrigin().ID, "id=../../etc", 1),
		"id with .0":      strings.Replace(string(good), anOrigin().ID, anOrigin().Digest.String()+".0", 1),
		"other algorithm": strings.Replace(string(good), "v1-sha256-12:", "v1-sha512-12:", 1),
		"bad date":        strings.Replace(string(good), "created=2026", "created=x", 1),
		"bad pin":         strings.Replace(string(good), "pinned=true", "pinned=perhaps", 1),
	} {
		if o, err := parseOrigin([]byte(text)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: got %+v, %v, want ErrFormat", name, o, err)
		}
	}
}

func FuzzOrigin(f *testing.F) {
	good, err := anOrigin().marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(good))
	f.Add("[origin]\ncontainer-image-reference=x\n")
	f.Fuzz(func(t *testing.T, text string) {
		o, err := parseOrigin([]byte(text))
		if err != nil {
			return
		}
		data, err := o.marshal()
		if err != nil {
			return // a control character in a value
		}
		again, err := parseOrigin(data)
		if err != nil || again.ID != o.ID || again.Digest != o.Digest || again.KArgs.All().String() != o.KArgs.All().String() {
			t.Errorf("%q became %q: %v", text, data, err)
		}
	})
}
