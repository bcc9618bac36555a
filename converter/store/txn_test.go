package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// TestPutSizes stores objects around every limit in both ways and reads them back.
func TestPutSizes(t *testing.T) {
	ctx := context.Background()
	s := newStore(t, 0)
	sizes := []int{0, 1, 4095, 4096, 4097, 8192, wholeMax - 1, wholeMax, wholeMax + 1, 2*wholeMax + 4096, overlapMin, overlapMin + wholeMax + 7, writebackStep*2 + 1}
	fills := map[string]func(n int) []byte{
		"random": func(n int) []byte { return randomBytes(int64(n), n) },
		"zeros":  func(n int) []byte { return make([]byte, n) },
		"holes": func(n int) []byte {
			b := make([]byte, n)
			for i := 10000; i < n; i += 50000 {
				b[i] = 1
			}
			return b
		},
		"hole at the end": func(n int) []byte {
			b := make([]byte, n)
			copy(b, "x")
			return b
		},
		"data at the end": func(n int) []byte {
			b := make([]byte, n)
			if n > 0 {
				b[n-1] = 'x'
			}
			return b
		},
	}
	txn := begin(t, s)
	want := map[fsverity.Digest][]byte{}
	file := filepath.Join(t.TempDir(), "file")
	for _, size := range sizes {
		for name, fill := range fills {
			data := fill(size)
			d := fsverity.Sum(fsverity.SHA256, data)
			want[d] = data
			more := io.MultiReader(bytes.NewReader(data), strings.NewReader("more"))
			got, err := txn.Put(ctx, more, int64(size))
			if err != nil || got != d {
				t.Errorf("Put %d %s: %v, %v; want %v", size, name, got, err, d)
			}
			if rest, _ := io.ReadAll(more); string(rest) != "more" {
				t.Errorf("Put %d %s reads beyond the size: %q is left", size, name, rest)
			}
			if got, err := txn.PutBytes(ctx, data); err != nil || got != d {
				t.Errorf("PutBytes %d %s: %v, %v", size, name, got, err)
			}
			sub := begin(t, s) // so that it is written once more
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, link := range []bool{false, true} {
				sub.SetImmutableSources(link)
				if got, err := sub.PutFile(ctx, f, int64(size)); err != nil || got != d {
					t.Errorf("PutFile %d %s: %v, %v", size, name, got, err)
				}
			}
			if _, err := sub.PutFile(ctx, f, int64(size)+1); !errors.Is(err, ErrSize) {
				t.Errorf("PutFile with a wrong size: got %v, want ErrSize", err)
			}
			of, err := sub.OpenObject(d)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(of); err != nil || !bytes.Equal(got, data) {
				t.Errorf("staged object of %d %s: other content (%v)", size, name, err)
			}
			of.Close()
			f.Close()
			sub.Rollback()
		}
	}
	if st := txn.Stats(); st.NewObjects != len(want) {
		t.Errorf("the transaction has %d objects, want %d", st.NewObjects, len(want))
	}
	commit(t, txn)
	for d, data := range want {
		if !bytes.Equal(readObject(t, s, d), data) {
			t.Errorf("object of %d bytes has other content", len(data))
		}
	}
}

