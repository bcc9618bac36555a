package hostdeploy

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"
)

// An Event is something that happened to a host's deployments.
type Event struct {
	Time time.Time `json:"time"`
	// What is "deployed", "booted", "rolled back to", "unstaged" or "removed".
	What  string `json:"what"`
	ID    string `json:"id"`
	Title string `json:"title,omitempty"`
}

// record appends an event to the history. The history is for people: that it cannot be
// written stops nothing.
func (h *Host) record(what, id, title string) {
	line, err := json.Marshal(Event{time.Now().UTC().Truncate(time.Second), what, id, title})
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
