package snapshotter

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"sync"

	cmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/tree"
)

// A mounted is a merged image that is mounted, and the snapshots that need it.
type mounted struct {
	target       string
	device       uint64 // of the root of the mount
	image        fsverity.Digest
	verification mount.Verification
	loop         bool
	users        map[string]bool // IDs of active snapshots and views
}

// A mountTable knows the mounts of this process. Changing a mount point takes the
// lock of its path, too.
type mountTable struct {
	mu       sync.Mutex
	byTarget map[string]*mounted
	byUser   map[string]*mounted // a snapshot needs one at most
}

func (t *mountTable) init() {
	t.byTarget, t.byUser = map[string]*mounted{}, map[string]*mounted{}
}

// of returns a copy of the mount that a snapshot needs.
func (t *mountTable) of(user string) (mounted, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if m := t.byUser[user]; m != nil {
		return *m, true
	}
	return mounted{}, false
}

// use adds a user to the mount at target and reports whether there is one. One that
// somebody has unmounted is none: what is below it would be an empty root for whoever
// is told of it.
func (t *mountTable) use(target, user string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.byTarget[target]
	if m == nil {
		return false
	}
	if device, err := deviceOf(target); err != nil || device != m.device {
		return false
	}
	m.users[user] = true
	t.byUser[user] = m
	return true
}

// add adds a mount that was made for a user. Those of one that it replaces use it now.
func (t *mountTable) add(m *mounted, user string) error {
	device, err := deviceOf(m.target)
	if err != nil {
		return err
	}
	m.device, m.users = device, map[string]bool{user: true}
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.byTarget[m.target]; old != nil {
		maps.Copy(m.users, old.users)
	}
	for user := range m.users {
		t.byUser[user] = m
	}
	t.byTarget[m.target] = m
	return nil
}

// deviceOf returns the number of the filesystem that a directory is on.
func deviceOf(dir string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return 0, fmt.Errorf("looking at mount point %q: %w", dir, err)
	}
	return uint64(st.Dev), nil
}

// drop removes a user and reports whether the mount has none any more, in which case
// it is forgotten.
func (t *mountTable) drop(target, user string) (unused bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.byUser, user)
	m := t.byTarget[target]
	if m == nil {
		return false
	}
	delete(m.users, user)
	if len(m.users) > 0 {
		return false
	}
	delete(t.byTarget, target)
	return true
}

// count returns the number of mounts and of those that are on loop devices.
func (t *mountTable) count() (mounts, loops int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range t.byTarget {
		mounts++
		if m.loop {
			loops++
		}
	}
	return mounts, loops
}

// mountPoint returns where the merged image of a committed snapshot is mounted.
func (s *Snapshotter) mountPoint(id string, m *idMap) string {
	if m != nil {
		id += "-" + m.name()
	}
	return filepath.Join(s.root, "mounts", id)
}

// parentsPoint returns where the directories of a committed snapshot are mounted.
func (s *Snapshotter) parentsPoint(id string) string {
	return filepath.Join(s.root, "mounts", id+"-parents")
}

// lowerOf returns the lower directory of a snapshot that has a parent.
func (s *Snapshotter) lowerOf(a *active) string {
	top := a.chain[len(a.chain)-1]
	if isExtract(a.key) {
		return s.parentsPoint(top)
	}
	return s.mountPoint(top, a.ids)
}

// acquire mounts the lower directory of a snapshot that has a parent, if that has not
// been done.
func (s *Snapshotter) acquire(ctx context.Context, a *active) error {
	target := s.lowerOf(a)
	defer s.lock(target)()
	if !isExtract(a.key) {
		s.state.setSpeculative(a.chain[len(a.chain)-1], false)
	}
	if s.mounts.use(target, a.id) {
		return nil
	}
	made, err := s.mountLower(ctx, target, a)
	if err != nil {
		return err
	}
	return s.mounts.add(made, a.id)
}

func (s *Snapshotter) mountLower(ctx context.Context, target string, a *active) (*mounted, error) {
	if isExtract(a.key) {
		return s.mountParents(ctx, target, a.chain)
	}
	image, err := s.image(ctx, a.chain, false)
	if err != nil {
		return nil, err
	}
	return s.mountImage(target, image, a.ids)
}

// mountParents mounts the directories of a chain, without their files: what containerd
// looks at while it unpacks a layer on top. Nobody keeps that image.
func (s *Snapshotter) mountParents(ctx context.Context, target string, chain []string) (_ *mounted, err error) {
	txn, err := s.store.Begin(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, txn.Rollback()) }()
	t, _, err := s.merged(ctx, txn, chain)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(s.root, tempPrefix)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	w := bufio.NewWriter(f)
	if err := errors.Join(erofs.Write(w, directories(t), erofs.Options{}), w.Flush()); err != nil {
		return nil, err
	}
	image, err := os.Open(f.Name())
	if err != nil {
		return nil, err
	}
	defer image.Close()
	if err := makeMountPoint(target); err != nil {
		return nil, err
	}
	state, err := mount.Mount(target, mount.Options{Image: image, Objects: []string{s.store.ObjectsDir()}, Name: "directories"})
	if err != nil {
		return nil, err
	}
	return &mounted{target: target, loop: state.Loop}, nil
}

// directories returns a tree with the directories of t alone.
func directories(t *tree.Tree) *tree.Tree {
	var only func(n *tree.Node) *tree.Node
	only = func(n *tree.Node) *tree.Node {
		d := &tree.Node{Stat: n.Stat, Dir: map[string]*tree.Node{}}
		for name, child := range n.Dir {
			if child.IsDir() {
				d.Dir[name] = only(child)
			}
		}
		return d
	}
	return &tree.Tree{Root: only(t.Root)}
}

