package podman

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/registry"
	"github.com/particle-os/particle/tests/program"
)

// traffic counts what goes through a registry.
type traffic struct{ in, out atomic.Int64 }

func (c *traffic) options() registry.ServeOptions {
	return registry.ServeOptions{OnRequest: func(r registry.Request) {
		c.in.Add(r.In)
		c.out.Add(r.Out)
	}}
}

// A worker is a clean machine of a CI: a storage and a store that nobody used before.
type worker struct {
	*engine
	store string
}

func newWorker(t testing.TB, rel release) *worker {
	e := newEngine(t, rel, "")
	return &worker{e, filepath.Join(e.dir, "store")}
}

// particle makes a command of ours that uses the worker's podman. A podman in a
// chroot gets its directory at the same path there.
func (w *worker) particle(args ...string) *exec.Cmd {
	cmd := exec.Command(particle, append([]string{"--store", w.store}, args...)...)
	cmd.Dir = "/"
	cmd.Env = w.command().Env
	if w.rel.chroot != "" {
		script := filepath.Join(w.dir, "podman")
		write(w.t, script, "#!/bin/sh\nexec chroot "+w.rel.chroot+" podman \"$@\"\n")
		if err := os.Chmod(script, 0o755); err != nil {
			w.t.Fatal(err)
		}
		cmd.Env = append(cmd.Env, "PARTICLE_PODMAN="+script)
	}
	return cmd
}

// A built image is what particle build --json tells.
type built struct {
	Config  string
	Builder string
	Layers  []struct{ DiffID string }
	Pushed  []struct{ Manifest string }
}

