package etcmerge

import (
	"bytes"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
)

var testTime = time.Unix(12345, 678)

// TestChangedSincePlan changes /etc between the plan and its execution: what is written
// has the change, and the plan says so.
func TestChangedSincePlan(t *testing.T) {
	f := newFixture(t)
	o, n := spec{"/a": "1", "/b": "1", "/c": "1", "/passwd": root}, spec{"/a": "1", "/b": "2", "/c": "1", "/passwd": root + sshd}
	current := f.disk(o.tree(t, f.objects))
	m, err := Plan(t.Context(), Input{o.tree(t, f.objects), n.tree(t, f.objects), current, f.objects})
	check(t, err)
	if len(m.Local) != 0 || len(m.Conflicts) != 0 {
		t.Fatalf("got %+v", m)
	}
	check(t, os.WriteFile(filepath.Join(current, "b"), []byte("3"), 0o600))
	check(t, os.WriteFile(filepath.Join(current, "passwd"), []byte(root+alice), 0o600))
	check(t, os.Remove(filepath.Join(current, "a")))
	check(t, os.Mkdir(filepath.Join(current, "new"), 0o755))
	dst := f.path()
	check(t, m.Write(t.Context(), dst))
	want := spec{"/b": "3", "/b.dpkg-dist": "2", "/c": "1", "/passwd": root + sshd + alice, "/new": "dir"}
	if got := f.text(t, f.read(dst)); !maps.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if len(m.Local) != 4 || len(m.Conflicts) != 1 || m.Late != nil {
		t.Errorf("got local %v, conflicts %v, late %q", m.Local, m.Conflicts, m.Late)
	}
}

// opener calls a function before it opens an object.
type opener struct {
	objects
	before func()
}

func (o opener) OpenObject(d fsverity.Digest) (*os.File, error) {
	o.before()
	return o.objects.OpenObject(d)
}

// TestLate changes /etc in each attempt to write: the last one stands, and says what is
// older in it.
func TestLate(t *testing.T) {
	f := newFixture(t)
	n := spec{"/0image": long("1")}.tree(t, f.objects)
	for _, tt := range []struct {
		what   string
		change func(dir string, i int) error
		want   []string
	}{
		{"a file that the merge has", func(dir string, i int) error {
			return os.WriteFile(filepath.Join(dir, "mine"), []byte(long(strconv.Itoa(i))), 0o644)
		}, []string{"/etc/mine"}},
		{"new files", func(dir string, i int) error {
			return os.WriteFile(filepath.Join(dir, "new"+strconv.Itoa(i)), nil, 0o644)
		}, []string{"/etc/new5"}},
		{"a file that comes and goes", func(dir string, i int) error {
			return errors.Join(os.Remove(filepath.Join(dir, "mine")), os.WriteFile(filepath.Join(dir, "mine"), []byte("x"), 0o644),
				os.Chtimes(filepath.Join(dir, "mine"), testTime, testTime.Add(time.Duration(i)*time.Second)))
		}, []string{"/etc/mine"}},
		{"a file that becomes a link", func(dir string, i int) error {
			name := filepath.Join(dir, "mine")
			if i < attempts {
				return os.WriteFile(name, []byte(long(strconv.Itoa(i))), 0o644)
			}
			return errors.Join(os.Remove(name), os.Symlink("/etc/shadow", name))
		}, []string{"/etc/mine"}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			current := f.disk(spec{"/mine": long("1"), "/still": long("2")}.tree(t, f.objects))
			i := 0
			o := opener{f.objects, func() {
				i++
				check(t, tt.change(current, i))
			}}
			m, err := Plan(t.Context(), Input{nil, n, current, o})
			check(t, err)
			dst := f.path()
			check(t, m.Write(t.Context(), dst))
			if i != attempts {
				t.Errorf("got %d attempts, want %d", i, attempts)
			}
			if !slices.Equal(m.Late, tt.want) {
				t.Errorf("Late: got %q, want %q", m.Late, tt.want)
			}
			got := f.text(t, f.read(dst))
			if got["/still"] != long("2") || got["/0image"] != long("1") || strings.HasPrefix(got["/mine"], "-> ") {
				t.Errorf("got %q", got)
			}
		})
	}
}

// TestNoLinkFollowed has files and directories that become links to a secret place and
// back, while merges run: nothing of that place is ever in one.
func TestNoLinkFollowed(t *testing.T) {
	f := newFixture(t)
	outside := f.path()
	check(t, os.MkdirAll(filepath.Join(outside, "sub"), 0o700))
	secret := long("secret")
	for _, name := range []string{"file", "sub/file", "passwd"} {
		check(t, os.WriteFile(filepath.Join(outside, name), []byte(secret), 0o600))
	}
	o := spec{"/passwd": long(strings.TrimSpace(root)), "/still": long("1")}
	n := spec{"/passwd": o["/passwd"] + sshd, "/still": long("2")}
	old, image := o.tree(t, f.objects), n.tree(t, f.objects)
	o["/passwd"] += alice
	o["/still"] = long("3")
	o["/file"], o["/dir/sub/file"], o["/out"], o["/outfile"] = long("mine"), long("mine"), "-> "+outside, "-> "+outside+"/file"
	current := f.disk(o.tree(t, f.objects))

	var stop atomic.Bool
	var flips atomic.Int64
	var wg sync.WaitGroup
	flip := func(name, target string) {
		// rename(2) puts one in the place of the other at once.
		name = filepath.Join(current, name)
		link := filepath.Join(f.base, "link-"+filepath.Base(name))
		away := link + ".away"
		wg.Go(func() {
			for !stop.Load() {
				os.Symlink(target, link)
				if os.Rename(name, away) == nil {
					os.Rename(link, name)
					time.Sleep(time.Duration(flips.Load()%5) * 100 * time.Microsecond)
					os.Remove(name)
					os.Rename(away, name)
				}
				flips.Add(1)
				time.Sleep(time.Duration(flips.Load()%7) * 100 * time.Microsecond)
			}
		})
	}
	flip("file", filepath.Join(outside, "file"))
	flip("passwd", filepath.Join(outside, "passwd"))
	flip("dir", outside)
	defer wg.Wait()
	defer stop.Store(true)

	written := 0
	for range 12 {
		dst := f.path()
		m, err := Plan(t.Context(), Input{old, image, current, f.objects})
		if err == nil {
			err = m.Write(t.Context(), dst)
		}
		if err != nil {
			if !errors.Is(err, ErrChanged) {
				t.Fatal(err)
			}
			if _, err := os.Lstat(dst); !errors.Is(err, fs.ErrNotExist) {
				t.Fatalf("after an error: %v", err)
			}
			continue
		}
		written++
		check(t, filepath.WalkDir(dst, func(p string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(p)
			if bytes.Contains(data, []byte("secret")) {
				t.Fatalf("%q has what a link led to", p)
			}
			return err
		}))
		data, err := os.ReadFile(filepath.Join(dst, "still"))
		check(t, err)
		sameBytes(t, "still", data, []byte(long("3")))
		data, err = os.ReadFile(filepath.Join(dst, "still"+Suffix))
		check(t, err)
		sameBytes(t, "the image's", data, []byte(long("2")))
		check(t, os.RemoveAll(dst))
	}
	if written < 3 || flips.Load() < 50 {
		t.Errorf("%d merges, %d flips: the test shows little", written, flips.Load())
	}
}