// makeMountPoint makes a directory on which nothing is mounted.
func makeMountPoint(target string) error {
	if err := detachAll(target); err != nil {
		return err
	}
	if err := os.Mkdir(target, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// release gives up the mount that a snapshot needs, if any.
func (s *Snapshotter) release(user string) {
	m, ok := s.mounts.of(user)
	if !ok {
		return
	}
	defer s.lock(m.target)()
	if !s.mounts.drop(m.target, user) {
		return
	}
	s.unmount(m.target)
}

// unmount clears a mount point. What still uses the files (a container's overlay that
// is not unmounted yet, say) keeps them.
func (s *Snapshotter) unmount(target string) {
	if err := clearMountPoint(target); err != nil {
		s.log.Warn("unmounting", "target", target, "error", err)
	}
}

// detachAll unmounts all images at a mount point, which need not exist.
func detachAll(target string) error {
	for {
		err := mount.Detach(target)
		if errors.Is(err, mount.ErrNotMounted) || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// mountImage mounts an image, or takes over the mount that an earlier process left
// for those who use it.
func (s *Snapshotter) mountImage(target string, image fsverity.Digest, m *idMap) (*mounted, error) {
	f, _, err := s.store.OpenImage(image.String())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	made := &mounted{target: target, image: image}
	old, err := mountedAt(target)
	if err != nil {
		return nil, err
	}
	if old != nil && old.Name == image.String() {
		if made.verification, err = verify(f, image, old.Verity); err == nil {
			made.loop = s.onLoop()
			return made, nil
		}
		s.log.Warn("mounting anew", "target", target, "error", err)
	}
	if err := makeMountPoint(target); err != nil {
		return nil, err
	}
	opts := mount.Options{
		Image:          f,
		Objects:        []string{s.store.ObjectsDir()},
		Digest:         image,
		Verity:         mount.VerityTry,
		ObjectsChecked: true,
		Name:           image.String(),
		// Containers stack a second overlay on it.
		Loop: s.onLoop(),
	}
	if m != nil {
		ns, err := cmount.GetUsernsFD(m.uid, m.gid)
		if err != nil {
			return nil, fmt.Errorf("making a user namespace of uids %q and gids %q: %w", m.uid, m.gid, err)
		}
		defer ns.Close()
		opts.UserNS = ns
	}
	state, err := mount.Mount(target, opts)
	if err != nil {
		return nil, err
	}
	for _, w := range state.Warnings {
		s.log.Warn(w, "target", target)
	}
	made.verification, made.loop = state.Verification, state.Loop
	s.counters.mounts.Add(1)
	s.log.Debug("mounted", "target", target, "image", image.String(), "verification", string(state.Verification), "loop", state.Loop)
	return made, nil
}

// onLoop reports whether images must be mounted from loop devices.
func (s *Snapshotter) onLoop() bool { return !s.features.File.OK || !s.features.FileStacks.OK }

// mountedAt returns the composefs image that is mounted at target, nil for none.
func mountedAt(target string) (*mount.Mounted, error) {
	all, err := mount.List()
	if err != nil {
		return nil, err
	}
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].Target == target {
			return &all[i], nil
		}
	}
	return nil, nil
}

// verify says who checks the files of a mount that an earlier process made, and
// compares the image again where the kernel does not.
func verify(image *os.File, want fsverity.Digest, verity bool) (mount.Verification, error) {
	got, err := fsverity.Measure(image)
	measured := err == nil
	if !measured {
		if got, _, err = fsverity.Read(want.Algorithm(), io.NewSectionReader(image, 0, math.MaxInt64)); err != nil {
			return mount.None, err
		}
	}
	switch {
	case got != want:
		return mount.None, fmt.Errorf("%w: got %s, want %s", mount.ErrWrongDigest, got, want)
	case measured && verity:
		return mount.Enforced, nil
	}
	return mount.Checked, nil
}

// restore mounts what active snapshots and views need, and unmounts what none needs. A
// snapshot that this cannot be done for does not keep the others from working.
func (s *Snapshotter) restore(ctx context.Context) error {
	var keys []string
	err := s.read(ctx, func(ctx context.Context) error {
		return walkAll(ctx, func(_ context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted {
				keys = append(keys, info.Name)
			}
			return nil
		})
	})
	if err != nil {
		return err
	}
	for _, key := range keys {
		if err := s.restoreOne(ctx, key); err != nil {
			s.log.Error("mounting the layers of a snapshot", "key", key, "error", err)
		}
	}
	return s.unmountUnused()
}

func (s *Snapshotter) restoreOne(ctx context.Context, key string) error {
	a, err := s.active(ctx, key)
	if err != nil {
		return err
	}
	if a.kind == snapshots.KindActive {
		if err := makeUpper(s.dir(a.id)); err != nil {
			return err
		}
	}
	return s.need(ctx, a)
}

// unmountUnused unmounts what an earlier process mounted and nobody needs any more.
func (s *Snapshotter) unmountUnused() error {
	dirs, err := os.ReadDir(filepath.Join(s.root, "mounts"))
	if err != nil {
		return err
	}
	for _, e := range dirs {
		target := filepath.Join(s.root, "mounts", e.Name())
		func() {
			defer s.lock(target)()
			s.mounts.mu.Lock()
			_, used := s.mounts.byTarget[target]
			s.mounts.mu.Unlock()
			if !used {
				s.unmount(target)
			}
		}()
	}
	return nil
}
