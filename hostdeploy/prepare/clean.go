package prepare

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// junk names files that an image must not carry, by patterns of [path.Match].
var junk = []struct{ pattern, why string }{
	{"etc/ssh/ssh_host_*", "a host key that all machines would share"},
	{"etc/.pwd.lock", "a lock"},
	{"etc/.updated", "a time stamp of systemd"},
	{"etc/passwd-", "a backup"},
	{"etc/group-", "a backup"},
	{"etc/shadow-", "a backup"},
	{"etc/gshadow-", "a backup"},
	{"etc/subuid-", "a backup"},
	{"etc/subgid-", "a backup"},
	{"usr/lib/sysimage/dpkg/*-old", "a backup"},
	{"var/.updated", "a time stamp of systemd"},
	{"var/backups/*", "backups of the build"},
	{"var/cache/debconf/*-old", "a backup"},
	{"var/lib/apt/lists/*", "package indexes, old by tomorrow"},
	{"var/lib/apt/lists/*/*", "package indexes, old by tomorrow"},
	{"var/lib/NetworkManager/secret_key", "a secret that all machines would share"},
	{"var/lib/dbus/machine-id", "an id that all machines would share"},
	{"var/lib/systemd/credential.secret", "a secret that all machines would share"},
	{"var/lib/systemd/random-seed", "randomness that all machines would share"},
	{"var/lib/urandom/random-seed", "randomness that all machines would share"},
}

// oldSuffixes end the names of files in /etc that dpkg and ucf have put aside.
var oldSuffixes = []string{".dpkg-old", ".dpkg-bak", ".ucf-old"}

// shared are keys and ids that packages make when they are configured, and nothing makes
// anew on a machine. Something may need them, so they are only reported.
var shared = []struct{ pattern, what string }{
	{"etc/dropbear/dropbear_*_host_key", "a private key"},
	{"etc/dropbear/initramfs/dropbear_*_host_key", "a private key"},
	{"etc/nvme/hostid", "an id"},
	{"etc/nvme/hostnqn", "an id"},
	{"etc/ssl/private/ssl-cert-snakeoil.key", "a private key"},
}

// madeCaches are what is in /var/cache and no cache: only packages' scripts make it, debconf's
// answers and the dictionary by which pam_cracklib and pam_pwquality judge passwords.
var madeCaches = []string{"var/cache/cracklib", "var/cache/debconf"}

// clean removes what belongs to one machine, or to the build.
func (p *preparation) clean(ctx context.Context) error {
	for _, j := range junk {
		found, err := p.glob(j.pattern)
		if err != nil {
			return err
		}
		var remove []entry
		for _, en := range found {
			if en.Mode().IsRegular() && !en.mount {
				remove = append(remove, en)
			}
		}
		if err := p.removeFiles(j.pattern, j.why, remove); err != nil {
			return err
		}
	}
	if err := p.cleanEtc(ctx); err != nil {
		return err
	}

	for _, c := range []struct {
		dir, why string
		keep     func(entry) bool
	}{
		{"var/cache", "caches", func(en entry) bool {
			return en.mount || slices.Contains(madeCaches, path.Dir(en.path)) || en.IsDir()
		}},
		// Empty logs are there for their owner and their mode.
		{"var/log", "logs of the build", func(en entry) bool { return !en.Mode().IsRegular() || en.Size() == 0 }},
	} {
		files, err := p.below(ctx, c.dir)
		if err != nil {
			return err
		}
		files = slices.DeleteFunc(files, func(en entry) bool { return c.keep(en) })
		if err := p.removeFiles(c.dir, c.why, files); err != nil {
			return err
		}
	}
	for _, dir := range []string{"run", "tmp", "var/tmp"} {
		if err := p.emptyDir(dir); err != nil {
			return err
		}
	}
	for _, s := range shared {
		found, err := p.glob(s.pattern)
		if err != nil {
			return err
		}
		for _, en := range found {
			if !en.mount && en.Size() > 0 {
				p.warnf("%s that all machines will share: /%s", s.what, en.path)
			}
		}
	}
	return nil
}

