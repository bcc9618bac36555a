package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// FsckOptions are those of a check. The zero value checks names, links, streams and
// that no object is missing, without reading what the objects contain.
type FsckOptions struct {
	// Scrub reads every object again and compares its digest.
	Scrub bool
	// ImageObjects, when given, is used to check that no image lacks an object.
	ImageObjects ImageObjects
	// Progress, when given, is told how many bytes of objects have been read, of
	// how many, when scrubbing. Calls come one at a time.
	Progress func(done, total int64)
}

// A Problem is something that is wrong with a store.
type Problem struct {
	Path    string `json:"path"` // below the store
	Problem string `json:"problem"`
	Advice  string `json:"advice"` // what to do about it
}

func (p Problem) String() string { return fmt.Sprintf("%s: %s: %s", p.Path, p.Problem, p.Advice) }

// An FsckReport is what a check found.
type FsckReport struct {
	Objects  int   `json:"objects"`
	Bytes    int64 `json:"bytes"` // of all objects
	Streams  int   `json:"streams"`
	Images   int   `json:"images"`
	Refs     int   `json:"refs"`
	Scrubbed bool  `json:"scrubbed"`
	// Swept counts transactions of dead processes that were cleared away.
	Swept int `json:"swept"`
	// Problems is sorted by path.
	Problems []Problem `json:"problems"`
}

// Clean reports whether no problem was found.
func (r *FsckReport) Clean() bool { return len(r.Problems) == 0 }

const (
	adviseRemake = "remove it, and convert or pull the images that use it again"
	adviseGC     = "run \"particle store gc\", which removes it"
	adviseRemove = "nothing of the store should be there: remove it"
)

// Fsck looks for damage. What it finds is in the report; an error means that it
// could not look. Transactions may go on meanwhile, garbage collection waits.
func (s *Store) Fsck(ctx context.Context, o FsckOptions) (*FsckReport, error) {
	c := &checker{s: s, o: o, missing: map[fsverity.Digest]bool{}}
	c.report.Problems = []Problem{}
	c.report.Scrubbed = o.Scrub
	if err := c.run(ctx); err != nil {
		return nil, fmt.Errorf("checking store %q: %w", s.dir, err)
	}
	slices.SortFunc(c.report.Problems, func(a, b Problem) int { return strings.Compare(a.Path+"\x00"+a.Problem, b.Path+"\x00"+b.Problem) })
	return &c.report, nil
}

type checker struct {
	s       *Store
	o       FsckOptions
	mu      sync.Mutex // of report and missing
	report  FsckReport
	missing map[fsverity.Digest]bool // told of already
	done    int64                    // bytes scrubbed
}

func (c *checker) add(path, advice, format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Problems = append(c.report.Problems, Problem{path, fmt.Sprintf(format, args...), advice})
}

func (c *checker) run(ctx context.Context) error {
	lock, err := c.s.lock(ctx, unix.LOCK_SH)
	if err != nil {
		return err
	}
	defer lock.Close()
	// Who may not write here can look all the same.
	if c.report.Swept, err = c.s.sweep(); err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.EROFS) {
		return err
	}
	c.meta()
	objects, err := c.objects(ctx)
	if err != nil {
		return err
	}
	if err := c.contents(ctx, objects); err != nil {
		return err
	}
	for _, kind := range []Kind{Images, Streams} {
		if err := c.entries(ctx, kind); err != nil {
			return err
		}
		if err := c.refs(kind); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) meta() {
	now := &Store{dir: c.s.dir}
	if err := now.readMeta(); err != nil {
		c.add(metaName, "restore it from a store of the same algorithm", "%v", err)
	} else if now.alg != c.s.alg || now.verity != c.s.verity {
		c.add(metaName, "open the store again", "it was changed while the store was open")
	}
}

// objects checks the names below objects/ and returns the objects.
func (c *checker) objects(ctx context.Context) ([]foundObject, error) {
	var all []foundObject
	err := c.s.walkObjects(ctx, func(o foundObject) error {
		switch {
		case o.temp: // perhaps in use
		case o.problem != "":
			c.add(o.path, adviseRemove, "%s", o.problem)
		default:
			c.report.Objects++
			c.report.Bytes += o.stat.Size
			all = append(all, o)
		}
		return nil
	}, func(string) error { return nil })
	return all, err
}

// contents checks what is in the objects: all of it when scrubbing, and what the
// kernel knows of it where it knows.
func (c *checker) contents(ctx context.Context, objects []foundObject) error {
	if !c.o.Scrub && !c.s.verity {
		return nil
	}
	jobs := make(chan foundObject)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			h := fsverity.NewHasher(c.s.alg)
			for o := range jobs {
				if err := c.content(ctx, o, h); err != nil {
					cancel(err)
				}
			}
		})
	}
	for _, o := range objects {
		if ctx.Err() != nil {
			break
		}
		jobs <- o
	}
	close(jobs)
	wg.Wait()
	return context.Cause(ctx)
}

