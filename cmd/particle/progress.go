package main

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	xterm "golang.org/x/term"

	"github.com/particle-os/particle/converter"
)

// redrawEvery is how often the line on a terminal changes.
const redrawEvery = 100 * time.Millisecond

// progress shows how far a conversion is: one line at the bottom of a terminal, or
// in a file or pipe a line for each layer that is done.
type progress struct {
	t     *term
	draws bool // stderr is a terminal
	width int
	start time.Time

	mu     sync.Mutex
	layers []layerProgress
	drawn  time.Time
	shown  bool // the line is on the screen
}

type layerProgress struct {
	event converter.Event
	start time.Time
}

// newProgress starts a progress line; stop must be called at the end.
func (t *term) newProgress() *progress {
	p := &progress{t: t, start: time.Now(), width: 80}
	if f, ok := t.err.(*os.File); ok && !t.quiet && xterm.IsTerminal(int(f.Fd())) {
		p.draws = true
		if w, _, err := xterm.GetSize(int(f.Fd())); err == nil && w > 20 {
			p.width = w
		}
	}
	t.mu.Lock()
	t.live = p
	t.mu.Unlock()
	return p
}

// stop removes the line.
func (p *progress) stop() {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	p.clear()
	p.t.live = nil
}

// Progress implements converter.Progress.
func (p *progress) Progress(e converter.Event) {
	now := time.Now()
	p.mu.Lock()
	for len(p.layers) <= e.Layer {
		p.layers = append(p.layers, layerProgress{start: now})
	}
	l := &p.layers[e.Layer]
	if e.State == converter.LayerStarted {
		l.start = now
	}
	l.event = e
	took := now.Sub(l.start)
	draw := p.draws && now.Sub(p.drawn) >= redrawEvery
	if draw {
		p.drawn = now
	}
	text := ""
	if draw {
		text = p.text(now)
	}
	p.mu.Unlock()

	switch {
	case draw:
		p.draw(text)
	case p.draws:
	case e.State == converter.LayerDone:
		p.t.infof("layer %d of %d %s: %s in %s", e.Layer+1, e.Layers, short(e.ID), size(e.Size), seconds(took))
	case e.State == converter.LayerPresent:
		p.t.infof("layer %d of %d %s: already there", e.Layer+1, e.Layers, short(e.ID))
	}
}

// bytes shows how far reading is, of verbs that have no layers.
func (p *progress) bytes(done, total int64) {
	now := time.Now()
	if !p.draws || now.Sub(p.drawn) < redrawEvery {
		return
	}
	p.drawn = now
	p.draw(line(done, total, now.Sub(p.start)))
}

// text is the line for a terminal: how many layers, how many bytes, how fast, how
// long still.
func (p *progress) text(now time.Time) string {
	var done, total, skipped int64
	finished, layers := 0, len(p.layers)
	for _, l := range p.layers {
		layers = max(layers, l.event.Layers)
		total += l.event.Size
		switch l.event.State {
		case converter.LayerPresent:
			finished++
			skipped += l.event.Size
		case converter.LayerDone:
			finished++
			done += l.event.Size
		default:
			done += l.event.Bytes
		}
	}
	return fmt.Sprintf("layers %d/%d  ", finished, layers) + line(done, total-skipped, now.Sub(p.start))
}

// line tells how many bytes are done, how fast, and how long the rest will take.
func line(done, total int64, took time.Duration) string {
	text := size(done)
	if total > 0 {
		text += " of " + size(total)
	}
	rate := float64(done) / max(took.Seconds(), 0.001)
	if rate > 0 {
		text += "  " + size(int64(rate)) + "/s"
		if left := float64(total-done) / rate; left >= 1 {
			text += fmt.Sprintf("  %s left", time.Duration(left*float64(time.Second)).Round(time.Second))
		}
	}
	return text
}

// draw puts the line on the screen.
func (p *progress) draw(text string) {
	text = "particle: " + text
	if len(text) >= p.width {
		text = text[:p.width-1]
	}
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	if p.t.live == p {
		fmt.Fprintf(p.t.err, "\r\x1b[K%s", text)
		p.shown = true
	}
}

// clear removes the line from the screen; the caller holds t.mu.
func (p *progress) clear() {
	if p.shown {
		fmt.Fprint(p.t.err, "\r\x1b[K")
		p.shown = false
	}
}

// short cuts a digest to what a person tells apart.
func short(digest string) string {
	algorithm, hex, ok := strings.Cut(digest, ":")
	if !ok {
		algorithm, hex = "", digest
	} else {
		algorithm += ":"
	}
	return algorithm + hex[:min(12, len(hex))]
}

// seconds prints a duration to a tenth of a second, or in milliseconds.
func seconds(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
