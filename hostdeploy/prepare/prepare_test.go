package prepare

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
)

var update = flag.Bool("update", false, "write the golden files anew")

// plant makes a tree. An item is "NAME/" (a directory), "NAME=CONTENT", "NAME->TARGET" or
// "NAME|" (a pipe), perhaps with a mode in front, as in "2755 var/mail/".
func plant(t *testing.T, root string, items ...string) {
	t.Helper()
	check := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	for _, item := range items {
		var mode uint32
		if m, rest, ok := strings.Cut(item, " "); ok && len(m) == 4 && strings.Trim(m, "01234567") == "" {
			_, err := fmt.Sscanf(m, "%o", &mode)
			check(err)
			item = rest
		}
		name, content, isFile := strings.Cut(item, "=")
		if target, ok := "", false; !isFile {
			if name, target, ok = strings.Cut(item, "->"); ok {
				name = filepath.Join(root, name)
				check(os.MkdirAll(filepath.Dir(name), 0o755))
				check(os.Symlink(target, name))
				continue
			}
		}
		pipe, dir := strings.HasSuffix(name, "|"), strings.HasSuffix(name, "/")
		name = filepath.Join(root, strings.TrimSuffix(name, "|"))
		check(os.MkdirAll(filepath.Dir(name), 0o755))
		switch {
		case isFile:
			if mode == 0 {
				mode = 0o644
			}
			check(os.WriteFile(name, []byte(content), 0o600))
		case pipe:
			mode = 0o600
			check(syscall.Mkfifo(name, mode))
		case dir:
			if mode == 0 {
				mode = 0o755
			}
			check(os.MkdirAll(name, 0o755))
		default:
			t.Fatalf("what is %q?", item)
		}
		check(syscall.Chmod(name, mode))
	}
}

