package podman

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/hostdeploy/initramfs"
	"github.com/particle-os/particle/registry"
	"github.com/particle-os/particle/tests/program"
)

// server is podman's name of the server example, which tests/setup/images.sh builds in
// the podman storage that the environment names.
const server = "localhost/server"

// publishedServer returns the reference of the server example in a registry of the test.
func publishedServer(t *testing.T) (ref string, blobs *blobCount) {
	t.Helper()
	if _, _, err := program.Run(exec.Command("podman", "image", "exists", server)); err != nil {
		t.Skipf("podman has no image %s; tests/setup/images.sh builds it", server)
	}
	addr, blobs, _ := serveFrom(t, sharedDir(t), registry.ServeOptions{})
	ref = addr + "/server:1"
	run(t, exec.Command("podman", "push", "-q", "--tls-verify=false", server, "docker://"+ref))
	return ref, blobs
}

// hostDisk makes a file system of a disk's own and returns where it is mounted.
func hostDisk(t *testing.T, size int64) string {
	t.Helper()
	dir := sharedDir(t)
	file, root := filepath.Join(dir, "disk"), filepath.Join(dir, "d")
	write(t, file, "")
	if err := errors.Join(os.Truncate(file, size), os.Mkdir(root, 0o755)); err != nil {
		t.Fatal(err)
	}
	run(t, exec.Command("mkfs.ext4", "-q", "-F", file))
	run(t, exec.Command("mount", "-o", "loop", file, root))
	t.Cleanup(func() { run(t, exec.Command("umount", root)) })
	return root
}

