package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// A Txn is a write transaction. All methods may be called side by side, but Commit
// and Rollback wait for the calls that run.
//
// What it writes lies in a staging directory of its own inside the store until
// Commit. An object is looked for in the store and in the transaction itself and
// written only where neither has it. After a failure of the disk every later call
// fails with the same error; after bad input (a reader's error, a wrong size) the
// transaction may go on.
type Txn struct {
	s       *Store
	root    *os.File // holds the shared lock; opened before the first write, for syncfs
	objects int      // directory handle
	stage   *staging

	linkFiles atomic.Bool
	noReflink atomic.Bool
	seq       atomic.Uint64 // of files in the staging directory

	mu      sync.Mutex // of what follows
	idle    sync.Cond  // running has become 0
	running int        // calls of other methods
	done    bool
	known   map[fsverity.Digest]object
	links   map[string]fsverity.Digest // "streams/<id>", "images/<hex>"
	refs    map[string]string          // "streams/refs/<name>" to the entry's name
	failed  error
}

// An object of a transaction: in the store already, or staged under a number.
type object struct {
	size   int64
	staged uint64 // 0: in the store
	// replace is set where the store has something else, of another size, under
	// that name: a file that some crash cut short, healed by the good one.
	replace bool
}

// Begin starts a transaction. It waits, as long as ctx allows, for a garbage
// collection to end, and sweeps what killed processes left.
func (s *Store) Begin(ctx context.Context) (*Txn, error) {
	t, err := s.begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("starting a transaction: %w", diskFull(s.dir, err))
	}
	return t, nil
}

func (s *Store) begin(ctx context.Context) (*Txn, error) {
	if s.readOnly != "" {
		return nil, fmt.Errorf("%w: %q: %s", ErrReadOnly, s.dir, s.readOnly)
	}
	root, err := s.lock(ctx, unix.LOCK_SH)
	if err != nil {
		return nil, err
	}
	t := &Txn{
		s:       s,
		root:    root,
		objects: -1,
		known:   map[fsverity.Digest]object{},
		links:   map[string]fsverity.Digest{},
		refs:    map[string]string{},
	}
	t.idle.L = &t.mu
	if err := t.prepare(); err != nil {
		t.release()
		return nil, err
	}
	return t, nil
}

func (t *Txn) prepare() (err error) {
	if err := t.s.makeDirs(); err != nil {
		return err
	}
	if _, err := t.s.sweep(); err != nil {
		return err
	}
	if t.objects, err = unix.Open(t.s.ObjectsDir(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("opening %q: %w", t.s.ObjectsDir(), err)
	}
	t.stage, err = t.s.newStaging()
	return err
}

// release removes the staging directory and gives the lock back.
func (t *Txn) release() error {
	var err error
	if t.stage != nil {
		err = t.stage.close()
	}
	if t.objects >= 0 {
		err = errors.Join(err, unix.Close(t.objects))
	}
	return errors.Join(err, t.root.Close())
}

// Algorithm returns the store's.
func (t *Txn) Algorithm() fsverity.Algorithm { return t.s.alg }

// Store returns the store that the transaction writes to.
func (t *Txn) Store() *Store { return t.s }

// enter is called at the start of every method that writes, and its result at the
// end.
func (t *Txn) enter() (leave func(), err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return nil, ErrDone
	}
	if t.failed != nil {
		return nil, t.failed
	}
	t.running++
	return t.leave, nil
}

func (t *Txn) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.running--; t.running == 0 {
		t.idle.Broadcast()
	}
}

// end keeps new calls out and waits for those that run. It reports false when the
// transaction was ended before.
func (t *Txn) end() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return false
	}
	t.done = true
	for t.running > 0 {
		t.idle.Wait()
	}
	return true
}

// fail records that the disk failed. Objects that were taken for written may not
// be, so nothing of the transaction may become visible.
func (t *Txn) fail(err error) error {
	err = diskFull(t.s.dir, err)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.failed == nil {
		t.failed = err
	}
	return err
}

// stagedName returns the path of a file in the staging directory.
func (t *Txn) stagedName(n uint64) string {
	return t.stage.path + "/" + strconv.FormatUint(n, 36)
}

// A TxnStats tells what a transaction adds to the store.
type TxnStats struct {
	NewObjects int   `json:"new_objects"`
	NewBytes   int64 `json:"new_bytes"` // of their content
	// Objects counts the new ones and those that the store had already.
	Objects int `json:"objects"`
}

