package store

import (
	"cmp"
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
