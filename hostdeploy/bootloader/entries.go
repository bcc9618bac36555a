package bootloader

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

// sortKey is the sort key of all our entries: they are ordered by version alone. Others'
// have the ID of their system (os-release(5)): "debian" would come before "particle", and
// systemd-boot would go on to boot the system that was there before.
const sortKey = "0particle"

// ourID matches the IDs of Particle's entries.
var ourID = regexp.MustCompile(`^particle-[1-9][0-9]{0,8}$`)

// entryDir is loader/entries of a boot file system: the truth for every loader.
type entryDir struct{ p Paths }

// A record is an entry as a file has it.
type record struct {
	Entry
	// file is the name in the directory, in the case that it has there.
	file string
	key  bls.Entry
}

func (d entryDir) dir() string { return filepath.Join(d.p.Boot, "loader", "entries") }

// read returns Particle's entries, one an ID, in the order of the menu. Counters are
// those of the names. spare are files that name an entry once more: a crash can leave
// them.
func (d entryDir) read(warn func(format string, args ...any)) (records []record, spare []string, err error) {
	if warn == nil {
		warn = func(string, ...any) {}
	}
	list, err := os.ReadDir(d.dir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	} else if err != nil {
		return nil, nil, fmt.Errorf("reading the boot entries: %w", err)
	}
	for _, f := range list {
		name, ok := bls.ParseName(f.Name())
		if name.ID = strings.ToLower(name.ID); !ok || !strings.HasPrefix(name.ID, "particle-") {
			continue
		}
		full := filepath.Join(d.dir(), f.Name())
		if !ourID.MatchString(name.ID) || !f.Type().IsRegular() {
			warn("boot entry %q skipped: not a file that Particle makes", full)
			continue
		}
		text, err := os.ReadFile(full)
		if err != nil {
			return nil, nil, fmt.Errorf("reading the boot entries: %w", err)
		}
		r, err := newRecord(name, string(text))
		if err != nil {
			warn("boot entry %q skipped: %v", full, err)
			continue
		}
		r.file = f.Name()
		records = append(records, r)
	}
	slices.SortStableFunc(records, func(a, b record) int { return bls.Compare(a.key, b.key) })
	// Of two files with one ID the one that has proved good stays, else the one that
	// systemd-boot shows first.
	best := map[string]int{}
	for i, r := range records {
		if j, ok := best[r.ID]; !ok || records[j].Counter != nil && r.Counter == nil {
			best[r.ID] = i
		}
	}
	kept := records[:0]
	for i, r := range records {
		if best[r.ID] == i {
			kept = append(kept, r)
		} else {
			spare = append(spare, r.file)
		}
	}
	return kept, spare, nil
}

// newRecord reads one file. The error is ErrMenu.
func newRecord(name bls.Name, text string) (record, error) {
	r := record{Entry: Entry{ID: name.ID}, key: bls.Entry{Name: name}}
	if name.Counted {
		r.Counter = &Counter{Left: name.Left, Done: name.Done}
	}
	fields := bls.Parse(text)
	r.Title, _ = bls.Last(fields, "title")
	r.key.SortKey, _ = bls.Last(fields, "sort-key")
	r.key.MachineID, _ = bls.Last(fields, "machine-id")
	r.key.Version, _ = bls.Last(fields, "version")
	var err error
	if r.Generation, err = strconv.Atoi(r.key.Version); err != nil || r.Generation < 1 {
		return record{}, fmt.Errorf("%w: version %q is no generation: got no number above 0", ErrMenu, r.key.Version)
	}
	r.Options = bls.Options(fields)
	linux, _ := bls.Last(fields, "linux")
	efi, _ := bls.Last(fields, "efi")
	if (linux == "") == (efi == "") {
		return record{}, fmt.Errorf("%w: got linux %q and efi %q, want one of them", ErrMenu, linux, efi)
	}
	r.Linux, r.EFI = rooted(linux), rooted(efi)
	for _, name := range bls.Values(fields, "initrd") {
		r.Initrd = append(r.Initrd, rooted(name))
	}
	for _, f := range fields {
		switch f.Key {
		case "title", "version", "sort-key", "linux", "efi", "initrd", "options":
		default:
			r.Extra = append(r.Extra, f)
		}
	}
	return r, nil
}

