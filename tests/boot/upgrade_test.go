package boot

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

// upgrade upgrades the running machine to a target of the images, staged, and restarts.
// It returns what the command told.
func (m *machine) upgrade(l loader, target string) *deployed {
	m.t.Helper()
	d := m.stage(l, target)
	m.reboot()
	return d
}

// stage upgrades without restarting.
func (m *machine) stage(l loader, target string) *deployed {
	m.t.Helper()
	push(m.t, target, l.name)
	m.registry()
	return m.deployed("particle hostdeploy upgrade --json")
}

// deployed is what the tests look at of the JSON of verbs that make a deployment.
type deployed struct {
	deployment
	Staged bool `json:"staged"`
	Same   bool `json:"same"`
	Phases []struct {
		Name    string  `json:"name"`
		Seconds float64 `json:"seconds"`
		Bytes   int64   `json:"bytes"`
	} `json:"phases"`
}

func (m *machine) deployed(command string) *deployed {
	m.t.Helper()
	var d deployed
	if out := m.sh("%s", command); true {
		if err := json.Unmarshal([]byte(out), &d); err != nil {
			m.t.Fatalf("%s: %v\n%s", command, err, out)
		}
	}
	return &d
}

// "Upgrade to a second image, reboot, new system; rollback, reboot, old system." And:
// "dpkg -l and dpkg --verify are right after install, upgrade and rollback."
func TestUpgrade(t *testing.T) {
	t.Parallel() // also beside TestInstall: that one looks at no image that is pushed
	for _, l := range loaders {
		t.Run(l.name, func(t *testing.T) { testUpgrade(t, l) })
	}
}

func testUpgrade(t *testing.T, l loader) {
	if l == oneLoader(t) {
		need(t, essential)
	} else {
		need(t, all)
	}
	t.Parallel()
	m := boot(t, l)
	m.packages("1.0")
	m.equal("cat /etc/particle-test.conf", "shape=square")
	first := m.status().booted(t).ID
	m.sh("echo before >/var/lib/particle-test-var")

	d := m.stage(l, "next")
	if !d.Staged || d.ID == first {
		t.Fatalf("the upgrade is %+v, want one that is staged", d)
	}
	s := m.status()
	if len(s.Deployments) != 2 || s.Deployments[0].ID != d.ID || !s.Deployments[0].Staged || !s.Deployments[1].Booted {
		t.Fatalf("deployments after staging: %+v", s.Deployments)
	}
	// Until the machine shuts down nothing of it can be booted.
	if n := m.sh("find /boot/loader/entries -name 'particle-*' | wc -l"); n != "1" {
		t.Errorf("%s boot entries while the upgrade is only staged", n)
	}
	changed := map[string]string{}
	for _, p := range s.Deployments[0].Packages {
		changed[p.Name] = p.Old + ">" + p.New
	}
	if len(changed) != 2 || changed["particle-test"] != "1.0>2.0" || changed["particle-test-more"] != ">2.0" {
		t.Errorf("status tells of the packages %v", changed)
	}
	m.fails("test $(cat /usr/share/particle-test/version) = 2")

	m.reboot()
	m.equal("cat /usr/share/particle-test/version", "2")
	m.packages("2.0")
	m.equal("dpkg-query -W -f '${Version}' particle-test-more", "2.0")
	m.equal("cat /etc/particle-test.conf /etc/particle-test-more.conf", "shape=round\nshape=round")
	m.equal("cat /var/lib/particle-test-var", "before")
	m.good()
	s = m.status()
	if b := s.booted(t); b.ID != d.ID || !b.Default || b.TriesLeft != nil || s.Boot.Verification != "enforced" {
		t.Errorf("after the upgrade %+v runs, %+v", b, s.Boot)
	}
	if len(s.Deployments) != 2 || s.Deployments[1].ID != first || s.Deployments[1].Kept != "rollback" {
		t.Errorf("deployments after the upgrade: %+v", s.Deployments)
	}
	m.registry()
	if again := m.deployed("particle hostdeploy upgrade --json"); !again.Same {
		t.Errorf("an upgrade to what runs: %+v", again)
	}
	m.clean()

	m.sh("echo after >>/var/lib/particle-test-var")
	m.sh("particle hostdeploy rollback")
	m.reboot()
	m.equal("cat /usr/share/particle-test/version", "1")
	m.packages("1.0")
	m.fails("dpkg-query -W particle-test-more", "no packages found")
	m.equal("cat /etc/particle-test.conf", "shape=square")
	m.equal("cat /var/lib/particle-test-var", "before\nafter")
	m.good()
	s = m.status()
	if b := s.booted(t); b.ID != first || !b.Default || s.Boot.Verification != "enforced" {
		t.Errorf("after the rollback %+v runs, %+v", b, s.Boot)
	}
	m.clean()
	var history []struct{ What, ID string }
	if err := json.Unmarshal([]byte(m.sh("particle hostdeploy history --json")), &history); err != nil {
		t.Fatal(err)
	}
	var what []string
	for _, e := range history {
		what = append(what, e.What)
	}
	if !slices.Contains(what, "deployed") || what[len(what)-1] != "booted" && !slices.Contains(what, "rolled back to") {
		t.Errorf("history: %q", what)
	}
}

