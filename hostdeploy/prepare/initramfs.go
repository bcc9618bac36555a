package prepare

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"strings"

	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// builders are the programs that make an initramfs, and the hooks by which they take in
// Particle's set-up of the root. The package particle installs both hooks.
var builders = []struct {
	program, hook string
	args          func(version, initrd string) []string
}{
	{
		"usr/sbin/update-initramfs", "usr/share/initramfs-tools/hooks/particle",
		// Unlike -u it takes versions that have none yet.
		func(version, _ string) []string { return []string{"-c", "-k", version} },
	},
	{
		"usr/bin/dracut", "usr/lib/dracut/modules.d/*particle/module-setup.sh",
		// The image is for other machines than the one that builds it.
		func(version, initrd string) []string {
			return []string{"--force", "--no-hostonly", "--reproducible", "--kver", version, initrd}
		},
	},
}

// initramfs makes the initramfs of each kernel that Debian's packages have put into
// /boot, after all else that goes into one.
func (p *preparation) initramfs(ctx context.Context) error {
	kernels, err := p.glob("boot/vmlinu[xz]-*")
	if err != nil {
		return err
	}
	for _, k := range kernels {
		_, version, _ := strings.Cut(k.Name(), "-")
		p.report.Kernels = append(p.report.Kernels, version)
	}
	if len(kernels) == 0 || p.o.NoInitramfs {
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
			initrd := "/boot/initrd.img-" + version
			if err := p.build(ctx, initrd, len(hooks) > 0, append([]string{"/" + b.program}, b.args(version, initrd)...)); err != nil {
				return err
			}
		}
		return nil
	}
	p.warnf("there is a kernel, and nothing that makes an initramfs: install initramfs-tools or dracut")
	return nil
}

// build makes one initramfs. Where there is no hook, one that is there already is as good
// as a new one.
func (p *preparation) build(ctx context.Context, initrd string, hook bool, command []string) error {
	name := strings.TrimPrefix(initrd, "/")
	before, err := p.lstat(name)
	if err != nil {
		return err
	}
	ready := before != nil
	var sum []byte
	if ready && hook {
		if p.check {
			if ready, err = p.hasSetup(name); err != nil {
				return err
			}
		} else if sum, err = p.sum(name); err != nil {
			return err
		}
	}
	if p.check || !hook {
		if ready || !p.will(Rebuild, name, "", "") {
			return nil
		}
	}
	// Directories in which the program has made files and removed them again.
	dirs := map[string]fs.FileInfo{}
	for _, dir := range []string{"boot", "tmp", "var/tmp"} {
		if fi, err := p.lstat(dir); err != nil {
			return err
		} else if fi != nil && fi.IsDir() {
			dirs[dir] = fi
		}
	}
	if err := p.runIn(ctx, command); err != nil {
		return fmt.Errorf("%w: %w", ErrInitramfs, err)
	}
	if hook {
		if has, err := p.hasSetup(name); err != nil {
			return err
		} else if !has {
			return fmt.Errorf("%w: /%s has not taken in Particle's set-up of the root, although its hook is installed", ErrInitramfs, name)
		}
	}
	after, err := p.sum(name)
	if err != nil {
		return err
	}
	if sum != nil && bytes.Equal(sum, after) {
		// The same bytes: nothing has changed, then.
		if err := p.like(name, before); err != nil {
			return err
		}
		for dir, fi := range dirs {
			if err := p.like(dir, fi); err != nil {
				return err
			}
		}
		return nil
	}
	if hook {
		p.will(Rebuild, name, "", "with Particle's set-up of the root")
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

// sum returns the SHA-256 of a file.
func (p *preparation) sum(name string) ([]byte, error) {
	f, err := p.root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, fmt.Errorf("reading /%s: %w", name, err)
	}
	return h.Sum(nil), nil
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
