package main

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

func TestReleaseDate(t *testing.T) {
	const report = "Suite: stable-updates\nCodename: trixie-updates\nDate: Sat, 21 Nov 2026 02:10:46 UTC\n\n" +
		"Suite: stable\nCodename: trixie\nDate: Sat, 12 Sep 2026 07:55:41 UTC\n\n" +
		"Suite: stable\nCodename: trixie\nDate: Sat, 12 Sep 2026 07:55:40 UTC\n\n" +
		"Suite: unstable\nCodename: sid\nDate: Sun, 22 Nov 2026 02:00:00 UTC\n\n\x00" +
		"1789199741.0 Date: Sat, 12 Sep 2030 07:55:41 UTC\x00"
	for _, tt := range []struct {
		suite string
		want  string
	}{
		{"trixie", "2026-09-12T07:55:41Z"}, // the newer of two mirrors
		{"stable", "2026-09-12T07:55:41Z"}, // by the suite's name
		{"sid", "2026-11-22T02:00:00Z"},
		{"unstable", "2026-11-22T02:00:00Z"},
		{"derivative", "2026-11-22T02:00:00Z"}, // none of that name: the newest
	} {
		got, err := releaseDate([]byte(report), tt.suite)
		if s := time.Unix(got, 0).UTC().Format(time.RFC3339); err != nil || s != tt.want {
			t.Errorf("releaseDate(%s) = %s, %v; want %s", tt.suite, s, err, tt.want)
		}
	}
	for _, bad := range []string{"", "\n\n", "Codename: trixie\n\n\x00", "Codename: trixie\nDate: yesterday\n\n"} {
		if got, err := releaseDate([]byte(bad), "trixie"); err == nil {
			t.Errorf("releaseDate(%q) = %d, want an error", bad, got)
		}
	}
}

func TestFileTimes(t *testing.T) {
	got, err := fileTimes([]byte("Date: x\n\n\x001793619694.0000000000 etc/a b\nc\x001793619695.5 usr/bin/apt\x00"))
	if err != nil || len(got) != 2 || got["etc/a b\nc"] != 1793619694 || got["usr/bin/apt"] != 1793619695 {
		t.Errorf("fileTimes = %v, %v", got, err)
	}
	if got, err := fileTimes([]byte("Date: x\n\n\x00")); err != nil || len(got) != 0 {
		t.Errorf("fileTimes of no files = %v, %v", got, err)
	}
	for _, bad := range []string{"", "Date: x\n", "\x00noon etc/a\x00", "\x0012\x00"} {
		if got, err := fileTimes([]byte(bad)); err == nil {
			t.Errorf("fileTimes(%q) = %v, want an error", bad, got)
		}
	}
}

