package hostdeploy

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/hostdeploy/bootloader"
)

// Collected is what a garbage collection removed, or would.
type Collected struct {
	// Deployments that lost their entry; Kept are those that stay, with the reason.
	Deployments []string          `json:"deployments"`
	Kept        map[string]string `json:"kept"`
	// Kernels are directories of the boot file system, BootBytes what they took.
	Kernels   []string      `json:"kernels"`
	BootBytes int64         `json:"bootBytes"`
	States    []string      `json:"states"` // directories of deployments, with their /etc
	Vars      []string      `json:"vars"`   // directories of /var
	Store     store.GCStats `json:"store"`
}

// Keep tells for each deployment why it must stay, "" for those that need not: it is
// booted, staged, pinned, boots next, or is what a rollback leads to; where that has not
// proved good yet, the first one that has, too.
func Keep(all []*Deployment) map[string]string {
	keep := map[string]string{}
	for _, d := range all {
		switch {
		case d.Booted:
			keep[d.ID] = "booted"
		case d.Staged:
			keep[d.ID] = "staged"
		case d.Pinned:
			keep[d.ID] = "pinned"
		case d.Default:
			keep[d.ID] = "boots next"
		}
	}
	good := slices.DeleteFunc(slices.Clone(all), func(d *Deployment) bool { return d.Tries != nil })
	for _, d := range []*Deployment{previous(all), previous(good)} {
		if d != nil && keep[d.ID] == "" {
			keep[d.ID] = "rollback"
		}
	}
	return keep
}

// Prune removes the deployments that need not stay: their entries, kernels, states and
// names in the store, in an order that leaves nothing half-working behind. The caller
// has the lock. A /var stays: what people have written goes when they ask for it.
func (h *Host) Prune() (*Collected, error) {
	c, _, err := h.prune(false)
	return c, err
}

// prune is Prune, which with dry removes nothing. It also returns which deployments need
// their state.
func (h *Host) prune(dry bool) (*Collected, map[string]bool, error) {
	if !dry {
		if err := h.Loader.Sync(); err != nil {
			return nil, nil, err
		}
	}
	all, err := h.Deployments()
	if err != nil {
		return nil, nil, err
	}
	if !dry {
		h.recordFailures(all)
	}
	c := &Collected{Kept: Keep(all)}
	if h.Booted != "" && booted(all) == nil {
		// The running system has no entry any more: without it nobody can tell what it
		// needs, so nothing is touched.
		return nil, nil, fmt.Errorf("removing deployments: %w: the running deployment %s has no boot entry; particle hostdeploy upgrade or switch makes a new one", ErrInUse, ShortID(h.Booted))
	}
	entries, err := h.Loader.Entries(h.Warn)
	if err != nil {
		return nil, nil, err
	}
	var left []bootloader.Entry
	for _, e := range entries {
		id := bootedID(ParseArgs(e.Options))
		i := slices.IndexFunc(all, func(d *Deployment) bool { return d.ID == id })
		if id == "" || i >= 0 && c.Kept[id] != "" && all[i].Entry != nil && all[i].Entry.ID == e.ID {
			left = append(left, e) // a needed one, or one that is not understood
			continue
		}
		if i < 0 {
			// Without a state it cannot boot. With one whose record cannot be read it may, and
			// may be what somebody has pinned.
			if have, err := exists(h.stateDir(id)); err != nil {
				return nil, nil, err
			} else if have {
				left = append(left, e)
				continue
			}
		}
		if i >= 0 && c.Kept[id] == "" {
			c.Deployments = append(c.Deployments, id)
		}
		if dry {
			continue
		}
		if err := h.Loader.Remove(e.ID); err != nil {
			return nil, nil, fmt.Errorf("removing the boot entry of deployment %s: %w", ShortID(id), err)
		}
		if i >= 0 {
			h.record(Event{What: "removed", ID: id, Title: all[i].Title})
		}
	}
	if err := h.pruneKernels(c, left, dry); err != nil {
		return nil, nil, err
	}
	needed, err := h.needed(left)
	if err != nil {
		return nil, nil, err
	}
	return c, needed, h.pruneStates(c, needed, dry)
}

