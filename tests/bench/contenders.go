package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// A group is one job that several contenders do. The first is Particle.
type group struct {
	name       string
	what       string
	repeat     int // so many times the rounds of others, for what takes no time; 0 is 1
	contenders []contender
}

type contender struct {
	name string
	// program is what it needs, "" for what is built here; pkg is the Debian package
	// that has it.
	program, pkg string
	oracle       bool // program is in the chroot of Debian's sid
	// target is how many times faster than this contender Particle wants to be; 0 for
	// no aim.
	target float64
	reads  func(*inputs) []string // files that are brought into the page cache
	// run gives the command that does the job; what it makes lies in dir.
	run func(in *inputs, dir string, img image) *exec.Cmd
	// second does the same for a second image of the same base, after run; nil where
	// the job does not know images.
	second func(in *inputs, dir string, img image) *exec.Cmd
}

// missing says why a contender cannot run, "" if it can.
func (c *contender) missing(in *inputs) string {
	switch {
	case c.oracle && in.oracle == "":
		return "no chroot with the C tools; tests/setup/setup.sh makes it from Debian's sid"
	case c.oracle || c.program == "":
		return ""
	}
	if _, err := exec.LookPath(c.program); err != nil {
		return "not installed: apt install " + c.pkg
	}
	return ""
}

// twice makes a contender that takes the second image as it takes the first.
func twice(c contender) contender {
	c.second = c.run
	return c
}

func layouts(in *inputs) []string  { return []string{in.first.layout, in.second.layout} }
func archives(in *inputs) []string { return []string{in.first.archive, in.second.archive} }
func dump(in *inputs) []string     { return []string{in.dump} }
func root(in *inputs) []string     { return []string{in.root} }

var groups = []group{
	{
		name: "image",
		what: "a two-layer gzip image of Debian becomes files that can be used; then a second image of the same base",
		contenders: []contender{
			twice(contender{name: "particle convert", reads: layouts, run: func(in *inputs, dir string, img image) *exec.Cmd {
				return exec.Command(in.particle, "--quiet", "--store", filepath.Join(dir, "store"), "convert", "oci:"+img.layout+":"+img.name, img.name)
			}}),
			twice(contender{name: "podman load", program: "podman", pkg: "podman", target: 2, reads: archives, run: func(in *inputs, dir string, img image) *exec.Cmd {
				return in.podman(dir, "load", "--quiet", "--input", img.archive)
			}}),
			twice(contender{name: "umoci unpack", program: "umoci", pkg: "umoci", target: 2, reads: layouts, run: func(in *inputs, dir string, img image) *exec.Cmd {
				return exec.Command("umoci", "unpack", "--image", img.layout+":"+img.name, filepath.Join(dir, "bundle-"+img.name))
			}}),
			twice(contender{name: "skopeo copy (nothing unpacked)", program: "skopeo", pkg: "skopeo", reads: layouts, run: func(in *inputs, dir string, img image) *exec.Cmd {
				return exec.Command("skopeo", "copy", "--quiet", "oci:"+img.layout+":"+img.name, "dir:"+filepath.Join(dir, img.name))
			}}),
			{name: "gzip -dc | sha256sum (the floor)", program: "gzip", pkg: "gzip", reads: layouts, run: func(in *inputs, dir string, img image) *exec.Cmd {
				cmd := exec.Command("sh", append([]string{"-c", `set -e; for l; do gzip -dc "$l" | sha256sum; done`, "floor"}, img.layers...)...)
				return cmd
			}},
		},
	},
	{
		name: "registry",
		what: "the same image from a registry on this machine",
		contenders: []contender{
			twice(contender{name: "particle pull", reads: layouts, run: func(in *inputs, dir string, img image) *exec.Cmd {
				return exec.Command(in.particle, "--quiet", "--store", filepath.Join(dir, "store"), "pull", in.host+"/"+img.name, img.name)
			}}),
			twice(contender{name: "podman pull", program: "podman", pkg: "podman", reads: layouts, run: func(in *inputs, dir string, img image) *exec.Cmd {
				return in.podman(dir, "pull", "--quiet", "--tls-verify=false", in.host+"/"+img.name)
			}}),
		},
	},
	{
		name:   "dump",
		what:   "an EROFS image from a composefs dump, the largest of the conformance tests",
		repeat: 5,
		contenders: []contender{
			{name: "particle mkcomposefs", reads: dump, run: func(in *inputs, dir string, _ image) *exec.Cmd {
				return exec.Command(in.particle, "mkcomposefs", "--from-file", in.dump, filepath.Join(dir, "image"))
			}},
			{name: "C mkcomposefs", oracle: true, target: 2, reads: dump, run: func(in *inputs, dir string, _ image) *exec.Cmd {
				return in.fromOracle("mkcomposefs", "--from-file", in.dump, filepath.Join(dir, "image"))
			}},
		},
	},
	{
		name: "directory",
		what: "an image of the unpacked system, with its files",
		contenders: []contender{
			{name: "particle mkcomposefs", reads: root, run: func(in *inputs, dir string, _ image) *exec.Cmd {
				return exec.Command(in.particle, "mkcomposefs", "--digest-store="+filepath.Join(dir, "objects"), in.root, filepath.Join(dir, "image"))
			}},
			{name: "C mkcomposefs", oracle: true, reads: root, run: func(in *inputs, dir string, _ image) *exec.Cmd {
				return in.fromOracle("mkcomposefs", "--digest-store="+filepath.Join(dir, "objects"), in.root, filepath.Join(dir, "image"))
			}},
			{name: "mkfs.erofs", program: "mkfs.erofs", pkg: "erofs-utils", reads: root, run: func(in *inputs, dir string, _ image) *exec.Cmd {
				return exec.Command("mkfs.erofs", filepath.Join(dir, "image"), in.root)
			}},
			{name: "mksquashfs (gzip)", program: "mksquashfs", pkg: "squashfs-tools", reads: root, run: func(in *inputs, dir string, _ image) *exec.Cmd {
				return exec.Command("mksquashfs", in.root, filepath.Join(dir, "image"), "-quiet", "-no-progress")
			}},
		},
	},
}

// fromOracle runs a program of the chroot with the chroot's loader and libraries, so
// that it sees the same files as everybody else.
func (in *inputs) fromOracle(program string, args ...string) *exec.Cmd {
	loaders, _ := filepath.Glob(filepath.Join(in.oracle, "lib64/ld-linux*.so*"))
	more, _ := filepath.Glob(filepath.Join(in.oracle, "lib/ld-linux*.so*"))
	libs, _ := filepath.Glob(filepath.Join(in.oracle, "usr/lib/*-linux-gnu"))
	loader, lib := "ld-linux.so", ""
	if loaders = append(loaders, more...); len(loaders) > 0 {
		loader = loaders[0]
	}
	if len(libs) > 0 {
		lib = libs[0]
	}
	return exec.Command(loader, append([]string{"--library-path", lib, filepath.Join(in.oracle, "usr/bin", program)}, args...)...)
}

// podman runs podman with its images below dir and the test's settings otherwise.
func (in *inputs) podman(dir string, args ...string) *exec.Cmd {
	conf := filepath.Join(dir, "storage.conf")
	cmd := exec.Command("podman", args...)
	cmd.Env = append(os.Environ(), "CONTAINERS_STORAGE_CONF="+conf, "TMPDIR="+dir)
	text := fmt.Sprintf("[storage]\ndriver = \"overlay\"\ngraphroot = %q\nrunroot = %q\n", filepath.Join(dir, "graph"), filepath.Join(dir, "run"))
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		cmd.Err = err // Start reports it
	}
	return cmd
}
