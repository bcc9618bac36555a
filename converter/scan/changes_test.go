package scan

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// hook calls a function before it reads a file.
type hook struct {
	Objects
	before func(f *os.File)
}

func (h hook) PutFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	h.before(f)
	return h.Objects.PutFile(ctx, f, size)
}

func TestChanges(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"grows":   func(path string) error { return os.Truncate(path, 200) },
		"shrinks": func(path string) error { return os.Truncate(path, 80) },
		"touched": func(path string) error { return os.Chtimes(path, time.Unix(1, 0), time.Unix(1, 0)) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDir(t)
			d.write("file", strings.Repeat("x", 100))
			o := hook{Hash(fsverity.SHA256), func(*os.File) { d.check(change(d.path("file"))) }}
			_, err := Dir(context.Background(), d.root, o, Options{})
			if !errors.Is(err, ErrChanged) || !strings.Contains(err.Error(), d.path("file")) {
				t.Errorf("got %v, want ErrChanged with the path", err)
			}
		})
	}
}

// TestMovedDirectory moves a directory away while what is below it is read; on the
// way back ".." leads elsewhere.
func TestMovedDirectory(t *testing.T) {
	d := newDir(t)
	d.mkdir("elsewhere")
	deep := strings.Repeat("/d", window+8)
	d.check(os.MkdirAll(d.root+deep, 0o755))
	d.write(deep[1:]+"/file", strings.Repeat("x", 100))
	s := &scanner{ctx: context.Background(), opts: Options{}, links: map[inode]*tree.Node{}}
	fd, err := unix.Open(d.root, dirFlags, 0)
	d.check(err)
	at := &dir{name: d.root, fd: fd}
	var st unix.Statx_t
	d.check(statx(fd, "", unix.AT_EMPTY_PATH, &st))
	at.id = inodeOf(&st)
	for range window + 8 {
		d.check(statx(at.fd, "d", unix.AT_SYMLINK_NOFOLLOW, &st))
		at, err = at.enter("d", &st)
		d.check(err)
	}
	d.check(os.Rename(d.path("d/d"), d.path("elsewhere/d")))
	if _, err := s.readNames(at.fd); err != nil {
		t.Errorf("reading below the moved directory: %v", err)
	}
	var got error
	for ; at.parent != nil; at = at.parent {
		if err := at.leave(); err != nil && got == nil {
			got = err
		}
	}
	at.close()
	if !errors.Is(got, ErrChanged) {
		t.Errorf("got %v, want ErrChanged", got)
	}
}

type failing struct{ Objects }

var errDisk = errors.New("disk full")

func (failing) PutFile(context.Context, *os.File, int64) (fsverity.Digest, error) {
	return fsverity.Digest{}, errDisk
}

func TestFailures(t *testing.T) {
	d := newDir(t)
	for i := range 500 {
		d.write(fmt.Sprint(i), strings.Repeat("x", 100))
	}
	before := openFiles(t)
	if _, err := Dir(context.Background(), d.root, failing{Hash(fsverity.SHA256)}, Options{Threads: 3}); !errors.Is(err, errDisk) {
		t.Errorf("got %v, want %v", err, errDisk)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var once sync.Once
	o := hook{Hash(fsverity.SHA256), func(*os.File) { once.Do(cancel) }}
	if _, err := Dir(ctx, d.root, o, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if after := openFiles(t); after != before {
		t.Errorf("got %d open files, want %d as before", after, before)
	}
}

// TestThreads compares what one thread and many make of a tree.
func TestThreads(t *testing.T) {
	d := newDir(t)
	rnd := rand.New(rand.NewSource(3))
	for i := range 40 {
		dir := fmt.Sprint("dir", i)
		d.mkdir(dir)
		for j := range 25 {
			d.write(filepath.Join(dir, fmt.Sprint(j)), strings.Repeat("x", rnd.Intn(9000)))
		}
	}
	one, many := d.scan(Options{Threads: 1}), d.scan(Options{Threads: 8})
	if diff := tree.Diff(one, many); len(diff) != 0 {
		t.Errorf("got %v", diff)
	}
}

func BenchmarkDir(b *testing.B) {
	root := b.TempDir()
	for i := range 100 {
		dir := fmt.Sprintf("%s/%d", root, i)
		if err := os.Mkdir(dir, 0o755); err != nil {
			b.Fatal(err)
		}
		for j := range 100 {
			if err := os.WriteFile(fmt.Sprintf("%s/%d", dir, j), bytes.Repeat([]byte{byte(j)}, 100*j), 0o644); err != nil {
				b.Fatal(err)
			}
		}
	}
	for b.Loop() {
		if _, err := Dir(context.Background(), root, Hash(fsverity.SHA256), Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
