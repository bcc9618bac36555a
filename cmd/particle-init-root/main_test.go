package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/particle-os/particle/hostdeploy/initramfs"
)

func TestUsage(t *testing.T) {
	if inInitramfs() {
		t.Skip("/ is in memory here: the program would take it for an initramfs")
	}
	missing := filepath.Join(t.TempDir(), "missing")
	for _, c := range []struct {
		args string
		want int
		text string
	}{
		{"", initramfs.ExitUsage, "usage: particle-init-root DIR"},
		{"a b", initramfs.ExitUsage, "usage:"},
		{"--other a", initramfs.ExitUsage, "-other"},
		{"--help", initramfs.ExitDone, "--next ARGUMENTS"},
		// On a running system it must neither replace a root nor restart the machine.
		{missing, initramfs.ExitUsage, "this is not an initramfs"},
		{"--next quiet " + missing, initramfs.ExitFailed, "names no image"},
		{"--next particle.etc=x " + missing, initramfs.ExitFailed, "want particle.etc=transient"},
		{"--next composefs=" + strings.Repeat("0a", 32) + " " + missing, initramfs.ExitFailed, "no such file or directory"},
	} {
		var stderr bytes.Buffer
		if got := run(strings.Fields(c.args), &stderr); got != c.want || !strings.Contains(stderr.String(), c.text) {
			t.Errorf("%q: got status %d and %q, want %d and %q", c.args, got, stderr.String(), c.want, c.text)
		}
	}
}

func TestOnlyDeployments(t *testing.T) {
	dir := t.TempDir()
	if onlyDeployments(dir) {
		t.Error("an empty disk is none of Particle's")
	}
	for _, name := range []string{"composefs", "sbin"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "composefs/meta.json"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if !onlyDeployments(dir) {
		t.Error("a disk with a store alone has nothing else to boot")
	}
	if err := os.Symlink("../lib/systemd/systemd", filepath.Join(dir, "sbin/init")); err != nil {
		t.Fatal(err)
	}
	if onlyDeployments(dir) {
		t.Error("a disk with a system beside the store boots without an image")
	}
}
