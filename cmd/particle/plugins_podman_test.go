package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fakePodman puts a podman of some version first in $PATH. With a storage.conf that
// names a directory that is not there it fails, as podman does.
func fakePodman(t *testing.T, version string) {
	t.Helper()
	dir := t.TempDir()
	script := "#!/bin/sh\n" +
		"for d in $(sed -n 's/^additional.*= \\[\\(.*\\)\\].*/\\1/p' \"${CONTAINERS_STORAGE_CONF:-/dev/null}\" | tr -d '\",'); do\n" +
		"\t[ -d \"${d%:ref}\" ] || { echo \"can't stat $d\" >&2; exit 125; }\ndone\n" +
		"echo podman version " + version + "\n"
	if err := os.WriteFile(filepath.Join(dir, "podman"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("PARTICLE_PODMAN", "")
}

func TestPodmanBridge(t *testing.T) {
	const own = "# mine\n[storage]\ndriver = \"overlay\"\n[storage.options]\nadditionalimagestores = [\n \"/usr/lib\", # vendor\n]" // no newline
	for _, c := range []struct {
		name, version, conf string // conf "" is none
		images, layers      bool
	}{
		{"edited", "5.4.2", own, true, true}, {"too old for images", "4.3.1", own, false, true},
		{"made", "5.8.6", "", true, false}, {"made for an old one", "4.3.1", "", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			fakePodman(t, c.version)
			dir := t.TempDir()
			conf := filepath.Join(dir, "etc", "storage.conf")
			t.Setenv("CONTAINERS_STORAGE_CONF", conf)
			if c.conf != "" {
				if err := os.Mkdir(filepath.Dir(conf), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(conf, []byte(c.conf), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			plugins := func(args ...string) string {
				t.Helper()
				var out, stderr bytes.Buffer
				args = append([]string{"particle", "plugins"}, append(args, "podman", "--root", filepath.Join(dir, "root"))...)
				if status := run(args, nil, &out, &stderr); status != exitOK {
					t.Fatalf("%q: got status %d\n%s", args, status, stderr.Bytes())
				}
				return out.String()
			}
			if got := plugins("status"); !strings.Contains(got, bridgeOff) {
				t.Errorf("before: got %s", got)
			}
			if got := plugins("enable", "--dry-run"); !strings.Contains(got, "would write "+conf) {
				t.Errorf("dry run: got %s", got)
			}
			if _, err := os.Lstat(filepath.Join(dir, "root")); err == nil {
				t.Error("a dry run made directories")
			}
			plugins("enable")
			text, err := os.ReadFile(conf)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(string(text), filepath.Join(dir, "root", "images")); got != c.images {
				t.Errorf("image store in the configuration: got %v, want %v\n%s", got, c.images, text)
			}
			if got := strings.Contains(string(text), filepath.Join(dir, "root", "layers")+":ref"); got != c.layers {
				t.Errorf("layer store in the configuration: got %v, want %v\n%s", got, c.layers, text)
			}
			if got := plugins("enable"); !strings.Contains(got, "nothing to change") {
				t.Errorf("enabled again: got %s", got)
			}
			if got := plugins("status"); !strings.Contains(got, bridgeOn) {
				t.Errorf("enabled: got %s", got)
			}
			plugins("disable")
			back, err := readFileIfAny(conf)
			if err != nil {
				t.Fatal(err)
			}
			if c.conf == "" && back != nil || c.conf != "" && (back == nil || *back != c.conf) {
				t.Errorf("disabled: got %v, want %q", back, c.conf)
			}
			if got := plugins("disable"); !strings.Contains(got, "nothing to change") {
				t.Errorf("disabled again: got %s", got)
			}
		})
	}
}

// TestPodmanBridgeTries checks that a configuration that podman does not take is not
// written.
func TestPodmanBridgeTries(t *testing.T) {
	fakePodman(t, "5.4.2")
	dir := t.TempDir()
	conf := filepath.Join(dir, "storage.conf")
	const own = "[storage.options]\nadditionalimagestores = [\"/no/such/directory\"]\n"
	if err := os.WriteFile(conf, []byte(own), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := newPodmanBridge(bridgeOptions{config: conf, root: filepath.Join(dir, "root")})
	if err != nil {
		t.Fatal(err)
	}
	plan, err := b.enable(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := plan.apply(); err == nil || !strings.Contains(err.Error(), "does not take") {
		t.Errorf("got %v, want podman's complaint", err)
	}
	if got, err := os.ReadFile(conf); err != nil || string(got) != own {
		t.Errorf("got %v and %q, want it unchanged", err, got)
	}
}

// TestPodmanBridgeKeeps checks that what was added to a storage.conf that enable made
// survives disable.
func TestPodmanBridgeKeeps(t *testing.T) {
	fakePodman(t, "5.4.2")
	dir := t.TempDir()
	conf := filepath.Join(dir, "storage.conf")
	b, err := newPodmanBridge(bridgeOptions{config: conf, root: filepath.Join(dir, "root")})
	if err != nil {
		t.Fatal(err)
	}
	apply := func(plan *bridgePlan, err error) {
		t.Helper()
		if err == nil {
			_, err = plan.apply()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	apply(b.enable(context.Background()))
	f, err := os.OpenFile(conf, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("size = \"10G\"\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	apply(b.disable(context.Background()))
	got, err := os.ReadFile(conf)
	if err != nil || !strings.Contains(string(got), "size = \"10G\"") || strings.Contains(string(got), "particle") {
		t.Errorf("got %v and\n%s", err, got)
	}
}