func (c *checker) content(ctx context.Context, o foundObject, h *fsverity.Hasher) error {
	f, err := os.Open(c.s.path(o.path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed by hand meanwhile; whoever needs it says so
	}
	if err != nil {
		c.add(o.path, adviseRemake, "opening it: %v", err)
		return nil
	}
	defer f.Close()
	if c.s.verity {
		if err := measured(f, o.digest); err != nil {
			c.add(o.path, adviseRemake, "%v", err)
			return nil
		}
	}
	if !c.o.Scrub {
		return nil
	}
	h.Reset()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	r := &sparseReader{f: f, size: o.stat.Size}
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := r.Read(*buf)
		h.Write((*buf)[:n])
		c.progress(int64(n))
		if err == io.EOF {
			break
		}
		if err != nil {
			c.add(o.path, adviseRemake, "reading it: %v", err)
			return nil
		}
	}
	if got := h.Sum(); got != o.digest {
		c.add(o.path, adviseRemake, "its %d bytes have digest %s", o.stat.Size, got)
	}
	return nil
}

func (c *checker) progress(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += n
	if c.o.Progress != nil {
		c.o.Progress(c.done, c.report.Bytes)
	}
}

// need says that by needs an object, if the store does not have it.
func (c *checker) need(d fsverity.Digest, by string) {
	_, err := c.s.objectSize(d)
	if err == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.missing[d] {
		return
	}
	c.missing[d] = true
	c.report.Problems = append(c.report.Problems, Problem{
		Path:    objectsDir + "/" + d.Path(),
		Problem: fmt.Sprintf("needed by %s: %v", by, err),
		Advice:  "convert or pull the images that use it again",
	})
}

// entries checks the streams or the images.
func (c *checker) entries(ctx context.Context, kind Kind) error {
	dir, err := os.ReadDir(c.s.path(string(kind)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range dir {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		path := string(kind) + "/" + e.Name()
		if e.Name() == refsDir && e.IsDir() {
			continue
		}
		if e.Type()&fs.ModeSymlink == 0 {
			c.add(path, adviseRemove, "not a link")
			continue
		}
		if kind == Images {
			c.report.Images++
		} else {
			c.report.Streams++
		}
		d, err := c.s.entry(kind, e.Name())
		if errors.Is(err, ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			c.add(path, adviseRemake, "%v", err)
			continue
		}
		if kind == Images && d.String() != e.Name() {
			c.add(path, adviseRemake, "it leads to object %s", d)
			continue
		}
		f, err := c.s.OpenObject(d)
		if err != nil {
			c.add(path, adviseRemake, "%v", err)
			continue
		}
		if kind == Images {
			err = c.image(path, f)
		} else {
			err = c.stream(path, d, f)
		}
		f.Close()
		if err != nil {
			c.add(path, adviseRemake, "%v", err)
		}
	}
	return nil
}

func (c *checker) image(path string, f *os.File) error {
	switch kind, err := sniff(f); {
	case err != nil:
		return err
	case kind != Images:
		return fmt.Errorf("%w: no EROFS image", ErrCorrupt)
	case c.o.ImageObjects == nil:
		return nil
	}
	digests, err := c.s.imageObjects(f, c.o.ImageObjects)
	for _, d := range digests {
		c.need(d, path)
	}
	return err
}

func (c *checker) stream(path string, d fsverity.Digest, f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	r, err := newStreamReader(f, st.Size(), c.s, c.s.alg)
	if err != nil {
		return err
	}
	defer r.Close()
	for name, d := range r.NamedRefs() {
		c.need(d, fmt.Sprintf("%s as %q", path, name))
	}
	for d, err := range r.ObjectRefs() {
		if err != nil {
			return err
		}
		c.need(d, path)
	}
	for {
		if _, _, _, err := r.Next(); err == io.EOF || errors.Is(err, ErrNotFound) {
			return nil // missing objects were told of
		} else if err != nil {
			return err
		}
	}
}

// refs checks that each name leads to a stream or an image.
func (c *checker) refs(kind Kind) error {
	root := c.s.path(string(kind), refsDir)
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || err == nil && e.IsDir() {
			return nil
		}
		if err != nil {
			return err
		}
		name, err := filepath.Rel(c.s.dir, path)
		if err != nil {
			return err
		}
		target, err := os.Readlink(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			c.add(name, adviseRemove, "not a link")
			return nil
		}
		c.report.Refs++
		id := filepath.Base(target)
		if want := strings.Repeat("../", strings.Count(name, "/")-1) + id; target != want {
			c.add(name, "remove it and tag the image again", "it leads to %q, want %q", target, want)
			return nil
		}
		if _, err := c.s.entry(kind, id); errors.Is(err, ErrNotFound) || errors.Is(err, ErrBadName) {
			c.add(name, adviseGC+", or convert the image again", "it leads nowhere: %v", err)
		}
		return nil // any other fault is the entry's own
	})
}
