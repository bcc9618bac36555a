package bootloader

import (
	"cmp"
	"fmt"
	"slices"
)

// once is the part that loaders share which can be told to boot one entry the next time
// only: their default stays the last entry that proved good, and a new one is booted
// once. The entry's file has the counter in its name, "particle-12+1.conf", until it is
// good; whether the try is still to come is what the loader remembers.
type once struct {
	entryDir
	memory onceMemory
	// menu writes the loader's menu; def is the ID of the default entry, "" for none.
	menu func(records []record, def string) error
}

// onceMemory is where a loader remembers what to boot the next time.
type onceMemory interface {
	// armed returns the ID that is booted next, "" for the default.
	armed() (string, error)
	// arm has an entry booted next; "" for the default.
	arm(id string) error
	// mend makes whole what a crash while arming left.
	mend() error
}

// records returns the entries with their counters. An entry that was not booted though it
// should have been, and one that was and has not proved good since, has no try left.
func (l once) records(warn func(format string, args ...any)) ([]record, error) {
	records, _, err := l.read(warn)
	if err != nil {
		return nil, err
	}
	armed, err := l.memory.armed()
	if err != nil {
		return nil, err
	}
	for i, r := range records {
		switch {
		case r.Counter == nil:
		case r.ID == armed:
			records[i].Counter = &Counter{Left: 1}
		default:
			records[i].Counter = &Counter{Done: 1}
		}
	}
	order(records)
	// What is booted next comes first, whatever its version.
	slices.SortStableFunc(records, func(a, b record) int {
		return cmp.Compare(b2i(b.Counter != nil && b.ID == armed), b2i(a.Counter != nil && a.ID == armed))
	})
	return startableFirst(records), nil
}

// defaultID returns the default: the first good entry, or the first one.
func defaultID(records []record) string {
	for _, r := range records {
		if r.Counter == nil {
			return r.ID
		}
	}
	if len(records) > 0 {
		return records[0].ID
	}
	return ""
}

func (l once) Tries() Tries { return Tries{Max: 1, How: "by \"once\""} }

func (l once) Entries(warn func(format string, args ...any)) ([]Entry, error) {
	records, err := l.records(warn)
	return entriesOf(records), err
}

// add adds an entry that the loader has checked.
func (l once) add(e Entry) error {
	var counter *Counter
	if e.Counter != nil {
		counter = &Counter{Left: 1}
	}
	if err := l.write(&e, counter); err != nil {
		return err
	}
	if err := l.Sync(); err != nil {
		return err
	}
	switch {
	case e.Counter == nil:
		// The newest good entry is the default, whatever was to be booted once before it.
		return l.disarm("")
	case e.Counter.Left == 0:
		return l.disarm(e.ID)
	}
	// Last, since the loader must find the entry in its menu.
	if err := l.memory.arm(e.ID); err != nil {
		return fmt.Errorf("having boot entry %q booted once: %w", e.ID, err)
	}
	return nil
}

// disarm has the default booted next, if it is this entry that would be; "" for any.
func (l once) disarm(id string) error {
	armed, err := l.memory.armed()
	if err != nil || armed == "" || id != "" && armed != id {
		return err
	}
	if err := l.memory.arm(""); err != nil {
		return fmt.Errorf("having boot entry %q no longer booted once: %w", armed, err)
	}
	return nil
}

func (l once) Remove(id string) error {
	// First, since the loader would not find the entry in its menu.
	if err := l.disarm(id); err != nil {
		return err
	}
	if err := l.remove(id); err != nil {
		return err
	}
	return l.Sync()
}

func (l once) Good(id string) error {
	if err := l.good(id); err != nil {
		return err
	}
	if err := l.Sync(); err != nil {
		return err
	}
	return l.disarm(id)
}

func (l once) Sync() error {
	if err := l.tidy(); err != nil {
		return err
	}
	if err := l.memory.mend(); err != nil {
		return err
	}
	// In the order of the files: what is to be booted once is not said in the menu.
	records, _, err := l.read(nil)
	if err != nil {
		return err
	}
	records = startable(records)
	if err := l.menu(records, defaultID(records)); err != nil {
		return err
	}
	return settle(l.p.Boot)
}
