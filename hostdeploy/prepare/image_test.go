package prepare

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// images are those that the tests work on copies of, if podman has them.
var images = []string{"localhost/server", "localhost/debian:trixie"}

// imageTree shows an image's files in a directory that can be written, as a build has
// them: by overlayfs, with the image below.
func imageTree(t *testing.T, image string) string {
	t.Helper()
	if testing.Short() {
		t.Skip("works on a whole image; not in -short")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := exec.LookPath("podman"); err != nil {
		t.Skip("there is no podman here (Debian package podman)")
	}
	if err := exec.Command("podman", "image", "exists", image).Run(); err != nil {
		t.Skipf("podman has no image %s; docs/examples/server/README.md says how to build one", image)
	}
	lower, err := exec.Command("podman", "image", "mount", image).Output()
	if err != nil {
		t.Fatalf("podman image mount %s: %v", image, err)
	}
	// podman counts its mounts: others may use this one, too.
	t.Cleanup(func() { _ = exec.Command("podman", "image", "umount", image).Run() })
	dir, err := os.MkdirTemp("/var/tmp", "particle-prepare-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	root := filepath.Join(dir, "root")
	plant(t, dir, "root/", "upper/", "work/")
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work,redirect_dir=off,metacopy=off", strings.TrimSpace(string(lower)), dir, dir)
	if err := unix.Mount("overlay", root, "overlay", 0, options); err != nil {
		t.Fatalf("mounting overlayfs over %s: %v", image, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	return root
}

// in runs a command in a tree.
func in(t *testing.T, root, command string) string {
	t.Helper()
	out, stderr, err := tryIn(t, root, command)
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", command, err, out, stderr)
	}
	return out
}

func tryIn(t *testing.T, root, command string) (stdout, stderr string, err error) {
	t.Helper()
	handle, err := os.OpenRoot(root)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	cmd := exec.Command("/bin/sh", "-ec", command)
	cmd.Env, cmd.Dir = environment(), "/"
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = runChroot(handle, root, cmd)
	return out.String(), errs.String(), err
}

// changed tells which lines of a digest are others in another.
func changed(before, after string) string {
	var b strings.Builder
	for _, side := range []struct{ sign, a, b string }{{"-", before, after}, {"+", after, before}} {
		have := map[string]bool{}
		for line := range strings.Lines(side.b) {
			have[line] = true
		}
		for line := range strings.Lines(side.a) {
			if !have[line] {
				b.WriteString(side.sign + line)
			}
		}
	}
	return b.String()
}

// testDeb makes, in a tree, a package with directories in /var, a user, a trigger and a
// file each in /root's and /opt's place.
const testDeb = `
dir=$(mktemp -d)
mkdir -p $dir/DEBIAN $dir/usr/share/prepared $dir/opt/prepared $dir/var/lib/prepared/spool "$dir/var/lib/prepared/a b%c"
echo 1 >$dir/usr/share/prepared/file
echo 1 >$dir/opt/prepared/tool
echo seed >"$dir/var/lib/prepared/a b%c/seed"
chmod 2770 $dir/var/lib/prepared/spool
cat >$dir/DEBIAN/control <<END
Package: prepared
Version: 1
Architecture: all
Maintainer: Particle tests <tests@particle-os.invalid>
Description: a package of the tests
END
cat >$dir/DEBIAN/postinst <<'END'
#!/bin/sh
set -e
echo 'prepared:x:877:877:A "user":/var/lib/prepared:/usr/sbin/nologin' >>/etc/passwd
echo 'prepared:x:877:' >>/etc/group
echo 'prepared:!*:1::::::' >>/etc/shadow
echo 'prepared:!*::' >>/etc/gshadow
chown prepared:prepared /var/lib/prepared/spool
END
echo 'activate-noawait ldconfig' >$dir/DEBIAN/triggers
chmod 755 $dir/DEBIAN/postinst $dir
(cd $dir && find usr opt -type f -exec md5sum {} + >DEBIAN/md5sums)
dpkg-deb --root-owner-group -Znone --build $dir /tmp/prepared.deb >&2
rm -r $dir
apt-get -q -y install /tmp/prepared.deb >&2
rm /tmp/prepared.deb
`

// TestImage prepares a real image, and has the programs of Debian judge it.
func TestImage(t *testing.T) {
	for _, image := range images {
		t.Run(image, func(t *testing.T) {
			root := imageTree(t, image)
			o := Options{Root: root, NoInitramfs: true}
			ctx := context.Background()

			packages := in(t, root, "dpkg -l | wc -l")
			verify := in(t, root, "dpkg --verify || true")
			auto := in(t, root, "apt-mark showauto")
			manual := in(t, root, "apt-mark showmanual")
			if _, err := Run(ctx, o); err != nil {
				t.Fatal(err)
			}
			for command, want := range map[string]string{
				"dpkg -l | wc -l": packages, "dpkg --verify || true": verify,
				"apt-mark showauto": auto, "apt-mark showmanual": manual,
				"dpkg -S /usr/bin/sh":    "dash: /usr/bin/sh\n",
				"readlink /var/lib/dpkg": toDpkg + "\n",
			} {
				if got := in(t, root, command); got != want {
					t.Errorf("%s: got %q, want %q as before", command, got, want)
				}
			}

			// A host has another /boot.
			if got := in(t, root, "mkdir /tmp/boot; mount --bind /tmp/boot /boot; dpkg --verify || true"); got != verify {
				t.Errorf("dpkg --verify on a host: got %q, want %q", got, verify)
			}

			// apt and dpkg on top, and another run.
			in(t, root, testDeb)
			in(t, root, "apt-mark auto prepared")
			for _, name := range []string{"var/lib/apt/extended_states", "var/lib/dpkg/status-new"} {
				if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("/%s after apt: got %v, want nothing there", name, err)
				}
			}
			if got := in(t, root, "readlink /var/lib/dpkg; ls /usr/lib/sysimage/dpkg/updates; grep -A 1 '^Package: prepared' /usr/lib/sysimage/apt/extended_states | head -n 1"); got != toDpkg+"\nPackage: prepared\n" {
				t.Errorf("after apt: got %q", got)
			}
			if _, err := Run(ctx, o); err != nil {
				t.Fatal(err)
			}
			if got := in(t, root, "dpkg --verify prepared; dpkg -l prepared | tail -n 1 | cut -c 1-2"); got != "ii\n" {
				t.Errorf("the package on top: got %q", got)
			}

			// A third run is for nothing.
			before := digest(t, root)
			r, err := Run(ctx, o)
			if err != nil {
				t.Fatal(err)
			}
			if diff := changed(before, digest(t, root)); len(r.Changes) > 0 || diff != "" {
				t.Errorf("a run for nothing changes the tree:\n%s%s", lines(r), diff)
			}
			tmpfilesAgain(t, root)
			sysusersAgain(t, root)
		})
	}
}

// tmpfilesAgain has systemd-tmpfiles make the image's /var anew.
func tmpfilesAgain(t *testing.T, root string) {
	if _, err := os.Stat(filepath.Join(root, "usr/bin/systemd-tmpfiles")); err != nil {
		t.Log("the image has no systemd-tmpfiles: its lines are not tried")
		return
	}
	data, err := os.ReadFile(filepath.Join(root, tmpfilesConf))
	if err != nil {
		t.Fatal(err)
	}
	made := parseTmpfiles(string(data))
	if len(made) < 5 {
		t.Fatalf("%d lines only:\n%s", len(made), data)
	}
	show := func() string {
		var b strings.Builder
		for _, l := range made {
			below := []string{l.path}
			if slices.Contains(seeded, strings.TrimPrefix(l.path, "/")) {
				below = strings.Fields(in(t, root, "cd / && find ."+l.path+" ! -name '* *' | sort"))
			}
			for _, name := range below {
				fi, err := os.Lstat(filepath.Join(root, name))
				if err != nil {
					fmt.Fprintln(&b, name, "is missing")
					continue
				}
				st := fi.Sys().(*syscall.Stat_t)
				fmt.Fprintf(&b, "%s %o %d:%d", name, st.Mode, st.Uid, st.Gid)
				switch fi.Mode().Type() {
				case fs.ModeSymlink:
					target, _ := os.Readlink(filepath.Join(root, name))
					fmt.Fprintf(&b, " -> %s", target)
				case 0:
					content, _ := os.ReadFile(filepath.Join(root, name))
					fmt.Fprintf(&b, " %q", content)
				}
				b.WriteByte('\n')
			}
		}
		return b.String()
	}
	want := show()
	if !strings.Contains(want, "/var/lib/prepared/a b%c/seed") || strings.Contains(want, "is missing") {
		t.Errorf("the lines are not those of /var:\n%s", want)
	}
	entries, err := os.ReadDir(filepath.Join(root, "var"))
	if err != nil {
		t.Fatal(err)
	}
	for _, en := range entries {
		if err := os.RemoveAll(filepath.Join(root, "var", en.Name())); err != nil {
			t.Fatal(err)
		}
	}
	// A machine that was installed otherwise.
	plant(t, root, "var/lib/dpkg/status=Package: of another system\n")
	_, said, err := tryIn(t, root, "systemd-tmpfiles --create --boot --prefix=/var")
	t.Logf("systemd-tmpfiles: %v\n%s", err, said)
	if strings.Contains(said, filepath.Base(tmpfilesConf)) {
		t.Errorf("it complains about our lines:\n%s", said)
	}
	if diff := changed(want, show()); diff != "" {
		t.Errorf("systemd-tmpfiles has made others:\n%s", diff)
	}
}

// sysusersAgain has systemd-sysusers make the users that an older /etc lacks.
func sysusersAgain(t *testing.T, root string) {
	if _, err := os.Stat(filepath.Join(root, "usr/bin/systemd-sysusers")); err != nil {
		t.Log("the image has no systemd-sysusers: its lines are not tried")
		return
	}
	want := in(t, root, "sort /etc/passwd; sort /etc/group")
	for _, name := range []string{"passwd", "group", "shadow", "gshadow"} {
		in(t, root, fmt.Sprintf("sed -i '/^prepared:/d; /^systemd-/d; /^messagebus:/d; /^sshd:/d' /etc/%s", name))
	}
	if in(t, root, "sort /etc/passwd; sort /etc/group") == want {
		t.Fatal("nothing was removed")
	}
	in(t, root, "systemd-sysusers")
	got := in(t, root, "sort /etc/passwd; sort /etc/group")
	got = strings.ReplaceAll(got, ":!*:", ":x:")
	if diff := changed(want, got); diff != "" {
		t.Errorf("systemd-sysusers has made others:\n%s", diff)
	}
}

// TestInitramfs makes the initramfs of a real image, in the image, with Particle's part.
func TestInitramfs(t *testing.T) {
	root := imageTree(t, images[0])
	program := filepath.Join(t.TempDir(), "particle-init-root")
	build := exec.Command("go", "build", "-o", program, "github.com/particle-os/particle/cmd/particle-init-root")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building particle-init-root: %v\n%s", err, out)
	}
	for _, f := range initramfs.Files() {
		data := f.Data
		if data == nil {
			var err error
			if data, err = os.ReadFile(program); err != nil {
				t.Fatal(err)
			}
		}
		plant(t, root, fmt.Sprintf("%04o %s=", f.Mode.Perm(), f.Path)+string(data))
	}
	t.Setenv("SOURCE_DATE_EPOCH", "1789199741")
	in(t, root, "rm -f /boot/initrd.img-* /usr/lib/modules/*/initramfs.img")
	o, ctx := Options{Root: root}, context.Background()
	r, err := Check(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(r.Changes, func(c Change) bool { return c.Action == Rebuild }) {
		t.Errorf("Check does not miss the initramfs:\n%s", lines(r))
	}
	r, err = Run(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kernels) == 0 || !slices.ContainsFunc(r.Changes, func(c Change) bool { return c.Action == Rebuild }) {
		t.Errorf("no initramfs was made for %q:\n%s", r.Kernels, lines(r))
	}
	for _, v := range r.Kernels {
		f, err := os.Open(filepath.Join(root, modulesDir, v, initrdName))
		if err != nil {
			t.Fatal(err)
		}
		if has, err := initramfs.Has(f); err != nil || !has {
			t.Errorf("the initramfs of %s has Particle's set-up: %v, %v", v, has, err)
		}
		f.Close()
	}
	if got := in(t, root, "linux-version list; readlink -e /boot/initrd.img-*"); got != r.Kernels[0]+"\n/usr/lib/modules/"+r.Kernels[0]+"/initramfs.img\n" {
		t.Errorf("what other programs find: got %q", got)
	}
	for _, dir := range []string{"proc", "sys", "dev", "run"} {
		if entries, err := os.ReadDir(filepath.Join(root, dir)); err != nil || dir == "proc" && len(entries) > 0 {
			t.Errorf("/%s of the tree after the run: %d entries, %v", dir, len(entries), err)
		}
	}
	before := digest(t, root)
	if r, err = Run(ctx, o); err != nil {
		t.Fatal(err)
	}
	if diff := changed(before, digest(t, root)); len(r.Changes) > 0 || diff != "" {
		t.Errorf("the second initramfs is another one:\n%s%s", lines(r), diff)
	}
}
