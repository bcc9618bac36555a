package bootloader

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

var errKilled = errors.New("killed")

// killAt ends the work at the nth change of the file system and reports whether there was
// one.
func killAt(t *testing.T, n int, work func() error) (killed bool) {
	t.Helper()
	old := step
	defer func() { step = old }()
	step = func(op, name string) error {
		if n--; n >= 0 {
			return nil
		}
		killed = true
		return fmt.Errorf("%w before %s %q", errKilled, op, name)
	}
	if err := work(); err != nil && !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	return killed
}

// testKill ends each kind of change before each of its steps: what boots then, and what
// the entries are, is the old or the new, and Sync makes it whole.
func (h host) testKill(t *testing.T, _ host) {
	for _, c := range []struct {
		name string
		work func(l Loader) error
	}{
		{"add", func(l Loader) error { return l.Add(entry(13, tries(l, 3))) }},
		{"add good", func(l Loader) error { return l.Add(entry(13, nil)) }},
		{"replace", func(l Loader) error {
			e := entry(12, tries(l, 2))
			e.Options = "other"
			return l.Add(e)
		}},
		{"remove", func(l Loader) error { return l.Remove("particle-12") }},
		{"good", func(l Loader) error { return l.Good("particle-12") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			prepare := func() (Loader, string) {
				l, boot := h.open(t)
				add(t, l, entry(10, nil), entry(11, nil), entry(12, tries(l, 3)))
				return l, boot
			}
			l, boot := prepare()
			old, oldNext := show(entries(t, l)), h.next(t, boot)
			if err := c.work(l); err != nil {
				t.Fatal(err)
			}
			new, newNext, newTree := show(entries(t, l)), h.next(t, boot), tree(t, boot)
			n := 0
			for ; ; n++ {
				l, boot := prepare()
				if !killAt(t, n, func() error { return c.work(l) }) {
					break
				}
				if got := h.next(t, boot); got != oldNext && got != newNext && !(h.coarse && strings.Contains(old+new, "good: {ID:"+got+" ")) {
					t.Errorf("killed at step %d: the loader would boot %q, want %q or %q", n, got, oldNext, newNext)
				}
				l = h.reopen(t, boot)
				// Sync is killed at each step, too.
				for m := 0; killAt(t, m, l.Sync); m++ {
				}
				noTemps(t, boot)
				got := show(entries(t, l))
				if !between(got, old, new) {
					t.Errorf("killed at step %d: got\n%swant\n%sor\n%s", n, got, old, new)
				}
				if list := entries(t, l); h.next(t, boot) != list[0].ID {
					t.Errorf("killed at step %d: the loader would boot %q, the entries are %q", n, h.next(t, boot), ids(list))
				}
				// And the work can be done again.
				if err := c.work(l); err != nil && !errors.Is(err, ErrNoEntry) {
					t.Fatalf("killed at step %d, done again: %v", n, err)
				}
				if got := tree(t, boot); got != newTree {
					t.Errorf("killed at step %d, done again: got\n%s\nwant\n%s", n, got, newTree)
				}
			}
			if n < 1 {
				t.Errorf("only %d steps were seen", n)
			}
		})
	}
}

// between reports whether entries are the old or the new ones, as far as they are to be:
// where counter and entry are two files, one of them may be new already. No mixture may
// have an entry pass for good before it is.
func between(got, old, new string) bool {
	if got == old || got == new {
		return true
	}
	pick := func(s string) (counters, rest []string) {
		for line := range strings.Lines(s) {
			c, r, _ := strings.Cut(line, ": ")
			counters, rest = append(counters, c), append(rest, r)
		}
		slices.Sort(rest)
		return counters, rest
	}
	_, gotRest := pick(got)
	_, oldRest := pick(old)
	_, newRest := pick(new)
	goods := strings.Count(got, "good: ")
	return (slices.Equal(gotRest, oldRest) || slices.Equal(gotRest, newRest)) &&
		goods <= max(strings.Count(old, "good: "), strings.Count(new, "good: "))
}
