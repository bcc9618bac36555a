package tests

import (
	"strings"
	"testing"
)

// TestServerPrepared: the server example is what particle prepare makes of a tree, and
// apt and dpkg still work on it.
func TestServerPrepared(t *testing.T) {
	image := server.get(t)
	in := func(script string) string {
		t.Helper()
		return strings.TrimSpace(run(t, "podman", "run", "--rm", "--network", "host", image, "sh", "-ec", script))
	}
	if got := in("particle prepare --check"); got != "" {
		t.Errorf("there is something left to do:\n%s", got)
	}
	if got := in("dpkg --verify; dpkg --audit; readlink /var/lib/dpkg"); got != "../../usr/lib/sysimage/dpkg" {
		t.Errorf("dpkg: got %q", got)
	}
	if got := in("ls /etc/ssh/ssh_host_* 2>/dev/null || echo none; wc -c </etc/machine-id"); got != "none\n0" {
		t.Errorf("host keys and the size of machine-id: got %q", got)
	}
	// What apt does on top, prepare takes in.
	got := in("apt-get -q -y remove --auto-remove openssh-server >/dev/null; dpkg -l openssh-server | tail -n 1 | cut -c 1-2; particle prepare --no-initramfs >/dev/null; particle prepare --check; readlink /var/lib/dpkg")
	if got != "rc\n../../usr/lib/sysimage/dpkg" {
		t.Errorf("after another package was removed: got %q", got)
	}
}
