package hostdeploy

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"
)

// An Event is something that happened to a host's deployments.
type Event struct {
	Time time.Time `json:"time"`
	// What is "deployed", "booted", "failed", "rolled back from", "rolled back to",
	// "unstaged" or "removed".
	What  string `json:"what"`
	ID    string `json:"id"`
	Title string `json:"title,omitempty"`
	// Manifest is that of an image that booted, or failed to, or is part of a rollback.
	Manifest string `json:"manifest,omitempty"`
}

const (
	eventBooted = "booted" // for the first time, as far as boot-complete.target
	eventFailed = "failed" // all its tries are used up
	eventLeft   = "rolled back from"
)

// record appends an event to the history. The history is for people: that it cannot be
// written stops nothing.
func (h *Host) record(e Event) {
	e.Time = time.Now().UTC().Truncate(time.Second)
	line, err := json.Marshal(e)
	if err == nil {
		var f *os.File
		if f, err = os.OpenFile(h.path(historyLog), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644); err == nil {
			_, err = f.Write(append(line, '\n'))
			if cerr := f.Close(); err == nil {
				err = cerr
			}
		}
	}
	if err != nil {
		h.Warn("writing the history: %v", err)
	}
}

// recordFailures notes which deployments have used up their tries: their entries go with
// the next Prune.
func (h *Host) recordFailures(all []*Deployment) {
	known, err := h.Failures()
	if err != nil {
		h.Warn("%v", err)
		return
	}
	for _, d := range all {
		// The running one is on its last try.
		if d.Failed && !d.Booted && !slices.ContainsFunc(known, func(e Event) bool { return e.ID == d.ID && e.Manifest == d.Manifest }) {
			h.record(Event{What: eventFailed, ID: d.ID, Title: d.Title, Manifest: d.Manifest})
		}
	}
}

// Failures returns what became of the images that used up their tries here, the oldest
// first, and have not booted since.
func (h *Host) Failures() ([]Event, error) { return h.lastly(eventFailed) }

// Left returns the images that were rolled back from, the oldest first, and have not
// booted since.
func (h *Host) Left() ([]Event, error) { return h.lastly(eventLeft) }

// lastly returns the events of a kind that are the last of their image.
func (h *Host) lastly(what string) ([]Event, error) {
	all, err := h.History()
	var last []Event
	for _, e := range all {
		if e.Manifest == "" {
			continue
		}
		last = slices.DeleteFunc(last, func(l Event) bool { return l.Manifest == e.Manifest })
		if e.What == what {
			last = append(last, e)
		}
	}
	return last, err
}

// History returns what happened, the oldest first. Lines that a power loss damaged are
// passed over.
func (h *Host) History() ([]Event, error) {
	data, err := os.ReadFile(h.path(historyLog))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("reading the history: %w", err)
	}
	var all []Event
	for s := bufio.NewScanner(bytes.NewReader(data)); s.Scan(); {
		var e Event
		if json.Unmarshal(s.Bytes(), &e) == nil && e.What != "" {
			all = append(all, e)
		}
	}
	return all, nil
}
