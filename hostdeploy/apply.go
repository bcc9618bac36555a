package hostdeploy

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/hostdeploy/bootloader"
	"github.com/particle-os/particle/hostdeploy/etcmerge"
)

// A Done is told of each step of a plan when it is done.
type Done func(s Step, took time.Duration)

// Apply does what the plan says, step by step. The caller has the host's lock. A step
// that fails ends it: what was done before is either not visible yet or removed by the
// next Prune.
func (p *Plan) Apply(ctx context.Context, done Done) error {
	for _, s := range p.Steps {
		start := time.Now()
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.run(ctx); err != nil {
			return fmt.Errorf("deploying %s: to %s: %w", ShortID(p.ID), s.Text, err)
		}
		if done != nil {
			done(s, time.Since(start))
		}
	}
	return nil
}

// keep gives the image the names that keep it from being collected.
func (p *Plan) keep(ctx context.Context) error {
	txn, err := p.h.Store.Begin(ctx)
	if err != nil {
		return err
	}
	defer txn.Rollback()
	manifest := store.ManifestPrefix + p.image.Manifest.String()
	if err := txn.SetRef(store.Streams, store.TagPrefix+store.EncodeTag(tag(p.ID)), manifest); err != nil {
		return err
	}
	// What is booted must not depend on what the manifest's stream refers to, which
	// another conversion of the same image may replace.
	if err := txn.SetRef(store.Images, imageRef(p.ID), p.Digest.String()); err != nil {
		return err
	}
	return txn.Commit()
}

// planEtc works out the merge of /etc.
func (p *Plan) planEtc(ctx context.Context) error {
	if p.req.Base == "" || p.req.FreshEtc {
		return nil
	}
	base, err := p.h.origin(p.req.Base)
	if err != nil {
		return err
	}
	old, err := p.h.tree(base.Digest)
	if err != nil {
		return fmt.Errorf("reading /etc of deployment %s's image: %w", ShortID(base.ID), err)
	}
	p.Etc, err = etcmerge.Plan(ctx, etcmerge.Input{
		Old: old.Lookup("/etc"), New: p.tree.Lookup("/etc"),
		Current: filepath.Join(p.h.stateDir(base.ID), "etc"), Objects: p.objects,
	})
	return err
}

// writeEtc begins the deployment's state, under a name of its own.
func (p *Plan) writeEtc(ctx context.Context) error {
	tmp := p.h.stateDir(p.ID) + tempSuffix
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return err
	}
	dst := filepath.Join(tmp, "etc")
	if p.Etc != nil {
		return p.Etc.Write(ctx, dst)
	}
	if err := p.writeFresh(ctx, "/etc", dst); err != nil {
		return err
	}
	lines := p.req.Fstab
	if p.req.Base != "" {
		var err error
		if lines, err = addedLines(filepath.Join(p.h.stateDir(p.req.Base), "etc/fstab"), filepath.Join(dst, "fstab")); err != nil {
			return err
		}
	}
	return appendFstab(filepath.Join(dst, "fstab"), lines)
}

// addedLines returns the lines of a file that another one lacks: what a machine's
// fstab has besides the image's must outlive a reset, or its disks are not found.
func addedLines(name, other string) (string, error) {
	data, err := os.ReadFile(name)
	if err != nil && !os.IsNotExist(err) {
		return "", err
	}
	have, err := os.ReadFile(other)
	if err != nil && !os.IsNotExist(err) {
		return "", err
	}
	lines := strings.SplitAfter(string(have), "\n")
	var added strings.Builder
	for line := range strings.SplitAfterSeq(string(data), "\n") {
		if !slices.Contains(lines, line) {
			added.WriteString(line)
		}
	}
	return added.String(), nil
}

