package bootloader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

// A host is a boot file system with a loader on it, and the part of the loader that runs
// before Linux does.
type host struct {
	name string
	// install makes what Install would, as far as the menu goes.
	install func(t *testing.T, boot string)
	// next returns the ID that the loader itself would boot now, from its own files.
	next func(t *testing.T, boot string) string
	// boot does to the files what the loader does when it boots that entry.
	boot func(t *testing.T, boot, id string)
	// coarse: between two calls of its program the loader has forgotten what to boot
	// once, and boots an entry that proved good.
	coarse bool
	// efi: it starts EFI programs.
	efi bool
}

var hosts = []host{
	{"systemd-boot", nil, nextBLS, bootSystemdBoot, false, true},
	{"grub-efi", nil, nextGrub, bootGrub, false, true},
	{"grub-bios", nil, nextGrub, bootGrub, false, false},
	{"extlinux", installFakeExtlinux, nextExtlinux, bootExtlinux, false, false},
	{"u-boot", nil, nextUBoot, func(*testing.T, string, string) {}, false, false},
	{"lilo", installFakeLilo, nextLilo, bootLilo, true, false},
}

// TestLoaders runs the suite that every loader has to pass.
func TestLoaders(t *testing.T) {
	if len(hosts) != len(Names()) {
		t.Fatalf("%d loaders are tested, %d exist: %q", len(hosts), len(Names()), Names())
	}
	for _, h := range hosts {
		t.Run(h.name, func(t *testing.T) {
			for _, c := range []struct {
				name string
				run  func(*testing.T, host)
			}{
				{"Add", h.testAdd}, {"Order", h.testOrder}, {"Replace", h.testReplace}, {"Remove", h.testRemove}, {"RollBack", h.testRollBack},
				{"Good", h.testGood}, {"FallBack", h.testFallBack}, {"LostMenu", h.testLostMenu}, {"Lines", h.testLines},
				{"Refused", h.testRefused}, {"Kill", h.testKill}, {"OtherLoader", h.testOtherLoader}, {"Foreign", h.testForeign},
			} {
				t.Run(c.name, func(t *testing.T) { c.run(t, h) })
			}
		})
	}
}

// open makes a boot file system and opens the loader on it.
func (h host) open(t *testing.T) (Loader, string) {
	t.Helper()
	boot := bootDir(t)
	if h.install != nil {
		h.install(t, boot)
	}
	return h.reopen(t, boot), boot
}

// bootDir makes a directory for a boot file system, in memory where there is a tmpfs:
// what fsync costs on a disk would be most of the time of these tests.
func bootDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "bootloader-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func (h host) reopen(t *testing.T, boot string) Loader {
	t.Helper()
	l, err := ByName(h.name, Paths{Boot: boot})
	if err != nil {
		t.Fatal(err)
	}
	if l.Name() != h.name {
		t.Fatalf("got loader %q, want %q", l.Name(), h.name)
	}
	return l
}

func entry(n int, counter *Counter) Entry {
	return Entry{
		ID: fmt.Sprintf("particle-%d", n), Generation: n, Title: fmt.Sprintf("Debian (particle %d)", n),
		Linux: fmt.Sprintf("/particle-%d/vmlinuz", n), Initrd: []string{fmt.Sprintf("/particle-%d/initrd", n)},
		Options: fmt.Sprintf("root=UUID=1 n=%d", n), Counter: counter,
	}
}

// tries is the counter of a new entry, nil where the loader counts none.
func tries(l Loader, n int) *Counter {
	if n = min(n, l.Tries().Max); n > 0 {
		return &Counter{Left: n}
	}
	return nil
}

func add(t *testing.T, l Loader, entries ...Entry) {
	t.Helper()
	for _, e := range entries {
		if err := l.Add(e); err != nil {
			t.Fatalf("adding %s: %v", e.ID, err)
		}
	}
}

