package containerd

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/rootfs"

	"github.com/particle-os/particle/snapshotter"
	"github.com/particle-os/particle/tests/program"
)

// TestLife takes images through a containerd's life with them: import, pull, run,
// commit, export, removal. In the end nothing is left.
func TestLife(t *testing.T) {
	forReleases(t, func(t *testing.T, r release) {
		h := newHost(t, r)
		reg := newRegistry(t)

		// What upper layers change looks as with containerd's overlayfs.
		img := changes(t)
		const name = "example.com/changes:1"
		tarball := archive(t, img, name)
		for _, sn := range []string{"overlayfs", "particle"} {
			h.ctr("images", "import", "--snapshotter", sn, tarball)
		}
		want, got := h.runIn("overlayfs", name, listing), h.runIn("particle", name, listing)
		if strings.Count(want, "\n") < 60 {
			t.Errorf("overlayfs shows %s", want)
		}
		for _, line := range missing(want, got) {
			t.Errorf("overlayfs shows %s", line)
		}
		for _, line := range missing(got, want) {
			t.Errorf("we show %s", line)
		}

		many := hundred(t)
		ref := reg.push(t, "hundred", many)
		h.ctr("images", "pull", "--plain-http", "--snapshotter", "particle", ref)
		if _, n := reg.fetched(t, many); n != 99 {
			t.Errorf("containerd fetched %d layers, want 99: it has the shell", n)
		}
		if out := h.runIn("particle", ref, "cat /last; ls /all; sha256sum </all/97"); !strings.HasPrefix(out, "9897\n98\n") {
			t.Errorf("a container of 100 layers prints %q", out)
		}

		h.changeAndCommit(name)

		// The exported image is the one that came.
		out := filepath.Join(h.dir, "export.tar")
		h.ctr("images", "export", out, ref)
		digest, err := many.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if index := run(t, "tar", "-xOf", out, "index.json"); !strings.Contains(index, digest.String()) {
			t.Errorf("the exported index is %s, want %s in it", index, digest)
		}

		h.fsck()
		h.removeImages(name, ref, "example.com/committed:1")
		h.storeEmpty()
	})
}

// missing returns the lines of a text that another one lacks.
func missing(text, other string) (lines []string) {
	have := strings.Split(other, "\n")
	for line := range strings.SplitSeq(text, "\n") {
		if !slices.Contains(have, line) {
			lines = append(lines, line)
		}
	}
	return lines
}

// changeAndCommit has a container change its files, commits them as a snapshot and as
// the layer of an image, and looks at both.
func (h *host) changeAndCommit(name string) {
	h.t.Helper()
	const script = `set -e; rm /etc/kept; echo more >>/etc/changed; mv /opaque /moved; chown 7:8 /owned; rm -r /todir; mkdir /todir; echo x >/todir/z`
	id := h.newID()
	h.ctr("run", "--snapshotter", "particle", "--net-host", name, id, "/bin/sh", "-c", script)
	const look = `cat /etc/changed; ls -d /etc/kept /opaque; ls /moved /todir; stat -c %u:%g /owned`
	const want = "newmore\n/moved:\nhidden\n\n/todir:\nz\n7:8\n"

	// A layer of an image, as nerdctl commit and builders make it.
	ctx, done, err := h.client.WithLease(h.ctx)
	if err != nil {
		h.t.Fatal(err)
	}
	defer done(h.ctx)
	desc, err := rootfs.CreateDiff(ctx, id, h.client.SnapshotService("particle"), h.client.DiffService())
	if err != nil {
		h.t.Fatalf("making a layer of the container's changes: %v", err)
	}
	base, err := h.client.GetImage(ctx, name)
	if err != nil {
		h.t.Fatal(err)
	}
	made, err := appendLayer(ctx, h.client, base, desc)
	if err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.client.ImageService().Create(ctx, images.Image{Name: "example.com/committed:1", Target: made}); err != nil {
		h.t.Fatal(err)
	}
	img, err := h.client.GetImage(ctx, "example.com/committed:1")
	if err != nil {
		h.t.Fatal(err)
	}
	if err := img.Unpack(ctx, "particle"); err != nil {
		h.t.Fatal(err)
	}
	if got := h.runIn("particle", img.Name(), look+" 2>/dev/null; true"); got != want {
		h.t.Errorf("a container of the committed image prints %q, want %q", got, want)
	}

	// A snapshot of its own, which nothing but its label keeps.
	keep := map[string]string{"containerd.io/gc.root": "test"}
	h.ctr("snapshots", "--snapshotter", "particle", "commit", "committed", id)
	h.ctr("snapshots", "--snapshotter", "particle", "label", "committed", "containerd.io/gc.root=test")
	sn := h.client.SnapshotService("particle")
	mounts, err := sn.View(ctx, "look", "committed", snapshots.WithLabels(keep))
	if err != nil {
		h.t.Fatal(err)
	}
	info, err := sn.Stat(ctx, "look")
	if err != nil || info.Labels[snapshotter.LabelVerification] == "" {
		h.t.Errorf("the view has labels %v, %v, want %s among them", info.Labels, err, snapshotter.LabelVerification)
	}
	target := h.t.TempDir()
	if err := mount.All(mounts, target); err != nil {
		h.t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(target, "etc/changed"))
	if _, kept := os.Stat(filepath.Join(target, "etc/kept")); err != nil || string(b) != "newmore\n" || kept == nil {
		h.t.Errorf("the committed snapshot has %q, %v; /etc/kept: %v", b, err, kept)
	}
	if err := mount.UnmountAll(target, 0); err != nil {
		h.t.Error(err)
	}
	h.ctr("snapshots", "--snapshotter", "particle", "rm", "look")
	h.ctr("snapshots", "--snapshotter", "particle", "rm", "committed")
	h.ctr("containers", "rm", id)
}

