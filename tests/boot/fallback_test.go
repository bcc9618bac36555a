package boot

import (
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A broken image is left by itself: after its tries the machine is back in the system
// that it came from, without anybody doing anything.
//
// "A broken image (kernel panics; init missing; unit fails) is left by itself after its
// tries."
func TestFallback(t *testing.T) {
	for _, l := range loaders {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			for _, b := range broken {
				t.Run(b.target, func(t *testing.T) {
					// The essential ones: one way to fail with each loader, each with one loader.
					if b.target == "panics" || l == oneLoader(t) {
						need(t, essential)
					} else {
						need(t, all)
					}
					testFallback(t, l, b)
				})
			}
		})
	}
}

// A failing is a way in which an image does not come up.
type failing struct {
	target string
	sign   *regexp.Regexp // of the failure, on the console
}

var broken = []failing{
	{"panics", kernelPanic},
	{"no-init", regexp.MustCompile(`the system cannot be booted: .*it has no init`)},
	{"unit-fails", regexp.MustCompile(`did not reach boot-complete.target|A health check that fails`)},
}

// testFallback reads from the console which of the two images each boot starts.
func testFallback(t *testing.T, l loader, b failing) {
	m := boot(t, l)
	before := m.status()
	old := before.booted(t).ID
	m.sh("echo mine >/etc/particle-own")
	d := m.stage(l, b.target)
	m.t.Logf("the loader falls back: %s", before.Fallback)
	m.sh("systemctl --no-block reboot")
	tries, failed := 0, false
	for image := ""; ; {
		which, groups := m.expectThrough(bootedImage, b.sign, loginPrompt)
		if which == 0 {
			if image = groups[1]; image == d.hex() {
				tries++
			}
			if tries > l.tries {
				t.Fatalf("the broken system is started for the %d. time", tries)
			}
		} else if image == "" {
			continue // of the system that shuts down
		} else if which == 1 {
			failed = true
		} else if image != d.hex() {
			break
		}
		// Else one whose check fails: it shows its prompt, too, and restarts then.
	}
	if !failed {
		t.Errorf("the console does not show %q", b.sign)
	}
	if tries != l.tries {
		t.Errorf("the broken system was tried %d times, want %d", tries, l.tries)
	}
	m.shell()
	m.equal("cat /usr/share/particle-test/version", "1")
	m.equal("cat /etc/particle-own", "mine")
	m.good()
	s := m.status()
	if b := s.booted(t); b.ID != old {
		t.Errorf("deployment %s runs, want %s", b.ID, old)
	}
	if !slices.ContainsFunc(s.Failures, func(f failure) bool { return f.ID == d.ID }) {
		t.Errorf("status does not tell that %s failed: %+v", d.ID, s.Failures)
	}
	m.registry()
	if again := m.deployed("particle hostdeploy upgrade --json"); !again.Same {
		t.Errorf("what failed is deployed again: %+v", again)
	}
	// And it stays left.
	m.reboot()
	m.equal("cat /usr/share/particle-test/version", "1")
	m.clean()
	// The way forward is open.
	m.upgrade(l, "next")
	m.equal("cat /usr/share/particle-test/version", "2")
	m.good()
}

