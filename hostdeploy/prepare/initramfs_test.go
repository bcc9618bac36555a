package prepare

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/particle-os/particle/tests/program"
)

// withMkinitramfs gives a tree a shell, and a mkinitramfs that writes for which kernel it
// was run. Its kernel has no initramfs then.
func withMkinitramfs(t *testing.T, root string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for chroot(2)")
	}
	plant(t, root, "0755 bin/sh="+string(program.Busybox(t)), "0755 usr/sbin/mkinitramfs=#!/bin/sh\necho \"made for $3\" >$2\n")
	if err := os.Remove(filepath.Join(root, "boot/initrd.img-6.1")); err != nil {
		t.Fatal(err)
	}
}

// wantInitramfs looks for what that mkinitramfs makes, and for nothing else.
func wantInitramfs(t *testing.T, root, scratch string) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(root, modulesDir, "6.1", initrdName))
	if want := "made for 6.1\n"; err != nil || string(got) != want {
		t.Errorf("the initramfs: got %q, %v, want %q", got, err, want)
	}
	for _, dir := range []string{scratch, modulesDir + "/6.1"} {
		left, err := filepath.Glob(filepath.Join(root, dir, ".particle-*"))
		if err != nil || len(left) != 0 {
			t.Errorf("left in /%s: %q, %v", dir, left, err)
		}
	}
}

// TestLinkedTmp makes an initramfs where /var/tmp is a link of the author's.
func TestLinkedTmp(t *testing.T) {
	root := small(t)
	withMkinitramfs(t, root)
	if err := os.RemoveAll(filepath.Join(root, "var/tmp")); err != nil {
		t.Fatal(err)
	}
	plant(t, root, "1777 data/tmp/", "var/tmp->/data/tmp")
	mustRun(t, root)
	wantInitramfs(t, root, "data/tmp")
}

// TestMountedTmp makes one where the build has mounted something on /var/tmp.
func TestMountedTmp(t *testing.T) {
	root := small(t)
	withMkinitramfs(t, root)
	mountTmpfs(t, root, "var/tmp")
	mustRun(t, root)
	wantInitramfs(t, root, "var/tmp")
	if again := mustRun(t, root); len(again.Changes) != 0 {
		t.Errorf("a second run changes what is right:\n%s", lines(again))
	}
}