// server is podman's name of the server example, which tests/setup/images.sh builds.
const server = "localhost/server"

// storedServer returns a host that has the server example in its store, and a registry
// that has it, too.
func storedServer(t *testing.T, r release) (h *host, reg *loggedRegistry, ref string) {
	t.Helper()
	if _, err := exec.LookPath("podman"); err != nil {
		t.Skipf("%v (Debian package podman)", err)
	}
	if _, err := program.Try("podman", "image", "exists", server); err != nil {
		t.Skipf("podman has no image %s; tests/setup/images.sh builds it", server)
	}
	h, reg = newHost(t, r), newRegistry(t)
	h.particle("convert", "containers-storage:"+server, "host")
	ref = reg.Addr() + "/server:1"
	h.particle("push", "--compression=none", "host", ref)
	return h, reg, ref
}

// TestHostImage starts the image that the host itself boots: no layer is fetched, and
// its files are on disk once.
func TestHostImage(t *testing.T) {
	forReleases(t, func(t *testing.T, r release) {
		h, reg, ref := storedServer(t, r)
		img := reg.get(t, ref)
		reg.fetched(t, img)

		began := time.Now()
		h.pull(ref)
		pulled := time.Since(began)
		out := h.runIn("particle", ref, ". /etc/os-release; echo $ID; dpkg-query -W -f '${Status}\n' systemd; find /usr -xdev -type f | wc -l")
		t.Logf("pulled in %v, ran in %v", pulled, time.Since(began)-pulled)
		if ours, theirs := reg.fetched(t, img); ours+theirs != 0 {
			t.Errorf("%d layers were fetched, want none: the store has them", ours+theirs)
		}
		f := strings.Fields(out)
		if len(f) != 5 || f[0] != "debian" || strings.Join(f[1:4], " ") != "install ok installed" || len(f[4]) < 4 {
			t.Errorf("the container prints %q", out)
		}
		h.fsck()
		if !all() {
			return
		}
		if r.since(2, 0) { // ctr of 1.x fetches all layers before it asks
			h.removeImages(ref)
			h.ctr("images", "pull", "--plain-http", "--snapshotter", "particle", ref)
			if ours, theirs := reg.fetched(t, img); ours+theirs != 0 {
				t.Errorf("ctr had %d layers fetched, want none", ours+theirs)
			}
		}

		// Without it in the store, containerd fetches and unpacks it.
		h.particle("rm", "host")
		h.removeImages(ref)
		h.storeEmpty()
		h.ctr("images", "pull", "--plain-http", "--snapshotter", "particle", ref)
		if _, n := reg.fetched(t, img); n == 0 {
			t.Error("no layer was fetched of an image that the store does not have")
		}
		if again := h.runIn("particle", ref, "find /usr -xdev -type f | wc -l"); strings.TrimSpace(again) != f[len(f)-1] {
			t.Errorf("there are %s files in /usr, were %s", again, f[len(f)-1])
		}
		h.removeImages(ref)
		h.storeEmpty()
	})
}

