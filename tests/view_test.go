package tests

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// odd makes what file systems can hold and images seldom do.
const odd = `set -e
mkdir -p dir/sub empty 'sp ace' sticky setgid
chmod 1777 sticky; chmod 2750 setgid; chown 3:4 setgid
printf 'small' >small
head -c 64 /dev/urandom >inline; head -c 65 /dev/urandom >object; : >zero
head -c 300000 /dev/urandom >large
ln large hard1; ln large dir/hard2; ln small dir/small-link
ln -s ../large dir/link; ln -s "$(printf 't%.0s' $(seq 1 4000))" longlink; ln -s nowhere dangling
mkfifo fifo; mknod null c 1 3; mknod block b 8 17; mknod big c 300 70000
printf x >"$(printf 'non\377utf8')"; printf x >"$(printf 'new\nline')"; printf x >"$(printf 'n%.0s' $(seq 1 255))"
truncate -s 10M sparse; printf end >>sparse
printf suid >suid; chmod 4755 suid; printf none >none; chmod 0 none
chown 70000:4294967294 dir/sub; touch -d '2001-02-03 04:05:06.789012345 UTC' inline; touch -d '1969-12-31 23:59:58 UTC' object
touch -h -d '1965-02-02 UTC' dangling
setfattr -n user.note -v value small; setfattr -n user.empty empty; setfattr -n user.binary -v 0x00ff0a large
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 suid
setfacl -m u:12:rw none || true
`

// TestMountEqualsPodman compares a mounted image with podman's view of the same, in
// every field that there is.
func TestMountEqualsPodman(t *testing.T) {
	needPodman(t, "setfattr", "buildah")
	t.Run("odd files", func(t *testing.T) {
		dir := dirFor(t)
		ctr := strings.TrimSpace(run(t, "buildah", "from", "--quiet", "scratch"))
		root := strings.TrimSpace(run(t, "buildah", "mount", ctr))
		run(t, "sh", "-c", "cd \"$1\" && "+odd, "sh", root)
		run(t, "buildah", "commit", "-q", ctr, "localhost/odd-base")
		run(t, "buildah", "rm", ctr)
		// A second layer changes, deletes and hides.
		ctr = strings.TrimSpace(run(t, "buildah", "from", "--quiet", "localhost/odd-base"))
		root = strings.TrimSpace(run(t, "buildah", "mount", ctr))
		run(t, "sh", "-c", `cd "$1" && rm fifo && rm -r dir && mkdir dir && echo new >dir/new && echo changed >>hard1 && chown 5:5 zero &&
			rm empty/.x 2>/dev/null; mv small moved && ln -sf elsewhere dangling && rmdir empty && echo file >empty`, "sh", root)
		run(t, "buildah", "commit", "-q", ctr, "localhost/odd")
		run(t, "buildah", "rm", ctr)
		compareWithPodman(t, dir, "localhost/odd-base")
		compareWithPodman(t, dir, "localhost/odd")
	})
	t.Run("server", func(t *testing.T) {
		compareWithPodman(t, dirFor(t), server.get(t))
	})
}

