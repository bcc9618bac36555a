package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"

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
	viewOnce  sync.Once
	view      *mountView // nil until mountView made it
	viewErr   error
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
	if t.view != nil {
		t.view.file.Close()
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

// Added returns the number and bytes of the objects that the transaction has and the
// store had not. It may be called after Commit too.
func (t *Txn) Added() (objects int, bytes int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, o := range t.known {
		if o.staged != 0 {
			objects++
			bytes += o.size
		}
	}
	return objects, bytes
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
