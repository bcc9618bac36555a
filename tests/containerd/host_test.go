package containerd

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/particle-os/particle/tests/program"
)

// A host has a containerd and our daemon, in directories of a test.
type host struct {
	t          testing.TB
	release    release
	dir, store string
	daemon     *program.Process
	containerd *program.Process
	client     *client.Client
	ctx        context.Context
	daemonArgs []string
}

// newHost starts both daemons. containerd's own configuration says where it works; that
// there is a snapshotter it learns from particle plugins enable.
func newHost(t testing.TB, r release, daemonArgs ...string) *host {
	t.Helper()
	dir, err := os.MkdirTemp(work, "h")
	if err != nil {
		t.Fatal(err)
	}
	// As /run/containerd: root of a user namespace has to get through.
	for _, d := range []string{work, dir} {
		if err := os.Chmod(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	h := &host{t: t, release: r, dir: dir, store: filepath.Join(dir, "store"), daemonArgs: daemonArgs}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	t.Cleanup(cancel) // after end
	h.ctx = namespaces.WithNamespace(ctx, program.Namespace)
	t.Cleanup(h.end)
	h.startDaemon()

	config := filepath.Join(dir, "etc/config.toml")
	if err := os.Mkdir(filepath.Dir(config), 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
imports = [%q]
[grpc]
  address = %q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "etc/conf.d/*.toml"), h.socket())
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	h.plugins("enable")
	h.startContainerd()
	return h
}

func (h *host) socket() string       { return filepath.Join(h.dir, "containerd.sock") }
func (h *host) daemonSocket() string { return filepath.Join(h.dir, "particle.sock") }

// plugins runs particle plugins for the containerd of the host.
func (h *host) plugins(verb string, args ...string) string {
	h.t.Helper()
	out, err := program.TryEnv([]string{"PATH=" + h.release.bin + ":" + os.Getenv("PATH")}, particle, append([]string{"plugins", verb, "containerd",
		"--config=" + filepath.Join(h.dir, "etc/config.toml"), "--socket=" + h.daemonSocket(), "--root=" + filepath.Join(h.dir, "sn")}, args...)...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

func (h *host) startDaemon() {
	h.t.Helper()
	h.daemon = program.Start(h.t, particle, append([]string{"--store", h.store, "snapshotter", "--root", filepath.Join(h.dir, "sn"),
		"--socket", h.daemonSocket(), "--containerd", h.socket(), "--log-format=json"}, h.daemonArgs...)...)
	eventually(h.t, "the snapshotter answers", 30*time.Second, func() error {
		conn, err := net.Dial("unix", h.daemonSocket())
		if err != nil {
			return fmt.Errorf("%w\n%s", err, h.daemon.Log())
		}
		return conn.Close()
	})
}

func (h *host) startContainerd() {
	h.t.Helper()
	h.containerd = program.Start(h.t, h.release.program("containerd"), "--log-level=warn", "--config", filepath.Join(h.dir, "etc/config.toml"))
	eventually(h.t, "containerd answers", 30*time.Second, func() error {
		if _, err := h.tryCtr("version"); err != nil {
			return fmt.Errorf("%w\n%s", err, h.containerd.Log())
		}
		return nil
	})
	var err error
	if h.client, err = client.New(h.socket()); err != nil {
		h.t.Fatal(err)
	}
}

// end stops what runs and checks that nothing is left.
func (h *host) end() {
	if h.client != nil {
		h.client.Close()
	}
	if h.containerd != nil {
		h.containerd.Stop(syscall.SIGTERM)
	}
	if h.daemon != nil {
		if err := h.daemon.Stop(syscall.SIGTERM); err != nil {
			h.t.Errorf("the snapshotter ended with %v", err)
		}
		for line := range strings.Lines(h.daemon.Log()) {
			if strings.Contains(line, `"level":"ERROR"`) || strings.Contains(line, "panic") {
				h.t.Errorf("the snapshotter's log: %s", line)
			}
		}
	}
	if _, err := program.Try(particle, "snapshotter", "--root", filepath.Join(h.dir, "sn"), "--unmount"); err != nil {
		h.t.Error(err)
	}
	if left, err := mountsBelow(h.dir); err != nil || len(left) > 0 {
		h.t.Errorf("mounts are left: %q, %v", left, err)
	}
	// The kernel lets go of loop devices a moment after the unmount.
	for end := time.Now().Add(5 * time.Second); len(loopsBelow(h.t, h.dir)) > 0; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			h.t.Errorf("loop devices are left: %q", loopsBelow(h.t, h.dir))
			break
		}
	}
	if h.t.Failed() {
		h.t.Logf("containerd's log:\n%s\nthe snapshotter's log:\n%s", tail(h.containerd), tail(h.daemon))
	}
}

// tail returns the end of a service's log, long enough for all goroutines of one that
// had to tell where it hangs.
func tail(p *program.Process) string {
	if p == nil {
		return ""
	}
	s := p.Log()
	return s[max(0, len(s)-64<<10):]
}

func (h *host) tryCtr(args ...string) (string, error) {
	return program.Try(h.release.program("ctr"), append([]string{"--address", h.socket(), "--namespace", program.Namespace}, args...)...)
}

func (h *host) ctr(args ...string) string {
	h.t.Helper()
	out, err := h.tryCtr(args...)
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

// runIn runs a shell command in a new container and returns what it prints.
func (h *host) runIn(snapshotter, image, script string) string {
	h.t.Helper()
	return h.printed(script, func() []string {
		return []string{"run", "--rm", "--snapshotter", snapshotter, "--net-host", image, h.newID()}
	})
}

// printed runs a shell command, which may be run again, by ctr with the given arguments
// and returns what it prints.
func (h *host) printed(script string, args func() []string) string {
	h.t.Helper()
	out, err := program.Whole(func() (string, error) {
		return h.tryCtr(append(args(), "/bin/sh", "-c", script+"\necho '"+strings.TrimSpace(program.End)+"'")...)
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return out
}

var ids struct {
	sync.Mutex
	n int
}

func (h *host) newID() string {
	ids.Lock()
	defer ids.Unlock()
	ids.n++
	return fmt.Sprintf("c%d", ids.n)
}

// pull pulls as containerd's client does, which unpacks while it fetches and asks the
// snapshotter first. (ctr of 1.x fetches all layers before.)
func (h *host) pull(ref string) client.Image {
	h.t.Helper()
	img, err := h.client.Pull(h.ctx, ref, client.WithPullUnpack, client.WithPullSnapshotter("particle"),
		client.WithResolver(docker.NewResolver(docker.ResolverOptions{
			Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost)),
		})))
	if err != nil {
		h.t.Fatal(err)
	}
	return img
}

// particle runs the command on the host's store.
func (h *host) particle(args ...string) string {
	h.t.Helper()
	return run(h.t, particle, append([]string{"--store", h.store, "--quiet"}, args...)...)
}

// removeImages removes images and waits until the store has nothing of them.
func (h *host) removeImages(names ...string) {
	h.t.Helper()
	h.ctr(append([]string{"images", "rm", "--sync"}, names...)...)
	if out := h.ctr("snapshots", "--snapshotter", "particle", "ls"); strings.Count(out, "\n") != 1 {
		h.t.Errorf("snapshots are left: %s", out)
	}
}

// storeEmpty checks the store and waits until the snapshotter's collection of garbage
// has emptied it.
func (h *host) storeEmpty() {
	h.t.Helper()
	eventually(h.t, "the store is empty", 20*time.Second, func() error {
		var df struct {
			Total   struct{ Objects int }
			Streams int
			Images  int
		}
		if err := json.Unmarshal([]byte(h.particle("store", "df", "--json")), &df); err != nil {
			return err
		}
		if df.Total.Objects+df.Streams+df.Images > 0 {
			return fmt.Errorf("it has %+v", df)
		}
		return nil
	})
	h.fsck()
}

func (h *host) fsck() {
	h.t.Helper()
	if out := h.particle("store", "fsck"); !strings.HasPrefix(out, "clean: ") {
		h.t.Errorf("particle store fsck: %s", out)
	}
}
