package podman

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/registry"
	"github.com/particle-os/particle/tests/program"
)

// withEach runs a test with each podman, those that forget layers of a layer store
// among them.
func withEach(t *testing.T, fn func(t *testing.T, rel release)) {
	for _, rel := range releases(t) {
		t.Run(rel.name, func(t *testing.T) { fn(t, rel) })
	}
}

// withImages has an engine use an image store, which has to exist.
func (e *engine) withImages(dir string) {
	e.t.Helper()
	raw, err := os.ReadFile(e.conf)
	if err != nil {
		e.t.Fatal(err)
	}
	if strings.Contains(string(raw), "[storage.options]") {
		e.t.Fatal("the storage.conf has options already")
	}
	write(e.t, e.conf, string(raw)+fmt.Sprintf("[storage.options]\nadditionalimagestores = [%q]\n", dir))
}

// imageStore brings the generated image into a new store and an image store next to
// it, and returns the reference in a registry and the image store.
func imageStore(t *testing.T, rel release) (w *worker, ref, images string) {
	t.Helper()
	addr := serveOn(t, registry.ServeOptions{})
	ref = addr + "/three:1"
	put(t, threeLayers(t), ref)
	w, images = imageStoreOf(t, rel, ref)
	return w, ref, images
}

// imageStoreOf does so with an image that a registry has.
func imageStoreOf(t *testing.T, rel release, ref string) (w *worker, images string) {
	t.Helper()
	w = newWorker(t, rel)
	run(t, w.particle("pull", "--insecure", ref, ref))
	images = filepath.Join(w.dir, "images")
	run(t, w.particle("export", ref, "podman-store:"+images))
	return w, images
}

// undated gives paths of a tree the dates that another one has for them: of what the
// commands of a test made, and when.
func undated(tr, dates *tree.Tree, paths []string) {
	for _, path := range paths {
		if a, b := dates.Lookup(path), tr.Lookup(path); a != nil && b != nil {
			b.MtimeSec, b.MtimeNsec = a.MtimeSec, a.MtimeNsec
		}
	}
}

// TestImageStore: podman runs an image that it never pulled, sees what plain podman
// sees, and builds on it, pushes and saves it as if it were its own.
func TestImageStore(t *testing.T) {
	withEach(t, func(t *testing.T, rel release) {
		if !rel.takesImages() {
			t.Skip("podman before 5.4 wants to write to additional image stores")
		}
		w, ref, images := imageStore(t, rel)
		onImageStore(t, w, images, subject{
			ref: ref, layers: 3,
			look:   "cat /usr/share/gone/again; mv /usr/share/kept /usr/share/moved && rm /usr/lib/big && ls /usr/share/moved",
			build:  "rm /usr/lib/second && mkdir /usr/share/built && echo built > /usr/share/built/f",
			change: "rm -r /usr/share/new-name; echo committed > /tmp/c",
			dates:  []string{"/usr/lib", "/usr/share", "/usr/share/built", "/usr/share/built/f", "/tmp", "/tmp/c", "/run", "/etc"},
		})
	})
}

func onImageStore(t *testing.T, w *worker, images string, s subject) {
	ref := s.ref
	w.withImages(images)
	plain := newEngine(t, w.rel, "")
	plain.podman("pull", "-q", ref)

	if got, want := w.podman("image", "inspect", "--format", "{{.Id}} {{.RootFS.Layers}}", ref), plain.podman("image", "inspect", "--format", "{{.Id}} {{.RootFS.Layers}}", ref); got != want {
		t.Errorf("got image %s, want %s", got, want)
	}
	same := func(what, image string, dates ...string) {
		t.Helper()
		want, got := plain.shows(image), w.shows(image)
		// Plain podman gives "/" mode 0555 whatever a layer says of it; here it has the
		// layer's, as with containerd.
		want.Root.Mode = got.Root.Mode
		undated(got, want, dates)
		for _, c := range tree.Diff(want, got) {
			t.Errorf("%s: %s: %s (plain podman first)", what, c.Path, c.What)
		}
	}
	same("run", ref)
	if want, got := plain.podman("run", "--rm", ref, "sh", "-c", s.look), w.podman("run", "--rm", ref, "sh", "-c", s.look); got != want || got == "" {
		t.Errorf("plain podman: %q, with the image store: %q", want, got)
	}
	if n, files := w.layerBytes(); n != 0 {
		t.Errorf("podman keeps %d bytes of layers itself: %q", n, files)
	}

	// Built upon, committed.
	dir := sharedDir(t)
	write(t, filepath.Join(dir, "Containerfile"), "FROM "+ref+"\nRUN "+s.build+"\n")
	for _, e := range []*engine{plain, w.engine} {
		e.podman("build", "-q", "-t", "localhost/built", dir)
		e.podman("run", "--name", "c", ref, "sh", "-c", s.change)
		e.podman("commit", "-q", "c", "localhost/committed")
		e.podman("rm", "c")
	}
	same("build", "localhost/built", s.dates...)
	same("commit", "localhost/committed", s.dates...)

	// Pushed and saved: the very layers.
	for _, e := range []*engine{plain, w.engine} {
		e.podman("push", "-q", ref, "dir:"+filepath.Join(e.dir, "pushed"))
		e.podman("push", "-q", "localhost/built", "dir:"+filepath.Join(e.dir, "pushed-built"))
	}
	want, got := pushedLayers(t, filepath.Join(plain.dir, "pushed")), pushedLayers(t, filepath.Join(w.dir, "pushed"))
	if !slices.Equal(got, want) || len(got) != s.layers {
		t.Errorf("pushed: got layers %q, want %q", got, want)
	}
	if got := pushedLayers(t, filepath.Join(w.dir, "pushed-built")); len(got) != s.layers+1 || !slices.Equal(got[:s.layers], want) {
		t.Errorf("pushed what was built: got layers %q, want %q and one more", got, want)
	}
	w.podman("save", "-q", "--format=oci-archive", "-o", filepath.Join(w.dir, "saved.tar"), ref)

	// Nobody removes it but us; then podman does not know it, and its own goes on.
	if _, _, err := program.Run(w.command("rmi", ref)); err == nil {
		t.Error("podman removed an image of the image store")
	}
	w.podman("rmi", "localhost/built", "localhost/committed")
	w.podman("system", "prune", "--force")
	same("after prune", ref)
	run(t, w.particle("export", "--remove", ref, "podman-store:"+images))
	if out := w.podman("images", "-q"); out != "" {
		t.Errorf("after it was removed podman has images %q", out)
	}
}

