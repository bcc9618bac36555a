package podman

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/registry"
	"github.com/particle-os/particle/tests/program"
)

// forEach runs a test with each podman that layer stores work with.
func forEach(t *testing.T, fn func(t *testing.T, rel release)) {
	for _, rel := range releases(t) {
		t.Run(rel.name, func(t *testing.T) {
			if rel.forgets() {
				t.Skip("this podman forgets layers of layer stores; TestForgets has that")
			}
			fn(t, rel)
		})
	}
}

// TestForgets: podman 5.5 and newer loses layers of a layer store, whoever serves it.
// When this fails podman is repaired, and podmanext.CheckPodman may let it in.
func TestForgets(t *testing.T) {
	for _, rel := range releases(t) {
		t.Run(rel.name, func(t *testing.T) {
			if !rel.forgets() {
				t.Skip("this podman does not")
			}
			ref, _, _ := published(t, rel)
			l := newLayerStore(t)
			l.start()
			e := newEngine(t, rel, l.dir)
			e.podman("pull", "-q", ref)
			if _, errs, err := program.Run(e.command("image", "mount", ref)); err == nil || !strings.Contains(errs, "layer not known") {
				t.Errorf("podman image mount says %v\n%s", err, errs)
			}
		})
	}
}

// published returns the reference of the generated image in a registry of the test,
// which podman itself has pushed: a podman that asks by table of contents as
// zstd:chunked.
func published(t *testing.T, rel release) (ref string, blobs *blobCount, stop func()) {
	t.Helper()
	first, _, _ := serve(t, registry.ServeOptions{})
	put(t, threeLayers(t), first+"/plain:1")
	return publish(t, rel, first+"/plain:1")
}

// publish has podman copy an image to another registry.
func publish(t *testing.T, rel release, from string) (ref string, blobs *blobCount, stop func()) {
	t.Helper()
	// Another one: podman would not send to the first what it knows to be there.
	addr, blobs, stop := serveFrom(t, sharedDir(t), registry.ServeOptions{})
	e := newEngine(t, rel, "")
	ref = addr + "/image:1"
	e.podman("pull", "-q", from)
	e.podman("push", "-q", "--compression-format", rel.format(), from, ref)
	blobs.requests.Store(0)
	blobs.bytes.Store(0)
	return ref, blobs, stop
}

// TestPull: an image comes through the layer store without a byte in podman's own
// storage, and shows and does what it does in plain podman.
func TestPull(t *testing.T) {
	forEach(t, func(t *testing.T, rel release) {
		ref, blobs, _ := published(t, rel)
		plain := newEngine(t, rel, "")
		plain.podman("pull", "-q", ref)
		blobs.requests.Store(0)

		l := newLayerStore(t)
		l.start()
		e := newEngine(t, rel, l.dir)
		e.quietly("pull", "-q", ref)
		if all, additional := e.layers(); all != 3 || additional != 3 {
			t.Fatalf("podman has %d layers, %d of the layer store; want 3 of 3", all, additional)
		}
		if n, files := e.layerBytes(); n != 0 {
			t.Errorf("podman keeps %d bytes of layers itself: %q", n, files)
		}
		// A config for each of the two who asked, and each layer once.
		if got := blobs.requests.Load(); got != 5 {
			t.Errorf("the registry sent %d blobs, want 5", got)
		}
		sameFiles(t, plain, e, ref)

		script := "ls /usr/share; cat /usr/share/gone/again; mv /usr/share/kept /usr/share/moved && rm /usr/lib/big && ls /usr/share/moved"
		want, got := plain.podman("run", "--rm", ref, "sh", "-c", script), e.podman("run", "--rm", ref, "sh", "-c", script)
		if want != got || got == "" {
			t.Errorf("plain podman: %q, with the layer store: %q", want, got)
		}
		if _, files := e.layerBytes(); len(files) != 0 {
			t.Errorf("running left files in podman's storage: %q", files)
		}

		// The same again costs nothing; without users nothing stays.
		e.quietly("pull", "-q", ref)
		e.quietly("rmi", ref)
		if names := l.mountedLayers(); len(names) != 0 {
			t.Errorf("after podman rmi %d layers are still mounted", len(names))
		}
		run(t, l.particle("store", "gc"))
		objects, err := filepath.Glob(filepath.Join(l.store, "objects/*/*"))
		if err != nil || len(objects) != 0 {
			t.Errorf("after podman rmi and gc %d objects are left, %v", len(objects), err)
		}
	})
}

