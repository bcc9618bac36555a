// Package packaging has no code: scripts that make the Debian package, systemd's units,
// and the tests of both.
package packaging

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// need skips a test that must be root or lacks a program; packages are Debian's.
func need(t *testing.T, root bool, programs map[string]string) {
	t.Helper()
	if testing.Short() {
		t.Skip("drives foreign programs; not in -short")
	}
	if root && os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	for p, pkg := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("there is no %s here (Debian package %s)", p, pkg)
		}
	}
}

func command(t *testing.T, dir string, env []string, argv ...string) string {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%q: %v\n%s%s", argv, err, stdout.String(), stderr.String())
	}
	return stdout.String()
}

// buildDeb builds the package from a copy of the sources and returns its name. The
// copy has no .git: what git would say is fixed.
func buildDeb(t *testing.T, source string) string {
	t.Helper()
	return strings.TrimSpace(command(t, source, []string{"VERSION=1.2.3~test", "SOURCE_DATE_EPOCH=1000000000", "GOFLAGS=-buildvcs=false"}, "packaging/deb.sh", filepath.Join(source, "dist")))
}

// copySources copies what the package is built from.
func copySources(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	command(t, "..", nil, "cp", "-a", "LICENSE", "Makefile", "README.md", "cmd", "converter", "docs", "go.mod", "go.sum", "hostdeploy", "packaging", "plugins.go", "plugins.toml", "podman-ext", "registry", "snapshotter", dir)
	return dir
}

