package hostdeploy

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/particle-os/particle/hostdeploy/bootloader"
)

// A Deployment is an image that the host can boot, or will be able to.
type Deployment struct {
	Origin
	// Entry is its choice in the boot menu, nil while it is staged.
	Entry *bootloader.Entry `json:"-"`
	// Generation is the entry's, 0 while it is staged.
	Generation int  `json:"generation"`
	Booted     bool `json:"booted"`
	Staged     bool `json:"staged"`
	// Default: it boots next.
	Default bool `json:"default"`
	// Failed: its tries are used up without one success.
	Failed bool `json:"failed"`
	// Tries left, nil for one that has proved good.
	Tries *int `json:"triesLeft,omitempty"`
}

// Name returns the id in short, for people.
func (d *Deployment) Name() string { return ShortID(d.ID) }

// ShortID cuts an id to what people compare.
func ShortID(id string) string {
	hex, n, dotted := strings.Cut(id, ".")
	hex = hex[:min(12, len(hex))]
	if dotted {
		return hex + "." + n
	}
	return hex
}

// Deployments returns those that have a boot entry, in the order in which the loader
// tries them, the staged one before all. An entry without a record in the state is
// reported and left out.
func (h *Host) Deployments() ([]*Deployment, error) {
	entries, err := h.Loader.Entries(h.Warn)
	if err != nil {
		return nil, err
	}
	var all []*Deployment
	for i := range entries {
		e := &entries[i]
		id := bootedID(ParseArgs(e.Options))
		if id == "" {
			h.Warn("boot entry %s names no composefs digest: it is not looked at", e.ID)
			continue
		}
		o, err := h.origin(id)
		if err != nil {
			h.Warn("boot entry %s: %v", e.ID, err)
			continue
		}
		if slices.ContainsFunc(all, func(d *Deployment) bool { return d.ID == id }) {
			continue // the older entry of one that was rolled back to: the newer counts
		}
		d := &Deployment{
			Origin: *o, Entry: e, Generation: e.Generation,
			Booted: id == h.Booted, Default: len(all) == 0, Failed: e.Bad(),
		}
		if e.Counter != nil {
			d.Tries = &e.Counter.Left
		}
		all = append(all, d)
	}
	staged, err := h.staged()
	if err != nil || staged == nil {
		return all, err
	}
	for _, d := range all {
		d.Default = false
	}
	return slices.Insert(all, 0, &Deployment{Origin: staged.Origin, Staged: true, Default: true}), nil
}

// stateDir returns the directory of a deployment's state.
func (h *Host) stateDir(id string) string { return h.path(deployDir, id) }

func (h *Host) origin(id string) (*Origin, error) {
	name := filepath.Join(h.stateDir(id), id+".origin")
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: deployment %s has no record %q", ErrFormat, ShortID(id), name)
	} else if err != nil {
		return nil, fmt.Errorf("reading the record of deployment %s: %w", ShortID(id), err)
	}
	o, err := parseOrigin(data)
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", name, err)
	}
	return o, nil
}

// find returns the deployment that a person means: by its id or the beginning of one,
// or "booted", "staged", "rollback" or "default".
func find(all []*Deployment, name string) (*Deployment, error) {
	var found []*Deployment
	for _, d := range all {
		switch {
		case d.ID == name:
			return d, nil
		case name == "booted" && d.Booted, name == "staged" && d.Staged, name == "default" && d.Default:
			return d, nil
		case len(name) >= 4 && (strings.HasPrefix(d.ID, name) || ShortID(d.ID) == name):
			found = append(found, d)
		}
	}
	if name == "rollback" {
		if d := previous(all); d != nil {
			return d, nil
		}
	}
	if len(found) == 1 {
		return found[0], nil
	}
	var have []string
	for _, d := range all {
		have = append(have, d.Name())
	}
	if len(found) > 1 {
		return nil, fmt.Errorf("%w: %q fits %d of %s; give more digits", ErrNoDeployment, name, len(found), strings.Join(have, ", "))
	}
	return nil, fmt.Errorf("%w: %q; there are %s", ErrNoDeployment, name, strings.Join(have, ", "))
}

// previous returns the deployment that a rollback leads to: the first that is neither
// booted nor staged and did not fail; nil where there is none.
func previous(all []*Deployment) *Deployment {
	for _, d := range all {
		if !d.Booted && !d.Staged && !d.Failed {
			return d
		}
	}
	return nil
}

// Base returns the deployment whose /etc and kernel arguments a new one carries on: the
// running one, also where its boot entry is lost, or, on a disk that is looked after from
// outside, what boots next. all is what Deployments returned.
func (h *Host) Base(all []*Deployment) (*Deployment, error) {
	if d := booted(all); d != nil {
		return d, nil
	}
	if h.Booted != "" {
		if have, err := exists(h.stateDir(h.Booted)); err != nil {
			return nil, err
		} else if have {
			o, err := h.origin(h.Booted)
			if err != nil {
				return nil, fmt.Errorf("going on from what runs: %w", err)
			}
			return &Deployment{Origin: *o, Booted: true}, nil
		}
	}
	for _, d := range all {
		if !d.Staged {
			return d, nil
		}
	}
	return nil, fmt.Errorf("%w: the host has no deployment with a boot entry", ErrNoDeployment)
}

// booted returns the running deployment, nil for none.
func booted(all []*Deployment) *Deployment {
	if i := slices.IndexFunc(all, func(d *Deployment) bool { return d.Booted }); i >= 0 {
		return all[i]
	}
	return nil
}
