package initramfs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/particle-os/particle/tests/program"
)

// initTop runs the script of init-top as initramfs-tools does, which exports what panic=
// is on the command line, and reads /conf/param.conf after each script. It returns what
// panic is then.
func initTop(t *testing.T, cmdline string, mark bool) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for chroot(2)")
	}
	script, err := carriers.ReadFile("initramfs-tools/init-top")
	if err != nil {
		t.Fatal(err)
	}
	busybox, root := string(program.Busybox(t)), t.TempDir()
	files := map[string]string{
		"bin/sh": busybox, "bin/cat": busybox, "proc/cmdline": cmdline + "\n",
		"scripts/init-top/particle": string(script), "conf/arch.conf": "",
	}
	if mark {
		files[ShellMark] = ""
	}
	for name, content := range files {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("/bin/sh", "-c", `export panic=
		for x in $(cat /proc/cmdline); do
			case $x in panic=*) panic=${x#panic=} ;; esac
		done
		/scripts/init-top/particle || exit
		[ ! -e /conf/param.conf ] || . /conf/param.conf
		echo "[$panic]"`)
	cmd.Env = []string{"PATH=/bin"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return strings.TrimSpace(string(out))
}

// TestInitTop: a panic= of the kernel's restarts a machine whose boot fails early, unless
// a shell may come.
func TestInitTop(t *testing.T) {
	const ours = "composefs.digest=?v1-sha256-12:x "
	for _, c := range []struct {
		cmdline string
		mark    bool
		want    string
	}{
		{"root=/dev/vda1", false, "[]"},
		{"root=/dev/vda1 panic=30", false, "[30]"},
		{"root=/dev/vda1 panic=30 particle.shell", true, "[30]"},
		{ours, false, "[10]"},
		{ours + "panic=30", false, "[30]"},
		{ours + "panic=10 particle.shell=no", false, "[10]"},
		{ours, true, "[]"},
		{ours + "panic=10", true, "[]"},
		{ours + "panic=10 particle.shell=no", true, "[]"},
		{ours + "panic=10 particle.shell", false, "[]"},
		{"panic=10 particle.shell=1 " + ours, false, "[]"},
		{ours + "panic=10 particle.shell particle.shell=0", false, "[10]"},
	} {
		if got := initTop(t, c.cmdline, c.mark); got != c.want {
			t.Errorf("%q, a shell in the image %v: panic is %s, want %s", c.cmdline, c.mark, got, c.want)
		}
	}
}