// rooted gives a path the slash that the specification makes optional.
func rooted(name string) string {
	if name == "" || strings.HasPrefix(name, "/") {
		return name
	}
	return "/" + name
}

// text prints an entry as a file.
func (e *Entry) text() (string, error) {
	fields := []bls.Field{{Key: "title", Value: e.Title}, {Key: "version", Value: strconv.Itoa(e.Generation)}, {Key: "sort-key", Value: sortKey}}
	if e.Title == "" {
		fields = fields[1:]
	}
	if e.EFI != "" {
		fields = append(fields, bls.Field{Key: "efi", Value: e.EFI})
	} else {
		fields = append(fields, bls.Field{Key: "linux", Value: e.Linux})
	}
	for _, name := range e.Initrd {
		fields = append(fields, bls.Field{Key: "initrd", Value: name})
	}
	if e.Options != "" {
		fields = append(fields, bls.Field{Key: "options", Value: e.Options})
	}
	return bls.Format(append(fields, e.Extra...))
}

// maxCommandLine is COMMAND_LINE_SIZE of Linux on x86 and arm64 without its zero byte.
// Loaders cut what is longer, and some of them put the files' names in front.
const maxCommandLine = 2047

// check tells whether an entry can be written for a loader that counts max tries and
// starts EFI programs, or does not. The error is ErrEntry.
func (e *Entry) check(max int, efi bool) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("boot entry %q: %w: %w", e.ID, ErrEntry, fmt.Errorf(format, args...))
	}
	switch {
	case !ourID.MatchString(e.ID):
		return bad("the ID must be \"particle-\" and a number")
	case e.Generation < 1:
		return bad("got generation %d, want 1 or more", e.Generation)
	case (e.Linux == "") == (e.EFI == ""):
		return bad("got linux %q and efi %q, want one of them", e.Linux, e.EFI)
	case e.EFI != "" && !efi:
		return bad("the loader starts no EFI program, got %q: the image needs a kernel and an initramfs of their own", e.EFI)
	case e.EFI != "" && len(e.Initrd) > 0:
		return bad("got efi %q with initrd %q: the initramfs is in the image", e.EFI, e.Initrd)
	case e.Counter != nil && max == 0:
		return bad("the loader cannot count tries: leave the counter out")
	case e.Counter != nil && (e.Counter.Left < 0 || e.Counter.Done < 0 || e.Counter.Left+e.Counter.Done > max):
		return bad("got %d tries left and %d done, want at most %d together", e.Counter.Left, e.Counter.Done, max)
	}
	for _, name := range append([]string{e.Linux, e.EFI}, e.Initrd...) {
		// What every loader takes as one word, and FAT as a name.
		if name != "" && (name[0] != '/' || strings.ContainsFunc(name, notInPath)) {
			return bad("path %q must begin with a slash and be made of letters, digits and \"/+-_.@\"", name)
		}
	}
	all := fmt.Sprintf("BOOT_IMAGE=%s initrd=%s %s", e.Linux+e.EFI, strings.Join(e.Initrd, ","), e.Options)
	if len(all) > maxCommandLine {
		return bad("the kernel takes a command line of %d bytes, got %d with the names of its files", maxCommandLine, len(all))
	}
	if _, err := e.text(); err != nil {
		return bad("%w", err)
	}
	return nil
}

// checkMenu is check for a loader that has a menu of its own: it needs the settings, too.
// Errors are ErrEntry, and ErrMenu for a setting that is wrong.
func (d entryDir) checkMenu(e *Entry, max int, efi bool) error {
	if err := e.check(max, efi); err != nil {
		return err
	}
	_, err := d.p.settings()
	return err
}

func notInPath(r rune) bool {
	return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("/+-_.@", r))
}

// write puts an entry's file in place, with the counter in its name, and takes away
// others of the same ID.
func (d entryDir) write(e *Entry, counter *Counter) error {
	text, err := e.text()
	if err != nil {
		return fmt.Errorf("boot entry %q: %w: %w", e.ID, ErrEntry, err)
	}
	if err := d.makeDir(); err != nil {
		return err
	}
	others, err := d.files(e.ID)
	if err != nil {
		return err
	}
	n := bls.Name{ID: e.ID}
	if counter != nil {
		n.Counted, n.Left, n.Done = true, counter.Left, counter.Done
	}
	file := n.String()
	if err := replaceFile(filepath.Join(d.dir(), file), []byte(text)); err != nil {
		return fmt.Errorf("writing boot entry %q: %w", e.ID, err)
	}
	return d.discard(slices.DeleteFunc(others, func(name string) bool { return strings.EqualFold(name, file) }))
}

