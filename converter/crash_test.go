package converter

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
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

	childKillAt    = "PARTICLE_TEST_KILL_AT"    // the event at which to die
	childKillAfter = "PARTICLE_TEST_KILL_AFTER" // how long after the last layer to die
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

// child converts one image and prints how many events there were, and the peak of
// its memory.
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
	s := &suicide{}
	s.at, _ = strconv.Atoi(os.Getenv(childKillAt))
	s.after, _ = time.ParseDuration(os.Getenv(childKillAfter))
	if _, err := Convert(ctx, img, st, Options{Name: image, KeepBlobs: true, Progress: s}); err != nil {
		return err
	}
	fmt.Println(s.events, "events")
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(status)) {
		if peak, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			fmt.Println(strings.TrimSpace(peak))
		}
	}
	return nil
}

func crashImage() *memImage {
	var layers [][]byte
	for i := range 4 {
		var ents []ent
		for j := range 60 {
			ents = append(ents, f(fmt.Sprintf("l%d-%d", i, j), big(byte(i*50+j), 100+j*37)))
		}
		layers = append(layers, tarOf(append(ents, f(fmt.Sprintf("big%d", i), big(byte(i), 1<<20)))...))
	}
	return imageOf(gz, layers...)
}

func childProcess(dir, image string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), childStore+"="+dir, childImage+"="+image)
	cmd.Stderr = os.Stderr
	return cmd
}

// A suicide is a Progress that kills its own process: at the event number at, or some
// time after all layers are done, when the transaction commits.
type suicide struct {
	mu         sync.Mutex
	at, events int
	after      time.Duration
	done       int
}

func (s *suicide) Progress(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events++
	if s.at > 0 && s.events == s.at {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	if e.State == LayerDone {
		if s.done++; s.done == e.Layers && s.after > 0 {
			time.AfterFunc(s.after, func() { syscall.Kill(os.Getpid(), syscall.SIGKILL) })
		}
	}
}

// TestKilled kills a conversion at many moments: each time fsck finds nothing, and a
// repeated conversion completes. (The store's own tests kill at each step of a
// commit.)
func TestKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("kills processes; not in -short mode")
	}
	// A whole run tells how many events there are.
	dir := newStore(t).Dir()
	out, err := childProcess(dir, "crash").Output()
	if err != nil {
		t.Fatal(err)
	}
	var events int
	if _, err := fmt.Sscanf(string(out), "%d events", &events); err != nil || events < 20 {
		t.Fatalf("the child printed %q (%v)", out, err)
	}
	st, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	want, err := Find(st, "crash")
	if err != nil {
		t.Fatal(err)
	}

	const moments = 20
	killed := 0
	for i := range moments {
		when := fmt.Sprintf("%s=%d", childKillAt, 1+events*i/moments)
		if i%4 == 3 {
			when = fmt.Sprintf("%s=%dms", childKillAfter, 1+3*i)
		}
		t.Run(when, func(t *testing.T) {
			dir := newStore(t).Dir()
			cmd := childProcess(dir, "crash")
			cmd.Env = append(cmd.Env, when)
			if cmd.Run() != nil {
				if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || !ws.Signaled() {
					t.Fatalf("the child failed: %v", cmd.ProcessState)
				}
				killed++
			}
			st, err := store.Init(dir, store.Options{})
			if err != nil {
				t.Fatal(err)
			}
			wantClean(t, st)
			if err := childProcess(dir, "crash").Run(); err != nil {
				t.Fatalf("repeating: %v", err)
			}
			s, err := Find(st, "crash")
			if err != nil {
				t.Fatal(err)
			}
			if s.Images["merged"] != want.Images["merged"] {
				t.Errorf("the repeated conversion made %s, want %s", s.Images["merged"], want.Images["merged"])
			}
			wantClean(t, st)
		})
	}
	// Those that die by the clock may come too late; those that count events cannot.
	if killed < moments*3/4 {
		t.Errorf("only %d of %d processes were killed", killed, moments)
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
	var events, kib int
	if _, err := fmt.Sscanf(string(out), "%d events\n%d kB", &events, &kib); err != nil {
		t.Fatalf("the child printed %q: %v", out, err)
	}
	t.Logf("peak %d MiB", kib>>10)
	if kib > 256<<10 {
		t.Errorf("peak memory is %d MiB, want at most 256", kib>>10)
	}
}
