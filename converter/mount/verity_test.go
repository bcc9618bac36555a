package mount

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
)

func TestDigest(t *testing.T) {
	f := newFixture(t, t.TempDir())
	o := f.options()
	o.Digest = fsverity.Sum(fsverity.SHA256, []byte("another"))
	_, err := Mount(f.target, o)
	if !errors.Is(err, ErrWrongDigest) || !strings.Contains(err.Error(), f.digest.String()) || !strings.Contains(err.Error(), o.Digest.String()) {
		t.Errorf("got %v, want ErrWrongDigest with both digests", err)
	}
	o.Digest = f.digest
	o.Verity = VerityRequire
	if _, err := Mount(f.target, o); !errors.Is(err, ErrNoVerity) {
		t.Errorf("got %v, want ErrNoVerity", err)
	}
	// No object has fs-verity: requiring it would make all files unreadable.
	o.Verity, o.ObjectsChecked = VerityTry, true
	if st := f.mount(t, o); st.Verity || st.Digest != f.digest || st.Measured || st.Verification != Checked {
		t.Errorf("got %+v, want the digest, checked", st)
	}
	f.check(t, f.target)
}

// TestVerity mounts on a filesystem with fs-verity, where there is one, and
// changes an object: below fs-verity it is the kernel that notices.
func TestVerity(t *testing.T) {
	dir := t.TempDir()
	f := newFixture(t, dir)
	if err := tryVerity(dir); err != nil {
		t.Skipf("no fs-verity in the temporary directory: %v", err)
	}
	if s := Probe(dir).VerityOpt; !s.OK {
		t.Skipf("this kernel's overlayfs has no verity=require: %s", s.Why)
	}
	enable := func(path string) {
		t.Helper()
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		if err := fsverity.Enable(file, fsverity.SHA256); err != nil {
			t.Fatal(err)
		}
	}
	enable(f.image)
	big := filepath.Join(f.objects, f.tree.Lookup("sub/big").File.Path())
	enable(big)
	enable(filepath.Join(f.objects, f.tree.Lookup("other").File.Path()))
	if !veritySupported([]string{f.objects}) {
		t.Error("objects with fs-verity are taken for objects without")
	}

	o := f.options()
	o.Digest, o.Verity = f.digest, VerityRequire
	if st := f.mount(t, o); st.Verification != Enforced || !st.Measured || !st.Verity {
		t.Errorf("got %+v, want enforced", st)
	}
	f.check(t, f.target)
	list, err := List()
	if err != nil || len(list) == 0 || !list[len(list)-1].Verity {
		t.Errorf("List: got %+v, %v", list, err)
	}
	if err := Unmount(f.target); err != nil {
		t.Fatal(err)
	}

	if err := os.Remove(big); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(big, bytes.Repeat([]byte("bad"), 4000), 0o644); err != nil {
		t.Fatal(err)
	}
	enable(big)
	o.Verity = VerityTry
	if st := f.mount(t, o); st.Verification != Enforced {
		t.Errorf("got %+v, want enforced", st)
	}
	if _, err := os.ReadFile(f.target + "/sub/big"); !errors.Is(err, unix.EIO) {
		t.Errorf("reading a changed file: got %v, want EIO", err)
	}
	if _, err := os.ReadFile(f.target + "/other"); err != nil {
		t.Errorf("reading another file: %v", err)
	}
	other := fsverity.Sum(fsverity.SHA256, []byte("another"))
	o.Digest = other
	if _, err := Mount(f.target, o); !errors.Is(err, ErrWrongDigest) {
		t.Errorf("got %v, want ErrWrongDigest", err)
	}
}

func TestJudge(t *testing.T) {
	digest := fsverity.Sum(fsverity.SHA256, nil)
	for _, c := range []struct {
		digest, stored   bool // what the caller knows
		measured, verity bool // what the kernel does
		want             Verification
	}{
		{true, false, true, true, Enforced},
		{true, true, true, true, Enforced},
		{true, true, true, false, Checked},
		{true, true, false, true, Checked},
		{true, true, false, false, Checked},
		{true, false, false, true, Checked}, // files against the image, the image against the digest
		{true, false, true, false, None},
		{true, false, false, false, None},
		{false, true, true, true, None}, // any image at all would do
		{false, false, true, true, None},
		{false, true, false, false, None},
	} {
		o := Options{ObjectsChecked: c.stored}
		if c.digest {
			o.Digest = digest
		}
		st := State{Measured: c.measured, Verity: c.verity}
		o.judge(&st)
		if st.Verification != c.want || st.Why == "" {
			t.Errorf("%+v: got %s (%s)", c, st.Verification, st.Why)
		}
	}
}