// Stats returns what the transaction has stored so far; after Commit, what it added.
func (t *Txn) Stats() TxnStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := TxnStats{Objects: len(t.known)}
	for _, o := range t.known {
		if o.staged != 0 {
			st.NewObjects++
			st.NewBytes += o.size
		}
	}
	return st
}

// OpenObject opens an object of the transaction or of the store.
func (t *Txn) OpenObject(d fsverity.Digest) (*os.File, error) {
	leave, err := t.enter()
	if err != nil {
		return nil, err
	}
	defer leave()
	t.mu.Lock()
	o, ok := t.known[d]
	t.mu.Unlock()
	if !ok || o.staged == 0 {
		return t.s.OpenObject(d)
	}
	f, err := os.Open(t.stagedName(o.staged))
	if err != nil {
		return nil, fmt.Errorf("opening staged object %s: %w", d, err)
	}
	return f, nil
}

// objectSize returns the size of an object of the transaction or of the store.
func (t *Txn) objectSize(d fsverity.Digest) (int64, error) {
	t.mu.Lock()
	o, ok := t.known[d]
	t.mu.Unlock()
	if ok {
		return o.size, nil
	}
	return t.s.objectSize(d)
}

// Stream returns the digest of a stream of the transaction or of the store. The
// error is ErrNotFound where there is none.
func (t *Txn) Stream(id string) (fsverity.Digest, error) {
	t.mu.Lock()
	d, ok := t.links[string(Streams)+"/"+id]
	t.mu.Unlock()
	if ok {
		return d, nil
	}
	return t.s.StreamDigest(id)
}

// SetRef gives a stream or an image, by its content id or digest in hexadecimal, a
// name that keeps it from being collected. It becomes visible with Commit, after
// all else. A ref of that name is replaced.
func (t *Txn) SetRef(kind Kind, name, target string) error {
	leave, err := t.enter()
	if err != nil {
		return err
	}
	defer leave()
	if err := checkRefName(name); err != nil {
		return err
	}
	if err := checkEntryName(kind, target); err != nil {
		return err
	}
	t.mu.Lock()
	_, pending := t.links[string(kind)+"/"+target]
	t.mu.Unlock()
	if !pending {
		if _, err := t.s.entry(kind, target); err != nil {
			return fmt.Errorf("naming it %q: %w", name, err)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.refs[filepath.Join(string(kind), refsDir, name)] = target
	return nil
}

// Rollback ends the transaction and leaves nothing of it. After Commit it does
// nothing, so that it can be deferred.
func (t *Txn) Rollback() error {
	if !t.end() {
		return nil
	}
	if err := t.release(); err != nil {
		return fmt.Errorf("rolling back: %w", err)
	}
	return nil
}

// Commit makes all that the transaction wrote durable and then visible, and ends
// it, also when it fails.
//
// Durability costs a few syncfs(2) calls, however many objects there are: that is
// as good as an fsync of each one (the kernel reports write errors of the whole
// filesystem since the transaction began) and spares a journal commit an object. It
// also writes what others have not written back yet to the same filesystem.
//
// When Commit fails before the objects became visible, nothing is left. When it
// fails later, whole and unnamed objects may be, which the next GC removes: another
// transaction may have come to rely on them. So that a full disk does not get that
// far, the links are made and the room for directories is checked before.
func (t *Txn) Commit() error {
	if !t.end() {
		return ErrDone
	}
	err := t.failed
	if err == nil {
		err = t.commit()
	}
	err = errors.Join(err, t.release())
	if err != nil {
		return fmt.Errorf("committing to store %q: %w", t.s.dir, diskFull(t.s.dir, err))
	}
	return nil
}

// A stagedObject is one that Commit moves into the store.
type stagedObject struct {
	digest fsverity.Digest
	object
}

// A stagedLink is a symbolic link that Commit moves to its path below the store.
type stagedLink struct {
	path string
	temp string
}

func (t *Txn) commit() error {
	var staged []stagedObject
	for d, o := range t.known {
		if o.staged != 0 {
			staged = append(staged, stagedObject{d, o})
		}
	}
	// By number, which is roughly the order on the disk.
	slices.SortFunc(staged, func(a, b stagedObject) int { return cmp.Compare(a.staged, b.staged) })

	links, err := t.stageLinks()
	if err != nil {
		return err
	}
	refs, err := t.stageRefs()
	if err != nil {
		return err
	}
	if len(staged) > 0 {
		if err := t.sync(); err != nil {
			return err
		}
		if err := t.enable(staged); err != nil {
			return err
		}
		if err := t.room(staged); err != nil {
			return err
		}
		testPoint("objects")
		if err := t.publish(staged); err != nil {
			return err
		}
	}
	if len(staged) > 0 && len(links)+len(refs) > 0 || len(links) > 0 {
		// Also a link that another process made is only as durable as its object.
		if err := t.sync(); err != nil {
			return err
		}
	}
	testPoint("links")
	if err := t.publishLinks(links); err != nil {
		return err
	}
	testPoint("refs")
	if err := t.publishLinks(refs); err != nil {
		return err
	}
	testPoint("end")
	if len(links)+len(refs) == 0 && len(staged) > 0 {
		return t.sync()
	}
	return nil
}

// sync writes all of the store's filesystem back.
func (t *Txn) sync() error {
	if err := unix.Syncfs(int(t.root.Fd())); err != nil {
		return fmt.Errorf("syncing the filesystem: %w", err)
	}
	return nil
}

// each calls do for every staged object, several at once, and returns the first
// error.
func each(staged []stagedObject, do func(stagedObject) error) error {
	var (
		wg    sync.WaitGroup
		next  atomic.Int64
		once  sync.Once
		first error
		stop  atomic.Bool
	)
	// Waiting for the disk, not computing, takes the time here.
	for range min(len(staged), 4*runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for !stop.Load() {
				i := int(next.Add(1)) - 1
				if i >= len(staged) {
					return
				}
				if err := do(staged[i]); err != nil {
					once.Do(func() { first = err })
					stop.Store(true)
				}
			}
		})
	}
	wg.Wait()
	return first
}