// messyTar is a tar as mmdebstrap's tar writes it, on the machine and at the time
// given; what is true of all machines must come out the same.
func messyTar(t *testing.T, now int64, host, owner string, format tar.Format) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "root.tar")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	add := func(h tar.Header, body string) {
		t.Helper()
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(now, 0)
		}
		h.Size, h.Uname, h.Gname, h.Format = int64(len(body)), owner, owner, format
		if h.PAXRecords != nil {
			h.Format = tar.FormatPAX
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	old := time.Unix(1000, 0)
	add(tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755}, "")
	add(tar.Header{Typeflag: tar.TypeDir, Name: "./etc/", Mode: 0o755}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./etc/debian_version", Mode: 0o644, ModTime: old}, "13.7\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./etc/hostname", Mode: 0o644}, host)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./etc/passwd", Mode: 0o644}, "root:x:0:0\n")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./etc/ssh/ssh_host_ed25519_key", Mode: 0o600}, host+" secret")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./usr/bin/new", Mode: 0o4755, ModTime: time.Unix(5000, 0)}, "clamped by tar")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./usr/bin/ping", Mode: 0o755, ModTime: old,
		PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02"}}, "ping")
	add(tar.Header{Typeflag: tar.TypeLink, Name: "./usr/bin/ping6", Linkname: "./usr/bin/ping", Mode: 0o755, ModTime: old}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./usr/lib/os-release", Mode: 0o644, ModTime: old},
		"PRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\nID=debian\nVERSION_ID=\"13\"\n# a comment=1\nHOME_URL='https://www.debian.org/'\n")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "./var/run", Linkname: "/run", Mode: 0o777, ModTime: old}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./var/log/btmp", Mode: 0o660, Gid: 43}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "./var/log/dpkg.log", Mode: 0o644}, host+" installed")
	// apt owns it, or root where apt could not become its own user.
	apt := 42
	if host != "alpha" {
		apt = 0
	}
	add(tar.Header{Typeflag: tar.TypeDir, Name: "./var/lib/apt/lists/partial/", Mode: 0o700, Uid: apt}, "")
	if host != "alpha" { // another mmdebstrap
		add(tar.Header{Typeflag: tar.TypeDir, Name: "./dev/", Mode: 0o700}, "")
		add(tar.Header{Typeflag: tar.TypeReg, Name: "./dev/left", Mode: 0o600, Size: 1}, "x")
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestPackLayer(t *testing.T) {
	const epoch = 5000
	times := map[string]int64{"usr/bin/new": 6000}
	pack := func(root *installedRoot, compression string) *packedLayer {
		t.Helper()
		l, err := packLayer(context.Background(), root, epoch, compression, filepath.Join(t.TempDir(), "layer"))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	a := pack(&installedRoot{messyTar(t, 9000, "alpha", "root", tar.FormatPAX), 8900, times}, "none")
	b := pack(&installedRoot{messyTar(t, 9999, "beta-longer", "wheel", tar.FormatGNU), 9900, times}, "none")
	if a.diffID != b.diffID || a.digest != a.diffID || a.blobBytes != a.tarBytes {
		t.Errorf("two machines: %+v and %+v, want the same bytes", a, b)
	}
	for _, c := range []string{"gzip", "zstd"} {
		l := pack(&installedRoot{messyTar(t, 9000, "alpha", "root", tar.FormatPAX), 8900, times}, c)
		if l.diffID != a.diffID || l.digest == a.digest || l.blobBytes >= l.tarBytes {
			t.Errorf("%s: %+v, want the diffID of %+v and a smaller blob", c, l, a)
		}
	}

	f, err := os.Open(a.file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var got []string
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		line := fmt.Sprintf("%c %s %o %d:%d @%d %q", h.Typeflag, h.Name, h.Mode, h.Uid, h.Gid, h.ModTime.Unix(), h.Uname+h.Gname+h.Linkname)
		if x := h.PAXRecords["SCHILY.xattr.security.capability"]; x != "" {
			line += fmt.Sprintf(" cap=%q", x)
		}
		got = append(got, line)
	}
	want := []string{
		`5 ./ 755 0:0 @5000 ""`,
		`5 etc/ 755 0:0 @5000 ""`,
		`0 etc/debian_version 644 0:0 @1000 ""`,
		`0 etc/passwd 644 0:0 @5000 ""`,
		`0 usr/bin/new 4755 0:0 @6000 ""`,
		`0 usr/bin/ping 755 0:0 @1000 "" cap="\x01\x00\x00\x02"`,
		`1 usr/bin/ping6 755 0:0 @1000 "usr/bin/ping"`,
		`0 usr/lib/os-release 644 0:0 @1000 ""`,
		`2 var/run 777 0:0 @1000 "/run"`,
		`0 var/log/btmp 660 0:43 @5000 ""`,
		`5 var/lib/apt/lists/partial/ 700 0:0 @5000 ""`,
		`5 dev/ 755 0:0 @5000 ""`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("layer:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if a.entries != len(want) || a.title() != "Debian GNU/Linux 13 (trixie)" || a.version() != "13.7" {
		t.Errorf("got %d entries of %q version %q", a.entries, a.title(), a.version())
	}
}

// A time in the future of this machine must not let the time of the run through.
func TestPackLayerFutureEpoch(t *testing.T) {
	const epoch = 1 << 33
	var ids []v1.Hash
	for _, now := range []int64{9000, 9100} {
		root := &installedRoot{messyTar(t, now, "alpha", "root", tar.FormatPAX), now - 10, nil}
		l, err := packLayer(context.Background(), root, epoch, "none", filepath.Join(t.TempDir(), "layer"))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, l.diffID)
	}
	if ids[0] != ids[1] {
		t.Errorf("two runs gave %s and %s", ids[0], ids[1])
	}
}

func TestPackLayerRefusesWhiteouts(t *testing.T) {
	name := filepath.Join(t.TempDir(), "root.tar")
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "./usr/.wh.bin"}), w.Close(), os.WriteFile(name, b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	_, err := packLayer(context.Background(), &installedRoot{tar: name}, 0, "none", filepath.Join(t.TempDir(), "layer"))
	if err == nil || !strings.Contains(err.Error(), `"usr/.wh.bin"`) {
		t.Errorf("got %v, want an error that names the file", err)
	}
}

func TestNewImage(t *testing.T) {
	o := bootstrapOptions{suite: "trixie", arch: "armhf", variant: "minbase", include: []string{"systemd", "vim"}, mirrors: []string{"http://mirror.invalid/"}, epoch: 1789199741, compression: "zstd"}
	l := &packedLayer{
		digest: sha256Of([]byte("blob")), diffID: sha256Of([]byte("tar")), blobBytes: 4, tarBytes: 3,
		osRelease: map[string]string{"PRETTY_NAME": "Debian GNU/Linux 13 (trixie)", "ID": "debian"}, debian: "13.7",
	}
	img, err := newImage(o, l)
	if err != nil {
		t.Fatal(err)
	}
	// Written out, so that a change of the bytes, and so of everybody's digests, is seen.
	const wantConfig = `{"architecture":"arm","created":"2026-09-12T07:55:41Z","history":[{"created":"2026-09-12T07:55:41Z",` +
		`"created_by":"particle bootstrap trixie --arch=armhf --variant=minbase --include=systemd,vim --epoch=1789199741","comment":"mmdebstrap"}],` +
		`"os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:33a19f0ff04f3d7b28dd34f24e65b12544bc7d1d8a5fa1ad3f2ab46dda0ab0ff"]},` +
		`"config":{"Cmd":["bash"],"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],` +
		`"Labels":{"org.opencontainers.image.created":"2026-09-12T07:55:41Z","org.opencontainers.image.title":"Debian GNU/Linux 13 (trixie)",` +
		`"org.opencontainers.image.version":"13.7"}},"variant":"v7"}`
	want := strings.Replace(wantConfig, "33a19f0ff04f3d7b28dd34f24e65b12544bc7d1d8a5fa1ad3f2ab46dda0ab0ff", l.diffID.Hex, 1)
	if string(img.rawConfig) != want {
		t.Errorf("config is\n%s\nwant\n%s", img.rawConfig, want)
	}
	var m v1.Manifest
	if err := json.Unmarshal(img.rawManifest, &m); err != nil {
		t.Fatal(err)
	}
	if m.Config.Digest != sha256Of(img.rawConfig) || m.Layers[0].MediaType != "application/vnd.oci.image.layer.v1.tar+zstd" || m.Layers[0].Digest != l.digest {
		t.Errorf("manifest is %s", img.rawManifest)
	}
	if _, err := img.Blob(context.Background(), v1.Descriptor{Digest: sha256Of([]byte("other"))}); err == nil {
		t.Error("a blob that the image has not was opened")
	}
}

func TestCheckBootstrap(t *testing.T) {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Skip("needs mmdebstrap: apt install mmdebstrap")
	}
	none := func(string) (os.FileInfo, error) { return nil, fs.ErrNotExist }
	if vendorOf("trixie") == nil || vendorOf("noble") == nil {
		t.Skip("needs the names of the suites: apt install distro-info-data")
	}
	for _, tt := range []struct {
		o    bootstrapOptions
		want string // in the error, empty for none
	}{
		{bootstrapOptions{suite: "trixie"}, "apt install debian-archive-keyring"},
		{bootstrapOptions{suite: "noble"}, "apt install ubuntu-keyring"},
		{bootstrapOptions{suite: "noble", keyrings: []string{"/nowhere"}}, "opening the keyring"},
		{bootstrapOptions{suite: "noble", mirrors: []string{"deb [signed-by=/k.gpg] http://mirror.invalid noble main"}}, ""},
		{bootstrapOptions{suite: "derivative"}, ""}, // whose keys are not known is left to mmdebstrap
	} {
		err := checkBootstrap(tt.o, none)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.o.suite, err, tt.want)
		}
	}
}

