package hostdeploy

import (
	"context"
	"encoding/json"
	"fmt"
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
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(lines)
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
	name := defaultOS
	if p.req.FreshVar {
		name = p.ID
	}
	if err := p.makeVar(ctx, name); err != nil {
		return err
	}
	dir := p.h.stateDir(p.ID)
	tmp := dir + tempSuffix
	if err := os.Symlink(filepath.Join("../../os", name, "var"), filepath.Join(tmp, "var")); err != nil {
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
	if err := removeTree(dir); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
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
	// The names of new directories up to the root must be there before the entry is.
	if err := syncFS(p.h.Root); err != nil {
		return err
	}
	e, err := p.h.entry(&p.Origin, func(e *bootloader.Entry) { p.files.entry(e, p.h.Paths) })
	if err != nil {
		return err
	}
	if n := p.tries(); n > 0 && p.req.Base != "" {
		e.Counter = &bootloader.Counter{Left: n}
	}
	if err := p.h.Loader.Add(*e); err != nil {
		return err
	}
	p.h.record("deployed", p.ID, p.Title)
	return nil
}
