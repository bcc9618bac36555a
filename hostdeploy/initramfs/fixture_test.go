package initramfs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// privateEnv is set in the process that has a mount namespace of its own.
const privateEnv = "PARTICLE_TEST_PRIVATE_MOUNTS"

// TestMain runs the tests of root in a mount namespace of their own: what they mount is
// seen by nobody else and goes with them. Fuzzing mounts nothing.
func TestMain(m *testing.M) {
	fuzzing := false
	for _, arg := range os.Args {
		fuzzing = fuzzing || strings.HasPrefix(arg, "-test.fuzz")
	}
	if os.Geteuid() == 0 && !fuzzing && os.Getenv(privateEnv) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), privateEnv+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		if cmd.ProcessState != nil {
			os.Exit(cmd.ProcessState.ExitCode())
		}
		// Root of a container may not unshare: the tests that need it skip.
		fmt.Fprintf(os.Stderr, "no mount namespace for the tests: %v\n", err)
	}
	os.Exit(m.Run())
}

// needMounts skips a test where this process may not mount.
func needMounts(t *testing.T) {
	t.Helper()
	if os.Getenv(privateEnv) == "" {
		t.Skip("needs root, and a mount namespace of its own")
	}
}

// A system is the content of an image: paths and what is there. A path that ends with a
// slash is a directory, "-> TARGET" a symbolic link, "*" in front of the content makes
// a file executable.
type system map[string]string

// bootable is a small system with all that the set-up looks for.
func bootable(more system) system {
	s := system{
		"dev/": "", "proc/": "", "sys/": "", "run/": "", "tmp/": "", "sysroot/": "", "etc/": "", "var/": "",
		"usr/sbin/init": "*" + strings.Repeat("init", 100), "sbin": "-> usr/sbin",
		"usr/lib/os-release":    "ID=test\n",
		"usr/share/large":       strings.Repeat("large", 5000),
		"etc/image":             "of the image",
		"usr/share/second-file": strings.Repeat("second", 100),
	}
	for name, content := range more {
		if content == "" && !strings.HasSuffix(name, "/") {
			delete(s, name)
			delete(s, name+"/")
			continue
		}
		s[name] = content
	}
	return s
}

func (s system) tree(t testing.TB, txn *store.Txn) *tree.Tree {
	t.Helper()
	root := tree.New()
	for name, content := range s {
		dir := root.Root
		parts := strings.Split(strings.TrimSuffix(name, "/"), "/")
		for _, part := range parts[:len(parts)-1] {
			if dir.Dir[part] == nil {
				dir.Dir[part] = tree.NewImplied()
			}
			dir = dir.Dir[part]
		}
		base := parts[len(parts)-1]
		n := &tree.Node{Stat: tree.Stat{MtimeSec: 1700000000}}
		switch target, link := strings.CutPrefix(content, "-> "); {
		case strings.HasSuffix(name, "/"):
			if dir.Dir[base] == nil {
				dir.Dir[base] = tree.NewImplied()
			}
			continue
		case link:
			n.Mode, n.Target = tree.TypeSymlink|0o777, target
		default:
			n.Mode = tree.TypeRegular | 0o644
			body, exec := strings.CutPrefix(content, "*")
			if exec {
				n.Mode |= 0o111
			}
			n.File = &tree.File{Size: int64(len(body))}
			if len(body) <= 64 {
				n.File.Inline = []byte(body)
				break
			}
			d, err := txn.PutBytes(t.Context(), []byte(body))
			if err != nil {
				t.Fatal(err)
			}
			n.File.Object = d
		}
		dir.Dir[base] = n
	}
	return root
}

// A disk is a physical root in a directory.
type disk struct {
	dir string
}

func newDisk(t testing.TB) disk {
	t.Helper()
	d := disk{t.TempDir()}
	if _, err := store.Init(filepath.Join(d.dir, storeDir), store.Options{}); err != nil {
		t.Fatal(err)
	}
	d.mkdir(t, "state/os/default/var")
	return d
}

func (d disk) path(name string) string { return filepath.Join(d.dir, name) }

func (d disk) mkdir(t testing.TB, name string) {
	t.Helper()
	if err := os.MkdirAll(d.path(name), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (d disk) write(t testing.TB, name, content string) {
	t.Helper()
	d.mkdir(t, filepath.Dir(name))
	if err := os.WriteFile(d.path(name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// image puts a system into the store as a bootable image.
func (d disk) image(t testing.TB, s system) fsverity.Digest {
	t.Helper()
	st, err := store.Open(d.path(storeDir))
	if err != nil {
		t.Fatal(err)
	}
	txn, err := st.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer txn.Rollback()
	tr := s.tree(t, txn)
	digest, err := txn.PutImage(context.Background(), func(w io.Writer) error { return erofs.Write(w, tr, erofs.Options{}) })
	if err == nil {
		err = txn.Commit()
	}
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

// deploy puts a system into the store and makes its state.
func (d disk) deploy(t testing.TB, s system) fsverity.Digest {
	t.Helper()
	digest := d.image(t, s)
	d.state(t, digest.String())
	return digest
}

func (d disk) state(t testing.TB, id string) {
	t.Helper()
	dir := "state/deploy/" + id
	d.write(t, dir+"/etc/state", "of the state\n")
	if err := os.Symlink("../../os/default/var", d.path(dir+"/var")); err != nil {
		t.Fatal(err)
	}
	d.write(t, "state/os/default/var/shared", "of all\n")
}

// object returns the path of the object with some content, below the disk.
func object(content string) string {
	return storeDir + "/objects/" + fsverity.Sum(fsverity.SHA256, []byte(content)).Path()
}

// tamper changes a byte of a file, which may be read-only.
func (d disk) tamper(t testing.TB, name string) {
	t.Helper()
	data, err := os.ReadFile(d.path(name))
	if err != nil {
		t.Fatal(err)
	}
	data = bytes.Clone(data)
	data[len(data)/2] ^= 1
	if err := os.Remove(d.path(name)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.path(name), data, 0o444); err != nil {
		t.Fatal(err)
	}
}

// A boot is an initramfs's view of a disk.
type boot struct {
	root, run string
}

// mounted mounts a disk where an initramfs has it.
func (d disk) mounted(t *testing.T) boot {
	t.Helper()
	needMounts(t)
	base := t.TempDir()
	b := boot{filepath.Join(base, "root"), filepath.Join(base, "run")}
	for _, dir := range []string{b.root, b.run} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount(d.dir, b.root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for isMount(b.root) {
			if err := unmountAll(b.root); err != nil {
				t.Error(err)
				break
			}
		}
	})
	return b
}

func (b boot) setup(t *testing.T, cmdline string) (*Report, error) {
	t.Helper()
	return Setup(t.Context(), Options{Root: b.root, Cmdline: cmdline, Run: b.run})
}

func (b boot) path(name string) string { return filepath.Join(b.root, name) }

// insecure is the argument for an image where the kernel has no fs-verity.
func insecure(d fsverity.Digest) string { return "composefs.digest=?v1-sha256-12:" + d.String() }

func secure(d fsverity.Digest) string { return "composefs.digest=v1-sha256-12:" + d.String() }

// wantFile compares a file.
func wantFile(t *testing.T, name, want string) {
	t.Helper()
	if got, err := os.ReadFile(name); err != nil || string(got) != want {
		t.Errorf("%s: got %.40q, %v, want %.40q", name, got, err, want)
	}
}
