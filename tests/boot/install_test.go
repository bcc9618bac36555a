package boot

import (
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/particle-os/particle/tests/boot/vm"
)

// machineArgs are the kernel arguments that every installation of the tests gets. On a busy
// machine, disks take longer to appear than the minute and a half that systemd gives them.
var machineArgs = []string{"console=ttyS0", "panic=10", deviceTimeout}

const deviceTimeout = "systemd.default_device_timeout_sec=600"

// install installs the server to a new disk's file and returns it.
func install(t testing.TB, l loader, file string, more ...string) {
	t.Helper()
	// What updates come from must be there before the first machine asks.
	reference := push(t, "server", l.name)
	args := []string{"--store", filepath.Join(work, "store"), "hostdeploy", "install", "to-disk", file,
		"--image", "containers-storage:" + image(t, "server"), "--bootloader", l.name,
		"--size", "4G", "--target-imgref", reference}
	for _, a := range machineArgs {
		args = append(args, "--karg", a)
	}
	run(t, particle, append(args, more...)...)
}

// golden holds, for each loader's name, a disk that was installed, booted once and
// switched off. The first boot takes longer: it enables fs-verity on each object.
var golden sync.Map

type goldenState struct {
	sync.Mutex
	disk string
}

// goldenDisk returns the disk of a host that is installed and has booted once; it must
// not be written to.
func goldenDisk(t testing.TB, l loader) string {
	t.Helper()
	v, _ := golden.LoadOrStore(l.name, new(goldenState))
	state := v.(*goldenState)
	state.Lock()
	defer state.Unlock()
	if state.disk != "" {
		return state.disk
	}
	disk := filepath.Join(work, l.name+".raw")
	install(t, l, disk)
	m := start(t, l, vm.Disk{File: disk})
	m.login()
	m.good()
	m.off()
	state.disk = disk
	return disk
}

// boot starts a machine from a copy of the golden disk and waits for its login prompt.
func boot(t testing.TB, l loader) *machine {
	t.Helper()
	base := goldenDisk(t, l)
	disk := filepath.Join(dirFor(t), "disk.qcow2")
	if err := vm.Overlay(interrupted, disk, base, "raw"); err != nil {
		t.Fatal(err)
	}
	m := start(t, l, vm.Disk{File: disk})
	m.login()
	return m
}

// "The server example is installed to a disk file and boots to a login prompt with the
// root enforced, under OVMF + systemd-boot, OVMF + GRUB, BIOS + GRUB and BIOS + extlinux.
// Inside: write to /usr fails, /etc and /var persist, status is right."
func TestInstall(t *testing.T) {
	t.Parallel()
	for _, l := range loaders {
		t.Run(l.firmware.String()+"-"+l.name, func(t *testing.T) {
			need(t, essential)
			t.Parallel() // each loader has a disk and a reference of its own
			m := boot(t, l)
			m.logIn()
			m.good()
			m.readOnly()

			s := m.status()
			d := s.booted(t)
			if s.Boot == nil || s.Boot.Verification != "enforced" {
				t.Fatalf("the root is not enforced: %+v", s.Boot)
			}
			if s.Bootloader != l.name {
				t.Errorf("status names the boot loader %q, want %q", s.Bootloader, l.name)
			}
			if !s.Verity {
				t.Error("the store does not promise fs-verity after the first boot")
			}
			if len(s.Deployments) != 1 || !d.Default || d.Staged || d.Failed || d.TriesLeft != nil || d.Generation != 1 {
				t.Errorf("deployments %+v, want one that is booted, good and the default", s.Deployments)
			}
			if want := "docker://" + guestRegistry + "/server:" + l.name; d.Reference != want {
				t.Errorf("updates come from %q, want %q", d.Reference, want)
			}
			cmdline := m.sh("cat /proc/cmdline")
			if !strings.Contains(cmdline, "composefs.digest=v1-sha256-12:"+d.hex()) {
				t.Errorf("status says %s, the kernel was started with %q", d.Digest, cmdline)
			}
			for _, a := range machineArgs {
				if !strings.Contains(cmdline, a) {
					t.Errorf("%s is not in the command line %q", a, cmdline)
				}
			}
			m.packages("1.0")
			m.sh("echo kept >/etc/particle-boot-test; echo kept >/var/lib/particle-boot-test; sync")
			id := m.sh("cat /etc/machine-id")
			m.reboot()
			m.equal("cat /etc/particle-boot-test /var/lib/particle-boot-test", "kept\nkept")
			m.equal("cat /etc/machine-id", id)
			m.good()
			if s := m.status(); s.Boot == nil || s.Boot.Verification != "enforced" || s.booted(t).ID != d.ID {
				t.Errorf("after a restart: %+v, %+v", s.Boot, s.Deployments)
			}
			m.clean()
		})
	}
}

// logIn logs in at the console, as a person would.
func (m *machine) logIn() {
	m.t.Helper()
	for _, step := range []struct{ text, answer string }{
		{"root\r", "Password: "}, {"particle\r", "# "}, {"echo logged-$((40+2))-in\r", "logged-42-in"},
	} {
		if err := m.Console.Type(step.text); err != nil {
			m.t.Fatal(err)
		}
		m.expect(literal(step.answer))
	}
}

// readOnly checks that the image's part of the system cannot be written, not even by
// root, and the machine's can.
func (m *machine) readOnly() {
	m.t.Helper()
	for _, f := range []string{"/usr/test", "/usr/bin/test", "/usr/share/particle-test/version", "/test", "/bin/sh"} {
		m.fails("echo x >>"+f, "Read-only file system")
	}
	m.fails("rm -f /usr/share/particle-test/version", "Read-only file system")
	m.sh("for d in /etc /var /var/lib /tmp /run /root /home; do touch $d/particle-test-writes && rm $d/particle-test-writes || exit 1; done")
}

// packages checks that dpkg tells the truth: the version of our package, and that no
// package's file differs from what the package had.
func (m *machine) packages(version string) {
	m.t.Helper()
	m.equal("dpkg-query -W -f '${Version} ${db:Status-Status}' particle-test", version+" installed")
	m.equal("cat /usr/share/particle-test/package-version", version)
	if out := m.sh("dpkg -l | awk '/^[a-z][a-z] / && $1 != \"ii\"'"); out != "" {
		m.t.Errorf("packages that are not just installed:\n%s", out)
	}
	r := m.try("dpkg --verify")
	if bad := unexpected(r.Stdout); r.Status != 0 && r.Status != 1 || len(bad) > 0 {
		m.t.Errorf("dpkg --verify: status %d\n%s%s", r.Status, strings.Join(bad, "\n"), r.Stderr)
	}
}

// clean checks that nothing failed in this boot, and that the store is sound.
func (m *machine) clean() {
	m.t.Helper()
	if out := m.sh("systemctl --failed --no-legend --plain"); out != "" {
		m.t.Errorf("units have failed:\n%s", out)
	}
	m.sh("particle store fsck")
}
