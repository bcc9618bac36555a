package initramfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
)

const (
	// enablers work side by side: each waits for the disk more than it computes, since
	// the kernel writes a file's hashes before it calls it done.
	enablers = 32
	// maxDamaged is how many damaged objects a report names.
	maxDamaged = 100
)

// enableVerity enables fs-verity on the whole store if the physical root has the mark
// that asks for it. The mark goes once all is done and durable; until then every boot
// goes on where the last one was interrupted.
//
// A damaged object does not stop the boot: it may belong to another image, and of this
// one the kernel refuses to open it. But then the store does not promise fs-verity, and
// the mark stays.
func (s *setup) enableVerity(ctx context.Context, st *store.Store, img Image) error {
	mark := filepath.Join(s.o.Root, verityMark)
	if _, err := os.Lstat(mark); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%w: %w", ErrRoot, err)
	}
	e, err := EnableVerity(ctx, st, s.o.Progress)
	switch {
	case err != nil && img.Insecure && ctx.Err() == nil:
		// Some objects may have it and others not: verity=require would hide the latter.
		s.noVerity = true
		s.warn("the store was filled without fs-verity, and it could not be enabled: %v", err)
		return nil
	case errors.Is(err, fsverity.ErrUnsupported):
		return fmt.Errorf("%w: %w\n%s", ErrVerity, err,
			"the kernel or the file system of the physical root has no fs-verity: ext4 needs tune2fs -O verity DEVICE;\n"+
				"put a ? before the digest, as in composefs.digest=?v1-sha256-12:…, to boot without")
	case err != nil:
		return fmt.Errorf("enabling fs-verity: %w", err)
	}
	s.report.Enabled = e
	if !e.Complete {
		s.warn("%d objects of the store are damaged; run \"particle store fsck --scrub\"", len(e.Damaged))
		return nil
	}
	if err := os.Remove(mark); err != nil {
		return fmt.Errorf("enabling fs-verity: %w", err)
	}
	if err := syncDir(filepath.Dir(mark)); err != nil {
		return fmt.Errorf("enabling fs-verity: %w", err)
	}
	return nil
}

// EnableVerity enables fs-verity on every object of a store, several at once, compares
// the kernel's digests with the objects' names, and then has the store promise it, by
// fs-verity on meta.json; all of it durable. What has it already is only compared. The
// error is [fsverity.ErrUnsupported] where the kernel or the file system has none;
// objects that are damaged are no error. progress may be nil.
func EnableVerity(ctx context.Context, st *store.Store, progress func(done, total int)) (*Enabled, error) {
	start := time.Now()
	names, err := objectNames(st)
	if err != nil {
		return nil, err
	}
	e := &Enabled{}
	if progress == nil {
		progress = func(int, int) {}
	}
	var (
		mu   sync.Mutex
		wg   sync.WaitGroup
		next int // names[next:] are left
		done int
		bad  error
	)
	// take returns the next name, ok is false at the end or after an error.
	take := func() (name string, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if bad == nil && ctx.Err() != nil {
			bad = context.Cause(ctx)
		}
		if bad != nil || next == len(names) {
			return "", false
		}
		next++
		return names[next-1], true
	}
	for range min(len(names), enablers) {
		wg.Go(func() {
			for name, ok := take(); ok; name, ok = take() {
				good, had, err := enableObject(st, name)
				mu.Lock()
				switch {
				case err != nil:
					if bad == nil {
						bad = err
					}
				case good:
					e.Objects++
					if had {
						e.Already++
					}
				case len(e.Damaged) < maxDamaged:
					e.Damaged = append(e.Damaged, name)
				}
				done++
				progress(done, len(names))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if bad != nil {
		return nil, bad
	}
	slices.Sort(e.Damaged)
	if err := syncFS(st.Dir()); err != nil {
		return nil, err
	}
	if len(e.Damaged) == 0 {
		if err := enableFile(filepath.Join(st.Dir(), "meta.json"), st.Algorithm()); err != nil {
			return nil, err
		}
		if err := syncFS(st.Dir()); err != nil {
			return nil, err
		}
		e.Complete = true
	}
	e.Seconds = time.Since(start).Seconds()
	return e, nil
}

// objectNames lists the objects of a store as paths below its objects directory.
func objectNames(st *store.Store) ([]string, error) {
	var names []string
	dirs, err := os.ReadDir(st.ObjectsDir())
	if err != nil {
		return nil, err
	}
	for _, d := range dirs {
		files, err := os.ReadDir(filepath.Join(st.ObjectsDir(), d.Name()))
		if errors.Is(err, unix.ENOTDIR) {
			continue
		} else if err != nil {
			return nil, err
		}
		for _, f := range files {
			name := d.Name() + "/" + f.Name()
			// What has another name is no object: others' unfinished files.
			if got, err := fsverity.ParsePath(name); err == nil && got.Algorithm() == st.Algorithm() {
				names = append(names, name)
			}
		}
	}
	return names, nil
}

// enableObject enables fs-verity on one object and reports whether it has the digest
// of its name now, and whether it had fs-verity before.
func enableObject(st *store.Store, name string) (good, had bool, err error) {
	want, err := fsverity.ParsePath(name)
	if err != nil {
		return false, false, err
	}
	f, err := os.OpenFile(filepath.Join(st.ObjectsDir(), name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return false, false, nil // a link or a pipe is no object
	} else if err != nil {
		return false, false, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return false, false, err
	}
	got, err := fsverity.Measure(f)
	if err == nil {
		return got == want, true, nil
	}
	if !errors.Is(err, fsverity.ErrNotEnabled) {
		return false, false, err
	}
	if err := fsverity.Enable(f, st.Algorithm()); err != nil {
		return false, false, err
	}
	got, err = fsverity.Measure(f)
	return got == want, false, err
}

// enableFile enables fs-verity on a file.
func enableFile(name string, alg fsverity.Algorithm) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return fsverity.Enable(f, alg)
}

// syncFS makes durable all that was written to the file system of a directory.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("syncing the file system of %q: %w", dir, err)
	}
	return nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
