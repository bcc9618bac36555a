package packaging

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/particle-os/particle/hostdeploy/prepare"
)

// A unit is a file of systemd's: the values of each "Section.Key", in order.
type unit map[string][]string

func readUnits(t *testing.T) map[string]unit {
	t.Helper()
	units := map[string]unit{}
	for _, pattern := range []string{"systemd/*.service", "systemd/*.socket", "systemd/*.path", "systemd/*.timer", "systemd/*.d/*.conf"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			u, section := unit{}, ""
			for line := range strings.Lines(string(readFile(t, name))) {
				line = strings.TrimSpace(line)
				switch key, value, ok := strings.Cut(line, "="); {
				case line == "" || line[0] == '#':
				case line[0] == '[':
					section = strings.Trim(line, "[]")
				case !ok || section == "":
					t.Errorf("%s: bad line %q", name, line)
				default:
					u[section+"."+key] = append(u[section+"."+key], value)
				}
			}
			units[filepath.Base(name)] = u
		}
	}
	if len(units) < 11 {
		t.Fatalf("found %d units only", len(units))
	}
	return units
}

// TestUnits holds what the units promise each other and docs/boot.md.
func TestUnits(t *testing.T) {
	units := readUnits(t)
	for name, u := range units {
		if name == "50-particle.conf" || strings.HasPrefix(name, "particle-overlay@") || isBridge(name) {
			continue
		}
		conditions := u["Unit.ConditionKernelCommandLine"]
		for _, want := range []string{"|composefs.digest", "|composefs"} {
			if !slices.Contains(conditions, want) {
				t.Errorf("%s works on hosts that Particle has not booted: conditions %q lack %q", name, conditions, want)
			}
		}
		for _, line := range append(slices.Clone(u["Service.ExecStart"]), u["Service.ExecStop"]...) {
			if words := strings.Fields(line); strings.HasSuffix(words[0], "particle") && (words[0] != "/usr/bin/particle" || !slices.Contains(words, "hostdeploy")) {
				t.Errorf("%s runs %q", name, line)
			}
		}
		for key, values := range u {
			for _, v := range values {
				for _, word := range strings.Fields(v) {
					if strings.HasPrefix(word, "particle-") && strings.Contains(word, ".") && units[word] == nil {
						t.Errorf("%s: %s=%s names a unit that is not here", name, key, v)
					}
				}
			}
		}
	}
	// Units with an automounted /boot must not require its mount while they wait: its
	// expiry would cancel their jobs.
	for _, name := range []string{"particle-boot-success.service", "particle-boot-failed.service", "particle-upgrade.service", "particle-factory-reset.service"} {
		for _, key := range []string{"Unit.RequiresMountsFor", "Unit.Requires", "Unit.BindsTo"} {
			if v := strings.Join(units[name][key], " "); strings.Contains(v, "/boot") || strings.Contains(v, "boot.mount") {
				t.Errorf("%s: %s=%s", name, key, v)
			}
		}
	}
	if v := units["particle-finalize.service"]["Service.WorkingDirectory"]; !slices.Equal(v, []string{"/boot"}) {
		t.Errorf("particle-finalize.service does not hold /boot: WorkingDirectory %q", v)
	}
	if v := units["particle-finalize.path"]["Path.PathExists"]; !slices.Equal(v, []string{"/run/particle/staged.json"}) {
		t.Errorf("particle-finalize.path watches %q", v)
	}
}

// isBridge reports whether a unit is of a bridge to another program, which also works on
// hosts that Particle has not booted.
func isBridge(name string) bool {
	return strings.HasPrefix(name, "particle-snapshotter.") || name == "particle-layer-store.service"
}

// TestBridges: other programs see what the daemons mount, and find their sockets.
func TestBridges(t *testing.T) {
	units := readUnits(t)
	service := units["particle-snapshotter.service"]
	if v := service["Service.ExecStart"]; !slices.Equal(v, []string{"/usr/bin/particle snapshotter"}) {
		t.Errorf("particle-snapshotter.service runs %q", v)
	}
	for key := range service {
		for _, own := range []string{"Service.Private", "Service.Protect", "Service.ReadOnly", "Service.RootDirectory", "Service.MountFlags", "Service.DynamicUser", "Service.Bind"} {
			if strings.HasPrefix(key, own) {
				t.Errorf("%s gives particle-snapshotter.service mounts of its own", key)
			}
		}
	}
	// systemd gives up at the fifth start in ten seconds, and takes a socket down, too.
	for name, u := range units {
		sec, _ := strconv.Atoi(strings.Join(u["Service.RestartSec"], ""))
		if u["Service.Restart"] != nil && !slices.Equal(u["Unit.StartLimitIntervalSec"], []string{"0"}) && sec < 3 {
			t.Errorf("%s is given up after seconds of a store that is not there", name)
		}
	}
	source := string(readFile(t, "../cmd/particle/snapshotter.go"))
	for _, path := range units["particle-snapshotter.socket"]["Socket.ListenStream"] {
		if !strings.Contains(source, `snapshotterSocket = "`+path+`"`) {
			t.Errorf("particle-snapshotter.socket listens on %s, the command elsewhere", path)
		}
	}
}