// TestSideBySide pulls an image that the store has where containerd may unpack side by
// side: a release that cannot take layers so is not told that it can.
func TestSideBySide(t *testing.T) {
	forReleases(t, func(t *testing.T, r release) {
		if !r.since(2, 2) {
			t.Skip("containerd does so since 2.2")
		}
		h, reg, ref := storedServer(t, r)
		img := reg.get(t, ref)
		reg.fetched(t, img)

		config := filepath.Join(h.dir, "etc/config.toml")
		text, err := os.ReadFile(config)
		if err != nil {
			t.Fatal(err)
		}
		text = append(text, "[plugins.'io.containerd.transfer.v1.local']\nmax_concurrent_unpacks = 3\n"...)
		if err := os.WriteFile(config, text, 0o600); err != nil {
			t.Fatal(err)
		}
		h.client.Close()
		h.containerd.Stop(syscall.SIGTERM)
		h.startContainerd()
		h.ctr("images", "pull", "--plain-http", "--snapshotter", "particle", ref)
		// 2.2 does not say which layer it asks for.
		if ours, theirs := reg.fetched(t, img); r.since(2, 3) && ours+theirs != 0 {
			t.Errorf("%d layers were fetched, want none: the store has them", ours+theirs)
		}
		h.removeImages(ref)
	})
}

// TestDaemonGoes stops and kills the daemon under a container: that goes on, and others
// start once the daemon is back.
func TestDaemonGoes(t *testing.T) {
	forReleases(t, func(t *testing.T, r release) {
		h := newHost(t, r)
		const name = "example.com/changes:1"
		h.ctr("images", "import", "--snapshotter", "particle", archive(t, changes(t), name))
		h.ctr("run", "--detach", "--snapshotter", "particle", "--net-host", name, "stays", "/bin/sleep", "600")
		exec := func(script string) string {
			t.Helper()
			return h.printed(script, func() []string { return []string{"tasks", "exec", "--exec-id", h.newID(), "stays"} })
		}
		sum := exec("sha256sum </etc/kept")
		for i, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			h.daemon.Stop(sig)
			run(t, "sh", "-c", "echo 2 >/proc/sys/vm/drop_caches")
			if got := exec("sha256sum </etc/kept; cat /hard3"); !strings.HasPrefix(got, sum) {
				t.Errorf("%v: the container reads %q, want %q", sig, got, sum)
			}
			h.ctr("tasks", "exec", "--exec-id", h.newID(), "stays", "/bin/sh", "-c", "echo x >>/etc/changed")
			if _, err := h.tryCtr("run", "--rm", "--snapshotter", "particle", "--net-host", name, h.newID(), "/bin/true"); err == nil {
				t.Errorf("%v: a container starts without the snapshotter", sig)
			}
			h.startDaemon()
			eventually(t, "containers start again", 30*time.Second, func() error {
				_, err := h.tryCtr("run", "--rm", "--snapshotter", "particle", "--net-host", name, h.newID(), "/bin/true")
				return err
			})
			if got := h.runIn("particle", name, "sha256sum </etc/kept"); got != sum {
				t.Errorf("%v: a new container reads %q, want %q", sig, got, sum)
			}
			if got, want := exec("cat /etc/changed"), "new"+strings.Repeat("x\n", i+1); got != want {
				t.Errorf("%v: the container has %q, want %q", sig, got, want)
			}
		}
		// containerd goes, too, and with it its knowledge of mounts.
		h.client.Close()
		h.containerd.Stop(syscall.SIGTERM)
		h.startContainerd()
		if got := exec("sha256sum </etc/kept"); got != sum {
			t.Errorf("after containerd's restart the container reads %q, want %q", got, sum)
		}
		h.ctr("tasks", "kill", "--signal", "SIGKILL", "stays")
		eventually(t, "the container ends", 10*time.Second, func() error {
			_, err := h.tryCtr("tasks", "rm", "stays")
			return err
		})
		h.ctr("containers", "rm", "stays")
		// What the container that could not start left goes with garbage collection.
		h.ctr("images", "rm", "--sync", name)
		h.removeContainers()
		h.ctr("content", "prune", "references")
		h.storeEmpty()
	})
}

