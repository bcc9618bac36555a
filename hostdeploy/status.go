package hostdeploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/dpkg"
	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/hostdeploy/etcmerge"
	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// A Status is what can be said of a host's deployments.
type Status struct {
	// Deployments in the order in which they boot.
	Deployments []*DeploymentStatus `json:"deployments"`
	// Boot is what the initramfs reported of the running system, nil where there is no
	// report.
	Boot   *initramfs.Report `json:"boot,omitempty"`
	Loader string            `json:"bootloader"`
	// Fallback says how the loader falls back, "" where it cannot.
	Fallback string `json:"fallback,omitempty"`
	BootFree int64  `json:"bootFree"` // bytes
	BootSize int64  `json:"bootSize"`
	// EtcChanges are the differences of the running system's /etc from its image's.
	EtcChanges []etcmerge.Change `json:"etcChanges,omitempty"`
	// Failures are the images that used up their tries here and have not booted since.
	Failures []Event `json:"failures,omitempty"`
	// Verity says whether the store promises fs-verity of all its files.
	Verity bool `json:"verity"`
	// Conflicts are those of the merge that made the running system's /etc, without the
	// ones whose image's version somebody has taken away since.
	Conflicts []etcmerge.Conflict `json:"conflicts,omitempty"`
}

// A DeploymentStatus adds to a deployment what it takes reading its image to know.
type DeploymentStatus struct {
	*Deployment
	Kept string `json:"kept,omitempty"` // why gc keeps it
	// Packages are the differences to the running deployment, or to the first where
	// none runs.
	Packages []dpkg.Change `json:"packages,omitempty"`
	// Missing says why the image cannot be read, "".
	Missing string `json:"missing,omitempty"`
}

// Status gathers the state of the host. It takes no lock: what it says was true a
// moment ago.
func (h *Host) Status(ctx context.Context) (*Status, error) {
	all, err := h.Deployments()
	if err != nil {
		return nil, err
	}
	s := &Status{Deployments: []*DeploymentStatus{}, Loader: h.Loader.Name(), Verity: h.Store.Verity()}
	if t := h.Loader.Tries(); t.Max > 0 {
		s.Fallback = fmt.Sprintf("after %d tries, counted %s", min(t.Max, DefaultTries), t.How)
	}
	if s.BootFree, s.BootSize, err = free(h.Paths.Boot); err != nil {
		return nil, err
	}
	if h.Run != "" {
		if s.Boot, err = initramfs.Read(h.Run); err != nil && !errors.Is(err, initramfs.ErrNoReport) {
			h.Warn("reading what the initramfs reported: %v", err)
		}
	}
	if s.Failures, err = h.Failures(); err != nil {
		h.Warn("%v", err)
	}
	// What has an entry that says so need not be in the history yet.
	for _, d := range all {
		if d.Failed && !d.Booted && !slices.ContainsFunc(s.Failures, func(e Event) bool { return e.Manifest == d.Manifest }) {
			s.Failures = append(s.Failures, Event{What: eventFailed, ID: d.ID, Title: d.Title, Manifest: d.Manifest})
		}
	}
	keep := Keep(all)
	base := booted(all)
	if base == nil && len(all) > 0 {
		base = all[0]
	}
	var old *dpkg.Database
	for _, d := range all {
		ds := &DeploymentStatus{Deployment: d, Kept: keep[d.ID]}
		s.Deployments = append(s.Deployments, ds)
		t, err := h.tree(d.Digest)
		if err != nil {
			ds.Missing = err.Error()
			continue
		}
		if d.Booted {
			if s.EtcChanges, err = h.etcChanges(ctx, t, d.ID); err != nil {
				h.Warn("comparing /etc with the image's: %v", err)
			}
			if s.Conflicts, err = h.conflicts(d.ID); err != nil {
				h.Warn("reading the conflicts of /etc: %v", err)
			}
		}
		if d == base {
			continue
		}
		if old == nil {
			if old, err = h.packages(base); err != nil {
				h.Warn("reading the packages of deployment %s: %v", base.Name(), err)
				continue
			}
		}
		pkgs, err := dpkg.Read(t, h.Store)
		if err != nil {
			h.Warn("reading the packages of deployment %s: %v", d.Name(), err)
			continue
		}
		ds.Packages = dpkg.Diff(old, pkgs)
	}
	return s, nil
}

// free returns the free bytes of a file system, as root has them, and its size.
func free(dir string) (avail, total int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, fmt.Errorf("asking for the free space of %q: %w", dir, err)
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize, nil
}

func (h *Host) packages(d *Deployment) (*dpkg.Database, error) {
	t, err := h.tree(d.Digest)
	if err != nil {
		return nil, err
	}
	return dpkg.Read(t, h.Store)
}

func (h *Host) etcChanges(ctx context.Context, t *tree.Tree, id string) ([]etcmerge.Change, error) {
	return etcmerge.Changes(ctx, t.Lookup("/etc"), filepath.Join(h.stateDir(id), "etc"))
}

// conflicts returns those of a deployment's merge that still stand.
func (h *Host) conflicts(id string) ([]etcmerge.Conflict, error) {
	data, err := os.ReadFile(filepath.Join(h.stateDir(id), conflictsFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var all []etcmerge.Conflict
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrFormat, conflictsFile, err)
	}
	return slices.DeleteFunc(all, func(c etcmerge.Conflict) bool {
		have, err := exists(filepath.Join(h.stateDir(id), c.Kept))
		return c.Kept != "" && err == nil && !have
	}), nil
}