// shows reads what a container of an image sees, while it runs.
func (e *engine) shows(image string) *tree.Tree {
	e.t.Helper()
	id := e.podman("run", "-d", image, "sleep", "1000")
	defer e.podman("rm", "--force", "--time=0", id)
	got := treeOf(e.t, filepath.Join(e.rel.chroot, e.podman("container", "inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", id)))
	// What podman mounts or makes in every container.
	for _, path := range []string{"/dev", "/proc", "/sys", "/run", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/etc/localtime"} {
		if parent := got.Lookup(filepath.Dir(path)); parent != nil {
			delete(parent.Dir, filepath.Base(path))
		}
	}
	for _, path := range []string{"/", "/etc"} {
		if n := got.Lookup(path); n != nil {
			n.MtimeSec, n.MtimeNsec = 0, 0
		}
	}
	return got
}

// pushedLayers returns the digests of the layers in a dir:.
func pushedLayers(t *testing.T, dir string) (digests []string) {
	t.Helper()
	var m struct{ Layers []struct{ Digest string } }
	raw, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err == nil {
		err = json.Unmarshal(raw, &m)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		digests = append(digests, l.Digest)
	}
	return digests
}

// TestOnce: an image that is fetched once is on disk once and in memory once, for
// podman, for a mount as containerd's snapshotter and a booted system have it, and for
// both at a time.
func TestOnce(t *testing.T) {
	withEach(t, func(t *testing.T, rel release) {
		if !rel.takesImages() {
			t.Skip("podman before 5.4 wants to write to additional image stores")
		}
		w, ref, images := imageStore(t, rel)
		alone, err := diskUse(w.store)
		if err != nil {
			t.Fatal(err)
		}
		both, err := diskUse(w.store, images)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("the store takes %d bytes on disk, the image store %d more", alone, both-alone)
		// Metadata of three layers, and directories of objects: not the files, which are
		// three times bigFile.
		if both-alone > bigFile {
			t.Errorf("the image store takes %d bytes: files are there twice", both-alone)
		}

		w.withImages(images)
		id := w.podman("run", "-d", ref, "sleep", "1000")
		defer w.podman("rm", "--force", "--time=0", id)
		merged := filepath.Join(rel.chroot, w.podman("container", "inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", id))
		mnt := filepath.Join(w.dir, "mnt")
		if err := os.Mkdir(mnt, 0o755); err != nil {
			t.Fatal(err)
		}
		run(t, w.particle("mount", ref, mnt))
		defer func() { run(t, w.particle("umount", mnt)) }()

		inMemoryOnce(t, w.store, []view{{"podman", merged}, {"the other mount", mnt}})
	})
}

// diskUse returns the disk space below directories in bytes, each inode once.
func diskUse(dirs ...string) (int64, error) {
	out, errs, err := program.Run(exec.Command("du", append([]string{"--summarize", "--block-size=1", "--total"}, dirs...)...))
	if err != nil {
		return 0, fmt.Errorf("du: %w\n%s", err, errs)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var n int64
	_, err = fmt.Sscan(lines[len(lines)-1], &n)
	return n, err
}

func residentPages(t *testing.T, path string) int {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := resident(f)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// resident counts the pages of a file that are in memory, by mincore(2).
func resident(f *os.File) (int, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	m, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer unix.Munmap(m)
	vec, err := mincore(m)
	n := 0
	for _, v := range vec {
		n += int(v & 1)
	}
	return n, err
}