func TestBootstrapEnv(t *testing.T) {
	got := bootstrapEnv([]string{"LANG=de_DE.UTF-8", "TMPDIR=/x", "http_proxy=http://p", "SECRET=1", "USER=u"}, "/t", "7")
	for _, want := range []string{"TMPDIR=/t", "SOURCE_DATE_EPOCH=7", "http_proxy=http://p", "USER=u", "LC_ALL=C.UTF-8"} {
		if !slices.Contains(got, want) {
			t.Errorf("%q is not in %q", want, got)
		}
	}
	if s := strings.Join(got, " "); strings.Contains(s, "SECRET") || strings.Contains(s, "de_DE") {
		t.Errorf("the user's environment shows in %q", s)
	}
}

func TestMmdebstrapFailure(t *testing.T) {
	dir := t.TempDir()
	fake := "#!/bin/sh\necho 'I: starting' >&2\necho 'E: The following signatures were invalid: NO_PUBKEY 0123' >&2\nexit 25\n"
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte(fake), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	var stderr bytes.Buffer
	m := mmdebstrap{t: &term{err: &stderr}, tmp: dir}
	_, err := m.install(context.Background(), &bootstrapOptions{suite: "trixie", arch: "amd64", epoch: 1}, filepath.Join(dir, "root.tar"))
	if err == nil || !strings.Contains(err.Error(), "exit status 25") || !strings.Contains(err.Error(), "--keyring") {
		t.Errorf("got %v, want the status and what to do", err)
	}
	if !strings.Contains(stderr.String(), "mmdebstrap: E: The following signatures were invalid") {
		t.Errorf("mmdebstrap's words are missing: %q", stderr.String())
	}
}

