package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// A ctrImage is an image that containerd imports.
type ctrImage struct {
	name    string
	archive string // file
	layers  int
}

func (i ctrImage) what() string {
	if i.layers == 1 {
		return "1 layer"
	}
	return fmt.Sprintf("%d layers", i.layers)
}

// containerdImages are the inputs of this part.
type containerdImages struct {
	server ctrImage   // the server example
	flat   ctrImage   // its files in one layer
	five   []ctrImage // of one base, each with the same files in a layer of its own, and 4 MiB more
	starts []ctrImage // of few files in 1, 20 and 100 layers
}

// prepareContainerd makes the images, as archives that containerd imports.
func prepareContainerd(in *inputs) (*containerdImages, error) {
	dir := filepath.Join(in.scratch, "ctd-images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	images := &containerdImages{}
	_, server, err := in.first.open()
	if err != nil {
		return nil, err
	}
	if images.server, err = saveImage(dir, "server", server); err != nil {
		return nil, err
	}
	flat, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return mutate.Extract(server), nil })
	if err != nil {
		return nil, err
	}
	if images.flat, err = saveLayers(dir, "flat", empty.Image, flat); err != nil {
		return nil, err
	}
	_, tiny, err := in.second.open()
	if err != nil {
		return nil, err
	}
	layers, err := tiny.Layers()
	if err != nil {
		return nil, err
	}
	for i := range 5 {
		own, err := commonLayer(i)
		if err != nil {
			return nil, err
		}
		img, err := saveLayers(dir, fmt.Sprintf("five%d", i), empty.Image, layers[0], own)
		if err != nil {
			return nil, err
		}
		images.five = append(images.five, img)
	}
	shell, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: apt install busybox-static", err)
	}
	program, err := os.ReadFile(shell)
	if err != nil {
		return nil, err
	}
	for _, n := range []int{1, 20, 100} {
		var layers []v1.Layer
		for i := range n {
			l, err := startLayer(program, i)
			if err != nil {
				return nil, err
			}
			layers = append(layers, l)
		}
		img, err := saveLayers(dir, fmt.Sprintf("start%d", n), empty.Image, layers...)
		if err != nil {
			return nil, err
		}
		images.starts = append(images.starts, img)
	}
	return images, nil
}

func saveLayers(dir, repo string, base v1.Image, layers ...v1.Layer) (ctrImage, error) {
	img, err := mutate.ConfigFile(base, &v1.ConfigFile{Architecture: runtime.GOARCH, OS: "linux"})
	if err == nil {
		img, err = mutate.AppendLayers(img, layers...)
	}
	if err != nil {
		return ctrImage{}, err
	}
	return saveImage(dir, repo, img)
}

func saveImage(dir, repo string, img v1.Image) (ctrImage, error) {
	tag, err := name.NewTag("bench.example/" + repo + ":1")
	if err != nil {
		return ctrImage{}, err
	}
	layers, err := img.Layers()
	if err != nil {
		return ctrImage{}, err
	}
	i := ctrImage{name: tag.Name(), archive: filepath.Join(dir, repo+".tar"), layers: len(layers)}
	return i, tarball.WriteToFile(i.archive, tag, img)
}

// An entry is a file of a made layer, a directory where the body is nil, a symbolic link
// where target is set.
type entry struct {
	name, target string
	body         []byte
}

func makeLayer(entries []entry) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: e.name, Mode: 0o755, Size: int64(len(e.body)), ModTime: time.Unix(1_600_000_000, 0), Linkname: e.target}
		switch {
		case e.target != "":
			h.Typeflag = tar.TypeSymlink
		case e.body == nil:
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(e.body); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil })
}

// noise is content that no compressor shrinks, the same for the same seed.
func noise(seed string, size int) []byte {
	var b []byte
	for i := 0; len(b) < size; i++ {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %d", seed, i))
		b = append(b, sum[:]...)
	}
	return b[:size]
}

// commonLayer has 32 MiB in 512 files that all such layers have, and 4 MiB of its own.
func commonLayer(n int) (v1.Layer, error) {
	entries := []entry{{name: "opt/"}, {name: "opt/own", body: noise(fmt.Sprintf("own %d", n), 4<<20)}}
	for i := range 512 {
		entries = append(entries, entry{name: fmt.Sprintf("opt/common%d", i), body: noise(fmt.Sprintf("common %d", i), 64<<10)})
	}
	return makeLayer(entries)
}

// startLayer is a layer of an image of few files; the lowest has a program.
func startLayer(program []byte, n int) (v1.Layer, error) {
	var entries []entry
	if n == 0 {
		for _, dir := range []string{"bin/", "proc/", "sys/", "dev/", "run/", "tmp/", "etc/"} {
			entries = append(entries, entry{name: dir})
		}
		entries = append(entries, entry{name: "bin/busybox", body: program}, entry{name: "bin/true", target: "busybox"})
	}
	entries = append(entries, entry{name: fmt.Sprintf("data%d/", n)})
	for i := range 20 {
		entries = append(entries, entry{name: fmt.Sprintf("data%d/%d", n, i), body: noise(fmt.Sprintf("%d/%d", n, i), 1000)})
	}
	return makeLayer(entries)
}