// appendFstab adds the machine's lines to the image's fstab(5), which on Debian has a
// comment only.
func appendFstab(name, lines string) error {
	if lines == "" {
		return nil
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	// The last line of an image's may have no end.
	if n, serr := f.Seek(0, io.SeekEnd); serr == nil && n > 0 {
		last := make([]byte, 1)
		if _, err = f.ReadAt(last, n-1); err == nil && last[0] != '\n' {
			lines = "\n" + lines
		}
	}
	if err == nil {
		_, err = f.WriteString(lines)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// writeFresh writes a directory of the image to disk.
func (p *Plan) writeFresh(ctx context.Context, dir, dst string) error {
	n := p.tree.Lookup(dir)
	if n == nil || !n.IsDir() {
		n = tree.NewImplied()
	}
	return etcmerge.Fresh(ctx, n, p.objects, dst)
}

// writeState completes the state and gives it its name.
func (p *Plan) writeState(ctx context.Context) error {
	name, err := p.varName()
	if err != nil {
		return err
	}
	if err := p.makeVar(ctx, name); err != nil {
		return err
	}
	dir := p.h.stateDir(p.ID)
	tmp := dir + tempSuffix
	if err := os.Symlink(varTarget(name), filepath.Join(tmp, "var")); err != nil {
		return err
	}
	data, err := p.Origin.marshal()
	if err != nil {
		return err
	}
	if err := writeFile(filepath.Join(tmp, p.ID+".origin"), data, 0o644); err != nil {
		return err
	}
	if p.Etc != nil && len(p.Etc.Conflicts) > 0 {
		list, err := json.MarshalIndent(p.Etc.Conflicts, "", "  ")
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(tmp, conflictsFile), list, 0o644); err != nil {
			return err
		}
	}
	if err := syncFS(tmp); err != nil {
		return err
	}
	// State without an entry is left from a deployment that was never finished, or from
	// one that is no longer there.
	if used, err := p.h.used(p.ID); err != nil {
		return err
	} else if used {
		return fmt.Errorf("%w: there is a boot entry of it, or it is running; make the deployment again", ErrInUse)
	}
	if err := removeTree(dir); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// varTarget is the target of a deployment's link to its /var.
func varTarget(name string) string { return filepath.Join("../../os", name, "var") }

// varOf returns the name of the directory in state/os that a deployment has its /var in.
func (h *Host) varOf(id string) (string, error) {
	link := filepath.Join(h.stateDir(id), "var")
	target, err := os.Readlink(link)
	if err != nil {
		return "", fmt.Errorf("looking for /var of deployment %s: %w", ShortID(id), err)
	}
	if name := filepath.Base(filepath.Dir(target)); target == varTarget(name) && (name == defaultOS || ownVar(name)) {
		return name, nil
	}
	return "", fmt.Errorf("%w: %q leads to %q, want %q", ErrFormat, link, target, varTarget(defaultOS))
}

// ownVar reports whether a name in state/os is that of a deployment's own /var: the id of
// the deployment that it was made for, and perhaps "-" and a number.
func ownVar(name string) bool {
	id, _, _ := strings.Cut(name, "-")
	return checkID(id) == nil
}

// varName returns the directory of the deployment's /var: a new one where it shall be
// fresh, else that of the Base.
func (p *Plan) varName() (string, error) {
	switch {
	case !p.req.FreshVar && p.req.Base == "":
		return defaultOS, nil
	case !p.req.FreshVar:
		return p.h.varOf(p.req.Base)
	}
	// One that was made for an earlier deployment of this id may be in use by others.
	for n := 0; ; n++ {
		name := p.ID
		if n > 0 {
			name = fmt.Sprintf("%s-%d", p.ID, n)
		}
		if have, err := exists(p.h.path(osDir, name)); err != nil || !have {
			return name, err
		}
	}
}

// used reports whether a deployment's state must not be replaced.
func (h *Host) used(id string) (bool, error) {
	entries, err := h.Loader.Entries(h.Warn)
	if err != nil {
		return false, err
	}
	return id == h.Booted || slices.ContainsFunc(entries, func(e bootloader.Entry) bool {
		return bootedID(ParseArgs(e.Options)) == id
	}), nil
}

// makeVar makes /var where there is none yet. One that exists is kept as it is.
func (p *Plan) makeVar(ctx context.Context, name string) error {
	dir := p.h.path(osDir, name, "var")
	if have, err := exists(dir); have || err != nil {
		return err
	}
	tmp := dir + tempSuffix
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := p.writeFresh(ctx, "/var", tmp); err != nil {
		return err
	}
	if err := syncFS(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// addEntry makes the deployment the default.
func (p *Plan) addEntry(context.Context) error {
	// The names of new directories up to the root must be there before the entry is; and
	// the kernel, which an earlier run may have copied and not got to making durable.
	for _, dir := range []string{p.h.Root, p.h.Paths.Boot} {
		if err := syncFS(dir); err != nil {
			return err
		}
	}
	e, err := p.newEntry()
	if err != nil {
		return err
	}
	if e.Counter != nil {
		if err := writeFile(p.h.trialFile(p.ID), nil, 0o644); err != nil {
			return err
		}
	}
	if err := p.h.Loader.Add(*e); err != nil {
		return err
	}
	p.h.record(Event{What: "deployed", ID: p.ID, Title: p.Title})
	return nil
}
