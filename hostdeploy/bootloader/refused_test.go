package bootloader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

func (h host) testRefused(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(11, nil))
	before := tree(t, boot)
	for _, c := range []struct {
		name   string
		change func(*Entry)
	}{
		{"ID with a slash", func(e *Entry) { e.ID = "particle-1/../../x" }},
		{"ID of another", func(e *Entry) { e.ID = "debian-12" }},
		{"ID with a counter", func(e *Entry) { e.ID = "particle-12+3" }},
		{"no generation", func(e *Entry) { e.Generation = 0 }},
		{"no kernel", func(e *Entry) { e.Linux = "" }},
		{"kernel and UKI", func(e *Entry) { e.EFI = "/a.efi" }},
		{"line break in the title", func(e *Entry) { e.Title = "a\nlinux /evil" }},
		{"line break in the options", func(e *Entry) { e.Options = "a\rb" }},
		{"path with a blank", func(e *Entry) { e.Linux = "/a b" }},
		{"path with a quote", func(e *Entry) { e.Initrd = []string{"/a'b"} }},
		{"path without a slash", func(e *Entry) { e.Linux = "a" }},
		{"too many tries", func(e *Entry) { e.Counter = &Counter{Left: 1000} }},
		{"negative tries", func(e *Entry) { e.Counter = &Counter{Left: -1} }},
		{"longer than a command line", func(e *Entry) { e.Options = strings.Repeat("a", 2000) }},
		{"bad line", func(e *Entry) { e.Extra = []bls.Field{{Key: "a b", Value: "c"}} }},
	} {
		e := entry(12, nil)
		c.change(&e)
		if err := l.Check(e); !errors.Is(err, ErrEntry) {
			t.Errorf("%s: checking it: got error %v, want %v", c.name, err, ErrEntry)
		}
		if err := l.Add(e); !errors.Is(err, ErrEntry) {
			t.Errorf("%s: got error %v, want %v", c.name, err, ErrEntry)
		}
	}
	for _, e := range []Entry{entry(12, nil), entry(12, tries(l, 3))} {
		if err := l.Check(e); err != nil {
			t.Errorf("an entry that can be written: %v", err)
		}
	}
	uki := Entry{ID: "particle-12", Generation: 12, EFI: "/particle-12/linux.efi"}
	if err := l.Check(uki); h.efi && err != nil || !h.efi && !errors.Is(err, ErrEntry) {
		t.Errorf("a unified kernel image: got error %v", err)
	}
	// What GRUB would hand on changed; the others write it as it is.
	odd := entry(12, nil)
	odd.Options = `a=b\c d='e' f=g"h i"`
	isGrub := strings.HasPrefix(h.name, "grub")
	if err := l.Check(odd); isGrub != errors.Is(err, ErrEntry) || !isGrub && err != nil {
		t.Errorf("quotes and backslashes: got error %v", err)
	}
	// A setting that the menu cannot be made with is noticed beforehand, too.
	p := Paths{Boot: boot}
	if err := os.WriteFile(p.particleConf(), []byte("serial fast\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	hasMenu := h.name != "systemd-boot"
	if err := l.Check(entry(12, nil)); hasMenu != errors.Is(err, ErrMenu) || !hasMenu && err != nil {
		t.Errorf("a wrong setting: got error %v", err)
	}
	if err := os.Remove(p.particleConf()); err != nil {
		t.Fatal(err)
	}
	if after := tree(t, boot); after != before {
		t.Errorf("refused entries left something: got\n%s\nwant\n%s", after, before)
	}
}

// testOtherLoader: what another loader could start may be there, and be the newest.
func (h host) testOtherLoader(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(11, nil), entry(12, nil))
	uki := Entry{ID: "particle-13", Generation: 13, EFI: "/particle-13/linux.efi"}
	if err := (entryDir{Paths{Boot: boot}}).write(&uki, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	if h.efi {
		wantIDs(t, l, "particle-13", "particle-12", "particle-11")
		h.wantNext(t, l, boot, "particle-13")
		return
	}
	wantIDs(t, l, "particle-12", "particle-11", "particle-13")
	h.wantNext(t, l, boot, "particle-12")
	for _, id := range []string{"particle-12", "particle-11"} {
		if err := l.Remove(id); err != nil {
			t.Fatal(err)
		}
	}
	if got := h.next(t, boot); got == "particle-13" {
		t.Errorf("the loader would boot %q, which it cannot start", got)
	}
}

// testForeign leaves entries of others alone and reports what looks like ours.
func (h host) testForeign(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(11, nil))
	dir := filepath.Join(boot, "loader/entries")
	foreign := map[string]string{
		"debian-6.1.conf": "title Debian\nsort-key debian\nversion 6.1\nlinux /vmlinuz\n", "README": "x", "auto-windows.conf": "efi /w.efi\n",
		"particle-x.conf": "linux /x\n", "particle-7.conf": "linux /x\n", "particle-8.conf": "version 8\n", "particle-9.conf": "version 0\nlinux /x\n",
	}
	for name, text := range foreign {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var warned []string
	list, err := l.Entries(func(format string, args ...any) { warned = append(warned, fmt.Sprintf(format, args...)) })
	if err != nil {
		t.Fatal(err)
	}
	if got := ids(list); !slices.Equal(got, []string{"particle-11"}) {
		t.Errorf("got entries %q", got)
	}
	for _, name := range []string{"particle-x.conf", "particle-7.conf", "particle-8.conf", "particle-9.conf"} {
		if !slices.ContainsFunc(warned, func(s string) bool { return strings.Contains(s, name) }) {
			t.Errorf("no warning of %s: %q", name, warned)
		}
	}
	if len(warned) != 4 {
		t.Errorf("got %d warnings, want 4: %q", len(warned), warned)
	}
	if got := h.next(t, boot); got != "particle-11" {
		t.Errorf("beside the entries of another system the loader would boot %q", got)
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	for name, text := range foreign {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != text {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
}
