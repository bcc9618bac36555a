package snapshotter

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
)

// gcWait is how long Cleanup waits until nobody else uses the store.
const gcWait = time.Minute

// Remove removes a snapshot. What only it used in the store goes with Cleanup.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	defer s.lock(keyLock(key))()
	return s.remove(ctx, key)
}

func (s *Snapshotter) remove(ctx context.Context, key string) error {
	var (
		id   string
		kind snapshots.Kind
	)
	err := s.write(ctx, func(ctx context.Context) (err error) {
		id, kind, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return err
	}
	// The record is gone: failures from here on are Cleanup's to repair.
	s.state.forget(id)
	s.trees.remove(id)
	s.release(id)
	if kind != snapshots.KindView {
		s.removeRefs(id)
	}
	if kind != snapshots.KindCommitted {
		s.discard(id)
	}
	s.retired(id)
	return nil
}

// discard removes the directories of a snapshot that has no upper directory any more,
// in the background. A container that still has it mounted (one that was committed
// while it ran, say) keeps it until the next Cleanup after its end.
func (s *Snapshotter) discard(id string) {
	used, err := upperInUse(s.upper(id))
	if err != nil {
		s.log.Warn("removing a snapshot's directories", "dir", s.dir(id), "error", err)
		return
	}
	if used {
		s.log.Info("keeping an upper directory while it is mounted", "dir", s.upper(id))
		return
	}
	s.unlimit(id)
	trash, err := os.MkdirTemp(filepath.Join(s.root, "snapshots"), "rm-")
	if err == nil {
		err = os.Rename(s.dir(id), filepath.Join(trash, id))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Warn("removing a snapshot's directories", "dir", s.dir(id), "error", err)
		return
	}
	s.background.Go(func() { s.removeAll(trash) })
}

func (s *Snapshotter) removeAll(dir string) {
	if err := os.RemoveAll(dir); err != nil {
		s.log.Warn("removing a snapshot's directories", "dir", dir, "error", err)
	}
}

// Cleanup removes what removed snapshots, and crashes, left: directories, mounts,
// names in the store, and then from the store what no name leads to any more.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	if err := s.sweep(ctx, false); err != nil {
		return err
	}
	if err := s.unmountUnused(); err != nil {
		return err
	}
	if s.o.KeepGarbage || !s.state.takeGarbage() {
		return nil
	}
	stats, err := converter.GC(ctx, s.store, store.GCOptions{Wait: gcWait})
	if err != nil {
		s.state.setGarbage(true)
		if errors.Is(err, store.ErrBusy) {
			s.log.Info("not collecting garbage while somebody uses the store", "store", s.store.Dir())
			return nil
		}
		return err
	}
	s.counters.collected.Add(stats.BytesRemoved)
	s.log.Info("collected garbage", "objects", stats.ObjectsRemoved, "bytes", stats.BytesRemoved)
	return nil
}

// sweep removes directories and names that belong to no snapshot. Temporary
// directories are only removed at the start, when nobody can be using them.
func (s *Snapshotter) sweep(ctx context.Context, start bool) error {
	// First what there is, then what is known: a snapshot that is being made may be in
	// the second list and not in the first, never the other way round.
	dirs, err := os.ReadDir(filepath.Join(s.root, "snapshots"))
	if err != nil {
		return err
	}
	streams, err := s.store.StreamRefs(refPrefix + s.instance + "/")
	if err != nil {
		return err
	}
	images, err := s.store.ImageRefs()
	if err != nil {
		return err
	}
	known := map[string]snapshots.Kind{}
	// A transaction that writes waits for those that do: a directory is there before
	// its record is.
	err = s.write(ctx, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if errdefs.IsNotFound(err) {
			return nil // there never was a snapshot
		}
		for id, key := range ids {
			_, info, _, err := storage.GetInfo(ctx, key)
			if err != nil {
				return err
			}
			known[id] = info.Kind
		}
		return err
	})
	if err != nil {
		return err
	}
	if start {
		temps, err := filepath.Glob(filepath.Join(s.root, tempPrefix+"*"))
		if err != nil {
			return err
		}
		for _, path := range temps {
			s.removeAll(path)
		}
	}
	for _, e := range dirs {
		name := e.Name()
		path := filepath.Join(s.root, "snapshots", name)
		switch {
		case strings.HasPrefix(name, "new-"), strings.HasPrefix(name, "rm-"):
			if start {
				s.removeAll(path)
			}
		case known[name] == snapshots.KindUnknown, known[name] == snapshots.KindCommitted && !s.state.isRetiring(name):
			s.discard(name)
		}
	}
	for kind, refs := range map[store.Kind][]store.Ref{store.Streams: streams, store.Images: images} {
		for _, ref := range refs {
			id := s.idOfRef(ref.Name)
			if id != "" && known[id] == snapshots.KindUnknown {
				s.removeRef(kind, id, filepath.Base(ref.Name))
			}
		}
	}
	return nil
}

// isEmpty reports whether a directory has no entries.
func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if err == io.EOF {
		return true, nil
	}
	return false, err
}
