package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// A term is where a verb reads and writes. Results go to out and nothing else does.
// Everything else goes to err, a line each, with the prefix "particle:", in lower
// case and without a full stop. A hint on what to do next stands on a line of its
// own.
type term struct {
	in       io.Reader
	out, err io.Writer
	quiet    bool

	mu   sync.Mutex // guards err while a progress line is drawn
	live *progress  // the line at the bottom of the terminal, nil if none
}

func (t *term) line(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.live != nil {
		t.live.clear()
	}
	fmt.Fprintf(t.err, "particle: "+format+"\n", args...)
}

// errorf prints an error.
func (t *term) errorf(format string, args ...any) { t.line("error: "+format, args...) }

// warnf prints a warning unless the user wants quiet.
func (t *term) warnf(format string, args ...any) {
	if !t.quiet {
		t.line("warning: "+format, args...)
	}
}

// infof prints what is being done unless the user wants quiet.
func (t *term) infof(format string, args ...any) {
	if !t.quiet {
		t.line(format, args...)
	}
}

// hint tells a user of this id what may help against an error, "" for nothing.
func hint(err error, uid int) string {
	if uid != 0 && errors.Is(err, fs.ErrPermission) && !strings.Contains(err.Error(), "sudo") {
		return "\nthis user may not do that: try sudo"
	}
	return ""
}

// printf prints a result.
func (t *term) printf(format string, args ...any) { fmt.Fprintf(t.out, format, args...) }

// printJSON prints a result for machines.
func (t *term) printJSON(v any) error {
	e := json.NewEncoder(t.out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// defaultStore is where the host keeps its images: the repository that it booted
// from if there is one, a directory of the system's or of the user's otherwise.
func defaultStore() string {
	const booted = "/sysroot/composefs"
	if _, err := os.Stat(filepath.Join(booted, "meta.json")); err == nil {
		return booted
	}
	if os.Geteuid() == 0 {
		return "/var/lib/particle"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); dir != "" {
		return filepath.Join(dir, "particle")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "particle-store"
	}
	return filepath.Join(home, ".local/share/particle")
}

// size prints a number of bytes for people: 1.5 MiB.
func size(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n)/1024, 0
	for f >= 1024 && unit < 4 {
		f, unit = f/1024, unit+1
	}
	if f < 10 {
		return fmt.Sprintf("%.1f %ciB", f, "KMGTP"[unit])
	}
	return fmt.Sprintf("%.0f %ciB", f, "KMGTP"[unit])
}
