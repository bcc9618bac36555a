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
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
