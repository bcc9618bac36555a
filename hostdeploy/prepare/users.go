package prepare

import (
	"context"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// sysusersConf has the image's users and groups with the numbers that its files have.
// Among several files of sysusers.d the first one, by name, decides.
const sysusersConf = "usr/lib/sysusers.d/00-particle.conf"

// A user is a line of passwd(5), a group one of group(5).
type user struct {
	name, gecos, home, shell string
	uid, gid                 uint32
}

type group struct {
	name    string
	gid     uint32
	members []string
}

// accounts are the users and groups of a tree.
type accounts struct {
	users  []user
	groups []group
}

// accounts reads /etc/passwd and /etc/group. Lines that are not understood (those of NIS,
// for instance) are passed over, as libc does.
func (p *preparation) accounts() (*accounts, error) {
	passwd, err := p.read("etc/passwd")
	if err != nil {
		return nil, err
	}
	groups, err := p.read("etc/group")
	if err != nil {
		return nil, err
	}
	return &accounts{parsePasswd(string(passwd)), parseGroup(string(groups))}, nil
}

func parsePasswd(text string) []user {
	var users []user
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) != 7 || f[0] == "" {
			continue
		}
		uid, err := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err == nil && err2 == nil {
			users = append(users, user{name: f[0], gecos: f[4], home: f[5], shell: f[6], uid: uint32(uid), gid: uint32(gid)})
		}
	}
	return users
}

func parseGroup(text string) []group {
	var groups []group
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) != 4 || f[0] == "" {
			continue
		}
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		g := group{name: f[0], gid: uint32(gid)}
		for m := range strings.SplitSeq(f[3], ",") {
			if m != "" {
				g.members = append(g.members, m)
			}
		}
		groups = append(groups, g)
	}
	return groups
}

// userName and groupName return the name of a number, or the number: tmpfiles.d takes
// both, and a machine may know the name by another number.
func (a *accounts) userName(uid uint32) string {
	for _, u := range a.users {
		if u.uid == uid && validName(u.name) {
			return u.name
		}
	}
	return strconv.FormatUint(uint64(uid), 10)
}

func (a *accounts) groupName(gid uint32) string {
	for _, g := range a.groups {
		if g.gid == gid && validName(g.name) {
			return g.name
		}
	}
	return strconv.FormatUint(uint64(gid), 10)
}

// system reports whether a number is for a system's user or group: below 1000, or one
// of those that Debian gives to packages or reserves (Debian Policy, 9.2.2).
func system(id uint32) bool { return id < 1000 || id >= 60000 && id <= 65534 }

var nameRE = regexp.MustCompile(`^[a-zA-Z_][a-zA-Z0-9_-]{0,30}$`)

// validName: what systemd-sysusers takes (sysusers.d(5)).
func validName(name string) bool { return nameRE.MatchString(name) }

// users writes the lines of sysusers.d for the system's users and groups, so that one
// that comes with an upgrade exists although /etc/passwd is the machine's own. People's
// accounts are the machine's.
func (p *preparation) users(context.Context) error {
	a, err := p.accounts()
	if err != nil {
		return err
	}
	others, err := p.otherSysusers()
	if err != nil {
		return err
	}
	text, odd := sysusers(a, others)
	if len(odd) > 0 {
		p.warnf("users or groups with names that systemd-sysusers does not take: %s", strings.Join(odd, ", "))
	}
	return p.write(sysusersConf, []byte(text), 0o644)
}

// otherSysusers returns the users and groups to which packages give fixed numbers
// themselves, as "u name" and "g name", with the number.
func (p *preparation) otherSysusers() (map[string]string, error) {
	fixed := map[string]string{}
	entries, err := p.list("usr/lib/sysusers.d")
	if err != nil {
		return nil, err
	}
	for _, en := range entries {
		if en.path == sysusersConf || path.Ext(en.Name()) != ".conf" || !en.Mode().IsRegular() {
			continue
		}
		data, err := p.root.ReadFile(en.path)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(data)) {
			f, _, err := splitFields(line, 3)
			if err != nil || len(f) < 3 || strings.HasPrefix(f[0], "#") {
				continue
			}
			kind := strings.TrimRight(f[0], "!")
			id, _, _ := strings.Cut(f[2], ":") // a user's may have its group behind it
			if _, ok := fixed[kind+" "+f[1]]; !ok {
				fixed[kind+" "+f[1]] = id
			}
		}
	}
	return fixed, nil
}

// sysusers gives the text of a file of sysusers.d(5), groups first, each kind ordered by
// number and then by name. The names it had to leave out are returned, too. Root, and
// what others declare with the same number, is not repeated.
func sysusers(a *accounts, others map[string]string) (text string, odd []string) {
	var b strings.Builder
	b.WriteString("# Written by particle prepare: users and groups of the image, with their numbers.\n")
	known := map[string]bool{}
	var groups []group
	for _, g := range a.groups {
		switch {
		case !system(g.gid):
		case !validName(g.name):
			odd = append(odd, g.name)
		default:
			groups = append(groups, g)
		}
	}
	slices.SortStableFunc(groups, func(a, b group) int { return compareIDs(a.gid, b.gid, a.name, b.name) })
	for _, g := range groups {
		id := strconv.FormatUint(uint64(g.gid), 10)
		if g.gid != 0 && others["g "+g.name] != id {
			fmt.Fprintf(&b, "g %s %s\n", g.name, id)
		}
	}
	var users []user
	for _, u := range a.users {
		switch {
		case !system(u.uid):
		case !validName(u.name):
			odd = append(odd, u.name)
		default:
			users = append(users, u)
		}
	}
	slices.SortStableFunc(users, func(a, b user) int { return compareIDs(a.uid, b.uid, a.name, b.name) })
	for _, u := range users {
		known[u.name] = true
		id := strconv.FormatUint(uint64(u.uid), 10)
		if u.uid == 0 || others["u "+u.name] == id {
			continue
		}
		fmt.Fprintf(&b, "u %s %s:%s %s %s %s\n", u.name, id, a.groupName(u.gid), quoteField(u.gecos), pathField(u.home), pathField(u.shell))
	}
	for _, g := range groups {
		members := slices.Sorted(slices.Values(g.members))
		for _, m := range slices.Compact(members) {
			if known[m] {
				fmt.Fprintf(&b, "m %s %s\n", m, g.name)
			}
		}
	}
	return b.String(), odd
}

func compareIDs(a, b uint32, nameA, nameB string) int {
	if a != b {
		return int(int64(a) - int64(b))
	}
	return strings.Compare(nameA, nameB)
}

// pathField writes the home or the shell of a user; systemd-sysusers takes none but
// absolute paths.
func pathField(s string) string {
	if !strings.HasPrefix(s, "/") {
		return "-"
	}
	return quoteField(s)
}

// quoteField writes a field of sysusers.d: quotes where needed, "%" doubled, "-" for one
// that is empty or has what systemd-sysusers does not take.
func quoteField(s string) string {
	if s == "" || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return "-"
	}
	s = strings.ReplaceAll(s, "%", "%%")
	if !strings.ContainsAny(s, " \t'\"\\") && s != "-" {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
}