// "/etc conflict kept".
func TestEtc(t *testing.T) {
	need(t, essential)
	l := oneLoader(t)
	m := boot(t, l)
	m.sh(`set -e
		echo "shape=triangle # mine" >/etc/particle-test.conf
		echo mine >/etc/particle-own
		rm /etc/issue.net
		useradd -u 1234 -m somebody
		chmod 600 /etc/hosts`)
	hosts := m.sh("cat /etc/hosts")
	d := m.stage(l, "next")
	// Changes after staging count, too.
	m.sh("echo late >/etc/particle-late")
	m.reboot()
	m.equal("cat /usr/share/particle-test/version", "2")
	m.equal("cat /etc/particle-test.conf", "shape=triangle # mine")
	m.equal("cat /etc/particle-test.conf.dpkg-dist", "shape=round")
	m.equal("cat /etc/particle-test-more.conf", "shape=round")
	m.equal("cat /etc/particle-own /etc/particle-late", "mine\nlate")
	m.equal("test -e /etc/issue.net || echo gone", "gone")
	m.equal("id -u somebody; stat -c %a /etc/hosts; cat /etc/hosts", "1234\n600\n"+hosts)
	m.equal("stat -c %U /home/somebody/", "somebody")
	if s := m.status(); s.booted(t).ID != d.ID || !slices.ContainsFunc(s.Conflicts, func(c conflict) bool { return c.Path == "/etc/particle-test.conf" && c.Kept == c.Path+".dpkg-dist" }) {
		t.Errorf("status tells of the conflicts %q", s.Conflicts)
	}
	// The /etc that the old deployment had is still there.
	m.sh("rm /etc/particle-own; particle hostdeploy rollback")
	m.reboot()
	m.equal("cat /etc/particle-test.conf /etc/particle-own", "shape=triangle # mine\nmine")
	m.fails("cat /etc/particle-test.conf.dpkg-dist", "No such file")
}

// "Kernel arguments changed."
func TestKargs(t *testing.T) {
	need(t, essential)
	l := oneLoader(t)
	m := boot(t, l)
	first := m.status().booted(t)
	has := func(arg string, want bool) {
		t.Helper()
		if got := slices.Contains(strings.Fields(m.sh("cat /proc/cmdline")), arg); got != want {
			t.Errorf("%s in the command line: %v, want %v: %s", arg, got, want, m.sh("cat /proc/cmdline"))
		}
	}
	m.sh("particle hostdeploy kargs --append test_user=1 --append 'test_quoted=\"a b\"'")
	m.sh("particle hostdeploy kargs --delete panic --append test_more")
	m.reboot()
	has("test_user=1", true)
	has("test_more", true)
	has("panic=10", false)
	m.good()
	d := m.status().booted(t)
	if d.ID == first.ID || d.Digest != first.Digest {
		t.Errorf("deployment %s of %s runs, want another than %s of %s", d.ID, d.Digest, first.ID, first.Digest)
	}
	if want := []string{"test_user=1", `test_quoted="a b"`, "test_more"}; !slices.Equal(d.KArgs.User, want) {
		t.Errorf("the user's arguments are %q, want %q", d.KArgs.User, want)
	}
	if !slices.Equal(d.KArgs.Deleted, []string{"panic=10"}) && !slices.Equal(d.KArgs.Deleted, []string{"panic"}) {
		t.Errorf("deleted arguments are %q", d.KArgs.Deleted)
	}
	// An upgrade takes the image's from the new image and keeps the rest.
	m.upgrade(l, "kargs")
	has("particle_test_image=yes", true)
	has("test_user=1", true)
	has("panic=10", false)
	m.good()
	if d := m.status().booted(t); !slices.Equal(d.KArgs.Image, []string{"particle_test_image=yes"}) {
		t.Errorf("the image's arguments are %q", d.KArgs.Image)
	}
	m.sh("particle hostdeploy kargs --replace test_user=2")
	m.reboot()
	has("test_user=2", true)
	has("test_user=1", false)
	has("particle_test_image=yes", true)
	m.fails("particle hostdeploy kargs --delete not_there", "not_there")
	m.sh("particle hostdeploy rollback")
	m.reboot()
	has("test_user=1", true)
	has("test_user=2", false)
}

