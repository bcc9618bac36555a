package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/converter"
)

// feed sends the events of two layers, one of which the store has.
func feed(p *progress) {
	const mib = 1 << 20
	id := "sha256:" + strings.Repeat("ab", 32)
	for i := range 2 {
		p.Progress(converter.Event{Layer: i, Layers: 2, ID: id, Size: 100 * mib})
	}
	p.Progress(converter.Event{Layer: 1, Layers: 2, ID: id, State: converter.LayerPresent, Size: 100 * mib, Bytes: 100 * mib})
	p.Progress(converter.Event{Layer: 0, Layers: 2, ID: id, State: converter.LayerStarted, Size: 100 * mib})
	p.start = time.Now().Add(-10 * time.Second)
	p.drawn = time.Time{}
	p.Progress(converter.Event{Layer: 0, Layers: 2, ID: id, State: converter.LayerMoved, Size: 100 * mib, Bytes: 25 * mib})
	p.Progress(converter.Event{Layer: 0, Layers: 2, ID: id, State: converter.LayerDone, Size: 100 * mib, Bytes: 100 * mib})
}

func TestProgressInPipe(t *testing.T) {
	var out bytes.Buffer
	tm := &term{err: &out}
	p := tm.newProgress()
	feed(p)
	p.stop()
	want := []string{
		"particle: layer 2 of 2 sha256:abababababab: already there",
		"particle: layer 1 of 2 sha256:abababababab: 100 MiB in ",
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != len(want) {
		t.Fatalf("got %q", lines)
	}
	for i := range want {
		if !strings.HasPrefix(lines[i], want[i]) {
			t.Errorf("got %q, want %q", lines[i], want[i])
		}
	}
}

func TestProgressOnTerminal(t *testing.T) {
	var out bytes.Buffer
	tm := &term{err: &out}
	p := tm.newProgress()
	p.draws = true
	feed(p)
	tm.warnf("look")
	p.stop()
	tm.report(t.Context(), errors.New("boom"))
	got := out.String()
	if !strings.Contains(got, "\r\x1b[Kparticle: layers 1/2  25 MiB of 100 MiB  2.5 MiB/s  30s left") {
		t.Errorf("no line with layers, bytes, rate and remaining time in %q", got)
	}
	if !strings.HasSuffix(got, "\r\x1b[Kparticle: warning: look\nparticle: error: boom\n") {
		t.Errorf("messages do not stand on lines of their own: %q", got)
	}
	if strings.Contains(got, "already there") {
		t.Errorf("a terminal gets lines of layers too: %q", got)
	}

	// A narrow terminal's line does not wrap.
	out.Reset()
	p = tm.newProgress()
	p.draws, p.width = true, 30
	feed(p)
	for frame := range strings.SplitSeq(out.String(), "\r\x1b[K") {
		if len(frame) >= 30 {
			t.Errorf("frame %q is too long", frame)
		}
	}
	p.stop()
}

func TestQuiet(t *testing.T) {
	var out bytes.Buffer
	tm := &term{err: &out, quiet: true}
	p := tm.newProgress()
	feed(p)
	tm.warnf("look")
	p.stop()
	if out.Len() != 0 {
		t.Errorf("got %q", out.String())
	}
}

func TestSizes(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 10 << 10: "10 KiB", 3 << 29: "1.5 GiB"} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
	for s, want := range map[string]int64{"0": 0, "512": 512, "64k": 64 << 10, "2G": 2 << 30, "1T": 1 << 40} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "k", "-1", "1.5G", "1 G", "99999999999T", "1GB"} {
		if n, err := parseSize(s); err == nil {
			t.Errorf("parseSize(%q) = %d", s, n)
		}
	}
}
