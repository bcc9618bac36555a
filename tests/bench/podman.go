package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// The podman of these groups is that of Debian 13, in a chroot that the tests of
// tests/podman make: Debian 12's knows neither zstd:chunked in its present form nor
// composefs layers. Each turn has a mount namespace of its own, so that nothing of it
// stays mounted.

// podmanChroot is where the chroot is, "" if there is none.
func podmanChroot() string {
	cache := os.Getenv("PARTICLE_TEST_CACHE")
	if cache == "" {
		cache = "/var/cache/particle-test"
	}
	dir := filepath.Join(cache, "podman-trixie")
	if _, err := os.Stat(filepath.Join(dir, "usr/bin/podman")); err != nil {
		return ""
	}
	return dir
}

const noChroot = "no chroot with Debian 13's podman; PARTICLE_TEST_PODMAN=all go test ./tests/podman makes it"

// chunked is what the images with zstd:chunked layers are called in the registry.
func chunked(img image) string { return img.name + "-chunked" }

// podmanOptions are the parts of storage.conf that contenders differ in.
const (
	partialPulls = "[storage.options]\npull_options = {enable_partial_images = \"true\", use_hard_links = \"false\", convert_images = \"false\"}\n"
	plainPulls   = "[storage.options]\npull_options = {enable_partial_images = \"false\"}\n"
)

// podman13 makes a command that runs a script: before on this machine, inside, where
// podman is the chroot's, in it. Both see dir.
func (in *inputs) podman13(dir, options, before, inside string) *exec.Cmd {
	root := podmanChroot()
	for name, text := range map[string]string{
		"storage.conf": fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n%s", filepath.Join(dir, "graph"), filepath.Join(dir, "run"), options),
		"containers.conf": "[containers]\nnetns = \"host\"\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n" +
			"[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"runc\"\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return &exec.Cmd{Err: err} // Start reports it
		}
	}
	script := `set -e
` + before + `
mkdir -p "$ROOT$DIR"
mount --bind "$ROOT" "$ROOT"
for d in proc sys dev; do mount --rbind /$d "$ROOT/$d"; done
mount -t tmpfs tmpfs "$ROOT/run"
mkdir -p "$ROOT$DIR"
mount --bind "$DIR" "$ROOT$DIR"
exec chroot "$ROOT" sh -c 'set -e
` + inside + `'`
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
	cmd.Env = append(os.Environ(), "ROOT="+root, "DIR="+dir, "TMPDIR="+dir, "PODMAN_IGNORE_CGROUPSV1_WARNING=1",
		"PARTICLE="+in.particle,
		"CONTAINERS_STORAGE_CONF="+filepath.Join(dir, "storage.conf"), "CONTAINERS_CONF="+filepath.Join(dir, "containers.conf"))
	return cmd
}

// podmanWays are the ways from a registry to an image that podman can run.
var podmanWays = []struct {
	name, options string
	before        string // on this machine
	inside        string // in the chroot
	image         func(image) string
}{
	{
		"particle pull, export to podman-store", "[storage.options]\nadditionalimagestores = [\"%s/images\"]\n",
		`"$PARTICLE" --quiet --store "$DIR/store" pull "$HOST/$IMAGE" "$HOST/$IMAGE" >/dev/null
"$PARTICLE" --quiet --store "$DIR/store" export "$HOST/$IMAGE" "podman-store:$DIR/images" >/dev/null`,
		"", func(img image) string { return img.name },
	},
	{"podman pull, overlay", plainPulls, "", "podman pull --quiet --tls-verify=false $HOST/$IMAGE", func(img image) string { return img.name }},
	{"podman pull, zstd:chunked in parts", partialPulls, "", "podman pull --quiet --tls-verify=false $HOST/$IMAGE", chunked},
}

// podmanGroups are a pull, with a second image of the same base, and all the way to
// the end of the first process.
func podmanGroups() []group {
	pull := group{name: "podman-pull", what: "podman of Debian 13: an image from a registry on this machine, ready to run; then a second one of the same base"}
	start := group{name: "podman-start", what: "the same, and a first container that ends at once"}
	for i, way := range podmanWays {
		do := func(run string) func(*inputs, string, image) *exec.Cmd {
			return func(in *inputs, dir string, img image) *exec.Cmd {
				options := way.options
				if strings.Contains(options, "%s") {
					options = fmt.Sprintf(options, dir)
				}
				cmd := in.podman13(dir, options, way.before, way.inside+"\n"+run)
				cmd.Env = append(cmd.Env, "IMAGE="+way.image(img), "HOST="+in.ranged)
				return cmd
			}
		}
		target := 0.0
		if i > 0 {
			target = 1
		}
		base := contender{name: way.name, target: target, reads: layouts}
		p, s := base, base
		p.run = do("podman image exists $HOST/$IMAGE:latest")
		s.run = do("podman run --rm --pull=never $HOST/$IMAGE:latest true")
		pull.contenders = append(pull.contenders, twice(p))
		start.contenders = append(start.contenders, s)
	}
	return []group{pull, start}
}

// withPodman returns all groups, those of podman where there is a chroot for them and
// the name asked for is part of theirs.
func withPodman(ctx context.Context, in *inputs, only string) ([]group, error) {
	var wanted []group
	for _, g := range podmanGroups() {
		if strings.Contains(g.name, only) {
			wanted = append(wanted, g)
		}
	}
	if len(wanted) == 0 {
		return groups, nil
	}
	if podmanChroot() == "" {
		fmt.Fprintln(os.Stderr, "podman:", noChroot)
		return groups, nil
	}
	if err := in.serveRanges(); err != nil {
		return nil, err
	}
	if err := in.pushChunked(ctx); err != nil {
		return nil, err
	}
	return slices.Concat(groups, wanted), nil
}

// serveRanges gives the registry a second door for podman's partial pulls, which ask
// for several ranges in one request: registries in production answer that, the one
// here does not.
func (in *inputs) serveRanges() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	in.ranged = l.Addr().String()
	blobs := filepath.Join(filepath.Dir(in.scratch), "registry")
	door := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, digest, ok := strings.Cut(r.URL.Path, "/blobs/sha256:")
		if ok && r.Method == http.MethodGet && r.Header.Get("Range") != "" && !strings.Contains(digest, "/") {
			w.Header().Set("Content-Type", "application/octet-stream")
			http.ServeFile(w, r, filepath.Join(blobs, "sha256", digest))
			return
		}
		in.server.Handler.ServeHTTP(w, r)
	})}
	go door.Serve(l) // ends with the process
	return nil
}

// pushChunked gives both images to the registry as zstd:chunked, which podman itself
// makes of them.
func (in *inputs) pushChunked(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp(in.scratch, "chunked-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, discard(dir)) }()
	for _, img := range []image{in.first, in.second} {
		fmt.Fprintf(os.Stderr, "preparing: %s as zstd:chunked\n", img.name)
		cmd := in.podman13(dir, plainPulls, "", "podman pull --quiet --tls-verify=false $HOST/$IMAGE\n"+
			"podman push --quiet --tls-verify=false --compression-format=zstd:chunked $HOST/$IMAGE $HOST/$IMAGE-chunked")
		cmd.Env = append(cmd.Env, "IMAGE="+img.name, "HOST="+in.ranged)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("making %s: %w\n%s", chunked(img), err, tailOf(string(out)))
		}
	}
	return ctx.Err()
}
