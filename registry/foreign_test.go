package registry_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/particle-os/particle/registry"
)

// run runs a foreign program, found by the caller, and returns its standard output.
func run(t testing.TB, prog string, args ...string) string {
	t.Helper()
	cmd := exec.Command(prog, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

func lookPath(t testing.TB, prog string) string {
	t.Helper()
	path, err := exec.LookPath(prog)
	if err != nil {
		t.Skipf("no %s here (Debian package %s)", prog, prog)
	}
	return path
}

// inspect returns the manifest that skopeo sees.
func inspect(t testing.TB, skopeo string, ref registry.Ref) []byte {
	t.Helper()
	args := []string{"inspect", "--raw", ref.String()}
	if ref.Transport == registry.Docker {
		args = append(args, "--tls-verify=false")
	}
	return []byte(run(t, skopeo, args...))
}

// TestSkopeo has skopeo read what we wrote and write what we read, in each transport
// that it knows.
func TestSkopeo(t *testing.T) {
	skopeo := lookPath(t, "skopeo")
	for kind, m := range map[string]*image{"oci": ociImage(t), "docker": dockerImage(t)} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			// skopeo looks for OCI manifests only when a layout is searched for a tag.
			tag := map[string]string{"oci": ":localhost/x:1", "docker": ""}[kind]
			places := func(who string) []registry.Ref {
				return []registry.Ref{
					mustRef(t, "docker://%s/%s:1", serve(t, t.TempDir(), nil).Addr(), who),
					mustRef(t, "oci:%s/%s-layout%s", dir, who, tag),
					mustRef(t, "oci-archive:%s/%s.oci.tar%s", dir, who, tag),
				}
			}
			ours := places("ours")
			for _, ref := range ours {
				mustWrite(t, ref, m, nil)
				if got := inspect(t, skopeo, ref); !bytes.Equal(got, m.raw) {
					t.Errorf("skopeo reads %s as %s, want %s", ref, got, m.raw)
				}
			}
			for _, ref := range places("theirs") {
				if kind == "docker" && ref.Transport != registry.Docker {
					continue // skopeo would have to convert the manifest
				}
				run(t, skopeo, "--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false", ours[1].String(), ref.String())
				same(t, "through skopeo: "+ref.String(), readImage(t, ref, nil), m)
			}
		})
	}
}

// TestSkopeoDockerArchive compares config and layers: the manifest of such an archive
// is everyone's own make.
func TestSkopeoDockerArchive(t *testing.T) {
	skopeo := lookPath(t, "skopeo")
	dir := t.TempDir()
	m := dockerImage(t)

	ours := mustRef(t, "docker-archive:%s/ours.tar:localhost/x:1", dir)
	mustWrite(t, ours, m, nil)
	var seen struct {
		Config struct{ Digest string }
		Layers []struct{ Digest string }
	}
	if err := json.Unmarshal(inspect(t, skopeo, ours), &seen); err != nil {
		t.Fatal(err)
	}
	got := readImage(t, ours, nil)
	if seen.Config.Digest != m.manifest.Config.Digest.String() {
		t.Errorf("skopeo sees config %s, want %s", seen.Config.Digest, m.manifest.Config.Digest)
	}
	for i, l := range seen.Layers {
		if l.Digest != got.manifest.Layers[i].Digest.String() {
			t.Errorf("skopeo sees layer %s, we %s", l.Digest, got.manifest.Layers[i].Digest)
		}
	}

	layout := mustRef(t, "oci:%s/layout", dir)
	mustWrite(t, layout, m, nil)
	theirs := mustRef(t, "docker-archive:%s/theirs.tar:localhost/x:1", dir)
	run(t, skopeo, "--insecure-policy", "copy", layout.String(), theirs.String())
	back := readImage(t, theirs, nil)
	for i, l := range back.manifest.Layers {
		if l.Digest != got.manifest.Layers[i].Digest {
			t.Errorf("layer %d of skopeo's archive is %s, of ours %s", i, l.Digest, got.manifest.Layers[i].Digest)
		}
	}
}