func compareWithPodman(t *testing.T, dir, name string) {
	t.Helper()
	store := filepath.Join(dir, "store")
	c := convert(t, store, "containers-storage:"+name, name)
	ours, theirs := mountImage(t, store, name, "rootfs"), podmanMount(t, name)
	// podman makes the root directory's own metadata up: mode 0555 and the time of
	// extraction.
	if out, err := try(particle, "--store", store, "diff", "--no-root", theirs, ours); err != nil || out != "" {
		t.Errorf("%s: podman's mount and ours differ: %v\n%s", name, err, out)
	}
	// The tree of the image is what its mount shows.
	if out, err := try(particle, "--store", store, "diff", name, ours); err != nil || out != "" {
		t.Errorf("%s: the image and its mount differ: %v\n%s", name, err, out)
	}
	// A comparison by foreign programs, in case ours cannot see. The sizes of
	// directories are the file system's own affair, and overlayfs counts links that
	// an upper layer has deleted.
	list := `cd "$1" && find . -mindepth 1 \( -type d -printf '%P %M %U:%G %T@\n' -o -printf '%P %M %U:%G %s %T@ %l\n' \) | LC_ALL=C sort`
	if a, b := run(t, "sh", "-c", list, "sh", theirs), run(t, "sh", "-c", list, "sh", ours); a != b {
		t.Errorf("%s: find prints other lines:\n%s", name, firstDifference(a, b))
	}
	// Link groups by inode number, device numbers, and xattrs.
	groups := `cd "$1" && find . -type f -links +1 -printf '%i %P\n' | LC_ALL=C sort -k2 | awk '{ if (!($1 in g)) g[$1] = ++n; $1 = g[$1]; print }' &&
		find . \( -type c -o -type b \) -exec stat -c '%n %t:%T' {} + | LC_ALL=C sort`
	if a, b := run(t, "sh", "-c", groups, "sh", theirs), run(t, "sh", "-c", groups, "sh", ours); onlyGroups(a) != onlyGroups(b) {
		t.Errorf("%s: links or devices differ:\n%s", name, firstDifference(onlyGroups(a), onlyGroups(b)))
	}
	xattrs := `cd "$1" && find . -mindepth 1 -print0 | LC_ALL=C sort -z | xargs -0 getfattr -h -d -m - -e hex -- 2>/dev/null || true`
	if a, b := run(t, "sh", "-c", xattrs, "sh", theirs), run(t, "sh", "-c", xattrs, "sh", ours); a != b {
		t.Errorf("%s: xattrs differ:\n%s", name, firstDifference(a, b))
	}
	sums := `cd "$1" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum`
	if a, b := run(t, "sh", "-c", sums, "sh", theirs), run(t, "sh", "-c", sums, "sh", ours); a != b {
		t.Errorf("%s: contents differ: %s and %s", name, a, b)
	}
	if len(c.Images["rootfs"]) != 64 {
		t.Errorf("%s: no rootfs image in %v", name, c.Images)
	}
}

// onlyGroups leaves out the groups of one name: overlayfs counts links that an upper
// layer has deleted.
func onlyGroups(list string) string {
	names := map[string][]string{}
	var order, rest []string
	for line := range strings.Lines(list) {
		group, name, ok := strings.Cut(line, " ")
		if !ok || strings.HasPrefix(group, "./") {
			rest = append(rest, line)
			continue
		}
		if names[group] == nil {
			order = append(order, group)
		}
		names[group] = append(names[group], name)
	}
	var b strings.Builder
	for _, group := range order {
		if len(names[group]) > 1 {
			b.WriteString(strings.Join(names[group], "= "))
		}
	}
	return b.String() + strings.Join(rest, "")
}

// firstDifference returns the first line that differs between two lists.
func firstDifference(a, b string) string {
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range min(len(as), len(bs)) {
		if as[i] != bs[i] {
			return as[i] + "\n" + bs[i]
		}
	}
	return "one is longer"
}

// TestSecondImageCostsTheDifference: the server example over a base that the store
// has takes the disk of what differs.
func TestSecondImageCostsTheDifference(t *testing.T) {
	needPodman(t)
	dir := dirFor(t)
	store := filepath.Join(dir, "store")
	first := convert(t, store, trixie.get(t), "base")
	second := convert(t, store, "containers-storage:"+tiny.get(t), "tiny")
	if second.NewBytes > first.NewBytes/10 {
		t.Errorf("tiny added %d bytes to the %d of its base", second.NewBytes, first.NewBytes)
	}
	if !second.Layers[0].Present {
		t.Error("the base's layer was read again")
	}
	if _, err := os.Stat(filepath.Join(store, "meta.json")); err != nil {
		t.Error(err)
	}
}
