package tests

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// oracle runs a program of the composefs project out of a chroot of Debian's sid,
// by that chroot's own loader and libraries, so that paths mean the same to it.
func oracle(t testing.TB, program string, args ...string) string {
	t.Helper()
	root := os.Getenv("PARTICLE_ORACLE")
	if root == "" {
		t.Skip("PARTICLE_ORACLE names no chroot with the C composefs tools; tests/setup/setup.sh makes one of Debian's sid")
	}
	loaders, _ := filepath.Glob(filepath.Join(root, "lib*/ld-linux*.so*"))
	libs, _ := filepath.Glob(filepath.Join(root, "usr/lib/*-linux-gnu*"))
	if len(loaders) == 0 || len(libs) == 0 {
		t.Fatalf("no loader or libraries in %s", root)
	}
	return run(t, loaders[0], append([]string{"--library-path", strings.Join(libs, ":"), filepath.Join(root, "usr/bin", program)}, args...)...)
}

// TestRealTreesEqualTheCTools: images of real Debian trees are those of the C tools
// byte for byte, from a directory and from a dump.
func TestRealTreesEqualTheCTools(t *testing.T) {
	needPodman(t, "umoci")
	if os.Getenv("PARTICLE_ORACLE") == "" {
		oracle(t, "mkcomposefs") // skips
	}
	for _, c := range []struct {
		name string
		root func(t *testing.T) string
	}{
		{"bookworm", func(t *testing.T) string { return unpack(t, bookworm.get(t)) }},
		{"trixie", func(t *testing.T) string { return unpack(t, trixie.get(t)) }},
		{"server", func(t *testing.T) string { return podmanMount(t, server.get(t)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			root, dir := c.root(t), dirFor(t)
			at := func(name string) string { return filepath.Join(dir, name) }

			oracle(t, "mkcomposefs", "--digest-store="+at("theirs"), root, at("theirs.cfs"))
			run(t, filepath.Join(work, "mkcomposefs"), "--digest-store="+at("ours"), root, at("ours.cfs"))
			equalFiles(t, "image of the directory", at("theirs.cfs"), at("ours.cfs"))
			list := `cd "$1" && find . -type f -printf '%P %s\n' | LC_ALL=C sort`
			if a, b := run(t, "sh", "-c", list, "sh", at("theirs")), run(t, "sh", "-c", list, "sh", at("ours")); a != b {
				t.Errorf("the digest stores differ: %s", firstDifference(a, b))
			}

			dump := oracle(t, "composefs-info", "dump", at("theirs.cfs"))
			if got := run(t, filepath.Join(work, "composefs-info"), "dump", at("ours.cfs")); got != dump {
				t.Errorf("the dumps differ: %s", firstDifference(dump, got))
			}
			if err := os.WriteFile(at("dump"), []byte(dump), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, version := range []string{"0", "1"} {
				flags := []string{"--min-version=" + version, "--max-version=" + version, "--from-file", at("dump")}
				oracle(t, "mkcomposefs", append(flags, at("theirs"+version))...)
				run(t, filepath.Join(work, "mkcomposefs"), append(flags, at("ours"+version))...)
				equalFiles(t, "image of the dump, version "+version, at("theirs"+version), at("ours"+version))
			}
			if _, err := exec.LookPath("fsck.erofs"); err == nil {
				run(t, "fsck.erofs", at("ours1"))
			}

			// What particle convert makes is what the C tool makes of its dump.
			convert(t, at("store"), root, "x")
			for _, kind := range []string{"rootfs", "merged"} {
				out := run(t, particle, "--store", at("store"), "dump", "--kind", kind, "x")
				if err := os.WriteFile(at("converted.dump"), []byte(out), 0o600); err != nil {
					t.Fatal(err)
				}
				got := strings.TrimSpace(oracle(t, "mkcomposefs", "--min-version=1", "--print-digest-only", "--from-file", at("converted.dump")))
				info := run(t, particle, "--store", at("store"), "info", "--kind", kind, "x")
				if !strings.Contains(info, got) {
					t.Errorf("the %s image has another digest than mkcomposefs makes of its dump, %s:\n%s", kind, got, info)
				}
			}
		})
	}
}

// unpack unpacks an image of a layout with umoci.
func unpack(t testing.TB, ref string) string {
	t.Helper()
	bundle := filepath.Join(dirFor(t), "bundle")
	run(t, "umoci", "unpack", "--image", strings.TrimPrefix(ref, "oci:"), bundle)
	return filepath.Join(bundle, "rootfs")
}

func equalFiles(t *testing.T, what, theirs, ours string) {
	t.Helper()
	a, err := os.ReadFile(theirs)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(ours)
	if err != nil {
		t.Fatal(err)
	}
	if len(a) == 0 {
		t.Errorf("%s: the C tool's is empty", what)
	}
	if !bytes.Equal(a, b) {
		t.Errorf("%s: ours has %d bytes, the C tool's %d, and they differ", what, len(b), len(a))
	}
}