func TestDeb(t *testing.T) {
	need(t, true, map[string]string{"dpkg-deb": "dpkg", "dpkg": "dpkg", "make": "make", "go": "golang"})
	first := copySources(t)
	deb := buildDeb(t, first)
	t.Run("reproducible", func(t *testing.T) {
		second := t.TempDir()
		command(t, first, nil, "cp", "-a", ".", second)
		// Neither the place nor the times, owners and modes of the sources matter.
		command(t, second, nil, "rm", "-r", "dist")
		command(t, second, nil, "find", ".", "-exec", "touch", "-h", "-d", "2020-02-02", "{}", "+")
		command(t, second, nil, "chmod", "-R", "g+w", ".")
		again := buildDeb(t, second)
		if filepath.Base(again) != filepath.Base(deb) {
			t.Errorf("names: got %q, want %q", filepath.Base(again), filepath.Base(deb))
		}
		if !bytes.Equal(readFile(t, again), readFile(t, deb)) {
			t.Errorf("%s and %s differ; diffoscope tells where", deb, again)
		}
	})
	t.Run("contents", func(t *testing.T) { testContents(t, deb) })
	t.Run("install", func(t *testing.T) { testInstall(t, deb) })
	t.Run("lintian", func(t *testing.T) {
		need(t, true, map[string]string{"lintian": "lintian"})
		out, err := exec.Command("lintian", "--allow-root", "--fail-on", "error,warning", deb).CombinedOutput()
		if err != nil {
			t.Errorf("lintian: %v\n%s", err, out)
		}
	})
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func testContents(t *testing.T, deb string) {
	for field, want := range map[string]string{"Package": "particle", "Version": "1.2.3~test", "Depends": ""} {
		if got := strings.TrimSpace(command(t, "", nil, "dpkg-deb", "-f", deb, field)); got != want {
			t.Errorf("%s: got %q, want %q", field, got, want)
		}
	}
	if runtime.GOARCH == "amd64" {
		if got := strings.TrimSpace(command(t, "", nil, "dpkg-deb", "-f", deb, "Architecture")); got != "amd64" {
			t.Errorf("Architecture: got %q", got)
		}
	}
	have := map[string]string{} // path to mode
	for line := range strings.Lines(command(t, "", nil, "dpkg-deb", "-c", deb)) {
		f := strings.Fields(line)
		if f[1] != "root/root" || f[3] != "2001-09-09" {
			t.Errorf("owner or date: %q", line)
		}
		have[strings.TrimPrefix(f[5], ".")] = f[0]
	}
	for path, mode := range map[string]string{
		"/usr/bin/particle":                                                                 "-rwxr-xr-x",
		"/usr/lib/particle/particle-init-root":                                              "-rwxr-xr-x",
		"/usr/lib/particle/mkcomposefs":                                                     "lrwxrwxrwx",
		"/usr/lib/particle/composefs-info":                                                  "lrwxrwxrwx",
		"/usr/lib/particle/mount.composefs":                                                 "lrwxrwxrwx",
		"/usr/share/initramfs-tools/hooks/particle":                                         "-rwxr-xr-x",
		"/usr/share/initramfs-tools/scripts/init-bottom/particle":                           "-rwxr-xr-x",
		"/usr/lib/dracut/modules.d/95particle/module-setup.sh":                              "-rwxr-xr-x",
		"/usr/lib/systemd/system/particle-finalize.service":                                 "-rw-r--r--",
		"/usr/lib/systemd/system/paths.target.wants/particle-finalize.path":                 "lrwxrwxrwx",
		"/usr/lib/systemd/system/basic.target.wants/particle-boot-success.service":          "lrwxrwxrwx",
		"/usr/lib/systemd/system/emergency.target.wants/particle-boot-failed.service":       "lrwxrwxrwx",
		"/usr/lib/systemd/system/factory-reset.target.wants/particle-factory-reset.service": "lrwxrwxrwx",
		"/usr/lib/systemd/system/systemd-bless-boot.service.d/50-particle.conf":             "-rw-r--r--",
		"/usr/lib/systemd/system/particle-snapshotter.service":                              "-rw-r--r--",
		"/usr/lib/systemd/system/particle-snapshotter.socket":                               "-rw-r--r--",
		"/usr/lib/systemd/system-preset/80-particle.preset":                                 "-rw-r--r--",
		"/usr/share/man/man8/particle.8.gz":                                                 "-rw-r--r--",
		"/usr/share/man/man8/particle-convert.8.gz":                                         "-rw-r--r--",
		"/usr/share/bash-completion/completions/particle":                                   "-rw-r--r--",
		"/usr/share/zsh/vendor-completions/_particle":                                       "-rw-r--r--",
		"/usr/share/fish/vendor_completions.d/particle.fish":                                "-rw-r--r--",
		"/usr/share/doc/particle/copyright":                                                 "-rw-r--r--",
		"/usr/share/doc/particle/changelog.gz":                                              "-rw-r--r--",
		"/usr/share/doc/particle/README.md.gz":                                              "-rw-r--r--",
		"/usr/share/doc/particle/third-party-licenses.gz":                                   "-rw-r--r--",
	} {
		if have[path] != mode {
			t.Errorf("%s: got mode %q, want %q", path, have[path], mode)
		}
	}
	for path := range have {
		if path != "/" && !strings.HasPrefix(path, "/usr/") {
			t.Errorf("%s lies outside of /usr", path)
		}
		// composefs (Debian) and podman have files of these names.
		if slices.Contains([]string{"/usr/bin/mkcomposefs", "/usr/bin/composefs-info", "/usr/sbin/mount.composefs"}, path) {
			t.Errorf("%s belongs to the package composefs", path)
		}
	}
	licenses := command(t, "", nil, "sh", "-c", `dpkg-deb --fsys-tarfile "$1" | tar -xO ./usr/share/doc/particle/third-party-licenses.gz | gzip -d`, "sh", deb)
	for _, module := range []string{"the Go standard library", "github.com/urfave/cli/v2", "golang.org/x/sys"} {
		if !strings.Contains(licenses, module) {
			t.Errorf("the licence of %s is missing", module)
		}
	}
}

// testInstall installs and purges the package in an empty root: its scripts do no harm
// where neither systemd nor an initramfs is.
func testInstall(t *testing.T, deb string) {
	root := t.TempDir()
	t.Setenv("CONTAINERS_STORAGE_CONF", "") // podman's usual one
	// What maintainer scripts run in: a shell and update-alternatives, from this system.
	for _, dir := range []string{"usr/bin", "usr/sbin", "usr/lib", "etc/alternatives", "etc/containers", "dev", "var/lib/dpkg/alternatives", "var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/dpkg/triggers", "var/log", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A program that is run by another one reads /dev/null; an empty file is as good.
	for _, name := range []string{"var/lib/dpkg/status", "var/lib/dpkg/available", "dev/null"} {
		if err := os.WriteFile(filepath.Join(root, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"bin", "sbin", "lib"} {
		if err := os.Symlink("usr/"+dir, filepath.Join(root, dir)); err != nil {
			t.Fatal(err)
		}
	}
	for _, program := range []string{"sh", "update-alternatives", "rm", "rmdir"} {
		copyProgram(t, root, program)
	}
	list := func() string {
		// Left out: dpkg's own files, and directories that come to be by its work.
		return command(t, root, nil, "sh", "-c", `find . \( -path ./var/lib/dpkg -o -path ./var/log \) -prune -o -print | sort`)
	}
	before := list()
	command(t, "", nil, "dpkg", "--root="+root, "--force-not-root", "--install", deb)
	if target, err := os.Readlink(filepath.Join(root, "etc/alternatives/mkcomposefs")); err != nil || target != "/usr/lib/particle/mkcomposefs" {
		t.Errorf("the alternative mkcomposefs: got %q, %v", target, err)
	}
	if out := command(t, "", nil, "dpkg", "--root="+root, "--verify", "particle"); out != "" {
		t.Errorf("dpkg --verify: %s", out)
	}
	help := command(t, "", nil, "chroot", root, "/usr/bin/particle", "--help")
	if !strings.Contains(help, "container images as bootable, immutable systems") {
		t.Errorf("particle --help in the root printed %q", help)
	}
	testBridges(t, root)
	// A file of the package composefs wins over the alternative, which may be set again.
	mkcomposefs := filepath.Join(root, "usr/bin/mkcomposefs")
	if err := os.Remove(mkcomposefs); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(mkcomposefs, []byte("theirs"), 0o755); err != nil {
		t.Fatal(err)
	}
	command(t, "", nil, "dpkg", "--root="+root, "--install", deb)
	command(t, "", nil, "dpkg", "--root="+root, "--purge", "particle")
	if got := readFile(t, mkcomposefs); string(got) != "theirs" {
		t.Errorf("a file of another package was changed: %q", got)
	}
	if err := os.Remove(mkcomposefs); err != nil {
		t.Fatal(err)
	}
	// What Particle keeps of podman's stays, and podman is not told of it any more.
	command(t, root, nil, "rm", "-r", "var/lib/particle-podman")
	command(t, root, nil, "rm", "usr/bin/containerd", "usr/bin/podman")
	if after := list(); after != before {
		t.Errorf("a purge does not leave what was there:\n%s\nwant\n%s", after, before)
	}
}

// testBridges turns on the bridges that a removal has to turn off. The programs are
// stand-ins.
func testBridges(t *testing.T, root string) {
	t.Helper()
	for name, version := range map[string]string{"containerd": "containerd github.com/containerd/containerd v1.7.24 0", "podman": "podman version 4.3.1"} {
		if err := os.WriteFile(filepath.Join(root, "usr/bin", name), []byte("#!/bin/sh\necho "+version+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	command(t, "", nil, "chroot", root, "/usr/bin/particle", "plugins", "enable")
	for _, path := range []string{"etc/containerd/conf.d/particle.toml", "etc/containers/storage.conf"} {
		if _, err := os.Stat(filepath.Join(root, path)); err != nil {
			t.Error(err)
		}
	}
}

var library = regexp.MustCompile(`(/\S+) \(0x`)

// copyProgram copies a program of this system and its libraries into a root.
func copyProgram(t *testing.T, root, name string) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("there is no %s here", name)
	}
	files := []string{path}
	// ldd fails for static programs, which need nothing.
	out, _ := exec.Command("ldd", path).Output()
	for _, m := range library.FindAllStringSubmatch(string(out), -1) {
		files = append(files, m[1])
	}
	for _, f := range files {
		real, err := filepath.EvalSymlinks(f)
		if err != nil {
			t.Fatal(err)
		}
		dst := filepath.Join(root, f)
		if strings.HasPrefix(f, "/lib64/") {
			if err := os.MkdirAll(filepath.Join(root, "lib64"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
			t.Fatal(err)
		}
		data := readFile(t, real)
		if err := os.WriteFile(dst, data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}