func blocks(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestHoles(t *testing.T) {
	s := newStore(t, 0)
	txn := begin(t, s)
	const size = 64 << 20
	d, err := txn.Put(context.Background(), io.LimitReader(zeros{}, size), size)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, txn)
	if got := blocks(t, s.path(objectsDir, d.Path())); got > 64<<10 {
		t.Errorf("an object of zeros takes %d bytes", got)
	}
	if got, _, err := fsverity.Read(fsverity.SHA256, io.LimitReader(zeros{}, size)); err != nil || got != d {
		t.Errorf("digest %s, want %s", d, got)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestPutFileLinks(t *testing.T) {
	ctx := context.Background()
	s := newStore(t, 0)
	name := filepath.Join(filepath.Dir(s.Dir()), "source")
	if err := os.WriteFile(name, randomBytes(1, 100000), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	txn := begin(t, s)
	txn.SetImmutableSources(true)
	d, err := txn.PutFile(ctx, f, 100000)
	if err != nil {
		t.Fatal(err)
	}
	commit(t, txn)
	a, _ := os.Stat(name)
	b, err := os.Stat(s.path(objectsDir, d.Path()))
	if err != nil || !os.SameFile(a, b) {
		t.Errorf("the object is not the source itself (%v)", err)
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	txn = begin(t, s)
	if _, err := txn.PutFile(ctx, dir, 4096); err == nil {
		t.Error("a directory was stored")
	}
}

// TestWriters has eight writers of overlapping objects, each with several
// goroutines, while the garbage is collected.
func TestWriters(t *testing.T) {
	s := newStore(t, 0)
	const writers, common, own = 8, 60, 10
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	var gc, wg sync.WaitGroup
	gc.Go(func() {
		for ctx.Err() == nil {
			if _, err := s.GC(ctx, GCOptions{}); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	body := func(seed int) []byte { return randomBytes(int64(seed), 100+seed*1000) }
	for w := range writers {
		wg.Go(func() {
			for round := range 3 {
				txn, err := s.Begin(context.Background())
				if err != nil {
					t.Error(err)
					return
				}
				var inner sync.WaitGroup
				digests := make([]fsverity.Digest, common+own)
				for part := range 3 {
					inner.Go(func() {
						for i := part; i < len(digests); i += 2 { // some twice
							seed := i
							if i >= common {
								seed += 1000 + w*own
							}
							seed %= 1200
							d, err := txn.Put(context.Background(), bytes.NewReader(body(seed)), int64(len(body(seed))))
							if err != nil {
								t.Error(err)
							}
							if part < 2 {
								digests[i] = d
							}
						}
					})
				}
				inner.Wait()
				stream := txn.NewStream(LayerStream)
				for i, d := range digests {
					seed := i
					if i >= common {
						seed += 1000 + w*own
					}
					if err := stream.Object(d, int64(len(body(seed%1200)))); err != nil {
						t.Error(err)
					}
				}
				id := fmt.Sprintf("w%d", w)
				if _, err := stream.Close(id); err != nil {
					t.Error(err)
				}
				if err := txn.SetRef(Streams, fmt.Sprintf("dir/%d/%d", w%2, w), id); err != nil {
					t.Error(err)
				}
				if err := txn.Commit(); err != nil {
					t.Error(err)
				}
				if round == 1 && w%2 == 1 { // names and their directories come and go
					if err := s.RemoveRef(Streams, fmt.Sprintf("dir/%d/%d", w%2, w)); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	stop()
	gc.Wait()

	wantClean(t, s, nil)
	st, err := s.GC(context.Background(), GCOptions{})
	if err != nil {
		t.Fatal(err)
	}
	u, err := s.DF(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	// Each object once, and a stream a writer.
	if want := common + writers*own + writers; st.ObjectsKept != want || u.Total.Objects != want || u.Unreferenced.Objects != 0 {
		t.Errorf("%d objects, of them unreferenced %d; want %d and 0", u.Total.Objects, u.Unreferenced.Objects, want)
	}
}

func wantClean(t *testing.T, s *Store, list ImageObjects) {
	t.Helper()
	r, err := s.Fsck(context.Background(), FsckOptions{Scrub: true, ImageObjects: list})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Problems {
		t.Errorf("fsck: %v", p)
	}
}

// The names of the variables that turn the test binary into a writer which kills
// itself.
const (
	envStore = "PARTICLE_TEST_STORE"
	envKill  = "PARTICLE_TEST_KILL" // at which test point, counted from 0
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(envStore); dir != "" {
		kill, err := strconv.Atoi(os.Getenv(envKill))
		if err != nil {
			panic(err)
		}
		n := 0
		testPoint = func(string) {
			if n++; n > kill {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		}
		if err := victim(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// dying is a source that may not live to its end.
type dying struct{ r io.Reader }

func (d dying) Read(p []byte) (int, error) { testPoint("read"); return d.r.Read(p) }

// victim makes a store and fills it in two transactions, then collects garbage.
func victim(dir string) error {
	ctx := context.Background()
	s, err := Init(dir, Options{})
	if err != nil {
		return err
	}
	for round := range 2 {
		testPoint("begin")
		txn, err := s.Begin(ctx)
		if err != nil {
			return err
		}
		stream := txn.NewStream(LayerStream)
		for i := range 200 {
			data := randomBytes(int64(i+round*100), 50+i*17)
			if i%20 == 0 {
				testPoint("put")
			}
			d, err := txn.PutBytes(ctx, data)
			if err != nil {
				return err
			}
			if err := stream.Object(d, int64(len(data))); err != nil {
				return err
			}
		}
		big := randomBytes(int64(-1-round), 1<<20)
		d, err := txn.Put(ctx, dying{bytes.NewReader(big)}, 1<<20)
		if err != nil {
			return err
		}
		if err := errors.Join(stream.Inline(randomBytes(9, 2<<20)), stream.Object(d, 1<<20)); err != nil {
			return err
		}
		testPoint("stream")
		id := fmt.Sprintf("layer-%d", round)
		if _, err := stream.Close(id); err != nil {
			return err
		}
		if err := txn.SetRef(Streams, "a/b/latest", id); err != nil {
			return err
		}
		if err := txn.SetRef(Streams, fmt.Sprintf("r/%d/x", round), id); err != nil {
			return err
		}
		if err := txn.Commit(); err != nil {
			return err
		}
	}
	if err := s.RemoveRef(Streams, "r/0/x"); err != nil {
		return err
	}
	testPoint("gc")
	_, err = s.GC(ctx, GCOptions{})
	return err
}

// TestKill kills a process at each step of its life. The store is clean after each,
// and the next try completes.
func TestKill(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(dir string, at int) (killed bool) {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), envStore+"="+dir, fmt.Sprintf("%s=%d", envKill, at))
		out, err := cmd.CombinedOutput()
		if err == nil {
			return false
		}
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
			t.Fatalf("killing at step %d: %v\n%s", at, err, out)
		}
		return true
	}
	// Where the files lie makes no difference to a killed process, but to its speed.
	tmp := memDir(t)
	whole := filepath.Join(tmp, "whole")
	if run(whole, 1<<30) {
		t.Fatal("killed although it should live")
	}
	ws, err := Open(whole)
	if err != nil {
		t.Fatal(err)
	}
	want := listing(t, ws)

	step := 1
	if testing.Short() {
		step = 11
	}
	steps := 0
	for at := 0; ; at += step {
		dir := filepath.Join(tmp, "store")
		if !run(dir, at) {
			break
		}
		steps++
		if s, err := Open(dir); err == nil {
			left, _ := os.ReadDir(s.path(stagingDir))
			r, err := s.Fsck(context.Background(), FsckOptions{Scrub: true})
			if err != nil {
				t.Fatal(err)
			}
			if !r.Clean() {
				t.Errorf("killed at step %d: %v", at, r.Problems)
			}
			if r.Swept != len(left) {
				t.Errorf("killed at step %d: swept %d staging directories of %d", at, r.Swept, len(left))
			}
		} else if !errors.Is(err, ErrNotStore) {
			t.Errorf("killed at step %d: %v", at, err)
		}
		if run(dir, 1<<30) {
			t.Fatal("killed although it should live")
		}
		s, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		wantListing(t, s, want)
		os.RemoveAll(dir)
	}
	if steps*step < 60 {
		t.Errorf("only %d steps", steps*step)
	}
}

// TestKillAtRandom kills at moments that nobody chose, also while Init works.
func TestKillAtRandom(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewSource(time.Now().UnixNano()))
	dir := filepath.Join(t.TempDir(), "store")
	for range 20 {
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), envStore+"="+dir, envKill+"=1000000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rnd.Intn(120)) * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		if s, err := Open(dir); err == nil {
			wantClean(t, s, nil)
		} else if !errors.Is(err, ErrNotStore) {
			t.Error(err)
		}
		if rnd.Intn(4) == 0 {
			os.RemoveAll(dir)
		}
	}
}

// mountTmpfs mounts a small filesystem, of any type that takes size= itself.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Skipf("mounting a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

// mountExt4 mounts a small ext4 from a file.
func mountExt4(t *testing.T, size int64) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		t.Skip("no mkfs.ext4 here (Debian package e2fsprogs)")
	}
	image := filepath.Join(t.TempDir(), "ext4")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", "-m0", image).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-o", "loop", image, dir).CombinedOutput(); err != nil {
		t.Skipf("mounting ext4: %v: %s", err, out)
	}
	t.Cleanup(func() { exec.Command("umount", dir).Run() })
	return dir
}

func TestFullDisk(t *testing.T) {
	for name, mount := range map[string]func(*testing.T) string{
		"tmpfs":           func(t *testing.T) string { return mountTmpfs(t, "size=8m") },
		"tmpfs of inodes": func(t *testing.T) string { return mountTmpfs(t, "size=64m,nr_inodes=400") },
		"ext4":            func(t *testing.T) string { return mountExt4(t, 16<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			ctx := context.Background()
			s, err := Init(filepath.Join(mount(t), "store"), Options{})
			if err != nil {
				t.Fatal(err)
			}
			txn := begin(t, s)
			first := put(t, txn, []byte("kept"))
			stream := txn.NewStream(BlobStream)
			stream.Object(first, 4)
			if _, err := stream.Close("kept"); err != nil {
				t.Fatal(err)
			}
			if err := txn.SetRef(Streams, "kept", "kept"); err != nil {
				t.Fatal(err)
			}
			commit(t, txn)
			before := listing(t, s)

			fill := func(size int) error {
				txn, err := s.Begin(ctx)
				if err != nil {
					return err
				}
				defer txn.Rollback()
				for i := range 40000 {
					if _, err := txn.Put(ctx, bytes.NewReader(randomBytes(int64(i), size)), int64(size)); err != nil {
						if _, err := txn.PutBytes(ctx, []byte("more")); !errors.Is(err, ErrNoSpace) {
							t.Errorf("after a full disk: got %v, want ErrNoSpace", err)
						}
						if err := txn.Commit(); !errors.Is(err, ErrNoSpace) {
							t.Errorf("committing after a full disk: got %v, want ErrNoSpace", err)
						}
						return err
					}
				}
				return txn.Commit()
			}
			for _, size := range []int{1000, 300000, 5 << 20} {
				err := fill(size)
				if name == "tmpfs of inodes" && size > 1000 {
					continue // there the bytes end first, or not at all
				}
				if !errors.Is(err, ErrNoSpace) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "particle store gc") {
					t.Errorf("objects of %d bytes: got %v, want ErrNoSpace and advice", size, err)
				}
				wantListing(t, s, before)
				wantClean(t, s, nil)
			}

			// Fill to the brim, for Commit to fail.
			for n := 200; n > 0; n-- {
				txn, err := s.Begin(ctx)
				if err != nil {
					t.Fatal(err)
				}
				for i := range n {
					if _, err = txn.PutBytes(ctx, randomBytes(int64(i), 2000)); err != nil {
						break
					}
				}
				if err != nil {
					txn.Rollback()
					continue
				}
				ballast, _ := os.Create(filepath.Join(filepath.Dir(s.Dir()), "ballast"))
				for err = nil; err == nil; {
					_, err = ballast.Write(make([]byte, 4096))
				}
				ballast.Close()
				err = txn.Commit()
				os.Remove(ballast.Name())
				if !errors.Is(err, ErrNoSpace) {
					t.Errorf("committing to a full disk: got %v, want ErrNoSpace", err)
				}
				break
			}
			wantListing(t, s, before)
			wantClean(t, s, nil)

			txn = begin(t, s)
			put(t, txn, []byte("there is room again"))
			commit(t, txn)
		})
	}
}

func TestRefConflict(t *testing.T) {
	s := memStore(t, 0)
	set := func(names ...string) error {
		txn := begin(t, s)
		w := txn.NewStream(BlobStream)
		if _, err := w.Close("x"); err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if err := txn.SetRef(Streams, n, "x"); err != nil {
				txn.Rollback()
				return err
			}
		}
		return txn.Commit()
	}
	if err := set("a", "b/c"); err != nil {
		t.Fatal(err)
	}
	before := listing(t, s)
	for _, names := range [][]string{{"a/b"}, {"a/b/c"}, {"b"}, {"new", "new/x"}, {""}, {"."}, {"x/.."}, {"/x"}, {"x/"}, {"x//y"}, {"x\x00"}, {strings.Repeat("x", 256)}} {
		if err := set(names...); !errors.Is(err, ErrBadName) {
			t.Errorf("%q: got %v, want ErrBadName", names, err)
		}
		wantListing(t, s, before)
	}
	txn := begin(t, s)
	if err := txn.SetRef(Streams, "y", "missing"); !errors.Is(err, ErrNotFound) {
		t.Errorf("naming nothing: got %v, want ErrNotFound", err)
	}
	if err := txn.SetRef("other", "y", "x"); !errors.Is(err, ErrBadName) {
		t.Errorf("another kind: got %v, want ErrBadName", err)
	}
	if err := txn.SetRef(Images, "y", "x"); !errors.Is(err, ErrBadName) {
		t.Errorf("an image that is no digest: got %v, want ErrBadName", err)
	}
}

// TestHeal puts an object that the store has with another size.
func TestHeal(t *testing.T) {
	s := memStore(t, 0)
	txn := begin(t, s)
	d := put(t, txn, []byte("whole"))
	commit(t, txn)
	name := s.path(objectsDir, d.Path())
	os.Remove(name)
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	txn = begin(t, s)
	put(t, txn, []byte("whole"))
	commit(t, txn)
	if got := readObject(t, s, d); string(got) != "whole" {
		t.Errorf("got %q", got)
	}
}

func TestCancel(t *testing.T) {
	s := memStore(t, 0)
	ctx, cancel := context.WithCancel(context.Background())
	txn := begin(t, s)
	cancel()
	if _, err := txn.PutBytes(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("PutBytes: got %v", err)
	}
	if _, err := txn.Put(ctx, zeros{}, 1<<30); !errors.Is(err, context.Canceled) {
		t.Errorf("Put: got %v", err)
	}
	if _, err := txn.PutImage(ctx, func(w io.Writer) error { _, err := io.CopyN(w, zeros{}, 1<<20); return err }); !errors.Is(err, context.Canceled) {
		t.Errorf("PutImage: got %v", err)
	}
	put(t, txn, []byte("goes on"))
	commit(t, txn)
}

func TestReaderErrors(t *testing.T) {
	s := memStore(t, 0)
	txn := begin(t, s)
	bad := errors.New("bad digest")
	for _, size := range []int64{100, 1 << 20, 5 << 20} {
		r := io.MultiReader(io.LimitReader(zeros{}, size/2), iotestErr{bad})
		if _, err := txn.Put(context.Background(), r, size); !errors.Is(err, bad) {
			t.Errorf("got %v, want the reader's error", err)
		}
	}
	if _, err := txn.PutImage(context.Background(), func(io.Writer) error { return bad }); err != bad {
		t.Errorf("PutImage: got %v, want the very error", err)
	}
	if _, err := txn.Put(context.Background(), zeros{}, -1); !errors.Is(err, ErrSize) {
		t.Errorf("size -1: got %v, want ErrSize", err)
	}
	if left, _ := os.ReadDir(txn.stage.path); len(left) != 0 {
		t.Errorf("files are left: %v", left)
	}
}

type iotestErr struct{ err error }

func (e iotestErr) Read([]byte) (int, error) { return 0, e.err }