// TestWants: units that are part of every boot are linked, and have no [Install]; the
// preset turns the others off.
func TestWants(t *testing.T) {
	units := readUnits(t)
	links, err := filepath.Glob("systemd/*.wants/*")
	if err != nil || len(links) < 4 {
		t.Fatalf("links: %q, %v", links, err)
	}
	for _, link := range links {
		target, err := os.Readlink(link)
		if err != nil {
			t.Errorf("%s is not a link: %v", link, err)
			continue
		}
		name := filepath.Base(link)
		if target != "../"+name || units[name] == nil {
			t.Errorf("%s points to %q", link, target)
		}
		if v := units[name]["Install.WantedBy"]; v != nil {
			t.Errorf("%s is linked and has WantedBy=%q, too", name, v)
		}
	}
	preset := string(readFile(t, "systemd/80-particle.preset"))
	for name, u := range units {
		if u["Install.WantedBy"] != nil && !strings.Contains(preset, "\ndisable "+name+"\n") {
			t.Errorf("%s can be enabled, and the preset does not say that it is off", name)
		}
	}
}

// sshUnits are those of openssh-server that a prepared tree adds to, as Debian 13 has
// them. ssh.socket is enabled: it then comes before all services of a usual boot.
var sshUnits = map[string]string{
	"ssh.service":   "[Unit]\nAfter=network.target\n[Service]\nType=notify\nExecStart=/usr/sbin/sshd -D\n[Install]\nWantedBy=multi-user.target\n",
	"ssh.socket":    "[Unit]\nBefore=sockets.target\n[Socket]\nListenStream=22\nAccept=no\n[Install]\nWantedBy=sockets.target\n",
	"sshd@.service": "[Service]\nExecStart=-/usr/sbin/sshd -i\nStandardInput=socket\n",
}

// TestUnitsVerify has systemd judge the package's units and those that a prepared tree
// gets, in a root with its own ones.
func TestUnitsVerify(t *testing.T) {
	need(t, true, map[string]string{"systemd-analyze": "systemd"})
	root := t.TempDir()
	dst := filepath.Join(root, "usr/lib/systemd/system")
	for _, dir := range []string{dst, filepath.Join(root, "var/lib/dpkg")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	theirs := "/usr/lib/systemd/system"
	if _, err := os.Stat(theirs + "/boot-complete.target"); err != nil {
		t.Skipf("there is no boot-complete.target here (Debian package systemd)")
	}
	// systemd's targets and their parts, not what else this machine has installed.
	command(t, "", nil, "sh", "-c", `cd "$1" && cp -a *.target systemd-*.service systemd-*.socket sysinit.target.wants emergency.service rescue.service modprobe@.service "$2" 2>/dev/null || true`, "sh", theirs, dst)
	command(t, "", nil, "sh", "-c", `cp -a systemd/. "$1"`, "sh", dst)
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("var/lib/dpkg/status", "")
	if _, err := prepare.Run(t.Context(), prepare.Options{Root: root, NoInitramfs: true}); err != nil {
		t.Fatal(err)
	}
	for name, content := range sshUnits {
		write("usr/lib/systemd/system/"+name, content)
	}
	wants := filepath.Join(dst, "sockets.target.wants")
	if err := os.MkdirAll(wants, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../ssh.socket", filepath.Join(wants, "ssh.socket")); err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"usr/sbin/sshd", "usr/bin/ssh-keygen", "usr/bin/find", "usr/bin/particle", "usr/bin/sleep", "bin/mount", "bin/umount", "bin/sh"} {
		name := filepath.Join(root, program)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte("#!/bin/true\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	units, err := filepath.Glob("systemd/particle-*")
	if err != nil {
		t.Fatal(err)
	}
	argv := []string{"verify", "--man=no", "--root=" + root}
	for _, u := range units {
		name := strings.Replace(filepath.Base(u), "@.", "@usr-local.", 1)
		argv = append(argv, name)
	}
	argv = append(argv, "particle-ssh-keys.service", "particle-build-stubs.service", "ssh.service", "ssh.socket", "sshd@1.service")
	argv = append(argv, "multi-user.target", "emergency.target", "factory-reset.target", "reboot.target")
	out, err := exec.Command("systemd-analyze", argv...).CombinedOutput()
	var ours []string
	for line := range strings.Lines(string(out)) {
		// The machine's own units may have flaws of their own.
		if strings.Contains(line, "particle") || strings.Contains(line, "cycle") {
			ours = append(ours, line)
		}
	}
	if len(ours) > 0 {
		t.Errorf("systemd-analyze verify (%v):\n%s", err, strings.Join(ours, ""))
	}
}
