package prepare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"

	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// builders are the programs that make an initramfs, and the hooks by which they take in
// Particle's set-up of the root. The package particle installs both hooks. Not
// update-initramfs: it is mkinitramfs, and hooks of boot loaders.
var builders = []struct {
	program, hook string
	args          func(version, out string) []string
}{
	{
		"usr/sbin/mkinitramfs", "usr/share/initramfs-tools/hooks/particle",
		func(version, out string) []string { return []string{"-o", out, version} },
	},
	{
		"usr/bin/dracut", "usr/lib/dracut/modules.d/*particle/module-setup.sh",
		// The image is for other machines than the one that builds it.
		func(version, out string) []string {
			return []string{"--force", "--no-hostonly", "--reproducible", "--kver", version, out}
		},
	},
}

// initramfs makes the initramfs of each kernel that has modules, after all else that goes
// into one.
func (p *preparation) initramfs(ctx context.Context) error {
	if err := p.findKernels(); err != nil {
		return err
	}
	if len(p.report.Kernels) == 0 || p.o.NoInitramfs {
		return nil
	}
	for _, b := range builders {
		if have, err := p.exists(b.program); err != nil {
			return err
		} else if !have {
			continue
		}
		hooks, err := p.glob(b.hook)
		if err != nil {
			return err
		}
		if len(hooks) == 0 {
			p.warnf("Particle's part of the initramfs is not in the image: install the package particle before particle prepare")
		}
		for _, version := range p.report.Kernels {
			command := func(out string) []string { return append([]string{"/" + b.program}, b.args(version, out)...) }
			if err := p.build(ctx, version, len(hooks) > 0, command); err != nil {
				return err
			}
		}
		return nil
	}
	p.warnf("there is a kernel, and nothing that makes an initramfs: install initramfs-tools or dracut")
	return nil
}

// findKernels notes the kernels' versions, in order. In a check they may not have moved.
func (p *preparation) findKernels() error {
	moved, err := p.glob(path.Join(modulesDir, "*", "vmlinu[xz]"))
	if err != nil {
		return err
	}
	for _, en := range moved {
		p.report.Kernels = append(p.report.Kernels, path.Base(path.Dir(en.path)))
	}
	inBoot, err := p.glob("boot/vmlinu[xz]-*")
	if err != nil {
		return err
	}
	for _, en := range inBoot {
		_, version, _ := strings.Cut(en.Name(), "-")
		if fi, err := p.lstat(path.Join(modulesDir, version)); err != nil {
			return err
		} else if isDir(fi) {
			p.report.Kernels = append(p.report.Kernels, version)
		}
	}
	slices.Sort(p.report.Kernels)
	p.report.Kernels = slices.Compact(p.report.Kernels)
	return nil
}

// build makes one initramfs. Where there is no hook, one that is there already is as good
// as a new one.
func (p *preparation) build(ctx context.Context, version string, hook bool, command func(out string) []string) error {
	name := path.Join(modulesDir, version, initrdName)
	inBoot := "boot/initrd.img-" + version
	have := name
	if p.check { // it may not have moved
		if there, err := p.exists(name); err != nil {
			return err
		} else if !there {
			have = inBoot
		}
	}
	ready, err := p.exists(have)
	if err != nil {
		return err
	}
	if p.check && ready && hook {
		if ready, err = p.hasSetup(have); err != nil {
			return err
		}
	}
	if p.check || !hook && ready {
		if !ready {
			p.will(Rebuild, name, "", "")
		}
		return nil
	}

	if p.o.Output != nil {
		fmt.Fprintf(p.o.Output, "making the initramfs of %s\n", version)
	}
	scratch, err := p.resolve("var/tmp")
	if err != nil {
		return err
	}
	// What is in a mount cannot be renamed out of it.
	if behind, err := p.behindMount(scratch); err != nil {
		return err
	} else if behind {
		scratch = path.Dir(name)
	}
	dirs, err := p.remember("tmp", scratch)
	if err != nil {
		return err
	}
	dir := temporary(path.Join(scratch, "x"))
	if err := p.root.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer p.root.RemoveAll(dir)
	made := path.Join(dir, initrdName)
	if err := p.runIn(ctx, command("/"+made)); err != nil {
		return fmt.Errorf("%w: %w", ErrInitramfs, err)
	}
	if hook {
		if has, err := p.hasSetup(made); err != nil {
			return err
		} else if !has {
			return fmt.Errorf("%w: that of %s has not taken in Particle's set-up of the root, although its hook is installed", ErrInitramfs, version)
		}
	}
	same := false
	if ready {
		if same, err = p.sameContent(made, name); err != nil {
			return err
		}
	}
	if same {
		if err := p.root.RemoveAll(dir); err != nil {
			return err
		}
		return p.restore(dirs)
	}
	p.will(Rebuild, name, "", "")
	if err := p.root.Chmod(made, 0o644); err != nil {
		return err
	}
	if err := p.root.Rename(made, name); err != nil {
		return err
	}
	target, err := relative(inBoot, name)
	if err != nil {
		return err
	}
	return p.link(inBoot, target, "for programs that look there")
}

// remember notes the attributes of directories in which a program is going to make and to
// remove files.
func (p *preparation) remember(names ...string) (map[string]fs.FileInfo, error) {
	dirs := map[string]fs.FileInfo{}
	for _, name := range names {
		if fi, err := p.lstat(name); err != nil {
			return nil, err
		} else if isDir(fi) {
			dirs[name] = fi
		}
	}
	return dirs, nil
}

// restore gives them back.
func (p *preparation) restore(dirs map[string]fs.FileInfo) error {
	for name, fi := range dirs {
		if err := p.like(name, fi); err != nil {
			return err
		}
	}
	return nil
}

// hasSetup looks into an initramfs.
func (p *preparation) hasSetup(name string) (bool, error) {
	f, err := p.root.Open(name)
	if err != nil {
		return false, err
	}
	defer f.Close()
	has, err := initramfs.Has(f)
	if err != nil {
		return false, fmt.Errorf("looking into /%s: %w", name, err)
	}
	return has, nil
}

// environment is what programs of the tree see, whoever builds.
func environment() []string {
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "TMPDIR=/var/tmp", "DEBIAN_FRONTEND=noninteractive"}
	// An ARG without a value is an empty variable in a build.
	if epoch := os.Getenv("SOURCE_DATE_EPOCH"); epoch != "" {
		env = append(env, "SOURCE_DATE_EPOCH="+epoch)
	}
	return env
}

// runIn runs a program of the tree in the tree.
func (p *preparation) runIn(ctx context.Context, command []string) error {
	said := &tail{}
	out := io.Writer(said)
	if p.o.Output != nil {
		out = io.MultiWriter(p.o.Output, said)
	}
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Env, cmd.Dir = environment(), "/"
	cmd.Stdout, cmd.Stderr = out, out
	err := runChroot(p.root, p.o.Root, cmd)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("%s: %w\n%s", path.Base(command[0]), err, said)
	}
	return fmt.Errorf("running %s: %w", command[0], err)
}

// tailSize is how many bytes of a program's output are in an error.
const tailSize = 2000

// A tail keeps the end of what is written to it.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if len(t.b) > tailSize {
		t.b = append([]byte(nil), t.b[len(t.b)-tailSize:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return strings.TrimSpace(string(t.b)) }