// build builds a directory and returns the result and what the build printed.
func (w *worker) build(args ...string) (b built, log string) {
	w.t.Helper()
	cmd := w.particle(append([]string{"build", "--json"}, args...)...)
	out, errs, err := program.Run(cmd)
	if err != nil {
		w.t.Fatalf("%s: %v\n%s", cmd, err, tail(errs))
	}
	if err := json.Unmarshal([]byte(out), &b); err != nil {
		w.t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return b, errs
}

// TestCI: what one worker of a CI has built no other builds again. The steps draw
// numbers at random: one that ran again would give another layer.
func TestCI(t *testing.T) {
	withEach(t, func(t *testing.T, rel release) {
		var c traffic
		s := serveOn(t, c.options())
		put(t, imageOf(t, baseLayer(t)), s+"/base:1")
		dir := sharedDir(t)
		containerfile := func(last string) {
			write(t, filepath.Join(dir, "Containerfile"), "FROM "+s+"/base:1\n"+
				"RUN cat /proc/sys/kernel/random/uuid > /first\n"+
				"COPY data /data\n"+
				"RUN cat /proc/sys/kernel/random/uuid > /last; echo "+last+" >> /last\n")
		}
		write(t, filepath.Join(dir, "data"), noise("data", 300_000))
		build := func(what, last string) built {
			containerfile(last)
			in, out, began := c.in.Load(), c.out.Load(), time.Now()
			w := newWorker(t, rel)
			b, log := w.build("--insecure", "--cache-from", s+"/cache", "--cache-to", s+"/cache", "-t", s+"/app:"+last, "--push", dir)
			t.Logf("%s: to the registry %d bytes, from it %d, in %s", what, c.in.Load()-in, c.out.Load()-out, time.Since(began).Round(10*time.Millisecond))
			if len(b.Layers) != 4 || len(b.Pushed) != 1 {
				t.Fatalf("%s: got %+v, want four layers and one push\n%s", what, b, tail(log))
			}
			return b
		}
		first := build("the first worker", "one")
		in := c.in.Load()
		again := build("a second one", "one")
		if again.Config != first.Config || again.Pushed[0] != first.Pushed[0] {
			t.Errorf("the second worker made %s, the first one %s: a step ran again", again.Config, first.Config)
		}
		if sent := c.in.Load() - in; sent > 10_000 {
			t.Errorf("the second worker sent %d bytes to the registry, which had all", sent)
		}
		changed := build("a third one, the last step changed", "two")
		for i, l := range changed.Layers {
			if same := l == first.Layers[i]; same != (i < 3) {
				t.Errorf("layer %d of 4: the same as before: %v", i+1, same)
			}
		}
	})
}

// serveOn starts a registry that ends with the test.
func serveOn(t testing.TB, o registry.ServeOptions) string {
	t.Helper()
	s, err := registry.Serve(t.Context(), "", "", &o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s.Addr()
}

// TestBuild: both ways to podman build the same from the same options, keep secrets
// out of layers, honour the ignore file, and what lands in the store is what podman
// has.
func TestBuild(t *testing.T) {
	withEach(t, func(t *testing.T, rel release) {
		addr := serveOn(t, registry.ServeOptions{})
		put(t, imageOf(t, baseLayer(t)), addr+"/base:1")
		dir := sharedDir(t)
		write(t, filepath.Join(dir, "Containerfile"), "FROM "+addr+"/base:1 AS one\n"+
			"ARG WHAT=nothing\n"+
			"RUN --mount=type=secret,id=file --mount=type=secret,id=env echo $WHAT; cat /run/secrets/file /run/secrets/env > /seen; [ \"$(cat /seen)\" = from-file-from-env ] && rm /seen && echo $WHAT > /what\n"+
			"COPY . /context\n"+
			"FROM one AS two\nRUN false\n")
		write(t, filepath.Join(dir, ".containerignore"), "*.log\n")
		write(t, filepath.Join(dir, "kept"), "kept")
		write(t, filepath.Join(dir, "left-out.log"), "left out")
		outside := sharedDir(t)
		write(t, filepath.Join(outside, "s"), "from-file-")

		for _, way := range []string{"program", "service"} {
			t.Run(way, func(t *testing.T) {
				w := newWorker(t, rel)
				w.t = t
				env := []string{"PARTICLE_TEST_SECRET=from-env"}
				if way == "service" {
					env = append(env, "CONTAINER_HOST=unix://"+w.serveAPI())
				}
				build := func(tag string) (built, string) {
					cmd := w.particle("build", "--json", "--insecure", "--build-arg", "WHAT=a,b=c", "--target", "one", "-t", tag,
						"--secret", "id=file,src="+filepath.Join(outside, "s"), "--secret", "id=env,env=PARTICLE_TEST_SECRET", dir)
					cmd.Env = append(cmd.Env, env...)
					out, errs, err := program.Run(cmd)
					if err != nil {
						t.Fatalf("%v\n%s", err, tail(errs))
					}
					var b built
					if err := json.Unmarshal([]byte(out), &b); err != nil {
						t.Fatal(err)
					}
					return b, errs
				}
				b, log := build("localhost/x:1")
				if isService := strings.HasPrefix(b.Builder, "unix://"); isService != (way == "service") {
					t.Errorf("built by %q", b.Builder)
				}
				if !strings.Contains(log, "STEP ") || strings.Contains(log, "to a file first") {
					t.Errorf("the build said\n%s", tail(log))
				}
				mnt := filepath.Join(w.dir, "mnt")
				if err := os.Mkdir(mnt, 0o755); err != nil {
					t.Fatal(err)
				}
				run(t, w.particle("mount", "localhost/x:1", mnt))
				got := treeOf(t, mnt)
				raw, err := os.ReadFile(filepath.Join(mnt, "what"))
				run(t, w.particle("umount", mnt))
				if err != nil || string(raw) != "a,b=c\n" {
					t.Errorf("build argument: got %q, %v", raw, err)
				}
				var names []string
				for name := range got.Lookup("/context").Children() {
					names = append(names, name)
				}
				if want := ".containerignore Containerfile kept"; strings.Join(names, " ") != want {
					t.Errorf("the context had %q, want %q", names, want)
				}
				// The very image that podman has.
				if id := w.podman("image", "inspect", "--format", "{{.Id}}", "localhost/x:1"); "sha256:"+id != b.Config {
					t.Errorf("podman has image %s, the store %s", id, b.Config)
				}
				// Cached: nothing but names is new.
				if again, _ := build("localhost/x:2"); again.Config != b.Config {
					t.Errorf("built again: got %s, want %s from the cache", again.Config, b.Config)
				}
				// A step that fails is the build's failure.
				cmd := w.particle("build", "--insecure", "--target", "two", dir,
					"--secret", "id=file,src="+filepath.Join(outside, "s"), "--secret", "id=env,env=PARTICLE_TEST_SECRET")
				cmd.Env = append(cmd.Env, env...)
				if _, errs, err := program.Run(cmd); err == nil || !strings.Contains(errs, "particle: error: building") {
					t.Errorf("a step that fails: got %v\n%s", err, tail(errs))
				}
			})
		}
	})
}

// serveAPI starts podman's service and returns its socket.
func (e *engine) serveAPI() string {
	e.t.Helper()
	path := filepath.Join(e.dir, "api")
	cmd := e.command("system", "service", "--time=0", "unix://"+path)
	cmd.Stderr = &logBuffer{t: e.t}
	s := program.StartCmd(e.t, cmd)
	e.t.Cleanup(func() {
		if err := s.Stop(syscall.SIGTERM); err != nil { // an interrupt is a failure to it
			e.t.Errorf("podman's service: %v", err)
		}
	})
	for range 200 {
		if _, err := os.Stat(path); err == nil {
			return path
		}
		time.Sleep(50 * time.Millisecond)
	}
	e.t.Fatal("podman's service does not listen")
	return ""
}

// TestImport: an image comes from podman's files as it would come through an archive,
// without a second copy where files can be linked.
func TestImport(t *testing.T) {
	withEach(t, func(t *testing.T, rel release) {
		addr := serveOn(t, registry.ServeOptions{})
		put(t, threeLayers(t), addr+"/three:1")
		w := newWorker(t, rel)
		ref := addr + "/three:1"
		w.podman("pull", "-q", ref)
		archive := filepath.Join(w.dir, "image.tar")
		w.podman("save", "-q", "--format=oci-archive", "-o", archive, ref)
		stores := map[string]string{"local": filepath.Join(w.dir, "a"), "archive": filepath.Join(w.dir, "b")}
		for name, args := range map[string][]string{
			"local": {"containers-storage:" + ref}, "archive": {"oci-archive:" + archive},
		} {
			w.store = stores[name]
			_, errs, err := program.Run(w.particle(append([]string{"convert"}, args...)...))
			if err != nil || strings.Contains(errs, "to a directory first") {
				t.Fatalf("%s: %v\n%s", name, err, tail(errs))
			}
		}
		// Linked where they lie on one file system, as here.
		objects, err := filepath.Glob(filepath.Join(stores["local"], "objects/*/*"))
		if err != nil {
			t.Fatal(err)
		}
		linked := 0
		for _, o := range objects {
			var st unix.Stat_t
			if err := unix.Lstat(o, &st); err != nil {
				t.Fatal(err)
			}
			if st.Nlink > 1 {
				linked++
			}
		}
		if linked < len(objects)/2 {
			t.Errorf("%d of %d objects are links of podman's files", linked, len(objects))
		}
		links := func(pattern string) string {
			var b strings.Builder
			paths, err := filepath.Glob(pattern)
			if err != nil || len(paths) < 2 {
				t.Fatalf("got %d of %s, %v", len(paths), pattern, err)
			}
			for _, p := range paths {
				to, err := os.Readlink(p)
				if err != nil {
					continue // refs
				}
				b.WriteString(filepath.Base(p) + " " + filepath.Base(to) + "\n")
			}
			return b.String()
		}
		for _, pattern := range []string{"streams/oci-layer-*", "images/*"} {
			a, b := links(filepath.Join(stores["local"], pattern)), links(filepath.Join(stores["archive"], pattern))
			if a != b || a == "" {
				t.Errorf("%s: from podman's files\n%sthrough an archive\n%s", pattern, a, b)
			}
		}
	})
}