// enable turns fs-verity on for all staged objects, where the filesystem has it,
// and compares the kernel's digests with ours.
func (t *Txn) enable(staged []stagedObject) error {
	one := func(o stagedObject) error {
		f, err := os.Open(t.stagedName(o.staged))
		if err != nil {
			return err
		}
		defer f.Close()
		if err := enableVerity(f, t.s.alg); err != nil {
			return err
		}
		return measured(f, o.digest)
	}
	// The first one tells whether there is fs-verity here.
	if err := one(staged[0]); err != nil {
		if !errors.Is(err, fsverity.ErrUnsupported) {
			return err
		}
		if t.s.verity {
			return fmt.Errorf("%w: the store's %s promises it: %w", ErrVerity, metaName, err)
		}
		return nil
	}
	if err := each(staged[1:], one); err != nil {
		return err
	}
	return t.sync()
}

// enableVerity is fsverity.Enable, and waits for writers to be gone: a process
// that is just being started has the handles of this one until it executes.
func enableVerity(f *os.File, alg fsverity.Algorithm) error {
	for pause := time.Millisecond; ; pause *= 2 {
		err := fsverity.Enable(f, alg)
		if !errors.Is(err, unix.ETXTBSY) || pause > time.Second {
			return err
		}
		time.Sleep(pause)
	}
}

// room checks that the directories have room to grow by the new names.
func (t *Txn) room(staged []stagedObject) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(t.objects, &st); err != nil {
		return fmt.Errorf("asking for free space: %w", err)
	}
	if st.Blocks == 0 || st.Bsize <= 0 {
		return nil // no such limits here
	}
	// A directory a first byte, and a name of at most 126 bytes with some overhead,
	// twice for half-full blocks.
	dirs := min(len(staged), 256)
	need := uint64(dirs) + uint64(len(staged))*2*160/uint64(st.Bsize) + 16
	if st.Bavail < need {
		return fmt.Errorf("%w: %d blocks are free, the names of %d objects need %d", unix.ENOSPC, st.Bavail, len(staged), need)
	}
	if st.Files > 0 && st.Ffree < uint64(dirs)+16 {
		return fmt.Errorf("%w: %d inodes are free", unix.ENOSPC, st.Ffree)
	}
	return nil
}