// "Refused with one clear error each, nothing changed: an image without kernel, initrd or
// Particle's root set-up in it (unless forced), an image for another architecture, a full
// ESP, a read-only boot partition, a missing bootloader, two runs at once."
func TestRefusals(t *testing.T) {
	need(t, essential, "buildah")
	l := oneLoader(t)
	m := boot(t, l)
	// What must not change: entries, kernels, states, names of images.
	state := func() string {
		return m.sh(`cd /; find boot sysroot/state \( -path '*/var/*' -o -path sysroot/state/lock \) -prune -o -printf '%%p %%T@\n' | sort; cat boot/loader/entries/*; ls -R sysroot/composefs/images/refs sysroot/composefs/streams/refs/*particle* 2>/dev/null; ls /run/particle; cat sysroot/state/history`)
	}
	before := state()
	unchanged := func(what string) {
		t.Helper()
		if after := state(); after != before {
			t.Errorf("%s changed the host:\n%s", what, difference(before, after))
			before = after
		}
	}
	oneError := func(command string, texts ...string) {
		t.Helper()
		m.fails(command, texts...)
		// One error, of one line, besides progress.
		if r := m.try("%s", command); strings.Contains(r.Stderr, "panic:") || strings.Contains(r.Stderr, "goroutine ") {
			t.Errorf("%s: %s", command, r.Stderr)
		}
		unchanged(command)
	}
	for _, c := range []struct{ target, text string }{
		{"no-kernel", "image without a kernel"},
		{"no-initrd", "image without an initramfs"},
		{"no-setup", "initramfs without Particle's root set-up"},
	} {
		reference := push(t, c.target, c.target)
		m.registry()
		oneError("particle hostdeploy switch "+reference, c.text)
	}
	oneError("particle hostdeploy switch "+pushForeign(t), "architecture", "arm64")

	// The panics image has another initramfs, so a kernel would have to be copied.
	other := push(t, "panics", "other")
	m.sh("df -k --output=avail /boot | tail -n 1 | { read n; head -c $(( (n - 1000) * 1024 )) /dev/zero >/boot/filler; }; sync")
	before = state()
	oneError("particle hostdeploy switch "+other, "no space left on the boot file system")
	oneError("particle hostdeploy switch --now "+other, "no space left on the boot file system")
	m.sh("rm /boot/filler; sync")

	m.sh("mount -o remount,ro /boot")
	before = state()
	oneError("particle hostdeploy switch --now "+other, "read-only")
	oneError("particle hostdeploy kargs --append x --now", "read-only")
	m.sh("mount -o remount,rw /boot")

	before = state()
	if l.name == "systemd-boot" {
		// What the firmware says of the loader is out of the way, too.
		oneError("unshare -m sh -c 'mount -t tmpfs none /sys/firmware; mount -t tmpfs none /boot; particle hostdeploy upgrade'", "boot loader")
	} else {
		oneError("unshare -m sh -c 'mount -t tmpfs none /boot; particle hostdeploy upgrade'", "boot loader")
	}
	oneError("flock /sysroot/state/lock particle hostdeploy upgrade", "another run of particle hostdeploy")
	// Forced, the image without our part of the initramfs is taken.
	m.sh("particle hostdeploy switch --force --dry-run docker://%s/server:no-setup", guestRegistry)
	unchanged("a dry run")
}

// "A missing bootloader", when a disk is made: the image lacks the loader's files.
func TestInstallRefusals(t *testing.T) {
	need(t, essential)
	name := image(t, "no-loader")
	for _, l := range loaders {
		disk := dirFor(t) + "/disk"
		_, stderr, err := try(t, particle, "--store", dirFor(t)+"/store", "hostdeploy", "install", "to-disk", disk,
			"--image", "containers-storage:"+name, "--bootloader", l.name, "--size", "4G")
		if err == nil || !strings.Contains(stderr, "boot loader's files are missing") {
			t.Errorf("%s: %v\n%s", l.name, err, stderr)
		}
	}
}

// pushForeign makes an image that says it is for another architecture.
func pushForeign(t testing.TB) string {
	t.Helper()
	from := image(t, "server")
	container := strings.TrimSpace(run(t, "buildah", "from", "--pull-never", from))
	defer try(t, "buildah", "rm", container)
	run(t, "buildah", "config", "--arch", "arm64", container)
	run(t, "buildah", "commit", "-q", container, repo+":foreign")
	run(t, "podman", "push", "-q", "--tls-verify=false", repo+":foreign", "docker://"+server.Addr()+"/server:foreign")
	return "docker://" + guestRegistry + "/server:foreign"
}

// difference shows the first lines that two texts do not share.
func difference(a, b string) string {
	count := map[string]int{}
	for line := range strings.Lines(a) {
		count[line]--
	}
	for line := range strings.Lines(b) {
		count[line]++
	}
	var out strings.Builder
	shown := 0
	for line := range strings.Lines(a + "\n" + b) {
		if shown == 20 {
			out.WriteString("...\n")
			break
		}
		if count[line] != 0 {
			shown++
		}
		switch n := count[line]; {
		case n < 0:
			out.WriteString("- " + line)
		case n > 0:
			out.WriteString("+ " + line)
		}
		delete(count, line)
	}
	return out.String()
}
