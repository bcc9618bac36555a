package mount

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"
)

func TestProbe(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	f := Probe(dir + "/not/there/yet")
	if f.Dir != dir || f.Kernel == "" {
		t.Errorf("got dir %q and kernel %q", f.Dir, f.Kernel)
	}
	if names, _ := os.ReadDir(dir); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
	if os.Geteuid() == 0 && !f.Privilege.OK {
		t.Logf("root may not mount here: %s", f.Privilege.Why)
	}
	v := reflect.ValueOf(f)
	for i := range v.NumField() {
		if s, ok := v.Field(i).Interface().(Support); ok && s.OK == (s.Why != "") {
			t.Errorf("%s: got %+v, want a reason if and only if it is not OK", v.Type().Field(i).Name, s)
		}
	}
	js, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	var back Features
	if err := json.Unmarshal(js, &back); err != nil || back != f {
		t.Errorf("JSON %s: got %+v, %v", js, back, err)
	}
	t.Logf("%s", js)
}

// TestProbeHolds compares what Probe says with what Mount then does.
func TestProbeHolds(t *testing.T) {
	f := newFixture(t, t.TempDir())
	features := Probe(filepath.Dir(f.image))
	if err := features.Mountable(); err != nil {
		if _, err := Mount(f.target, f.options()); err == nil {
			Unmount(f.target)
			t.Errorf("Probe says no and Mount works")
		}
		t.Skip(err)
	}
	st := f.mount(t, f.options())
	if st.Loop == features.File.OK {
		t.Errorf("EROFS on a file: Probe says %+v, Mount used a loop device: %t", features.File, st.Loop)
	}
	if got := len(st.Warnings) == 0; got != features.DataOnly.OK {
		t.Errorf("data-only layers: Probe says %+v, Mount warns %q", features.DataOnly, st.Warnings)
	}
}

func TestBest(t *testing.T) {
	ok, no := Support{OK: true}, Support{Why: "because"}
	all := Features{Privilege: ok, Erofs: ok, File: ok, Loop: ok, Overlay: ok, VerityOpt: ok, FsVerity: ok}
	for _, c := range []struct {
		change func(*Features)
		want   Verification
	}{
		{func(*Features) {}, Enforced},
		{func(f *Features) { f.File = no }, Enforced},
		{func(f *Features) { f.Loop = no }, Enforced},
		{func(f *Features) { f.VerityOpt = no }, Checked},
		{func(f *Features) { f.FsVerity = no }, Checked},
		{func(f *Features) { f.File, f.Loop = no, no }, None},
		{func(f *Features) { f.Erofs = no }, None},
		{func(f *Features) { f.Overlay = no }, None},
		{func(f *Features) { f.Privilege = no }, None},
	} {
		f := all
		c.change(&f)
		got, why := f.Best()
		if got != c.want || why == "" {
			t.Errorf("%+v: got %s (%s), want %s", f, got, why, c.want)
		}
		if err := f.Mountable(); (err != nil) != (c.want == None) {
			t.Errorf("%+v: Mountable: got %v", f, err)
		}
	}
	f := all
	f.Erofs = no
	if err := f.Mountable(); !errors.Is(err, ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}

// TestEmptyImage asks fsck.erofs whether the image that Probe mounts is one.
func TestEmptyImage(t *testing.T) {
	if _, err := parseHeader(emptyImage()); err != nil {
		t.Error(err)
	}
	prog, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Skip("no fsck.erofs here (Debian package erofs-utils)")
	}
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, emptyImage(), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(prog, file).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func BenchmarkProbe(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: mounts images")
	}
	dir := b.TempDir()
	for b.Loop() {
		if f := Probe(dir); !f.Privilege.OK {
			b.Fatal(f.Privilege.Why)
		}
	}
}
