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
	States    []string      `json:"states"` // directories of /etc and of own /var
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
// has the lock. With dry nothing is removed.
func (h *Host) Prune(dry bool) (*Collected, error) {
	if !dry {
		if err := h.Loader.Sync(); err != nil {
			return nil, err
		}
	}
	all, err := h.Deployments()
	if err != nil {
		return nil, err
	}
	if !dry {
		h.recordFailures(all)
	}
	c := &Collected{Kept: Keep(all)}
	if h.Booted != "" && booted(all) == nil {
		// The running system has no entry any more: without it nobody can tell what it
		// needs, so nothing is touched.
		return nil, fmt.Errorf("removing deployments: %w: the running deployment %s has no boot entry; particle hostdeploy upgrade or switch makes a new one", ErrInUse, ShortID(h.Booted))
	}
	entries, err := h.Loader.Entries(h.Warn)
	if err != nil {
		return nil, err
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
				return nil, err
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
			return nil, fmt.Errorf("removing the boot entry of deployment %s: %w", ShortID(id), err)
		}
		if i >= 0 {
			h.record(Event{What: "removed", ID: id, Title: all[i].Title})
		}
	}
	if err := h.pruneKernels(c, left, dry); err != nil {
		return nil, err
	}
	return c, h.pruneStates(c, left, dry)
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

// pruneStates removes the states and names of deployments without an entry.
func (h *Host) pruneStates(c *Collected, left []bootloader.Entry, dry bool) error {
	needed := map[string]bool{h.Booted: true}
	for _, e := range left {
		needed[bootedID(ParseArgs(e.Options))] = true
	}
	staged, err := h.staged()
	if err != nil {
		return err
	}
	if staged != nil {
		needed[staged.Origin.ID], needed[staged.Request.Base] = true, true
	}
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
	// A /var goes with the last deployment that has it, as a reset leaves one behind.
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
	for _, dir := range []string{deployDir, osDir} {
		entries, err := os.ReadDir(h.path(dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			id, dir := e.Name(), h.path(dir, e.Name())
			if strings.HasSuffix(id, tempSuffix) {
				if !dry {
					err = removeAll(dir)
				}
			} else if dir == h.path(deployDir, id) && !needed[id] && checkID(id) == nil || dir == h.path(osDir, id) && len(vars) > 0 && !vars[id] && (id == defaultOS || ownVar(id)) {
				c.States = append(c.States, dir)
				if !dry {
					err = removeTree(dir)
				}
			}
			if err != nil {
				return fmt.Errorf("removing the state %q: %w", dir, err)
			}
		}
	}
	return nil
}

// Collect prunes and then frees what the store needs no more. roots are images that
// are mounted and must stay.
func (h *Host) Collect(ctx context.Context, dry bool, roots []string) (*Collected, error) {
	c, err := h.Prune(dry)
	if err != nil {
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