// removeFiles removes files and notes it as one change.
func (p *preparation) removeFiles(what, why string, files []entry) error {
	if len(files) == 0 {
		return nil
	}
	if len(files) > 1 {
		why = fmt.Sprintf("%d files: %s", len(files), why)
	} else {
		what = files[0].path
	}
	p.will(Remove, what, "", why)
	for _, en := range files {
		if err := p.remove(en.path); err != nil {
			return err
		}
	}
	return nil
}

// below lists all that is below a directory and not behind a mount.
func (p *preparation) below(ctx context.Context, dir string) ([]entry, error) {
	if behind, err := p.behindMount(dir); behind || err != nil {
		return nil, err
	}
	return p.walk(ctx, dir)
}

// walk is below for a directory that is not behind a mount itself.
func (p *preparation) walk(ctx context.Context, dir string) ([]entry, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	entries, err := p.list(dir)
	if err != nil {
		return nil, err
	}
	var all []entry
	for _, en := range entries {
		all = append(all, en)
		if en.IsDir() && !en.mount {
			more, err := p.walk(ctx, en.path)
			if err != nil {
				return nil, err
			}
			all = append(all, more...)
		}
	}
	return all, nil
}

// emptyDir removes what is in a directory but for what is mounted there and /run/lock,
// which programs expect in containers, too. A directory that is a mount is not the tree's.
func (p *preparation) emptyDir(dir string) error {
	fi, err := p.lstat(dir)
	if err != nil || fi == nil || !fi.IsDir() {
		return err
	}
	if behind, err := p.behindMount(dir); behind || err != nil {
		return err
	}
	entries, err := p.list(dir)
	if err != nil {
		return err
	}
	entries = slices.DeleteFunc(entries, func(en entry) bool {
		return en.mount || en.path == "run/lock" || en.IsDir() && p.onlyMounts(en)
	})
	if len(entries) == 0 {
		return nil
	}
	names := make([]string, len(entries))
	for i, en := range entries {
		names[i] = en.Name()
	}
	p.will(Remove, path.Join(dir, "*"), "", "left by the build: "+strings.Join(names, " "))
	for _, en := range entries {
		if _, _, err := p.removeAll(en); err != nil {
			return err
		}
	}
	return nil
}

// onlyMounts reports whether a directory holds mounts, directories of mounts, and nothing
// else: engines make such directories in /run.
func (p *preparation) onlyMounts(dir entry) bool {
	entries, err := p.list(dir.path)
	if err != nil || len(entries) == 0 {
		return false
	}
	return !slices.ContainsFunc(entries, func(en entry) bool {
		return !en.mount && !(en.IsDir() && p.onlyMounts(en))
	})
}

// cleanEtc removes old versions of files and the name of the build's container.
func (p *preparation) cleanEtc(ctx context.Context) error {
	files, err := p.below(ctx, "etc")
	if err != nil {
		return err
	}
	files = slices.DeleteFunc(files, func(en entry) bool {
		return !en.Mode().IsRegular() || en.mount ||
			!slices.ContainsFunc(oldSuffixes, func(s string) bool { return strings.HasSuffix(en.Name(), s) })
	})
	if err := p.removeFiles("etc", "old versions of files", files); err != nil {
		return err
	}

	const hostname = "etc/hostname"
	fi, err := p.lstat(hostname)
	if fi == nil || !fi.Mode().IsRegular() || err != nil {
		return err
	}
	if mounted, err := p.mounted(hostname); mounted || err != nil {
		return err
	}
	data, err := p.root.ReadFile(hostname)
	if err != nil {
		return err
	}
	if why := buildName(strings.TrimSpace(string(data))); why != "" {
		return p.removeFiles(hostname, why, []entry{{FileInfo: fi, path: hostname}})
	}
	return nil
}

// buildName tells why a host name is not one that the image's author has chosen; "" for
// one that may be.
func buildName(name string) string {
	var u unix.Utsname
	switch {
	case name == "":
		return "an empty name"
	case len(name) == 12 && strings.Trim(name, "0123456789abcdef") == "":
		return "the name of a container"
	case unix.Uname(&u) == nil && name == unix.ByteSliceToString(u.Nodename[:]):
		return "the name of the machine that built the image"
	}
	return ""
}