func entries(t *testing.T, l Loader) []Entry {
	t.Helper()
	list, err := l.Entries(func(format string, args ...any) { t.Errorf("warning: "+format, args...) })
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func ids(list []Entry) []string {
	var s []string
	for _, e := range list {
		s = append(s, e.ID)
	}
	return s
}

// show prints entries with all that they have.
func show(list []Entry) string {
	var b strings.Builder
	for _, e := range list {
		c := "good"
		if e.Counter != nil {
			c = fmt.Sprintf("%d left, %d done", e.Counter.Left, e.Counter.Done)
		}
		e.Counter = nil
		fmt.Fprintf(&b, "%s: %+v\n", c, e)
	}
	return b.String()
}

func wantIDs(t *testing.T, l Loader, want ...string) {
	t.Helper()
	if got := ids(entries(t, l)); !slices.Equal(got, want) {
		t.Errorf("got entries %q, want %q", got, want)
	}
}

// wantNext compares what the loader would boot with what Entries promises.
func (h host) wantNext(t *testing.T, l Loader, boot, want string) {
	t.Helper()
	if got := h.next(t, boot); got != want {
		t.Errorf("the loader would boot %q, want %q", got, want)
	}
	if list := entries(t, l); len(list) == 0 || list[0].ID != want {
		t.Errorf("got entries %q, want %q first", ids(list), want)
	}
}

func (h host) testAdd(t *testing.T, _ host) {
	l, boot := h.open(t)
	if list := entries(t, l); len(list) != 0 {
		t.Fatalf("a new boot file system has entries %q", ids(list))
	}
	want := entry(12, nil)
	add(t, l, want)
	got := entries(t, h.reopen(t, boot))
	if show(got) != show([]Entry{want}) {
		t.Errorf("got\n%swant\n%s", show(got), show([]Entry{want}))
	}
	h.wantNext(t, l, boot, "particle-12")
	text, err := os.ReadFile(filepath.Join(boot, "loader/entries/particle-12.conf"))
	if err != nil {
		t.Fatal(err)
	}
	const file = "title      Debian (particle 12)\nversion    12\nsort-key   0particle\nlinux      /particle-12/vmlinuz\ninitrd     /particle-12/initrd\noptions    root=UUID=1 n=12\n"
	if string(text) != file {
		t.Errorf("got entry\n%swant\n%s", text, file)
	}
	if mark, _ := os.ReadFile(filepath.Join(boot, "loader/entries.srel")); string(mark) != "type1\n" {
		t.Errorf("entries.srel: got %q", mark)
	}
	counted := entry(13, tries(l, 3))
	add(t, l, counted)
	if got := entries(t, l); show(got) != show([]Entry{counted, want}) {
		t.Errorf("got\n%swant\n%s", show(got), show([]Entry{counted, want}))
	}
	h.wantNext(t, l, boot, "particle-13")
	noTemps(t, boot)
}

func (h host) testOrder(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(9, nil), entry(100, nil), entry(12, nil), entry(11, nil))
	wantIDs(t, l, "particle-100", "particle-12", "particle-11", "particle-9")
	h.wantNext(t, l, boot, "particle-100")
}

func (h host) testReplace(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(11, nil), entry(12, tries(l, 2)))
	e := entry(12, nil)
	e.Options = "other"
	add(t, l, e)
	if got, want := show(entries(t, l)), show([]Entry{e, entry(11, nil)}); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	e = entry(12, tries(l, 1))
	add(t, l, e)
	if got, want := show(entries(t, l)), show([]Entry{e, entry(11, nil)}); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	h.wantNext(t, l, boot, "particle-12")
}

func (h host) testRemove(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(11, nil), entry(12, nil), entry(13, tries(l, 3)))
	for _, c := range []struct{ id, next string }{{"particle-13", "particle-12"}, {"particle-11", "particle-12"}} {
		if err := l.Remove(c.id); err != nil {
			t.Fatal(err)
		}
		h.wantNext(t, l, boot, c.next)
		if err := l.Remove(c.id); !errors.Is(err, ErrNoEntry) {
			t.Errorf("removing %s again: got error %v, want %v", c.id, err, ErrNoEntry)
		}
	}
	wantIDs(t, l, "particle-12")
	// What a removed entry counted must not come back with the next one of its ID.
	add(t, l, entry(13, nil))
	if got, want := show(entries(t, l)), show([]Entry{entry(13, nil), entry(12, nil)}); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// testRollBack takes an upgrade back that has not been booted: by a good entry after it,
// and by removing it.
func (h host) testRollBack(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(11, nil), entry(12, tries(l, 3)))
	h.wantNext(t, l, boot, "particle-12")
	add(t, l, entry(13, nil))
	h.wantNext(t, l, boot, "particle-13")
	h.boot(t, boot, "particle-13")
	h.wantNext(t, l, boot, "particle-13")
	add(t, l, entry(14, tries(l, 3)))
	h.wantNext(t, l, boot, "particle-14")
	if err := l.Remove("particle-14"); err != nil {
		t.Fatal(err)
	}
	h.wantNext(t, l, boot, "particle-13")
	h.boot(t, boot, "particle-13")
	h.wantNext(t, l, boot, "particle-13")
}