// testPodman points PARTICLE_PODMAN to a podman with a storage of its own, and
// returns that program.
func testPodman(t *testing.T) string {
	t.Helper()
	podman := lookPath(t, "podman")
	if os.Getuid() != 0 {
		t.Skip("podman with a storage of its own needs root here")
	}
	// podman takes no runroot of more than 50 characters, so t.TempDir will not do.
	dir, err := os.MkdirTemp("/var/tmp", "pp-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	conf := filepath.Join(dir, "containers.conf")
	// No container is run, but podman starts up more easily so on odd machines.
	err = os.WriteFile(conf, []byte("[containers]\nnetns = \"host\"\n[engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\n"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	prog := filepath.Join(dir, "podman")
	script := fmt.Sprintf("#!/bin/sh\nexport CONTAINERS_CONF=%s\nexec %s --root %s/root --runroot %s/runroot --storage-driver vfs \"$@\"\n", conf, podman, dir, dir)
	if err := os.WriteFile(prog, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(prog, "info").CombinedOutput(); err != nil {
		t.Skipf("podman does not work here: %v: %s", err, out)
	}
	t.Setenv("PARTICLE_PODMAN", prog)
	return prog
}

func TestPodmanStorage(t *testing.T) {
	podman := testPodman(t)
	for kind, m := range map[string]*image{"oci": ociImage(t), "docker": dockerImage(t)} {
		temp := t.TempDir()
		opts := &registry.Options{TempDir: temp}
		ref := mustRef(t, "containers-storage:localhost/t/%s:1", kind)
		mustWrite(t, ref, m, opts)
		if id := run(t, podman, "image", "inspect", "--format", "{{.Id}} {{.ManifestType}}", "localhost/t/"+kind+":1"); id != m.manifest.Config.Digest.Hex+" "+string(m.mediaType) {
			t.Errorf("podman has image %s, want %s of type %s", id, m.manifest.Config.Digest.Hex, m.mediaType)
		}
		if names := run(t, podman, "images", "--format", "{{.Repository}}:{{.Tag}}", "--filter", "reference=localhost/t/"+kind+":1"); names != "localhost/t/"+kind+":1" {
			t.Errorf("podman lists %q", names)
		}
		img := mustOpen(t, ref, opts)
		var manifest struct {
			Config struct{ Digest string }
			Layers []struct{ MediaType types.MediaType }
		}
		raw, mediaType, err := img.Manifest(t.Context())
		if err != nil || mediaType != string(m.mediaType) {
			t.Errorf("manifest of type %s, %v, want %s", mediaType, err, m.mediaType)
		}
		if err := json.Unmarshal(raw, &manifest); err != nil {
			t.Fatal(err)
		}
		if manifest.Config.Digest != m.manifest.Config.Digest.String() {
			t.Errorf("config digest is %s, want podman's image ID %s", manifest.Config.Digest, m.manifest.Config.Digest)
		}
		readImage(t, ref, opts)
		if err := img.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := registry.Open(t.Context(), mustRef(t, "podman:localhost/not/there"), nil); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("opening what is not there: got %v, want ErrNotFound", err)
	}
}

// TestPodmanStorageAborted: a target that is closed early leaves podman as it was.
func TestPodmanStorageAborted(t *testing.T) {
	podman := testPodman(t)
	m := ociImage(t)
	temp := t.TempDir()
	target, err := registry.Create(t.Context(), mustRef(t, "podman:localhost/t/x:1"), &registry.Options{TempDir: temp})
	if err != nil {
		t.Fatal(err)
	}
	for h, b := range m.blobs {
		if err := target.PutBlob(t.Context(), describe(b, ""), opener(b)); err != nil {
			t.Fatal(h, err)
		}
	}
	if err := target.Close(); err != nil {
		t.Fatal(err)
	}
	if got := run(t, podman, "images", "--all", "--quiet"); got != "" {
		t.Errorf("podman has images %s", got)
	}
	if got := listing(t, temp); len(got) > 0 {
		t.Errorf("temporary files are left: %q", got)
	}
}

// TestPodmanFails: what podman says is in the error.
func TestPodmanFails(t *testing.T) {
	dir := t.TempDir()
	prog := filepath.Join(dir, "podman")
	if err := os.WriteFile(prog, []byte("#!/bin/sh\necho broken pod >&2\nexit 125\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PARTICLE_PODMAN", prog)
	ref := mustRef(t, "podman:localhost/x:1")
	if _, err := registry.Open(t.Context(), ref, nil); err == nil || !strings.Contains(err.Error(), "broken pod") {
		t.Errorf("Open: got %v, want podman's words", err)
	}
	if _, err := registry.Create(t.Context(), ref, nil); err == nil || !strings.Contains(err.Error(), "broken pod") {
		t.Errorf("Create: got %v, want podman's words", err)
	}
	t.Setenv("PARTICLE_PODMAN", filepath.Join(dir, "none"))
	if _, err := registry.Open(t.Context(), ref, nil); !errors.Is(err, registry.ErrNotFound) {
		t.Errorf("Open without podman: got %v, want ErrNotFound", err)
	}
}

// TestPodmanLoad has podman load our archives: the image ID must be the config digest.
func TestPodmanLoad(t *testing.T) {
	podman := testPodman(t)
	for kind, m := range map[string]*image{"oci": ociImage(t), "docker": dockerImage(t)} {
		for _, transport := range []string{"docker-archive", "oci-archive"} {
			name := fmt.Sprintf("localhost/load/%s-%s:1", transport, kind)
			ref := mustRef(t, "%s:%s/%s.tar:%s", transport, t.TempDir(), kind, name)
			mustWrite(t, ref, m, nil)
			run(t, podman, "load", "--quiet", "--input", ref.Path)
			if id := run(t, podman, "image", "inspect", "--format", "{{.Id}}", name); id != m.manifest.Config.Digest.Hex {
				t.Errorf("%s: podman loaded %s, want %s", ref, id, m.manifest.Config.Digest.Hex)
			}
			// What podman saves is for us to read.
			saved := filepath.Join(t.TempDir(), "saved.tar")
			run(t, podman, "save", "--quiet", "--format", transport, "--output", saved, name)
			got := readImage(t, mustRef(t, "%s:%s:%s", transport, saved, name), nil)
			if transport == "docker-archive" && kind == "docker" && got.manifest.Config.Digest != m.manifest.Config.Digest {
				t.Errorf("saved config is %s, want %s", got.manifest.Config.Digest, m.manifest.Config.Digest)
			}
			for i, l := range got.manifest.Layers {
				if l.Size == 0 {
					t.Errorf("layer %d is empty", i)
				}
			}
		}
	}
}
