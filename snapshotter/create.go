package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// Prepare makes an active snapshot. For a layer that the store has, or that the
// source can fetch, it makes the committed snapshot instead and returns
// ErrAlreadyExists.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]cmount.Mount, error) {
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

// View makes a snapshot that shows its parent and cannot be written to.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]cmount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

// An active is an active snapshot or view.
type active struct {
	id, key string
	kind    snapshots.Kind
	chain   []string // of the parent, the lowest first
	ids     *idMap
	staged  bool // its layer is in the store already
}

func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (_ []cmount.Mount, err error) {
	var base snapshots.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return nil, err
		}
	}
	opts = append(slices.Clone(opts), dropOurs)
	ids, err := idsOf(key, base.Labels)
	if err != nil {
		return nil, err
	}
	var size int64
	if !isExtract(key) { // see idsOf
		if size, err = parseMaxSize(base.Labels); err != nil {
			return nil, err
		}
	}
	defer s.lock(keyLock(key))()
	remote := s.asked(kind, key, parent, base.Labels)
	if remote != nil {
		if err := s.alreadyCommitted(ctx, remote); err != nil {
			return nil, err
		}
	}

	a := &active{key: key, kind: kind, ids: ids}
	if err := s.record(ctx, a, parent, opts); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			// The caller may be gone; what was made must go, too.
			if rerr := s.remove(context.WithoutCancel(ctx), key); rerr != nil && !errdefs.IsNotFound(rerr) {
				err = errors.Join(err, rerr)
			}
		}
	}()
	if size > 0 && kind == snapshots.KindActive {
		if err := s.limit(a.id, size); err != nil {
			return nil, err
		}
	}
	if remote != nil {
		if err := s.provide(ctx, a, remote); err != nil {
			return nil, err
		}
	}
	if err := s.need(ctx, a); err != nil {
		return nil, err
	}
	if err := s.ownRoot(a); err != nil {
		return nil, err
	}
	return s.mountsOf(a), nil
}

// record makes the record and the directories of a snapshot.
func (s *Snapshotter) record(ctx context.Context, a *active, parent string, opts []snapshots.Opt) (err error) {
	tmp, err := os.MkdirTemp(filepath.Join(s.root, "snapshots"), "new-")
	if err != nil {
		return err
	}
	made := tmp
	// A failed record's number may be given to the next snapshot.
	s.recording.Lock()
	defer s.recording.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(made))
		}
	}()
	if err := makeUpper(tmp); err != nil {
		return err
	}
	if a.ids != nil {
		uid, gid, err := a.ids.root()
		if err != nil {
			return err
		}
		if err := os.Lchown(filepath.Join(tmp, "fs"), uid, gid); err != nil {
			return err
		}
	}
	return s.write(ctx, func(ctx context.Context) error {
		snap, err := storage.CreateSnapshot(ctx, a.kind, a.key, parent, opts...)
		if err != nil {
			return err
		}
		a.id = snap.ID
		if a.chain, err = chain(ctx, parent); err != nil {
			return err
		}
		if err := os.Rename(tmp, s.dir(snap.ID)); err != nil {
			return err
		}
		made = s.dir(snap.ID)
		return nil
	})
}

// makeUpper makes the upper and work directory below dir, where they are missing. The
// root of a container has mode 0755 as with containerd's other snapshotters, whatever
// the image says of it.
func makeUpper(dir string) error {
	for name, mode := range map[string]os.FileMode{"fs": 0o755, "work": 0o711} {
		path := filepath.Join(dir, name)
		err := os.MkdirAll(dir, 0o700)
		if err == nil {
			err = os.Mkdir(path, mode)
		}
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err == nil {
			err = os.Chmod(path, mode) // whatever the umask
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// lazy reports whether a snapshot does without the layers below. Our differ does not
// look at them: once it has unpacked a layer it is the one that containerd uses.
func (s *Snapshotter) lazy(key string) bool { return s.differs.Load() && isExtract(key) }

// need mounts what a snapshot's mounts refer to.
func (s *Snapshotter) need(ctx context.Context, a *active) error {
	if len(a.chain) == 0 || a.staged || s.lazy(a.key) {
		return nil
	}
	return s.acquire(ctx, a)
}

// ownRoot gives a container's root the owner that the image says.
func (s *Snapshotter) ownRoot(a *active) error {
	if _, mounted := s.mounts.of(a.id); !mounted || a.kind != snapshots.KindActive {
		return nil
	}
	st, err := os.Stat(s.lowerOf(a))
	if err != nil {
		return err
	}
	sys := st.Sys().(*syscall.Stat_t)
	return os.Lchown(s.upper(a.id), int(sys.Uid), int(sys.Gid))
}

// mountsOf returns the mounts of a snapshot. They follow from its record alone.
func (s *Snapshotter) mountsOf(a *active) []cmount.Mount {
	view := a.kind == snapshots.KindView
	lower := s.empty()
	if len(a.chain) > 0 {
		lower = s.lowerOf(a)
	}
	switch {
	case a.staged:
		return []cmount.Mount{{Type: "bind", Source: s.upper(a.id), Options: []string{"ro", "rbind"}}}
	case view && len(a.chain) > 0:
		return []cmount.Mount{{Type: "bind", Source: lower, Options: []string{"ro", "rbind"}}}
	case view:
		return []cmount.Mount{{Type: "bind", Source: s.upper(a.id), Options: []string{"ro", "rbind"}}}
	case len(a.chain) == 0 && !isExtract(a.key):
		return []cmount.Mount{{Type: "bind", Source: s.upper(a.id), Options: []string{"rw", "rbind"}}}
	}
	// containerd's differs unpack into upperdir without mounting, and write whiteouts as
	// overlayfs has them, if there is one mount and its type is overlay. Into a bind
	// mount they write none, and a layer that gets its parent at Commit would lose
	// them. They look into lowerdir for the attributes of directories that a layer
	// does not list.
	//
	// What upper directories have must be a layer without the layers below, also where
	// the kernel's defaults are others.
	return []cmount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "metacopy=off", "redirect_dir=off",
		"workdir=" + s.work(a.id),
		"upperdir=" + s.upper(a.id),
		"lowerdir=" + lower,
	}}}
}

// Mounts returns the mounts of an active snapshot or view, the same ones always.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]cmount.Mount, error) {
	defer s.lock(keyLock(key))()
	a, err := s.active(ctx, key)
	if err != nil {
		return nil, err
	}
	// It is mounted since Prepare or New, unless that failed.
	if err := s.need(ctx, a); err != nil {
		return nil, err
	}
	return s.mountsOf(a), nil
}

// active reads the record of an active snapshot or view. It refuses one whose commit
// failed halfway: its files may be objects of the store.
func (s *Snapshotter) active(ctx context.Context, key string) (*active, error) {
	a := &active{key: key}
	err := s.read(ctx, func(ctx context.Context) error {
		snap, err := storage.GetSnapshot(ctx, key)
		if err != nil {
			return fmt.Errorf("snapshot %q: %w", key, err)
		}
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		a.id, a.kind = snap.ID, snap.Kind
		if a.ids, err = idsOf(key, info.Labels); err != nil {
			return err
		}
		a.staged = info.Labels[labelStaged] != ""
		a.chain, err = chain(ctx, info.Parent)
		return err
	})
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(s.taken(a.id)); !errors.Is(err, os.ErrNotExist) {
		return nil, errors.Join(err, fmt.Errorf("snapshot %q: its commit failed halfway: it can only be removed: %w", key, errdefs.ErrFailedPrecondition))
	}
	return a, nil
}
