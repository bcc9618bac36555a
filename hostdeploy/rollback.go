package hostdeploy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/particle-os/particle/hostdeploy/bootloader"
)

// Rollback makes an earlier deployment the one that boots next. Which one is told by a
// name as find takes it; "" means: the running one where another would boot next
// (after a fall back, or a choice in the menu) and it has proved good, else the one before
// it. What is staged is forgotten. The caller has the lock.
//
// The deployment's /etc is the one that it had when it last ran.
func (h *Host) Rollback(name string) (*Deployment, error) {
	if err := h.checkWritable(); err != nil {
		return nil, err
	}
	all, err := h.Deployments()
	if err != nil {
		return nil, err
	}
	var to *Deployment
	switch running := booted(all); {
	case name != "":
		to, err = find(all, name)
	case running != nil && !running.Default && running.Tries == nil:
		to = running
	default:
		if to = previous(all); to == nil {
			err = fmt.Errorf("rolling back: %w: there is one only, or the others failed", ErrNoDeployment)
		}
	}
	if err != nil {
		return nil, err
	}
	if to.Staged {
		return nil, fmt.Errorf("rolling back: %w: deployment %s is staged and boots next anyway", ErrNoDeployment, to.Name())
	}
	if present, err := h.bootable(to.Entry); err != nil {
		return nil, err
	} else if !present {
		return nil, fmt.Errorf("rolling back to deployment %s: %w: its kernel %s is not on the boot file system", to.Name(), ErrNoKernel, to.Entry.Linux)
	}
	if _, err := h.Unstage(); err != nil {
		return nil, err
	}
	var left []*Deployment // what nobody wants, as it seems
	for _, d := range all {
		if d != to && (d.Booted || d.Default) {
			left = append(left, d)
		}
	}
	if i := slices.IndexFunc(all, func(d *Deployment) bool { return !d.Staged }); all[i] == to {
		to.Default = true // what was staged is gone, this boots
	} else if err := h.promote(to); err != nil {
		return nil, err
	}
	for _, d := range left {
		h.record(Event{What: eventLeft, ID: d.ID, Title: d.Title, Manifest: d.Manifest})
	}
	h.record(Event{What: "rolled back to", ID: to.ID, Title: to.Title, Manifest: to.Manifest})
	return to, nil
}

// promote gives a deployment the highest generation: a new entry, then the old one goes.
func (h *Host) promote(d *Deployment) error {
	e, err := h.entry(&d.Origin, func(e *bootloader.Entry) {
		e.Linux, e.Initrd, e.EFI, e.Extra = d.Entry.Linux, d.Entry.Initrd, d.Entry.EFI, d.Entry.Extra
	})
	if err != nil {
		return err
	}
	e.Options = d.Entry.Options
	// One that failed, or never proved good, has to prove itself.
	if n := min(DefaultTries, h.Loader.Tries().Max); d.Entry.Counter != nil && n > 0 {
		e.Counter = &bootloader.Counter{Left: n}
		if err := writeFile(h.trialFile(d.ID), nil, 0o644); err != nil {
			return err
		}
	}
	if err := h.Loader.Add(*e); err != nil {
		return err
	}
	if err := h.Loader.Remove(d.Entry.ID); err != nil && !errors.Is(err, bootloader.ErrNoEntry) {
		return err
	}
	d.Entry, d.Generation, d.Default = e, e.Generation, true
	return nil
}

// bootable reports whether the files of an entry are there.
func (h *Host) bootable(e *bootloader.Entry) (bool, error) {
	for _, name := range append([]string{e.Linux, e.EFI}, e.Initrd...) {
		if name == "" {
			continue
		}
		rel, err := filepath.Rel(filepath.Join("/", h.Paths.Prefix), name)
		if err != nil {
			return false, err
		}
		if have, err := exists(filepath.Join(h.Paths.Boot, rel)); !have || err != nil {
			return false, err
		}
	}
	return true, nil
}

// Pin keeps a deployment whatever comes after it, or no longer does.
func (h *Host) Pin(name string, yes bool) (*Deployment, error) {
	all, err := h.Deployments()
	if err != nil {
		return nil, err
	}
	d, err := find(all, name)
	if err != nil {
		return nil, err
	}
	if d.Staged {
		return nil, fmt.Errorf("pinning deployment %s: it is staged: pin it once it has booted", d.Name())
	}
	d.Pinned = yes
	data, err := d.Origin.marshal()
	if err != nil {
		return nil, err
	}
	return d, writeFile(filepath.Join(h.stateDir(d.ID), d.ID+".origin"), data, 0o644)
}

// trialFile is there from before a deployment's entry counts tries until one succeeded.
// It says so where the entries cannot be read: the boot file system may be what fails.
func (h *Host) trialFile(id string) string { return filepath.Join(h.stateDir(id), "trial") }

// Good ends the counting of the running deployment's tries: it has booted. It returns
// the deployment, nil where none runs.
func (h *Host) Good() (*Deployment, error) {
	if err := h.Loader.Sync(); err != nil {
		return nil, err
	}
	all, err := h.Deployments()
	if err != nil {
		return nil, err
	}
	h.recordFailures(all)
	d := booted(all)
	if d == nil || d.Entry == nil {
		return d, nil
	}
	if d.Entry.Counter != nil {
		if err := h.Loader.Good(d.Entry.ID); err != nil {
			return nil, err
		}
		h.record(Event{What: eventBooted, ID: d.ID, Title: d.Title, Manifest: d.Manifest})
		d.Tries, d.Failed, d.Entry.Counter = nil, false, nil
	}
	if err := os.Remove(h.trialFile(d.ID)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return d, nil
}
