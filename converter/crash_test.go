package converter

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/store"
)

// The tests below run this test's own binary as another process, to kill it or to
// measure it.
const (
	childStore = "PARTICLE_TEST_STORE" // the store to convert into
	childImage = "PARTICLE_TEST_IMAGE" // which image
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(childStore); dir != "" {
		if err := child(dir, os.Getenv(childImage)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child converts one image and prints the peak of its memory in KiB.
func child(dir, image string) error {
	st, err := store.Init(dir, store.Options{})
	if err != nil {
		return err
	}
	var img Image
	switch image {
	case "crash":
		img = crashImage()
	case "large":
		img = newLargeImage()
	}
	if _, err := Convert(ctx, img, st, Options{Name: image, KeepBlobs: true}); err != nil {
		return err
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if peak, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			fmt.Println(strings.TrimSuffix(strings.TrimSpace(peak), " kB"))
		}
	}
	return nil
}

func crashImage() *memImage {
	var layers [][]byte
	for i := range 4 {
		var ents []ent
		for j := range 200 {
			ents = append(ents, f(fmt.Sprintf("l%d-%d", i, j), big(byte(i*50+j), 100+j*37)))
		}
		layers = append(layers, tarOf(append(ents, f(fmt.Sprintf("big%d", i), big(byte(i), 3<<20)))...))
	}
	return imageOf(gz, layers...)
}

func childProcess(dir, image string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), childStore+"="+dir, childImage+"="+image)
	cmd.Stderr = os.Stderr
	return cmd
}

// TestKilled kills a conversion at many moments: each time fsck finds nothing, and a
// repeated conversion completes.
func TestKilled(t *testing.T) {
	// How long a whole conversion takes sets the moments.
	dir := newStore(t).Dir()
	start := time.Now()
	if err := childProcess(dir, "crash").Run(); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(start)
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	want, err := Find(st, "crash")
	if err != nil {
		t.Fatal(err)
	}

	moments := 24
	if testing.Short() {
		moments = 6
	}
	killed := 0
	for i := range moments {
		dir := newStore(t).Dir()
		cmd := childProcess(dir, "crash")
		cmd.Stderr = nil
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(whole * time.Duration(i+1) / time.Duration(moments))
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			killed++
		}
		st, err := store.Init(dir, store.Options{})
		if err != nil {
			t.Fatalf("killed after %d/%d: %v", i+1, moments, err)
		}
		wantClean(t, st)
		if err := childProcess(dir, "crash").Run(); err != nil {
			t.Fatalf("repeated after %d/%d: %v", i+1, moments, err)
		}
		s, err := Find(st, "crash")
		if err != nil {
			t.Fatal(err)
		}
		if s.Images["merged"] != want.Images["merged"] {
			t.Errorf("the repeated conversion made %s, want %s", s.Images["merged"], want.Images["merged"])
		}
		wantClean(t, st)
	}
	if killed < moments/3 {
		t.Errorf("only %d of %d processes were killed before their end", killed, moments)
	}
}

// TestMemory converts an image of 2 GiB in a process of its own and looks at the
// peak of its memory.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 2 GiB of disk")
	}
	cmd := childProcess(newStore(t).Dir(), "large")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	kib, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("peak %d MiB", kib>>10)
	if kib > 256<<10 {
		t.Errorf("peak memory is %d MiB, want at most 256", kib>>10)
	}
}
