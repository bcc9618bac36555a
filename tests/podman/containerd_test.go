package podman

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	client "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/particle-os/particle/tests/program"
)

// A containerd is this machine's, with our snapshotter. (tests/containerd has more of
// them, and what they do.)
type containerd struct {
	t   testing.TB
	dir string
}

func (c *containerd) socket() string { return filepath.Join(c.dir, "containerd.sock") }

// newContainerd starts both, with all of their files below a directory.
func newContainerd(t testing.TB, store, dir string) *containerd {
	t.Helper()
	c := &containerd{t: t, dir: dir}
	snapshotter, root := filepath.Join(dir, "particle.sock"), filepath.Join(dir, "snapshotter")
	// It refuses while the service runs: what is set up first is cleaned up last.
	t.Cleanup(func() { run(t, exec.Command(particle, "snapshotter", "--root", root, "--unmount")) })
	c.serve(snapshotter, exec.Command(particle, "--store", store, "snapshotter", "--root", root, "--socket", snapshotter, "--containerd", c.socket()))
	config := filepath.Join(dir, "config.toml")
	write(t, config, fmt.Sprintf(`version = 2
root = %q
state = %q
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = %q
[proxy_plugins.particle]
  type = "snapshot"
  address = %q
`, filepath.Join(dir, "root"), filepath.Join(dir, "state"), c.socket(), snapshotter))
	c.serve(c.socket(), exec.Command("containerd", "--log-level=warn", "--config", config))
	return c
}

// serve starts a service that ends with the test, and waits until it listens.
func (c *containerd) serve(socket string, cmd *exec.Cmd) {
	c.t.Helper()
	log := &logBuffer{t: c.t}
	cmd.Stdout, cmd.Stderr = log, log
	s := program.StartCmd(c.t, cmd)
	c.t.Cleanup(func() {
		if err := s.Stop(syscall.SIGTERM); err != nil {
			c.t.Errorf("%s: %v", cmd, err)
		}
	})
	for range 300 {
		if conn, err := net.Dial("unix", socket); err == nil {
			conn.Close()
			return
		}
		select {
		case <-s.Done():
			c.t.Fatalf("%s ended: %s", cmd, cmd.ProcessState)
		case <-time.After(100 * time.Millisecond):
		}
	}
	c.t.Fatalf("%s does not listen after 30 s", cmd)
}

func (c *containerd) ctr(args ...string) string {
	c.t.Helper()
	return run(c.t, exec.Command("ctr", append([]string{"--address", c.socket(), "--namespace", program.Namespace}, args...)...))
}

// pull pulls an image as CRI does, which asks the snapshotter before it fetches a layer;
// ctr of 1.x asks afterwards.
func (c *containerd) pull(ref string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), program.Namespace), program.Deadline)
	defer cancel()
	cl, err := client.New(c.socket())
	if err != nil {
		c.t.Fatal(err)
	}
	_, err = cl.Pull(ctx, ref, client.WithPullUnpack, client.WithPullSnapshotter("particle"),
		client.WithResolver(docker.NewResolver(docker.ResolverOptions{
			Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost)),
		})))
	if err := errors.Join(err, cl.Close()); err != nil {
		c.t.Fatalf("containerd pulls %s: %v", ref, err)
	}
}

// run starts a container that ends with the test, and returns where its root is.
func (c *containerd) run(ref, id string, args ...string) (rootfs string) {
	c.t.Helper()
	c.ctr(append([]string{"run", "--detach", "--net-host", "--snapshotter", "particle", ref, id}, args...)...)
	c.t.Cleanup(func() {
		c.ctr("tasks", "rm", "--force", id)
		c.ctr("containers", "rm", id)
		c.ctr("images", "rm", "--sync", ref)
	})
	rootfs = filepath.Join(c.dir, "state/io.containerd.runtime.v2.task", program.Namespace, id, "rootfs")
	if _, err := os.Stat(filepath.Join(rootfs, "usr")); err != nil {
		c.t.Fatal(err)
	}
	return rootfs
}
