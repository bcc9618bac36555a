package initramfs

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/mount"
)

func TestReport(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	if _, err := Read(dir); !errors.Is(err, ErrNoReport) {
		t.Errorf("got %v, want ErrNoReport", err)
	}
	here, err := deviceOf("/")
	if err != nil {
		t.Fatal(err)
	}
	boot := &Report{Digest: digest(t, hexA), Deployment: hexA, Verification: mount.Enforced, Why: "so", ImageDigest: digest(t, hexA),
		Measured: true, Transient: []string{"etc"}, Enabled: &Enabled{Objects: 3, Complete: true}, Device: "0:1", Kernel: "6.12"}
	if err := boot.write(dir, reportName); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(dir); err != nil || !reflect.DeepEqual(got, boot) {
		t.Errorf("got %+v, %v, want %+v", got, err, boot)
	}

	// A root that was prepared counts once the machine has gone there.
	next := &Report{Digest: digest(t, hexB), Deployment: hexB, Device: "0:2"}
	if err := next.write(dir, nextName); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(dir); err != nil || got.Deployment != hexA {
		t.Errorf("before the soft reboot: got %+v, %v", got, err)
	}
	next.Device = here
	if err := next.write(dir, nextName); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(dir); err != nil || got.Deployment != hexB {
		t.Errorf("after the soft reboot: got %+v, %v", got, err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 {
		t.Errorf("got %v, %v, want two files", files, err)
	}

	if err := os.WriteFile(filepath.Join(dir, nextName), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir); err == nil || errors.Is(err, ErrNoReport) || !strings.Contains(err.Error(), nextName) {
		t.Errorf("got %v, want an error that names the file", err)
	}
}

func TestDescribe(t *testing.T) {
	for want, r := range map[string]Report{
		"deployment 0a0a0a0a0a0a":   {Deployment: hexA},
		"deployment 0a0a0a0a0a0a.3": {Deployment: hexA + ".3"},
		"2 layers of /m.json":       {Manifest: "/m.json", Layers: []string{"a", "b"}},
	} {
		if got := Describe(&r); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