func (h host) testGood(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(11, nil), entry(12, tries(l, 3)))
	h.boot(t, boot, "particle-12")
	for range 2 { // the second time there is nothing to do
		if err := l.Good("particle-12"); err != nil {
			t.Fatal(err)
		}
		if got, want := show(entries(t, l)), show([]Entry{entry(12, nil), entry(11, nil)}); got != want {
			t.Errorf("got\n%swant\n%s", got, want)
		}
		h.wantNext(t, l, boot, "particle-12")
	}
	h.boot(t, boot, "particle-12")
	h.wantNext(t, l, boot, "particle-12")
	if err := l.Good("particle-99"); !errors.Is(err, ErrNoEntry) {
		t.Errorf("got error %v, want %v", err, ErrNoEntry)
	}
}

// testFallBack boots an entry until its tries are used up.
func (h host) testFallBack(t *testing.T, _ host) {
	l, boot := h.open(t)
	most := min(3, l.Tries().Max)
	if most == 0 {
		if l.Tries().How == "" {
			t.Error("nothing is said about how to fall back")
		}
		return
	}
	add(t, l, entry(11, nil), entry(10, nil), entry(12, &Counter{Left: most}))
	for n := range most {
		h.wantNext(t, l, boot, "particle-12")
		h.boot(t, boot, "particle-12")
		i := slices.IndexFunc(entries(t, l), func(e Entry) bool { return e.ID == "particle-12" })
		if got, want := *entries(t, l)[i].Counter, (Counter{most - n - 1, n + 1}); got != want {
			t.Fatalf("after %d boots: got %+v, want %+v", n+1, got, want)
		}
	}
	wantIDs(t, l, "particle-11", "particle-10", "particle-12")
	h.wantNext(t, l, boot, "particle-11")
	if list := entries(t, l); !list[2].Bad() || list[0].Bad() {
		t.Errorf("got\n%swant the last one bad", show(list))
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	h.boot(t, boot, "particle-11")
	h.wantNext(t, l, boot, "particle-11")
	// It may be chosen by hand, and prove good.
	if err := l.Good("particle-12"); err != nil {
		t.Fatal(err)
	}
	h.wantNext(t, l, boot, "particle-12")
}

func (h host) testLostMenu(t *testing.T, _ host) {
	l, boot := h.open(t)
	add(t, l, entry(11, nil), entry(12, tries(l, 3)), entry(13, nil))
	before := tree(t, boot)
	for _, name := range []string{"grub/grub.cfg", "extlinux/extlinux.conf", "lilo/lilo.conf", "lilo/installed"} {
		if err := os.Remove(filepath.Join(boot, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := l.Sync(); err != nil {
			t.Fatal(err)
		}
		if after := tree(t, boot); after != before {
			t.Errorf("got\n%s\nwant\n%s", after, before)
		}
	}
}

// testLines keeps lines that nobody here knows.
func (h host) testLines(t *testing.T, _ host) {
	l, boot := h.open(t)
	e := entry(12, tries(l, 1))
	e.Extra = []bls.Field{{Key: bls.Comment, Value: " mine"}, {Key: "architecture", Value: "x64"}, {Key: "x-unknown", Value: "a b"}, {Key: "x-unknown", Value: "c"}}
	add(t, l, e, entry(11, nil))
	h.boot(t, boot, "particle-12")
	if err := l.Good("particle-12"); err != nil {
		t.Fatal(err)
	}
	e.Counter = nil
	if got, want := show(entries(t, l)), show([]Entry{e, entry(11, nil)}); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func noTemps(t *testing.T, boot string) {
	t.Helper()
	filepath.WalkDir(boot, func(name string, d fs.DirEntry, err error) error {
		if err == nil && isTemp(d.Name()) {
			t.Errorf("%s is left", name)
		}
		return err
	})
}

// tree prints all files of a boot file system.
func tree(t *testing.T, boot string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(boot, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(name)
		rel, _ := filepath.Rel(boot, name)
		if rel == "lilo/installed" {
			data = nil // a hash that depends on the directory's name
		}
		fmt.Fprintf(&b, "== %s\n%s", rel, strings.NewReplacer(boot, "BOOT", "\x00", "").Replace(string(data)))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}