// removeContainers removes the containers that are left.
func (h *host) removeContainers() {
	h.t.Helper()
	for id := range strings.Lines(h.ctr("containers", "ls", "-q")) {
		h.ctr("containers", "rm", strings.TrimSpace(id))
	}
}

// TestFetch has the daemon fetch layers straight into the store, where containerd says
// which image they are of.
func TestFetch(t *testing.T) {
	forReleases(t, func(t *testing.T, r release) {
		if !r.since(2, 1) {
			t.Skip("containerd says so since 2.1")
		}
		h := newHost(t, r, "--fetch")
		reg := newRegistry(t)
		img := changes(t)
		ref := reg.push(t, "changes", img)
		h.ctr("images", "pull", "--plain-http", "--snapshotter", "particle", ref)
		ours, theirs := reg.fetched(t, img)
		if ours != 4 || theirs != 0 {
			t.Errorf("the daemon fetched %d layers and containerd %d, want 4 and none", ours, theirs)
		}
		if out := h.runIn("particle", ref, "cat /etc/back"); out != "second" {
			t.Errorf("the container prints %q", out)
		}
		h.removeImages(ref)
		h.storeEmpty()
	})
}

// TestUserNamespace runs a container whose root is nobody on the host.
func TestUserNamespace(t *testing.T) {
	forReleases(t, func(t *testing.T, r release) {
		h := newHost(t, r)
		const name = "example.com/changes:1"
		h.ctr("images", "import", "--snapshotter", "particle", archive(t, changes(t), name))
		out := h.printed("cat /proc/self/uid_map; stat -c %u:%g /etc/kept /owned; echo x >/owned/new && stat -c %u:%g /owned/new", func() []string {
			return []string{"run", "--rm", "--snapshotter", "particle", "--remap-labels",
				"--uidmap", "0:200000:65536", "--gidmap", "0:300000:65536", name, h.newID()}
		})
		if f := strings.Fields(out); strings.Join(f, " ") != "0 200000 65536 0:0 5:6 0:6" {
			t.Errorf("the container prints %q", out)
		}
		h.removeImages(name)
	})
}

// TestPlugins judges what enable writes by what containerd makes of it, and disables it.
func TestPlugins(t *testing.T) {
	forReleases(t, func(t *testing.T, r release) {
		h := newHost(t, r)
		dump := func() string {
			return run(t, r.program("containerd"), "--config", filepath.Join(h.dir, "etc/config.toml"), "config", "dump")
		}
		with := dump()
		if !strings.Contains(with, "[proxy_plugins.particle]") || !strings.Contains(with, h.daemonSocket()) {
			t.Errorf("containerd's configuration is\n%s", with)
		}
		if log := h.containerd.Log(); strings.Contains(log, "unknown key") {
			t.Errorf("containerd does not know a key:\n%s", log)
		}
		if status := h.plugins("status"); !strings.Contains(status, "enabled") || !strings.Contains(status, "answers") {
			t.Errorf("status: %s", status)
		}
		if again := h.plugins("enable"); !strings.HasPrefix(again, "containerd: nothing to change\n") {
			t.Errorf("enabling twice: %s", again)
		}
		h.plugins("disable")
		if without := dump(); strings.Contains(without, "proxy_plugins.particle") {
			t.Errorf("disabled, containerd's configuration is\n%s", without)
		}
		if _, err := os.Stat(filepath.Join(h.dir, "etc/conf.d")); !os.IsNotExist(err) {
			t.Errorf("a directory that enable made is left: %v", err)
		}
	})
}
