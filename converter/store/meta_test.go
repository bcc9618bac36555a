package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

func TestTags(t *testing.T) {
	// The pairs of composefs-rs' own test, and text that EncodeTag never makes.
	for name, enc := range map[string]string{
		"myimage:latest": "myimage:latest", "library/nginx": "library%2Fnginx",
		"docker://busybox": "docker:%2F%2Fbusybox", "test%2F": "test%252F",
		"a%b/%": "a%25b%2F%25", "%%": "%25%25", "": "",
	} {
		if got := EncodeTag(name); got != enc {
			t.Errorf("EncodeTag(%q) = %q, want %q", name, got, enc)
		}
		if got := DecodeTag(enc); got != name {
			t.Errorf("DecodeTag(%q) = %q, want %q", enc, got, name)
		}
	}
	for _, odd := range []string{"%", "%2", "%zz", "%2f"} {
		if got := DecodeTag(odd); got != odd {
			t.Errorf("DecodeTag(%q) = %q, want it unchanged", odd, got)
		}
	}
}

func TestMeta(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]struct {
		err      error
		readOnly string
	}{
		`{"version":1,"algorithm":"fsverity-sha256-12"}`:                                                                         {nil, "format V1"},
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"read-only-compatible":["v1_erofs"]}}`:                        {nil, ""},
		`{"version":1,"algorithm":"fsverity-sha512-12","erofs_formats":{"default":1,"extra":[2]}}`:                               {nil, ""},
		`{"version":1,"algorithm":"fsverity-sha512-12","erofs_formats":{"default":2,"extra":[1]}}`:                               {nil, ""},
		`{"version":1,"algorithm":"fsverity-sha512-12","erofs_formats":{"default":2}}`:                                           {nil, "format V1"},
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"compatible":["x"]},"erofs_formats":{"default":1}}`:           {nil, ""},
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"read-only-compatible":["x"]},"erofs_formats":{"default":1}}`: {nil, `"x"`},
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"incompatible":["x"]}}`:                                       {ErrFeature, ""},
		`{"version":2,"algorithm":"fsverity-sha1024","features":7}`:                                                              {ErrVersion, ""},
		`{"version":0}`:                                     {ErrVersion, ""},
		`{"algorithm":"fsverity-sha256-12"}`:                {ErrCorrupt, ""},
		`{"version":1,"algorithm":"fsverity-sha256-16"}`:    {ErrAlgorithm, ""},
		`{"version":1,"algorithm":"sha256"}`:                {ErrAlgorithm, ""},
		`{"version":1,"algorithm":"fsverity-sha256"}`:       {ErrAlgorithm, ""},
		`{"version":1,"algorithm":"fsverity-fsverity-sha"}`: {ErrAlgorithm, ""},
		`{"version":1`: {ErrCorrupt, ""},
		``:             {ErrCorrupt, ""},
	} {
		if err := os.WriteFile(filepath.Join(dir, metaName), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(dir)
		if !errors.Is(err, want.err) || (err == nil) != (want.err == nil) {
			t.Errorf("%s: got %v, want %v", text, err, want.err)
			continue
		}
		if err != nil {
			// Init must not make a new store of it either.
			if _, err := Init(dir, Options{}); !errors.Is(err, want.err) {
				t.Errorf("Init over %s: got %v, want %v", text, err, want.err)
			}
			continue
		}
		if (s.ReadOnly() == "") != (want.readOnly == "") || !strings.Contains(s.ReadOnly(), want.readOnly) {
			t.Errorf("%s: read only %q, want %q", text, s.ReadOnly(), want.readOnly)
		}
		txn, err := s.Begin(context.Background())
		if want.readOnly == "" {
			if err != nil {
				t.Errorf("%s: %v", text, err)
				continue
			}
			txn.Rollback()
		} else {
			_, gcErr := s.GC(context.Background(), GCOptions{})
			for _, err := range []error{err, gcErr, s.RemoveRef(Streams, "x")} {
				if !errors.Is(err, ErrReadOnly) {
					t.Errorf("%s: writing: got %v, want ErrReadOnly", text, err)
				}
			}
			if _, err := s.GC(context.Background(), GCOptions{DryRun: true}); err != nil {
				t.Errorf("%s: a dry run: %v", text, err)
			}
		}
	}
}

func TestInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if _, err := Open(dir); !errors.Is(err, ErrNotStore) {
		t.Errorf("opening nothing: got %v, want ErrNotStore", err)
	}
	var stores [8]*Store
	done := make(chan error)
	for i := range stores {
		go func() {
			var err error
			stores[i], err = Init(dir, Options{Algorithm: fsverity.SHA512})
			done <- err
		}()
	}
	for range stores {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	want := "{\n  \"version\": 1,\n  \"algorithm\": \"fsverity-sha512-12\",\n  \"features\": {\n    \"compatible\": [],\n    \"read-only-compatible\": [\n      \"v1_erofs\"\n    ],\n    \"incompatible\": []\n  },\n  \"erofs_formats\": {\n    \"default\": 1\n  }\n}\n"
	if got, err := os.ReadFile(filepath.Join(dir, metaName)); err != nil || string(got) != want {
		t.Errorf("meta.json is %q (%v), want %q", got, err, want)
	}
	if s, err := Init(dir, Options{}); err != nil || s.Algorithm() != fsverity.SHA512 {
		t.Errorf("Init again: %v", err)
	}
	if _, err := Init(dir, Options{Algorithm: fsverity.SHA256}); !errors.Is(err, ErrAlgorithm) {
		t.Errorf("Init with another algorithm: got %v, want ErrAlgorithm", err)
	}
	for _, e := range must(os.ReadDir(dir)) {
		if isMetaTemp(e.Name()) {
			t.Errorf("%s is left", e.Name())
		}
	}

	other := t.TempDir()
	if err := os.WriteFile(filepath.Join(other, "photo.jpg"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(other, Options{}); !errors.Is(err, ErrNotStore) || !strings.Contains(err.Error(), "photo.jpg") {
		t.Errorf("Init over a directory in use: got %v, want ErrNotStore and the name", err)
	}
	old := t.TempDir()
	if err := os.MkdirAll(filepath.Join(old, "objects/00"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Init(old, Options{}); !errors.Is(err, ErrNotStore) || !strings.Contains(err.Error(), "cfsctl") {
		t.Errorf("Init over objects without meta.json: got %v, want ErrNotStore and advice", err)
	}
	if got := must(os.ReadDir(old)); len(got) != 1 {
		t.Errorf("Init left %v", got)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestUmask stores under a umask that takes everything from others.
func TestUmask(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	s := newStore(t, 0)
	txn := begin(t, s)
	d := put(t, txn, []byte("x"))
	commit(t, txn)
	if st, err := os.Stat(s.path(objectsDir, d.Path())); err != nil || st.Mode() != objectMode {
		t.Errorf("mode %v (%v), want %v", st.Mode(), err, os.FileMode(objectMode))
	}
}

// TestLiveStaging checks that the staging directory of a living transaction stays.
func TestLiveStaging(t *testing.T) {
	s := newStore(t, 0)
	txn := begin(t, s)
	d := put(t, txn, []byte("x"))
	if n, err := s.sweep(); n != 0 || err != nil {
		t.Errorf("swept %d, %v", n, err)
	}
	begin(t, s).Rollback()
	commit(t, txn)
	if !bytes.Equal(readObject(t, s, d), []byte("x")) {
		t.Error("other content")
	}
}

// FuzzMeta reads anything as meta.json: what is accepted means the same when it is
// written again.
func FuzzMeta(f *testing.F) {
	for _, seed := range []string{
		`{"version":1,"algorithm":"fsverity-sha256-12"}`,
		`{"version":1,"algorithm":"fsverity-sha512-12","features":{"compatible":["a"],"read-only-compatible":["v1_erofs"],"incompatible":[]},"erofs_formats":{"default":1,"extra":[2]}}`,
		`{"version":2}`, `[]`, ``,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, alg, readOnly, err := parseMeta(data)
		if err != nil {
			return
		}
		if alg.Size() == 0 {
			t.Fatal("no algorithm")
		}
		again, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if _, alg2, readOnly2, err := parseMeta(again); err != nil || alg2 != alg || readOnly2 != readOnly {
			t.Fatalf("%s: %v, %v, %q; before %v, %q", again, err, alg2, readOnly2, alg, readOnly)
		}
	})
}