// small is a tree with one of everything, of somebody who is called root in it.
func small(t *testing.T) string {
	t.Helper()
	old := syscall.Umask(0o022)
	t.Cleanup(func() { syscall.Umask(old) })
	root := t.TempDir()
	uid, gid := os.Getuid(), os.Getgid()
	plant(t, root,
		fmt.Sprintf("etc/passwd=root:x:%d:%d:root:/root:/bin/bash\n", uid, gid)+
			"daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"+
			"polkitd:x:988:988:User for polkitd:/:/usr/sbin/nologin\n"+
			"web:x:990:33:100% \"web\":/srv/my web:\n"+
			"nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"+
			"alice:x:4242:4242:Alice:/home/alice:/bin/bash\n+::::::\n",
		fmt.Sprintf("etc/group=root:x:%d:\n", gid)+
			"daemon:x:1:\nadm:x:4:web,alice\npolkitd:x:988:\nwww-data:x:33:web\nnogroup:x:65534:\nalice:x:4242:\nodd.name$:x:500:\n",
		"usr/lib/sysusers.d/basic.conf=g adm 4 - -\nu! daemon 1 \"daemon\" /usr/sbin\nu! nobody 65534:65534 \"nobody\"\n",
		"usr/lib/sysusers.d/polkit.conf=u! polkitd - \"User for polkitd\"\n",
		"usr/lib/tmpfiles.d/var.conf=# systemd's\nq /var 0755 - - -\nd /var/log 0755 - - -\nd /var/cache 0755\nd %S 0755\nL /var/run - - - - ../run\n",
		"etc/tmpfiles.d/local.conf=d \"/var/lib/decl\\x61red\" 0750 web web\n",
		"etc/machine-id=0123456789abcdef0123456789abcdef\n", "etc/hostname=0123456789ab\n",
		"etc/ssh/ssh_host_rsa_key=secret", "etc/ssh/ssh_host_rsa_key.pub=public", "etc/ssh/sshd_config=",
		"etc/passwd-=old", "etc/x/y.conf.dpkg-old=old", "etc/x/y.conf=new",
		"home/", "0700 root/", "root/.bashrc=# rc\n", "0700 root/.ssh/", "0600 root/.ssh/authorized_keys=key\n", "srv/", "mnt/", "media/cdrom/",
		"boot/", "dev/", "proc/", "run/", "sys/", "1777 tmp/", "opt/vendor/bin/tool=x", "usr/local/bin/tool=x",
		"run/sshd/", "1777 run/lock/", "run/lock/x=", "tmp/leftover/x=",
		"var/lib/dpkg/status=Package: a\nStatus: install ok installed\n\n", "var/lib/dpkg/status-old=", "var/lib/dpkg/info/a.list=/.\n",
		"var/lib/dpkg/updates/", "var/lib/dpkg/triggers/File=", "var/lib/dpkg/lock=",
		"var/lib/apt/extended_states=Package: a\nAuto-Installed: 1\n", "var/lib/apt/lists/x_Packages=x", "0700 var/lib/apt/lists/partial/",
		"var/cache/apt/pkgcache.bin=x", "var/cache/debconf/config.dat=Name: x\n", "var/cache/debconf/config.dat-old=x",
		"var/log/dpkg.log=x", "0660 var/log/btmp=", "var/log/sub/deep.log=x", "var/backups/dpkg.status.0=x",
		"2775 var/mail/", "1777 var/tmp/", "var/tmp/x=", "var/run->/run",
		"0750 var/lib/app/", "0600 var/lib/app/data.db=rows\n", "var/lib/app/current->data.db", "var/lib/app/pipe|", "var/lib/app/empty=",
		"0750 var/lib/declared/", "var/lib/declared/a b%\"c=x", "var/lib/ucf/registry=x", "var/lib/systemd/random-seed=x", "var/lib/dbus/machine-id=0123456789abcdef0123456789abcdef\n",
		"var/lib/systemd/deb-systemd-helper-enabled/x.service.dsh-also=",
		"boot/vmlinuz-6.1=kernel", "boot/config-6.1=y", "0600 boot/System.map-6.1=map", "boot/initrd.img-6.1=initrd",
		"boot/grub/grub.cfg=nobody's", "boot/memtest/x64.bin=a package's", "boot/vmlinuz-custom=without modules", "usr/lib/modules/6.1/kernel/x.ko=x",
		"vmlinuz->boot/vmlinuz-6.1", "vmlinuz.old->/opt/mine",
		"var/lib/dpkg/info/linux.list=/.\n/boot\n/boot/vmlinuz-6.1\n/boot/System.map-6.1\n/boot/config-6.1\n/lib/modules/6.1/kernel/x.ko\n/boot/memtest\n/boot/memtest/x64.bin\n",
		"var/lib/dpkg/diversions=/lib32\n/.lib32.usr-is-merged\nbase-files\n",
		"usr/share/systemd/tmp.mount=[Mount]\n", "usr/share/factory/var/lib/other/file=a package's own\n",
	)
	return root
}