// used returns how much of a file system is in use, in bytes.
func used(t *testing.T, dir string) int64 {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := errors.Join(unix.Syncfs(int(f.Fd())), unix.Fstatfs(int(f.Fd()), &st)); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

// A view is a place where the files of an image show.
type view struct{ name, root string }

// TestHost: the image of a host is fetched once, with its installation. The root that it
// boots, podman and containerd have their files of one store: no layer is fetched again,
// the disk gets names and metadata, and what one of them has read is in memory for the
// others.
//
// The root is set up by what does so in the initramfs; that a machine boots it is shown
// in tests/boot.
func TestHost(t *testing.T) {
	all := releases(t)
	need(t, "containerd", "ctr", "mkfs.ext4")
	ref, blobs := publishedServer(t)
	root := hostDisk(t, 3<<30)
	store, dir := filepath.Join(root, "composefs"), func(name string) string {
		t.Helper()
		d := filepath.Join(root, name)
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		return d
	}
	dir("boot")
	run(t, exec.Command(particle, "hostdeploy", "install", "to-filesystem", root, "--image", "docker://"+ref,
		"--bootloader", "extlinux", "--allow-missing-verity"))
	layers := layerDigests(t, ref)
	once := func(who string) {
		t.Helper()
		for _, l := range layers {
			if n := blobs.of(l); n != 1 {
				t.Errorf("%s: layer %s was fetched %d times", who, l, n)
			}
		}
	}
	once("installed")
	before := used(t, root)
	kernel, err := diskUse(filepath.Join(root, "boot"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("installed: %.1f MiB, of them %.1f MiB for the boot loader", mib(before), mib(kernel))
	var views []view
	// grown checks what the disk got since it was asked last.
	grown := func(who string, most int64) {
		t.Helper()
		once(who)
		now := used(t, root)
		t.Logf("%s: %.1f MiB more", who, mib(now-before))
		if now-before > most {
			t.Errorf("%s: the disk got %d bytes more, want %d at most", who, now-before, most)
		}
		before = now
	}

	boot := filepath.Join(sharedDir(t), "next")
	report, err := initramfs.PrepareNext(t.Context(), initramfs.Options{Root: root, Cmdline: kernelArgs(t, root), Run: sharedDir(t)}, boot)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := initramfs.CancelNext(boot); err != nil {
			t.Error(err)
		}
	})
	t.Logf("the root that boots is %s: %s", report.Verification, report.Why)
	views = append(views, view{"the booted root", boot})
	grown("the root that boots", mostMetadata)

	for _, rel := range all {
		podmanDir := dir("podman-" + rel.name)
		var e *engine
		switch {
		case rel.takesImages():
			images := filepath.Join(root, "images-"+rel.name)
			run(t, exec.Command(particle, "--store", store, "export", ref, "podman-store:"+images))
			e = newEngineIn(t, rel, "", podmanDir)
			e.withImages(images)
		case rel.toc():
			continue // it would ask for zstd:chunked layers
		default:
			l := newLayerStore(t)
			l.store, l.dir = store, dir("layers")
			l.start()
			e = newEngineIn(t, rel, l.dir, podmanDir)
			e.quietly("pull", "-q", ref)
		}
		id := e.podman("run", "-d", ref, "sleep", "1000")
		t.Cleanup(func() { e.podman("rm", "--force", "--time=0", id) })
		if n, files := e.layerBytes(); n > 10_000 { // what podman writes into each container
			t.Errorf("podman keeps %d bytes of layers itself: %q", n, files)
		}
		merged := filepath.Join(rel.chroot, e.podman("container", "inspect", "--format", "{{.GraphDriver.Data.MergedDir}}", id))
		views = append(views, view{"podman of " + rel.name, merged})
		grown("podman of "+rel.name, mostMetadata)
	}

	c := newContainerd(t, store, dir("containerd"))
	c.pull(ref)
	views = append(views, view{"containerd", c.run(ref, "c", "sleep", "1000")})
	grown("containerd", mostMetadata)

	inMemoryOnce(t, store, views)
}

// mostMetadata is what one more user of the server example may take on disk: composefs
// images of 11,000 files, directories and records.
const mostMetadata = 16 << 20

func mib(n int64) float64 { return float64(n) / (1 << 20) }

// kernelArgs returns the kernel arguments of a host's only boot entry.
func kernelArgs(t *testing.T, root string) string {
	t.Helper()
	entries, err := filepath.Glob(filepath.Join(root, "boot/loader/entries/*.conf"))
	if err != nil || len(entries) != 1 {
		t.Fatalf("boot entries %q, %v", entries, err)
	}
	raw, err := os.ReadFile(entries[0])
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && key == "options" {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("no options in %s", raw)
	return ""
}

// inMemoryOnce has each view read large files, which then are in memory for all others.
// The kernel may take pages back at any time, and does while other tests run; a view with
// pages of its own would have none of them in memory, so that most are enough.
func inMemoryOnce(t *testing.T, store string, views []view) {
	t.Helper()
	type file struct {
		path string // in a view
		size int64
	}
	var files []file
	usr := filepath.Join(views[0].root, "usr")
	err := filepath.WalkDir(usr, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			files = append(files, file{strings.TrimPrefix(path, views[0].root), fi.Size()})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(files, func(a, b file) int { return cmp.Or(cmp.Compare(b.size, a.size), cmp.Compare(a.path, b.path)) })
	files = files[:min(len(files), 4*len(views))]
	var bytes int64
	tried := 0
	for i, f := range files {
		reader := views[i%len(views)]
		want, err := digestOf(filepath.Join(reader.root, f.path))
		if err != nil {
			t.Fatal(err)
		}
		object := filepath.Join(store, "objects", want.Path())
		if err := dropFile(object); errors.Is(err, errMapped) {
			t.Logf("%s: %v", f.path, err)
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		if _, err := digestOf(filepath.Join(reader.root, f.path)); err != nil {
			t.Fatal(err)
		}
		pages := int((f.size + int64(os.Getpagesize()) - 1) / int64(os.Getpagesize()))
		for _, v := range views {
			path := filepath.Join(v.root, f.path)
			if n := residentPages(t, path); n <= pages/2 {
				t.Errorf("after %s read %s, %d of %d pages are in memory for %s", reader.name, f.path, n, pages, v.name)
			}
			if got, err := digestOf(path); err != nil || got != want {
				t.Errorf("%s has another %s than %s: %v", v.name, f.path, reader.name, err)
			}
		}
		if n := residentPages(t, object); n <= pages/2 {
			t.Errorf("%d of %d pages of the object of %s are in memory", n, pages, f.path)
		}
		bytes += f.size
		tried++
	}
	t.Logf("%d files with %.1f MiB: read by one, in memory for all %d", tried, mib(bytes), len(views))
	if tried < len(views) {
		t.Errorf("%d of %d files could be tried", tried, len(files))
	}
}

// digestOf reads a file.
func digestOf(path string) (fsverity.Digest, error) {
	f, err := os.Open(path)
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer f.Close()
	d, _, err := fsverity.Read(fsverity.SHA256, io.Reader(f))
	return d, err
}

// errMapped: somebody runs a file, as the containers do their libc.
var errMapped = errors.New("pages stay in memory")

// dropFile has the kernel forget the pages of a file.
func dropFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		return err
	}
	n, err := resident(f)
	if err == nil && n > 0 {
		err = fmt.Errorf("%w: %d of %s", errMapped, n, path)
	}
	return err
}

// TestServer is TestAgain and TestImageStore with the server example.
func TestServer(t *testing.T) {
	if os.Getenv("PARTICLE_TEST_PODMAN") != "all" {
		t.Skip("takes minutes; PARTICLE_TEST_PODMAN=all runs it")
	}
	withEach(t, func(t *testing.T, rel release) {
		from, _ := publishedServer(t)
		layers := len(layerDigests(t, from))
		if !rel.forgets() {
			ref, _, _ := publish(t, rel, from)
			again(t, rel, subject{
				ref: ref, layers: layers, size: 300 << 20,
				build: "mv /usr/share/doc/bash /usr/share/moved && rm -r /usr/share/doc/systemd /usr/lib/udev && mkdir /usr/lib/udev && " +
					"touch -d @1600000000 /usr/share/doc /usr/share /usr/share/moved /usr/lib /usr/lib/udev && echo built > /etc/built && touch -d @1600000000 /etc/built /etc",
				change: "rm -r /usr/share/perl5 /usr/share/doc/coreutils; touch -d @1600000000 /usr/share /usr/share/doc /etc/x /etc",
				most:   1 << 20, // what is moved is copied
			})
		}
		if rel.takesImages() {
			w, images := imageStoreOf(t, rel, from)
			onImageStore(t, w, images, subject{
				ref: from, layers: layers,
				look:   "cat /etc/os-release; find /usr -type f | wc -l; mv /usr/share/doc/bash /usr/share/moved && ls /usr/share/moved",
				build:  "rm -r /usr/share/doc/systemd && mkdir /usr/share/built && echo built > /usr/share/built/f",
				change: "rm -r /usr/share/perl5; echo committed > /tmp/c",
				dates:  []string{"/usr/share", "/usr/share/doc", "/usr/share/built", "/usr/share/built/f", "/tmp", "/tmp/c", "/run", "/etc"},
			})
		}
	})
}