// publish moves the staged objects into the store. One that has appeared there
// meanwhile stays.
func (t *Txn) publish(staged []stagedObject) error {
	var made [256]bool
	stage := int(t.stage.dir.Fd())
	for i, o := range staged {
		name := o.digest.Path()
		if b := o.digest.AppendTo(nil)[0]; !made[b] {
			if err := unix.Mkdirat(t.objects, name[:2], dirMode); err != nil && err != unix.EEXIST {
				return fmt.Errorf("making the directory of object %s: %w", o.digest, err)
			}
			made[b] = true
		}
		temp := strconv.FormatUint(o.staged, 36)
		flags := uint(unix.RENAME_NOREPLACE)
		if o.replace {
			flags = 0
		}
		err := unix.Renameat2(stage, temp, t.objects, name, flags)
		if err == unix.EINVAL && flags != 0 {
			// A filesystem without RENAME_NOREPLACE: a link does not replace either.
			err = unix.Linkat(stage, temp, t.objects, name, 0)
		}
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("moving object %s into the store: %w", o.digest, err)
		}
		if i%64 == 0 {
			testPoint("rename")
		}
	}
	return nil
}

// stageLinks makes the links of streams and images in the staging directory. Links
// that are there already are left out.
func (t *Txn) stageLinks() ([]stagedLink, error) {
	var links []stagedLink
	for path, d := range t.links {
		target := "../" + objectsDir + "/" + d.Path()
		l, err := t.stageLink(path, target)
		if err != nil {
			return nil, err
		}
		if l.temp != "" {
			links = append(links, l)
		}
	}
	slices.SortFunc(links, func(a, b stagedLink) int { return cmp.Compare(a.path, b.path) })
	return links, nil
}

func (t *Txn) stageRefs() ([]stagedLink, error) {
	var refs []stagedLink
	for path, entry := range t.refs {
		if err := t.refPlace(path); err != nil {
			return nil, err
		}
		// From <kind>/refs/a/b up to <kind>: as many steps as there are slashes
		// after the kind.
		target := strings.Repeat("../", strings.Count(path, "/")-1) + entry
		l, err := t.stageLink(path, target)
		if err != nil {
			return nil, err
		}
		if l.temp != "" {
			refs = append(refs, l)
		}
	}
	slices.SortFunc(refs, func(a, b stagedLink) int { return cmp.Compare(a.path, b.path) })
	return refs, nil
}

// refPlace refuses a ref whose name is a directory of other refs, or that would need
// another ref to be one, before anything is visible.
func (t *Txn) refPlace(path string) error {
	if st, err := os.Lstat(t.s.path(path)); err == nil && st.IsDir() {
		return refConflict(path, unix.EISDIR)
	}
	for dir := filepath.Dir(path); filepath.Base(dir) != refsDir || strings.Count(dir, "/") > 1; dir = filepath.Dir(dir) {
		st, err := os.Lstat(t.s.path(dir))
		if _, ok := t.refs[dir]; ok || err == nil && !st.IsDir() {
			return refConflict(path, unix.ENOTDIR)
		}
	}
	return nil
}

func (t *Txn) stageLink(path, target string) (stagedLink, error) {
	if old, err := os.Readlink(t.s.path(path)); err == nil && old == target {
		return stagedLink{}, nil
	}
	temp := t.stagedName(t.seq.Add(1))
	if err := os.Symlink(target, temp); err != nil {
		return stagedLink{}, fmt.Errorf("making link %q: %w", path, err)
	}
	return stagedLink{path, temp}, nil
}

// publishLinks moves links to their places and makes them durable.
func (t *Txn) publishLinks(links []stagedLink) error {
	dirs := map[string]bool{}
	for _, l := range links {
		dir := filepath.Dir(l.path)
		// Whoever removes a ref also removes the directories that it leaves empty,
		// perhaps just now.
		for try := 0; ; try++ {
			if err := mkdirAll(t.s.dir, dir); err != nil {
				return refConflict(l.path, err)
			}
			err := os.Rename(l.temp, t.s.path(l.path))
			if err == nil {
				break
			}
			if !errors.Is(err, unix.ENOENT) || try == 100 {
				return refConflict(l.path, err)
			}
		}
		dirs[dir] = true
		testPoint("link")
	}
	for dir := range dirs {
		if err := syncDir(t.s.path(dir)); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// refConflict explains why a ref cannot be where another one is.
func refConflict(path string, err error) error {
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("%w: %q: a part of it is the name of another ref, or it is the beginning of one: %w", ErrBadName, path, err)
	}
	return fmt.Errorf("making link %q: %w", path, err)
}