// start starts containerd, with the snapshotter's daemon where there is one.
func (h *ctrHost) start() error {
	bin := filepath.Join(h.dir, "bin")
	config := filepath.Join(h.dir, "etc/config.toml")
	for _, dir := range []string{bin, filepath.Join(h.dir, "etc/conf.d")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\nimports = [%q]\n"+
		"disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n[grpc]\naddress = %q\n",
		filepath.Join(h.dir, "root"), filepath.Join(h.dir, "state"), filepath.Join(h.dir, "etc/conf.d/*.toml"), h.socket())
	env := append(os.Environ(), "PATH="+bin+":"+h.bin+":"+os.Getenv("PATH"))
	switch h.sn {
	case "erofs":
		platform := "linux/" + runtime.GOARCH
		text += fmt.Sprintf("[plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"erofs\", \"walking\"]\n"+
			"[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\nplatform = %q\nsnapshotter = \"erofs\"\ndiffer = \"erofs\"\n", platform)
		mkfs := h.in.fromOracle("mkfs.erofs")
		script := fmt.Sprintf("#!/bin/sh\nexec '%s' \"$@\"\n", strings.Join(mkfs.Args, "' '"))
		if err := os.WriteFile(filepath.Join(bin, "mkfs.erofs"), []byte(script), 0o755); err != nil {
			return err
		}
	case "particle":
		socket, root := filepath.Join(h.dir, "p.sock"), filepath.Join(h.dir, "sn")
		h.daemon = exec.Command(h.in.particle, "--quiet", "--store", filepath.Join(h.dir, "store"), "snapshotter",
			"--root", root, "--socket", socket, "--containerd", h.socket())
		if err := h.background(h.daemon, "daemon", env, func() error { return dialed(socket) }); err != nil {
			return err
		}
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			return err
		}
		cmd := exec.Command(h.in.particle, "--quiet", "plugins", "enable", "containerd", "--config", config, "--socket", socket, "--root", root)
		cmd.Env = env
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("particle plugins enable: %w\n%s", err, out)
		}
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	h.containerd = exec.Command(filepath.Join(h.bin, "containerd"), "--log-level", "warn", "--config", config)
	return h.background(h.containerd, "containerd", env, func() error {
		_, err := h.ctr("version")
		return err
	})
}

func (h *ctrHost) socket() string { return filepath.Join(h.dir, "c.sock") }

func dialed(socket string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	return conn.Close()
}

// background starts a program and waits until it is ready.
func (h *ctrHost) background(cmd *exec.Cmd, what string, env []string, ready func() error) error {
	log, err := os.Create(filepath.Join(h.dir, what+".log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr, cmd.Env = log, log, env
	if err := cmd.Start(); err != nil {
		return err
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if err = ready(); err == nil {
			return nil
		}
		if time.Now().After(end) || h.ctx.Err() != nil {
			text, _ := os.ReadFile(log.Name())
			return fmt.Errorf("%s does not answer: %w\n%s", what, err, tailOf(string(text)))
		}
	}
}

func (h *ctrHost) ctr(args ...string) (string, error) {
	cmd := exec.CommandContext(h.ctx, filepath.Join(h.bin, "ctr"), append([]string{"--address", h.socket(), "--namespace", "bench"}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		logs := ""
		for _, what := range []string{"containerd", "daemon"} {
			text, _ := os.ReadFile(filepath.Join(h.dir, what+".log"))
			logs += tailOf(string(text))
		}
		return "", fmt.Errorf("ctr %s: %w\n%s\n%s", strings.Join(args, " "), err, tailOf(stdout.String()+stderr.String()), logs)
	}
	return stdout.String(), nil
}

// timed runs ctr and returns how many seconds it took.
func (h *ctrHost) timed(args ...string) (float64, error) {
	began := time.Now()
	_, err := h.ctr(args...)
	return time.Since(began).Seconds(), err
}

// unpack imports an image and unpacks it.
func (h *ctrHost) unpack(img ctrImage) error {
	_, err := h.ctr("images", "import", "--snapshotter", h.sn, img.archive)
	return err
}

// disk returns what a snapshotter has on disk, without containerd's blobs, which are the
// same with all.
func (h *ctrHost) disk() (total int64, err error) {
	dirs := []string{filepath.Join(h.dir, "root/io.containerd.snapshotter.v1."+h.sn)}
	if h.sn == "particle" {
		dirs = []string{filepath.Join(h.dir, "store"), filepath.Join(h.dir, "sn")}
	}
	if _, err := os.Stat(filepath.Join(h.dir, "root/io.containerd.snapshotter.v1."+h.sn)); h.sn != "particle" && err != nil {
		return 0, err
	}
	for _, dir := range dirs {
		n, err := diskUsage(dir)
		if err != nil {
			return 0, err
		}
		total += n
	}
	return total, nil
}

// unique adds up the content of images, each once: in bytes, and in blocks.
func (h *ctrHost) unique(images []ctrImage) (exact, blocks int64, err error) {
	seen := map[[sha256.Size]byte]bool{}
	for i, img := range images {
		target := filepath.Join(h.dir, fmt.Sprintf("unique%d", i))
		if err := os.Mkdir(target, 0o755); err != nil {
			return 0, 0, err
		}
		if _, err := h.ctr("images", "mount", "--snapshotter", h.sn, img.name, target); err != nil {
			return 0, 0, err
		}
		names, err := regularFiles(target)
		if err != nil {
			return 0, 0, err
		}
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				return 0, 0, err
			}
			if sum := sha256.Sum256(b); !seen[sum] {
				seen[sum] = true
				exact += int64(len(b))
				blocks += (int64(len(b)) + 4095) &^ 4095
			}
		}
		if _, err := h.ctr("images", "unmount", "--rm", "--snapshotter", h.sn, target); err != nil {
			return 0, 0, err
		}
	}
	return exact, blocks, nil
}
