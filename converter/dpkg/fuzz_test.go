package dpkg

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

// FuzzParse prints what was parsed and parses it again.
func FuzzParse(f *testing.F) {
	for _, s := range []string{
		"", "\n", "A: b", "A:\n", "A:b\n c\n\td\n\nB: c\r\n", stanza("x", "1") + "\n \n" + stanza("y", "2"), "A: b\nA: c\n", " x\n", ":\n", "a b: c\n",
		"Conffiles:\n /etc/a b 1 obsolete\nDescription: x\n .\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		all, err := Parse(text)
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatalf("got %v, want ErrFormat", err)
			}
			return
		}
		var b strings.Builder
		for _, p := range all {
			if len(p) == 0 {
				t.Fatal("an empty paragraph")
			}
			for _, field := range p {
				if got := p.Field(strings.ToUpper(field.Name)); !strings.EqualFold(field.Name, strings.ToUpper(field.Name)) {
					// Letters without a capital of their own: nothing to compare.
				} else if got != field.Value {
					t.Fatalf("Field(%q): got %q, want %q", field.Name, got, field.Value)
				}
				b.WriteString(field.Name + ": " + field.Value + "\n")
			}
			b.WriteString("\n")
		}
		again, err := Parse(b.String())
		if err != nil || !reflect.DeepEqual(again, all) {
			t.Fatalf("again: got %q, %v; want %q", again, err, all)
		}
	})
}

// FuzzDatabase reads whole databases: whatever is in them, each listed path has its
// package as owner, by all of its names.
func FuzzDatabase(f *testing.F) {
	f.Add(stanza("x", "1"), "/.\n/lib/a\n", "", "d41d8cd98f00b204e9800998ecf8427e  lib/a\n", "usr/lib")
	f.Add(stanza("x", "1", "Multi-Arch: same"), "/lib/a\n/usr/lib/a\n", "/lib/a\n/lib/b\nother\n", "", "/usr/lib")
	f.Add(stanza("x", "1", "Conffiles:", " /a b c obsolete"), "/lib/../a\n//b\n", "/lib/a\n/lib/b\nx\n", "x", "lib")
	f.Add("Package: x\n", "/lib/lib/lib/a\n", "", "", "../lib/../usr")
	f.Fuzz(func(t *testing.T, status, list, diversions, sums, link string) {
		if strings.ContainsRune(link, 0) || link == "" {
			link = "usr/lib"
		}
		d, err := Read(newTree(map[string]string{
			"/var/lib/dpkg/status": status, "/var/lib/dpkg/diversions": diversions,
			"/var/lib/dpkg/info/x.list": list, "/var/lib/dpkg/info/x.md5sums": sums,
			"/usr/lib/a": "", "/lib": "-> " + link,
		}), none{})
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatalf("got %v, want ErrFormat", err)
			}
			return
		}
		for _, c := range Diff(d, &Database{}) {
			if c.Kind != Removed {
				t.Fatalf("against nothing: %v", c)
			}
		}
		if c := Diff(d, d); len(c) != 0 {
			t.Fatalf("against itself: %v", c)
		}
		x := d.Package("x")
		if x == nil {
			return
		}
		if _, err := d.MD5Sums(x); err != nil && !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		}
		if _, err := d.Owner("/lib/a"); err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Fatal(err)
			}
			return
		}
		files, err := d.Files(x)
		if err != nil {
			t.Fatal(err)
		}
		diverted, err := d.diversions()
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range files {
			if v, ok := diverted[name]; ok && v.by != "x" {
				name = v.to
			}
			for _, alias := range []string{name, d.paths.canonical(name), name + "/", "/." + name} {
				owners, err := d.Owner(alias)
				if err != nil || len(owners) == 0 || owners[len(owners)-1].Name != "x" && owners[0].Name != "x" {
					t.Fatalf("Owner(%q): got %v, %v", alias, owners, err)
				}
			}
		}
	})
}

// FuzzChangelog reads first entries.
func FuzzChangelog(f *testing.F) {
	f.Add([]byte(gzipped("x (1) u; urgency=low\n\n  * y\n\n -- A <b@c>  Sat, 05 Apr 2025 12:00:00 +0200\n")))
	f.Add([]byte(gzipped(" -- A <b@c> Sat, 5 Apr 2025 12:00:00 GMT")))
	f.Add([]byte("x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if date, err := changelogDate(strings.NewReader(string(data))); err != nil && (!errors.Is(err, ErrFormat) || !date.IsZero()) {
			t.Fatalf("got %v, %v", date, err)
		}
	})
}