// A subject is an image for [again] and [onImageStore], with commands that delete,
// rename and add.
type subject struct {
	ref    string
	layers int
	build  string // a step of a Containerfile
	change string // in a container that is committed

	// For again, where build and change also date what they make:
	size int64 // that an archive has at least
	most int64 // bytes of files that build and change make

	// For onImageStore:
	look  string   // in a container that is removed
	dates []string // paths that build and change date
}

// TestAgain: push, save, build, commit and prune, compared with plain podman.
func TestAgain(t *testing.T) {
	forEach(t, func(t *testing.T, rel release) {
		ref, _, _ := published(t, rel)
		again(t, rel, subject{
			ref: ref, layers: 3, size: 3 * bigFile,
			build: "mv /usr/share/kept /usr/share/moved && rm -r /usr/share/opaque && mkdir /usr/share/opaque && " +
				"touch -d @1600000000 /usr/share/opaque /usr/share /usr/share/moved && echo built > /etc/built && touch -d @1600000000 /etc/built /etc",
			change: "rm -r /usr/share/deep /usr/lib/second; touch -d @1600000000 /usr/share /usr/lib /etc/x /etc",
			most:   100_000,
		})
	})
}

func again(t *testing.T, rel release, s subject) {
	l := newLayerStore(t)
	l.start()
	plain, e := newEngine(t, rel, ""), newEngine(t, rel, l.dir)
	plain.podman("pull", "-q", s.ref)
	e.quietly("pull", "-q", s.ref)
	if all, additional := e.layers(); all != s.layers || additional != s.layers {
		t.Fatalf("podman has %d layers, %d of the layer store; want %d of %[3]d", all, additional, s.layers)
	}
	if n, files := e.layerBytes(); n != 0 {
		t.Errorf("podman keeps %d bytes of layers itself: %q", n, files)
	}
	sameFiles(t, plain, e, s.ref)

	// To a registry that has none of it.
	other, _, _ := serveFrom(t, sharedDir(t), registry.ServeOptions{})
	e.quietly("push", "-q", "--compression-format", rel.format(), s.ref, other+"/image:1")
	if want, got := layerDigests(t, s.ref), layerDigests(t, other+"/image:1"); !slices.Equal(want, got) {
		t.Errorf("a push gives the layers %q, want %q", got, want)
	}

	// An archive has the uncompressed layers: all bytes, exactly.
	var sums []string
	for _, x := range []*engine{plain, e} {
		name := filepath.Join(x.dir, "saved.tar")
		x.podman("save", "-q", "--format", "docker-archive", "-o", name, s.ref)
		fi, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Size() < s.size {
			t.Fatalf("podman saved %d bytes only", fi.Size())
		}
		sums = append(sums, strings.Fields(run(t, exec.Command("sha256sum", name)))[0])
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	if sums[0] != sums[1] {
		t.Error("podman save gives other bytes than plain podman")
	}

	// A build deletes, renames and adds; both engines end with the same files.
	context := sharedDir(t)
	write(t, filepath.Join(context, "Containerfile"), "FROM "+s.ref+"\nRUN "+s.build+"\nCOPY Containerfile /tmp/\n")
	for _, x := range []*engine{plain, e} {
		x.podman("build", "-q", "--timestamp", "1600000000", "-t", "localhost/built", context)
	}
	sameFiles(t, plain, e, "localhost/built")
	for _, x := range []*engine{plain, e} {
		x.podman("run", "--name", "c", "localhost/built", "sh", "-c", s.change)
		x.podman("commit", "-q", "c", "localhost/committed")
		x.podman("rm", "c")
	}
	// What podman made for the container has the date of that.
	sameFiles(t, plain, e, "localhost/committed", "/run", "/run/.containerenv", "/etc/mtab")
	e.podman("push", "-q", "localhost/committed", other+"/committed:1")
	// From 5.1 on podman copies the layers below what it commits: it knows them by
	// their tables of contents, and by diffID in the new image.
	if n, _ := e.layerBytes(); n > s.most && !rel.toc() {
		t.Errorf("podman keeps %d bytes of layers itself, want %d at most: what the build and the commit made", n, s.most)
	}

	e.podman("rmi", "localhost/committed", "localhost/built", s.ref)
	e.podman("system", "prune", "--all", "--force")
	if all, _ := e.layers(); all != 0 {
		t.Errorf("after podman system prune there are %d layers", all)
	}
	if names := l.mountedLayers(); len(names) != 0 {
		t.Errorf("after podman system prune %d layers are still mounted", len(names))
	}
}
