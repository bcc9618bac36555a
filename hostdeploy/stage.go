package hostdeploy

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/particle-os/particle/converter/store"
)

// stagedRecord is staged.json: a deployment that Finalize is to make.
type stagedRecord struct {
	Request Request `json:"request"`
	Origin  Origin  `json:"origin"`
}

// stage is the last step of a plan that is not finished yet.
func (p *Plan) stage(context.Context) error {
	req := p.req
	req.ID = p.ID
	data, err := json.MarshalIndent(stagedRecord{req, p.Origin}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(p.h.Run, 0o755); err != nil {
		return err
	}
	return writeFile(filepath.Join(p.h.Run, stagedFile), append(data, '\n'), 0o600)
}

// staged returns what is staged, nil for nothing.
func (h *Host) staged() (*stagedRecord, error) {
	if h.Run == "" {
		return nil, nil
	}
	name := filepath.Join(h.Run, stagedFile)
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var r stagedRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("reading what is staged: %w: %q: %w; remove the file and upgrade again", ErrFormat, name, err)
	}
	return &r, nil
}

// StagedRequest returns what was asked for of the deployment that is staged.
func (h *Host) StagedRequest() (Request, error) {
	r, err := h.staged()
	if err == nil && r == nil {
		err = fmt.Errorf("%w: nothing is staged", ErrNoDeployment)
	}
	if err != nil {
		return Request{}, err
	}
	return r.Request, nil
}

// Unstage forgets what is staged and reports whether there was something. The caller
// has the lock.
func (h *Host) Unstage() (bool, error) {
	r, err := h.staged()
	if r == nil || err != nil {
		return false, err
	}
	if err := os.Remove(filepath.Join(h.Run, stagedFile)); err != nil {
		return false, err
	}
	h.record(Event{What: "unstaged", ID: r.Origin.ID, Title: r.Origin.Title})
	return true, nil
}

// Finalize makes the staged deployment one that boots: /etc is merged as it is now,
// and the entry is written. It returns nil for nothing staged. The caller has the lock.
func (h *Host) Finalize(ctx context.Context, done Done) (*Plan, error) {
	r, err := h.staged()
	if r == nil || err != nil {
		return nil, err
	}
	p, err := NewPlan(ctx, h, r.Request, false)
	if err != nil {
		return nil, fmt.Errorf("finalizing deployment %s: %w", ShortID(r.Origin.ID), err)
	}
	if err := p.Apply(ctx, done); err != nil {
		return nil, err
	}
	return p, os.Remove(filepath.Join(h.Run, stagedFile))
}

// names returns the ids of deployments whose images the store keeps.
func (h *Host) names() ([]string, error) {
	var ids []string
	refs, err := h.Store.ImageRefs()
	if err != nil {
		return nil, err
	}
	for _, r := range refs {
		if id, ok := cutRef(r.Name, imageRef("")); ok {
			ids = append(ids, id)
		}
	}
	streams, err := h.Store.StreamRefs(store.TagPrefix + store.EncodeTag(tag("")))
	if err != nil {
		return nil, err
	}
	for _, r := range streams {
		if id, ok := cutRef(r.Name, store.TagPrefix+store.EncodeTag(tag(""))); ok {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func cutRef(name, prefix string) (id string, ok bool) {
	if len(name) <= len(prefix) || name[:len(prefix)] != prefix {
		return "", false
	}
	id = name[len(prefix):]
	return id, checkID(id) == nil
}
