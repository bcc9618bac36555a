package containerd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/particle-os/particle/tests/program"
)

// TestBuildKit builds a Containerfile with BuildKit's containerd worker over the
// snapshotter. BuildKit is no Debian package; buildkit.sh builds it from its module, and
// where it is missing changeAndCommit is what is left of this.
func TestBuildKit(t *testing.T) {
	bin := os.Getenv("PARTICLE_BUILDKIT")
	if bin == "" {
		t.Skip("PARTICLE_BUILDKIT names no directory with buildkitd and buildctl; tests/containerd/buildkit.sh makes one")
	}
	forReleases(t, func(t *testing.T, r release) {
		h := newHost(t, r)
		reg := newRegistry(t)
		base := reg.push(t, "base", changes(t))
		dir := filepath.Join(h.dir, "bk")
		if err := os.MkdirAll(filepath.Join(dir, "context"), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{
			"buildkitd.toml": fmt.Sprintf("[registry.%q]\nhttp = true\n", reg.Addr()),
			"context/file":   "from the context",
			"context/Dockerfile": "FROM " + base + ` AS one
RUN rm /etc/kept && echo more >>/etc/changed && mkdir /made && echo x >/made/x
RUN rm -r /made && mv /etc/setuid /moved && chown 7:8 /owned
COPY file /copied
FROM one
COPY --from=one /moved /again
RUN rm -r /opaque
`,
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		addr := "unix://" + filepath.Join(dir, "s")
		daemon := program.Start(t, filepath.Join(bin, "buildkitd"), "--config", filepath.Join(dir, "buildkitd.toml"), "--addr", addr, "--root", filepath.Join(dir, "root"),
			"--oci-worker=false", "--containerd-worker=true", "--containerd-worker-addr", h.socket(), "--containerd-worker-namespace", program.Namespace,
			"--containerd-worker-snapshotter", "particle", "--containerd-worker-net", "host")
		defer daemon.Stop(syscall.SIGTERM)
		buildctl := func(args ...string) error {
			_, err := program.Try(filepath.Join(bin, "buildctl"), append([]string{"--addr", addr}, args...)...)
			return err
		}
		eventually(t, "buildkitd answers", 30*time.Second, func() error { return buildctl("debug", "workers") })
		const name = "example.com/built:1"
		err := buildctl("build", "--frontend", "dockerfile.v0", "--local", "context="+filepath.Join(dir, "context"),
			"--local", "dockerfile="+filepath.Join(dir, "context"), "--output", "type=image,name="+name+",unpack=true")
		if err != nil {
			t.Fatalf("%v\nbuildkitd's log:\n%s", err, tail(daemon))
		}
		out := h.runIn("particle", name, "cat /etc/changed /copied; echo; ls -d /etc/kept /made /etc/setuid /opaque 2>/dev/null; stat -c '%n %a %u:%g' /moved /again /owned")
		if want := "newmore\nfrom the context\n/moved 4755 0:0\n/again 4755 0:0\n/owned 2770 7:8\n"; out != want {
			t.Errorf("a container of what was built prints %q, want %q", out, want)
		}
		if err := buildctl("prune", "--all"); err != nil {
			t.Error(err)
		}
		daemon.Stop(syscall.SIGTERM)
		h.ctr("images", "rm", "--sync", name)
		for lease := range strings.Lines(h.ctr("leases", "ls", "-q")) {
			h.ctr("leases", "rm", "--sync", strings.TrimSpace(lease))
		}
		h.storeEmpty()
	})
}
