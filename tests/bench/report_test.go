package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The tests are their own launcher.
func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == launchArg {
		os.Exit(launch(os.Args[2:]))
	}
	os.Exit(m.Run())
}

// What this process needs must not show in what its contenders need.
func TestPeakMemoryIsTheContenders(t *testing.T) {
	mine := make([]byte, 300<<20)
	for i := range mine {
		mine[i] = byte(i)
	}
	for _, tt := range []struct {
		script   string
		min, max int64 // MiB
	}{
		{"true", 0, 60},
		{"dd if=/dev/zero of=/dev/null bs=150M count=1 2>/dev/null", 150, 210},
	} {
		m, err := measure(t.Context(), exec.Command("sh", "-c", tt.script), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if got := m.RSS >> 20; got < tt.min || got > tt.max {
			t.Errorf("%s: peak of %d MiB, want %d to %d", tt.script, got, tt.min, tt.max)
		}
	}
	if mine[12345] != byte(12345%256) {
		t.Error("the memory went away")
	}
}

func TestSummary(t *testing.T) {
	runs := func(walls ...float64) []measurement {
		var v []measurement
		for _, w := range walls {
			v = append(v, measurement{Wall: w, RSS: int64(w * (1 << 20))})
		}
		return v
	}
	g := &groupResult{Name: "g", What: "w", Contenders: []*contenderResult{
		{Name: "us", Runs: runs(3, 1, 2)},
		{Name: "slow", Target: 2, Runs: runs(5, 9, 4, 5)},
		{Name: "close", Target: 2, Runs: runs(3, 3, 3)},
		{Name: "gone", Target: 2, Skipped: "not installed"},
	}}
	g.summarize()
	var out bytes.Buffer
	(&results{Rounds: 3, Groups: []*groupResult{g}}).print(&out)
	for _, want := range []string{
		"2 times as fast as slow: 2.50, reached",
		"2 times as fast as close: 1.50, MISSED by 25 %",
		"gone did not run: not installed",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in\n%s", want, out.String())
		}
	}
}

func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("sh", "-c", `dd if=/dev/urandom of="$0/a" bs=64k count=16 2>/dev/null; ln "$0/a" "$0/b"; sleep 0.2`, dir)
	m, err := measure(t.Context(), cmd, dir)
	if err != nil {
		t.Fatal(err)
	}
	if m.Wall < 0.2 || m.Wall > 30 || m.CPU <= 0 || m.RSS < 1<<16 {
		t.Errorf("got %+v", m)
	}
	// A hard link is no second file.
	if m.Disk < 1<<20 || m.Disk > 2<<20 {
		t.Errorf("disk usage is %d bytes, want one file of 1 MiB", m.Disk)
	}
	if _, err := measure(t.Context(), exec.Command("sh", "-c", "echo sorry >&2; exit 3"), dir); err == nil || !strings.Contains(err.Error(), "sorry") {
		t.Errorf("got %v, want what the program said", err)
	}
	if err := discard(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "a")); !os.IsNotExist(err) {
		t.Errorf("the result is still there: %v", err)
	}
}