// pruneKernels removes the kernels that no entry and no staged deployment refers to.
func (h *Host) pruneKernels(c *Collected, left []bootloader.Entry, dry bool) error {
	staged, err := h.staged()
	if err != nil {
		return err
	}
	dirs, err := unusedBootDirs(h.Paths, left)
	if err != nil {
		return err
	}
	for _, name := range dirs {
		if staged != nil && name == bootPrefix+staged.Origin.BootDigest {
			continue
		}
		dir := filepath.Join(h.Paths.Boot, name)
		n, err := treeSize(dir, 1)
		if err != nil {
			return err
		}
		c.Kernels, c.BootBytes = append(c.Kernels, name), c.BootBytes+n
		if dry {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("removing the kernel %q: %w", dir, err)
		}
	}
	return nil
}

// needed tells which deployments' states must stay: what runs, what has an entry or is staged,
// and what somebody has pinned, although its entry is lost. What cannot be read may be pinned.
func (h *Host) needed(left []bootloader.Entry) (map[string]bool, error) {
	needed := map[string]bool{}
	if h.Booted != "" {
		needed[h.Booted] = true
	}
	for _, e := range left {
		if id := bootedID(ParseArgs(e.Options)); id != "" {
			needed[id] = true
		}
	}
	staged, err := h.staged()
	if err != nil {
		return nil, err
	}
	if staged != nil {
		needed[staged.Origin.ID], needed[staged.Request.Base] = true, true
	}
	states, err := os.ReadDir(h.path(deployDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range states {
		id := e.Name()
		if needed[id] || checkID(id) != nil {
			continue
		}
		if o, err := h.origin(id); err != nil {
			h.Warn("%v: its state stays", err)
			needed[id] = true
		} else if o.Pinned {
			h.Warn("deployment %s is pinned and has no boot entry: its state stays", ShortID(id))
			needed[id] = true
		}
	}
	return needed, nil
}

// pruneStates removes the states and names of deployments that are not needed.
func (h *Host) pruneStates(c *Collected, needed map[string]bool, dry bool) error {
	names, err := h.names()
	if err != nil {
		return err
	}
	for _, id := range names {
		if needed[id] || dry {
			continue
		}
		for kind, name := range map[store.Kind]string{
			store.Streams: store.TagPrefix + store.EncodeTag(tag(id)), store.Images: imageRef(id),
		} {
			if err := h.Store.RemoveRef(kind, name); err != nil && !errors.Is(err, store.ErrNotFound) {
				return err
			}
		}
	}
	c.States, err = h.removeBut(deployDir, func(id string) bool { return needed[id] || checkID(id) != nil }, dry)
	return err
}

// pruneVars removes each /var that no needed deployment has, as a reset leaves one behind.
func (h *Host) pruneVars(c *Collected, needed map[string]bool, dry bool) error {
	vars := map[string]bool{}
	for id := range needed {
		if have, err := exists(h.stateDir(id)); err != nil {
			return err
		} else if id == "" || !have {
			continue // staged, or of another disk
		}
		name, err := h.varOf(id)
		if err != nil {
			return err
		}
		vars[name] = true
	}
	if len(vars) == 0 {
		return nil
	}
	var err error
	c.Vars, err = h.removeBut(osDir, func(name string) bool { return vars[name] || name != defaultOS && !ownVar(name) }, dry)
	return err
}

// removeBut removes what is in a directory but for what is to stay, and returns what that
// was. What is not finished goes, too.
func (h *Host) removeBut(parent string, stays func(name string) bool, dry bool) (removed []string, err error) {
	entries, err := os.ReadDir(h.path(parent))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		name, dir := e.Name(), h.path(parent, e.Name())
		var err error
		if strings.HasSuffix(name, tempSuffix) {
			if !dry {
				err = removeAll(dir)
			}
		} else if !stays(name) {
			removed = append(removed, dir)
			if !dry {
				err = removeTree(dir)
			}
		}
		if err != nil {
			return removed, fmt.Errorf("removing the state %q: %w", dir, err)
		}
	}
	return removed, nil
}

// Collect prunes, removes each /var that no deployment has, and then frees what the store
// needs no more. With dry nothing is removed. roots are images that are mounted and must stay.
func (h *Host) Collect(ctx context.Context, dry bool, roots []string) (*Collected, error) {
	c, needed, err := h.prune(dry)
	if err != nil {
		return nil, err
	}
	if err := h.pruneVars(c, needed, dry); err != nil {
		return nil, err
	}
	c.Store, err = converter.GC(ctx, h.Store, store.GCOptions{DryRun: dry, Roots: roots})
	return c, err
}

// treeSize adds up the sizes of the files below a directory, each in whole blocks.
func treeSize(dir string, block int64) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		n += (fi.Size() + block - 1) / block * block
		return nil
	})
	return n, err
}