// "gc frees space."
func TestGC(t *testing.T) {
	need(t, essential)
	l := oneLoader(t)
	m := boot(t, l)
	first := m.status().booted(t).ID
	m.upgrade(l, "next-kernel")
	m.good()
	second := m.status().booted(t).ID
	if n := m.sh("ls -d /boot/particle-*/ | wc -l"); n != "2" {
		t.Errorf("%s kernels on the boot file system, want 2", n)
	}
	m.sh("particle hostdeploy pin %s", first)
	m.upgrade(l, "kargs")
	m.good()
	m.sh("particle hostdeploy gc")
	ids := func() (ids []string) {
		for _, d := range m.status().Deployments {
			ids = append(ids, d.ID)
		}
		return ids
	}
	third := m.status().booted(t).ID
	if got, want := ids(), []string{third, second, first}; !slices.Equal(got, want) {
		t.Errorf("deployments after gc with a pin: %q, want %q", got, want)
	}
	// Without the pin the first goes. Its kernel is that of the third: it stays.
	m.sh("particle hostdeploy pin --unpin %s", first)
	m.sh("particle hostdeploy gc --json")
	if got, want := ids(), []string{third, second}; !slices.Equal(got, want) {
		t.Errorf("deployments after gc: %q, want %q", got, want)
	}
	if n := m.sh("ls -d /boot/particle-*/ | wc -l"); n != "2" {
		t.Errorf("%s kernels on the boot file system, want 2", n)
	}
	m.fails("ls -d /sysroot/state/deploy/"+first, "No such file")
	// Back to what there was: the second goes with its kernel and its objects.
	used := func() string { return m.sh("sync; du -s /sysroot/composefs | cut -f1; du -s /boot | cut -f1") }
	before := used()
	push(t, "server", l.name)
	m.registry()
	m.sh("particle hostdeploy upgrade")
	m.reboot()
	m.good()
	m.sh("particle hostdeploy gc")
	if n := m.sh("ls -d /boot/particle-*/ | wc -l"); n != "1" {
		t.Errorf("%s kernels on the boot file system, want 1", n)
	}
	t.Logf("KiB of the store and of the boot file system: %q, then %q", before, used())
	m.clean()
	m.reboot()
	m.equal("cat /usr/share/particle-test/version", "1")
}

// "A one-package upgrade, from staged pull to entry written, is measured and split by
// phase." The figures are in the test's log.
func TestPhases(t *testing.T) {
	need(t, essential)
	l := oneLoader(t)
	m := boot(t, l)
	push(t, "next", l.name)
	m.registry()
	d := m.deployed("particle hostdeploy upgrade --now --json")
	names := map[string]bool{}
	var total float64
	for _, p := range d.Phases {
		names[p.Name] = true
		total += p.Seconds
		t.Logf("%-10s %8.3f s %12d bytes", p.Name, p.Seconds, p.Bytes)
	}
	t.Logf("%-10s %8.3f s", "together", total)
	for _, want := range []string{"resolve", "pull", "etc", "entry"} {
		if !names[want] {
			t.Errorf("no phase %q in %v", want, d.Phases)
		}
	}
	if d.Staged {
		t.Error("with --now it is staged nevertheless")
	}
	m.reboot()
	m.equal("cat /usr/share/particle-test/version", "2")
}