// makeDir makes the directory, and the mark that its entries follow the specification
// ("Standard-conformance Marker File").
func (d entryDir) makeDir() error {
	if err := d.removeTemps(); err != nil {
		return err
	}
	if _, err := os.Stat(d.dir()); err == nil {
		return nil
	}
	if err := updateFile(filepath.Join(d.p.Boot, "loader", "entries.srel"), []byte("type1\n")); err != nil {
		return fmt.Errorf("marking the directory of boot entries: %w", err)
	}
	return makeDir(d.dir())
}

// removeTemps removes unfinished files of the directory and of the settings above it.
func (d entryDir) removeTemps() error {
	if err := removeTemps(filepath.Dir(d.dir())); err != nil {
		return err
	}
	return removeTemps(d.dir())
}

// files returns the names of an entry's files: one, but for a crash.
func (d entryDir) files(id string) ([]string, error) {
	list, err := os.ReadDir(d.dir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading the boot entries: %w", err)
	}
	var names []string
	for _, f := range list {
		if n, ok := bls.ParseName(f.Name()); ok && strings.EqualFold(n.ID, id) {
			names = append(names, f.Name())
		}
	}
	return names, nil
}

// discard takes files of the directory away.
func (d entryDir) discard(files []string) error {
	for _, name := range files {
		if err := discard(filepath.Join(d.dir(), name)); err != nil {
			return fmt.Errorf("removing boot entry %q: %w", name, err)
		}
	}
	return nil
}

// remove takes an entry away. The error is ErrNoEntry where there is none.
func (d entryDir) remove(id string) error {
	names, err := d.files(id)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return fmt.Errorf("removing boot entry %q: %w", id, ErrNoEntry)
	}
	return d.discard(names)
}

// good takes the counter from an entry's name, if systemd-bless-boot(8) has not done so.
// The error is ErrNoEntry where there is none.
func (d entryDir) good(id string) error {
	records, spare, err := d.read(nil)
	if err != nil {
		return err
	}
	if err := d.discard(spare); err != nil {
		return err
	}
	i := slices.IndexFunc(records, func(r record) bool { return r.ID == id })
	if i < 0 {
		return fmt.Errorf("marking boot entry %q good: %w", id, ErrNoEntry)
	}
	if records[i].Counter == nil {
		return nil
	}
	to := filepath.Join(d.dir(), bls.Name{ID: id}.String())
	if err := renameFile(filepath.Join(d.dir(), records[i].file), to); err != nil {
		return fmt.Errorf("marking boot entry %q good: %w", id, err)
	}
	return nil
}

// tidy removes what a crash left.
func (d entryDir) tidy() error {
	if err := d.removeTemps(); err != nil {
		return err
	}
	_, spare, err := d.read(nil)
	if err != nil {
		return err
	}
	return d.discard(spare)
}

// order sorts records whose counters were not taken from their names.
func order(records []record) {
	for i := range records {
		n := &records[i].key.Name
		n.Counted, n.Left, n.Done = false, 0, 0
		if c := records[i].Counter; c != nil {
			n.Counted, n.Left, n.Done = true, c.Left, c.Done
		}
	}
	slices.SortStableFunc(records, func(a, b record) int { return bls.Compare(a.key, b.key) })
}

// startable returns the entries that a loader without EFI can start. Others are there
// when the host had another loader.
func startable(records []record) []record {
	return slices.DeleteFunc(slices.Clone(records), func(r record) bool { return r.EFI != "" })
}

// startableFirst puts the others behind them.
func startableFirst(records []record) []record {
	slices.SortStableFunc(records, func(a, b record) int { return cmp.Compare(b2i(a.EFI != ""), b2i(b.EFI != "")) })
	return records
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func entriesOf(records []record) []Entry {
	entries := make([]Entry, len(records))
	for i, r := range records {
		entries[i] = r.Entry
	}
	return entries
}
