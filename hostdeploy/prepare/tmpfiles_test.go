package prepare

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// machine makes a machine's root of a prepared tree, without anything in /var.
func machine(t *testing.T, tree string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for owners")
	}
	if _, err := exec.LookPath("systemd-tmpfiles"); err != nil {
		t.Skip("there is no systemd-tmpfiles here (Debian package systemd)")
	}
	root := t.TempDir()
	for _, name := range []string{"etc/passwd", "etc/group", tmpfilesConf, factory} {
		to := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("cp", "-a", filepath.Join(tree, name), to).CombinedOutput(); err != nil {
			t.Fatalf("copying %s: %v: %s", name, err, out)
		}
	}
	return root
}

// bootMachine has systemd-tmpfiles do what it does at each boot.
func bootMachine(t *testing.T, root string) {
	t.Helper()
	out, err := exec.Command("systemd-tmpfiles", "--create", "--boot", "--prefix=/var", "--root="+root).CombinedOutput()
	// Lines of packages that are not in this small tree may fail.
	if t.Logf("systemd-tmpfiles: %v\n%s", err, out); strings.Contains(string(out), filepath.Base(tmpfilesConf)) {
		t.Error("systemd-tmpfiles complains of our lines")
	}
}

// TestBoots: what a machine lacks is made with the image's owner and mode; what its
// administrator has given others keeps them.
func TestBoots(t *testing.T) {
	tree := small(t)
	if os.Geteuid() == 0 {
		for name, owner := range map[string][2]int{
			"var/lib/app":         {988, 988}, // polkitd
			"var/lib/app/data.db": {988, 4},
			"var/lib/app/pipe":    {0, 33},
			"var/lib/app/empty":   {990, 33}, // web
		} {
			if err := os.Chown(filepath.Join(tree, name), owner[0], owner[1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	plant(t, tree, "0640 var/lib/rooted/conf=x\n")
	mustRun(t, tree)
	root := machine(t, tree)
	// The machine knows polkitd by another number.
	for name, text := range map[string]string{
		"etc/passwd": "root:x:0:0:::\npolkitd:x:123:124:::\nweb:x:990:33:::\n",
		"etc/group":  "root:x:0:\nadm:x:4:\nwww-data:x:33:\npolkitd:x:124:\n",
	} {
		plant(t, root, name+"="+text)
	}
	stat := func(name string) string {
		fi, err := os.Lstat(filepath.Join(root, name))
		if err != nil {
			return err.Error()
		}
		st := fi.Sys().(*syscall.Stat_t)
		return fmt.Sprintf("%04o %d:%d", st.Mode&0o7777, st.Uid, st.Gid)
	}
	made := map[string]string{
		"var/lib/app":         "0750 123:124",
		"var/lib/app/data.db": "0600 123:4",
		"var/lib/app/pipe":    "0600 0:33",
		"var/lib/app/empty":   "0644 990:33",
		"var/lib/rooted":      "0755 0:0",
		"var/lib/rooted/conf": "0640 0:0",
		"var/mail":            "2775 0:0",
	}
	bootMachine(t, root)
	for name, want := range made {
		if got := stat(name); got != want {
			t.Errorf("/%s was made as %s, want %s", name, got, want)
		}
	}

	const ofPolkitd = "var/lib/app/data.db" // systemd has no way to say its owner for new files only
	changed := map[string]string{}
	for name := range made {
		uid := 77
		if name == ofPolkitd {
			uid = 123
		}
		path := filepath.Join(root, name)
		if err := errors.Join(os.Chown(path, uid, 77), os.Chmod(path, 0o666)); err != nil {
			t.Fatal(err)
		}
		changed[name] = fmt.Sprintf("0666 %d:77", uid)
	}
	bootMachine(t, root)
	for name, want := range changed {
		if got := stat(name); got != want {
			t.Errorf("/%s is %s after a boot, want it left at %s", name, got, want)
		}
	}
}

// TestSeeded: what an administrator removes from what is copied as a whole does not come
// back.
func TestSeeded(t *testing.T) {
	tree := small(t)
	plant(t, tree, "var/www/html/index.html=it works\n")
	mustRun(t, tree)
	root := machine(t, tree)
	page, key := filepath.Join(root, "var/www/html/index.html"), filepath.Join(root, "var/roothome/.ssh/authorized_keys")
	bootMachine(t, root)
	for _, name := range []string{page, key} {
		if err := os.Remove(name); err != nil {
			t.Error(err)
		}
	}
	bootMachine(t, root)
	for _, name := range []string{page, key} {
		if _, err := os.Lstat(name); err == nil {
			t.Errorf("%s has come back", name)
		}
	}
}