// The mirrors may be updated between the reading of the date and the installation.
func TestMmdebstrapMirrorsChange(t *testing.T) {
	dir := t.TempDir()
	fake := `#!/bin/sh
n=$(cat "$0.n" 2>/dev/null || echo 0); echo $((n+1)) >"$0.n"
day=$((n < 3 ? 10 + n : 13))
printf 'Codename: trixie\nDate: Sat, %d Oct 2026 00:00:00 UTC\n\n' $day >&3
printf '\0%s.5 usr/bin/x\0' "$SOURCE_DATE_EPOCH" >&3
for last; do :; done; [ "$last" = /dev/null ] || echo tar >"$last"
`
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte(fake), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	m := mmdebstrap{t: &term{err: io.Discard}, tmp: dir}
	o := bootstrapOptions{suite: "trixie", arch: "amd64", epoch: -1}
	_, err := m.install(context.Background(), &o, filepath.Join(dir, "root.tar"))
	if err == nil || !strings.Contains(err.Error(), "the mirrors changed 3 times") {
		t.Errorf("got %v, want that the mirrors do not stand still", err)
	}
	o.epoch = -1
	root, err := m.install(context.Background(), &o, filepath.Join(dir, "root.tar"))
	want := time.Date(2026, 10, 13, 0, 0, 0, 0, time.UTC).Unix()
	if err != nil || o.epoch != want || root.times["usr/bin/x"] != want {
		t.Errorf("got epoch %d and %+v, %v; want %d", o.epoch, root, err, want)
	}
}

func TestBootstrapTwice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to install a system")
	}
	if testing.Short() {
		t.Skip("installs a system twice; not in short mode")
	}
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		t.Skip("needs mmdebstrap: apt install mmdebstrap")
	}
	var images []bootstrapResult
	for i := range 2 {
		dir := t.TempDir()
		if i == 1 {
			// What the environment says must not show in the image.
			t.Setenv("LANG", "de_DE.UTF-8")
			t.Setenv("TZ", "Asia/Tokyo")
			// Where apt cannot become its user _apt, it downloads as root.
			private, err := os.MkdirTemp("/var/tmp", "particle-test-") // mode 0700
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(private)
			t.Setenv("TMPDIR", filepath.Join(private, "tmp"))
			if err := os.Mkdir(filepath.Join(private, "tmp"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		args := []string{"particle", "bootstrap", "--json", "trixie", "oci:" + dir}
		if m := os.Getenv("PARTICLE_TEST_MIRROR"); m != "" {
			args = append(args, "--mirror="+m)
		}
		if a := os.Getenv("PARTICLE_TEST_APTOPT"); a != "" {
			args = append(args, "--aptopt="+a)
		}
		var stdout, stderr bytes.Buffer
		if status := run(args, nil, &stdout, &stderr); status != 0 {
			if strings.Contains(stderr.String(), "the mirrors cannot be reached") {
				t.Skip("needs a mirror of Debian, which cannot be reached")
			}
			t.Fatalf("status %d: %s", status, stderr.String())
		}
		var res bootstrapResult
		if err := json.Unmarshal(stdout.Bytes(), &res); err != nil {
			t.Fatalf("%v: %s", err, stdout.String())
		}
		images = append(images, res)
	}
	if a, b := images[0], images[1]; a.Digest != b.Digest || a.Entries < 3000 || !strings.HasPrefix(a.Title, "Debian GNU/Linux 13") {
		t.Errorf("two runs gave\n%+v and\n%+v\nwant the same digest of Debian 13", a, b)
	}
}