// digest is the tree as text, with all that a composefs image would have of it.
func digest(t *testing.T, root string) string {
	t.Helper()
	tr, err := scan.Dir(context.Background(), root, scan.Hash(fsverity.SHA256), scan.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := dump.Print(&b, tr); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// list shows a tree: type, mode, path, and target or content of what is not in rootfs.
func list(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil || rel == "." {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		kind := map[fs.FileMode]string{fs.ModeDir: "d", fs.ModeSymlink: "l", fs.ModeNamedPipe: "p"}[fi.Mode().Type()]
		switch {
		case kind == "l":
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, "l      %s -> %s\n", rel, target)
			return nil
		case kind == "":
			kind = "f"
		}
		fmt.Fprintf(&b, "%s %04o %s\n", kind, st.Mode&0o7777, rel)
		if kind != "f" {
			return nil
		}
		if _, err := rootfs.Open("rootfs/" + rel); err == nil {
			return nil
		}
		data, err := os.ReadFile(name)
		for line := range strings.Lines(string(data)) {
			fmt.Fprintf(&b, "\t%s\n", strings.TrimSuffix(line, "\n"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	name = filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (go test -update writes it anew); got:\n%s", name, got)
	}
}

func mustRun(t *testing.T, root string) *Report {
	t.Helper()
	r, err := Run(context.Background(), Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func mustCheck(t *testing.T, root string) *Report {
	t.Helper()
	r, err := Check(context.Background(), Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func lines(r *Report) string {
	var b strings.Builder
	for _, c := range r.Changes {
		fmt.Fprintln(&b, c)
	}
	for _, w := range r.Warnings {
		fmt.Fprintln(&b, "warning:", w)
	}
	return b.String()
}

func TestRun(t *testing.T) {
	root := small(t)

	before := digest(t, root)
	checked := mustCheck(t, root)
	if now := digest(t, root); now != before {
		t.Error("Check has changed the tree")
	}
	if checked.Clean() {
		t.Error("Check finds nothing to do in a tree as apt leaves it")
	}

	r := mustRun(t, root)
	golden(t, "report", lines(r))
	golden(t, "tree", list(t, root))

	after := digest(t, root)
	if again := mustRun(t, root); len(again.Changes) != 0 {
		t.Errorf("a second run changes what is right:\n%s", lines(again))
	}
	if now := digest(t, root); now != after {
		t.Errorf("a second run has changed the tree:\n%s\nwas:\n%s", now, after)
	}
	if r := mustCheck(t, root); len(r.Changes) != 0 {
		t.Errorf("Check finds something to do after Run:\n%s", lines(r))
	}
}

// TestLater: further steps of a build, and another run after them.
func TestLater(t *testing.T) {
	root := small(t)
	mustRun(t, root)
	const copied = "usr/share/factory/var/lib/app/data.db"
	if _, err := os.Stat(filepath.Join(root, copied)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"var/lib/app/data.db", "var/roothome/.ssh/authorized_keys"} {
		if err := os.Remove(filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	// dpkg writes through the link, apt by its setting, the author through /root.
	plant(t, root, "var/lib/dpkg/info/b.list=/.\n", "usr/lib/sysimage/apt/extended_states=Package: b\n", "root/.profile=# p\n", "var/lib/b/seed=s\n")
	if err := os.WriteFile(filepath.Join(root, "var/lib/app/empty"), []byte("no more\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	checked := lines(mustCheck(t, root))
	r := mustRun(t, root)
	if got := lines(r); got != checked {
		t.Errorf("Check announced\n%sRun did\n%s", checked, got)
	}
	want := map[string]bool{
		copied: false, "usr/share/factory/var/roothome/.ssh/authorized_keys": false,
		"usr/share/factory/var/roothome/.profile": true, "usr/share/factory/var/roothome/.bashrc": true,
		"usr/share/factory/var/lib/b/seed": true, "usr/share/factory/var/lib/app/empty": true,
		"usr/share/factory/var/lib/other/file": true, // a package's
		"usr/lib/sysimage/dpkg/info/b.list":    true, "usr/lib/sysimage/dpkg/info/a.list": true,
	}
	for name, there := range want {
		if _, err := os.Lstat(filepath.Join(root, name)); (err == nil) != there {
			t.Errorf("%s: got %v, want it there: %v", name, err, there)
		}
	}
	conf, err := os.ReadFile(filepath.Join(root, tmpfilesConf))
	if err != nil {
		t.Fatal(err)
	}
	for line, there := range map[string]bool{"/var/lib/app/data.db ": false, "C /var/lib/b/seed - - - - /usr/share/factory/var/lib/b/seed\n": true, "C /var/lib/app/empty": true} {
		if strings.Contains(string(conf), line) != there {
			t.Errorf("%q in the lines: want %v, in\n%s", line, there, conf)
		}
	}
	if r := mustRun(t, root); len(r.Changes) != 0 {
		t.Errorf("a third run changes what is right:\n%s", lines(r))
	}
}

// TestCutOff stops the move of dpkg's database after each entry, as a kill would, and
// completes it.
func TestCutOff(t *testing.T) {
	want := ""
	for n := 0; ; n++ {
		root := small(t)
		names := []string{"diversions", "info/a.list", "info/linux.list", "lock", "status-old", "triggers/File"}
		for _, name := range names[:min(n, len(names))] {
			to := filepath.Join(root, dpkgDir, name)
			if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(root, dpkgLink, name), to); err != nil {
				t.Fatal(err)
			}
		}
		if n > len(names) { // all but the status file, and no directory left
			if err := os.RemoveAll(filepath.Join(root, dpkgLink, "info")); err != nil {
				t.Fatal(err)
			}
		}
		mustRun(t, root)
		got := list(t, filepath.Join(root, dpkgDir))
		if want == "" {
			want = got
		}
		if got != want {
			t.Errorf("after a run that was cut off at %d:\n%swant\n%s", n, got, want)
		}
		if n > len(names) {
			return
		}
	}
}

// TestStatusLast: dpkg's status file must be the last to move, since TestRefused takes
// two of them for two databases.
func TestStatusLast(t *testing.T) {
	root := small(t)
	plant(t, root, dpkgDir+"/zzz=in the way", dpkgLink+"/zzz=x")
	_, err := Run(context.Background(), Options{Root: root})
	if !errors.Is(err, ErrConflict) {
		t.Fatalf("got %v, want ErrConflict", err)
	}
	if _, err := os.Stat(filepath.Join(root, dpkgLink, "status")); err != nil {
		t.Errorf("the status file moved before zzz: %v", err)
	}
	if err := os.Remove(filepath.Join(root, dpkgDir, "zzz")); err != nil {
		t.Fatal(err)
	}
	mustRun(t, root)
}

// TestKernels: a newer kernel comes, and the old one goes.
func TestKernels(t *testing.T) {
	root := small(t)
	mustRun(t, root)
	remove := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	// apt purges 6.1, the file of which dpkg has diverted, and installs 6.2.
	remove("usr/lib/modules/6.1/vmlinuz", "usr/lib/modules/6.1/config", "usr/lib/modules/6.1/System.map", "usr/lib/modules/6.1/kernel", "usr/lib/sysimage/dpkg/info/linux.list")
	plant(t, root, "boot/vmlinuz-6.2=newer", "boot/initrd.img-6.2=newer", "usr/lib/modules/6.2/kernel/", "usr/lib/sysimage/dpkg/info/linux2.list=/.\n/boot\n/boot/vmlinuz-6.2\n")
	checked := lines(mustCheck(t, root))
	r := mustRun(t, root)
	if got := lines(r); !strings.Contains(checked, "move    /boot/vmlinuz-6.2") || !strings.Contains(got, "remove  /boot/initrd.img-6.1") {
		t.Errorf("Check announced\n%sRun did\n%s", checked, got)
	}
	if r := mustCheck(t, root); len(r.Changes) != 0 {
		t.Errorf("Check finds something to do after Run:\n%s", lines(r))
	}
	golden(t, "kernels", lines(r)+list(t, filepath.Join(root, "boot"))+list(t, filepath.Join(root, "usr/lib/modules")))
	got, err := os.ReadFile(filepath.Join(root, dpkgDir, "diversions"))
	if err != nil {
		t.Fatal(err)
	}
	if want := "/lib32\n/.lib32.usr-is-merged\nbase-files\n/boot/vmlinuz-6.2\n/usr/lib/modules/6.2/vmlinuz\n:\n"; string(got) != want {
		t.Errorf("diversions: got\n%swant\n%s", got, want)
	}

	// update-initramfs replaces the link by a newer file.
	remove("boot/initrd.img-6.2")
	plant(t, root, "boot/initrd.img-6.2=newest")
	mustRun(t, root)
	if got, err := os.ReadFile(filepath.Join(root, "usr/lib/modules/6.2", initrdName)); err != nil || string(got) != "newest" {
		t.Errorf("the initramfs: got %q, %v", got, err)
	}
	if r := mustRun(t, root); len(r.Changes) != 0 {
		t.Errorf("another run changes what is right:\n%s", lines(r))
	}

	// Or makes one of a version that has no kernel any more.
	plant(t, root, "boot/initrd.img-6.1=stale", "usr/lib/modules/6.1/modules.dep=")
	if got, want := lines(mustRun(t, root)), "remove  /boot/initrd.img-6.1 (its kernel is gone)"; !strings.Contains(got, want) {
		t.Errorf("changes: got\n%swant %s", got, want)
	}
	for _, name := range []string{"boot/initrd.img-6.1", "usr/lib/modules/6.1/" + initrdName} {
		if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is there: %v", name, err)
		}
	}
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(root string)
		want   error
		text   string
	}{
		"no dpkg": {func(root string) { os.RemoveAll(filepath.Join(root, "var/lib/dpkg")) }, ErrNoDpkg, "neither /var/lib/dpkg nor"},
		"dpkg without status": {func(root string) {
			os.Remove(filepath.Join(root, "var/lib/dpkg/status"))
		}, ErrNoDpkg, "/var/lib/dpkg/status"},
		"link elsewhere": {func(root string) {
			os.RemoveAll(filepath.Join(root, "var/lib/dpkg"))
			plant(t, root, "var/lib/dpkg->/usr/share/dpkg")
		}, ErrConflict, `/var/lib/dpkg leads to "/usr/share/dpkg"`},
		"link to nothing": {func(root string) {
			os.RemoveAll(filepath.Join(root, "var/lib/dpkg"))
			plant(t, root, "var/lib/dpkg->"+toDpkg)
		}, ErrNoDpkg, "no /usr/lib/sysimage/dpkg/status"},
		"two databases":    {func(root string) { plant(t, root, dpkgDir+"/status=") }, ErrConflict, "remove the older of the two databases"},
		"two files":        {func(root string) { plant(t, root, "var/roothome/.bashrc=other") }, ErrConflict, "remove one of the two"},
		"home is a file":   {func(root string) { os.Remove(filepath.Join(root, "home")); plant(t, root, "home=x") }, ErrConflict, "moving /home"},
		"machine-id a dir": {func(root string) { os.Remove(filepath.Join(root, "etc/machine-id")); plant(t, root, "etc/machine-id/") }, ErrConflict, "/etc/machine-id"},
	} {
		t.Run(name, func(t *testing.T) {
			root := small(t)
			c.change(root)
			_, err := Run(context.Background(), Options{Root: root})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
}

// TestDecided: what an author has decided differently stays.
func TestDecided(t *testing.T) {
	root := small(t)
	for _, name := range []string{"home", "etc/machine-id", "etc/hostname", "tmp", "opt", "usr/local"} {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	plant(t, root, "home->data/home", "data/home/", "tmp->/var/tmp", "opt->/var/opt", "usr/local->../var/usrlocal", "etc/machine-id=uninitialized\n", "etc/hostname=server\n", "etc/systemd/system/tmp.mount->/dev/null", "etc/tmpfiles.d/home.conf=# mine\n")
	r := mustRun(t, root)
	for name, want := range map[string]string{"etc/machine-id": "uninitialized\n", "etc/hostname": "server\n", "etc/tmpfiles.d/home.conf": "# mine\n"} {
		if got, err := os.ReadFile(filepath.Join(root, name)); err != nil || string(got) != want {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, want)
		}
	}
	for name, want := range map[string]string{"home": "data/home", "tmp": "/var/tmp", "opt": "/var/opt", "usr/local": "../var/usrlocal"} {
		if got, err := os.Readlink(filepath.Join(root, name)); got != want {
			t.Errorf("%s leads to %q (%v), want %q", name, got, err, want)
		}
	}
	if _, err := os.Lstat(filepath.Join(root, "var/home")); err == nil {
		t.Error("var/home was made although home leads elsewhere")
	}
	if !slices.ContainsFunc(r.Warnings, func(w string) bool { return strings.Contains(w, "tmp.mount is masked") }) {
		t.Errorf("no word about tmp.mount: %q", r.Warnings)
	}
}

// TestOutside: links of a hostile tree lead nowhere but into the tree.
func TestOutside(t *testing.T) {
	for _, link := range []string{"etc/apt", "usr/lib/systemd", "usr/lib/sysimage", "usr/lib/sysusers.d", "usr/lib/tmpfiles.d", "usr/share/factory", "usr/share", "etc/ssh", "run", "tmp", "var/log", "var/cache", "var/roothome", "var"} {
		for _, absolute := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s,%v", link, absolute), func(t *testing.T) {
				outside := t.TempDir()
				plant(t, outside, "apt/x=", "ssh_host_x=keep", "lib/dpkg/status=Package: o\n", "x.log=keep", "sub/a=keep", "factory/x=")
				before := digest(t, outside)
				root := small(t)
				target := outside
				if !absolute {
					rel, err := filepath.Rel(filepath.Join(root, filepath.Dir(link)), outside)
					if err != nil {
						t.Fatal(err)
					}
					target = rel
				}
				if err := os.RemoveAll(filepath.Join(root, link)); err != nil {
					t.Fatal(err)
				}
				plant(t, root, link+"->"+target)
				_, err := Run(context.Background(), Options{Root: root})
				t.Logf("the run: %v", err)
				if now := digest(t, outside); now != before {
					t.Errorf("something outside of the tree has changed:\n%s\nwas\n%s", now, before)
				}
			})
		}
	}
}

func TestRefuseRunning(t *testing.T) {
	for name, c := range map[string]struct {
		items []string
		want  bool
	}{
		"systemd booted":      {[]string{"run/systemd/system/"}, true},
		"sysvinit":            {[]string{"proc/1/comm=init\n"}, true},
		"its own root":        {[]string{"proc/1/comm=systemd\n", "proc/1/root->../.."}, true},
		"a chroot":            {[]string{"proc/1/comm=systemd\n", "proc/1/root/"}, false},
		"a build container":   {[]string{"proc/1/comm=sh\n", "run/systemd/"}, false},
		"a chroot, no /proc":  {nil, false},
		"particle as process": {[]string{"proc/1/comm=particle\n"}, false},
		"another init":        {[]string{"proc/1/comm=runit\n", "proc/1/root->../..", "proc/self/ns/pid->pid:[4026531836]"}, true},
		"a shy init":          {[]string{"proc/1/comm=agent\n", "proc/self/ns/pid->pid:[4026531836]"}, true},
		"its chroot":          {[]string{"proc/1/comm=runit\n", "proc/1/root/", "proc/self/ns/pid->pid:[4026531836]"}, false},
		"ids of its own":      {[]string{"proc/1/comm=sh\n", "proc/1/root->../..", "proc/self/ns/pid->pid:[4026532001]"}, false},
		"the host's ids":      {[]string{"proc/1/comm=runit\n", "proc/self/ns/pid->pid:[4026531836]", "run/.containerenv="}, false},
	} {
		t.Run(name, func(t *testing.T) {
			host := t.TempDir()
			plant(t, host, c.items...)
			if err := refuseRunning(host, host); errors.Is(err, ErrRunning) != c.want {
				t.Errorf("got %v, want it refused: %v", err, c.want)
			}
			if err := refuseRunning(t.TempDir(), host); err != nil {
				t.Errorf("another tree: %v", err)
			}
		})
	}
}

func TestUnfinished(t *testing.T) {
	status := `Package: fine
Status: install ok installed

Package: removed
Status: deinstall ok config-files
Description: x
 Status: install ok unpacked

Package: half
Status: install ok half-configured

package: waiting
status: install ok triggers-pending

Package: broken
Status: install reinstreq installed
`
	if got, want := unfinished([]byte(status)), []string{"half", "waiting", "broken"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestCancelled(t *testing.T) {
	root := small(t)
	before := digest(t, root)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Run(ctx, Options{Root: root}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if digest(t, root) != before {
		t.Error("the tree has changed")
	}
}
