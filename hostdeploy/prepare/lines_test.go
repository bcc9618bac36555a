package prepare

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestSplitFields(t *testing.T) {
	for line, want := range map[string][]string{
		"d /a 0755":             {"d", "/a", "0755"},
		"  d\t\t/a   0755  \n":  {"d", "/a", "0755"},
		`d "/a b" 'c"d'`:        {"d", "/a b", `c"d`},
		`d /a\x20b\tc\\`:        {"d", "/a b\tc\\"},
		`d "/a\"b" \u00e9\303`:  {"d", `/a"b`, "é\xc3"},
		`d a"b c"d`:             {"d", "ab cd"},
		`d "" -`:                {"d", "", "-"},
		"one two three four  x": {"one", "two", "three"},
		"":                      nil,
	} {
		got, _, err := splitFields(line, 3)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: got %q, %v, want %q", line, got, err, want)
		}
	}
	for _, line := range []string{`d "/a`, `d /a\`, `d /a\x2`, `d /a\xzz`, `d '/a"`, `d \u12`} {
		if got, _, err := splitFields(line, 3); err == nil {
			t.Errorf("%q: got %q, want an error", line, got)
		}
	}
	if _, rest, err := splitFields("L /a - - - - b  c \n", 6); err != nil || rest != "b  c" {
		t.Errorf("the rest of a line: got %q, %v, want %q", rest, err, "b  c")
	}
}

func TestParseTmpfiles(t *testing.T) {
	got := parseTmpfiles(`# comment
d /var/lib/a 0755 root root -
L+! /var/lib/b - - - - ../x%%y\x20z
C /var/cache/c 0644 u g
z /var/lib/z 0755
r! /var/lib/r
d /var/lib/%m/x
d %C/d
q %S
e /var/lib/e
d relative
f$ "/var/lib/f f"/../g
L /run/%v - - - - x
C /x - - - - \q
d /var/lib/n :0750 :u :g
`)
	want := []tmpfile{
		{kind: "d", path: "/var/lib/a", mode: "0755", user: "root", group: "root"},
		{kind: "L+!", path: "/var/lib/b", argument: "../x%y z"},
		{kind: "C", path: "/var/cache/c", mode: "0644", user: "u", group: "g"},
		{kind: "d", path: "/var/cache/d"},
		{kind: "q", path: "/var/lib"},
		{kind: "f$", path: "/var/lib/g"},
		{kind: "C", path: "/x", argument: `\q`},
		{kind: "d", path: "/var/lib/n", mode: "0750", user: "u", group: "g"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}

// FuzzTmpfiles: nothing that stands in a file makes the parser fail, and what we write
// comes back, whatever a path has in it.
func FuzzTmpfiles(f *testing.F) {
	f.Add("d /var/lib/a 0755 root root -\n", "/var/lib/a b", "../c%d\n\"e\\")
	f.Add("L+ \"/a\\x41\" - - - - b", "/-", "-")
	f.Add("C %S/x", "/\xff\x00", " leading and trailing ")
	f.Fuzz(func(t *testing.T, text, name, argument string) {
		for _, l := range parseTmpfiles(text) {
			if !strings.HasPrefix(l.path, "/") {
				t.Errorf("%q: path %q", text, l.path)
			}
		}
		in := tmpfile{kind: "L", path: "/x" + strings.ReplaceAll(name, "/", "_"), mode: "0644", user: "u", group: "g", argument: argument}
		got := parseTmpfiles(in.String() + "\n")
		if len(got) != 1 || got[0] != in {
			t.Errorf("%+v written as %q and read as %+v", in, in.String(), got)
		}
	})
}

// FuzzDiversions: what is read is written again, byte for byte.
func FuzzDiversions(f *testing.F) {
	f.Add("/lib32\n/.lib32.usr-is-merged\nbase-files\n")
	f.Add("/a\n/b\n:\n/c\n/d\np")
	f.Add("\n\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		all, err := parseDiversions([]byte(text))
		if err != nil {
			return
		}
		want := text
		if text != "" && !strings.HasSuffix(text, "\n") {
			want += "\n"
		}
		if got := string(formatDiversions(all)); got != want {
			t.Errorf("%q is written as %q", text, got)
		}
	})
}

// FuzzAccounts: no passwd or group makes a line that was not meant, and what sysusers.d
// gets is what stood there.
func FuzzAccounts(f *testing.F) {
	f.Add("root:x:0:0:root:/root:/bin/bash\n", "root:x:0:\n")
	f.Add("a:x:100:200:A \"B\" 100%\\:/home/a b:/bin/sh\nb:x:-1:0:::\n", "g:x:200:a,b,,a\nh:x:99999999999:\n")
	f.Add("x:x:65534:0:'\ty:-:\n", "+:::\n")
	f.Fuzz(func(t *testing.T, passwd, groups string) {
		a := &accounts{parsePasswd(passwd), parseGroup(groups)}
		text, _ := sysusers(a, nil)
		users := map[string][]user{}
		for _, u := range a.users {
			users[u.name] = append(users[u.name], u)
		}
		for i, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
			if i == 0 {
				continue
			}
			fields, rest, err := splitFields(line, 6)
			if err != nil || rest != "" {
				t.Fatalf("%q: %v, rest %q", line, err, rest)
			}
			if fields[0] != "u" {
				if len(fields) != 3 || !validName(fields[1]) {
					t.Fatalf("%q is no line of a group", line)
				}
				continue
			}
			plain := func(s string) string {
				if s == "-" {
					return ""
				}
				return strings.ReplaceAll(s, "%%", "%")
			}
			if len(fields) != 6 || !slices.ContainsFunc(users[fields[1]], func(u user) bool {
				id, _, _ := strings.Cut(fields[2], ":")
				eq := func(have, field string, odd bool) bool {
					odd = odd || have == "-" || !utf8.ValidString(have) || strings.ContainsFunc(have, unicode.IsControl)
					return odd && field == "-" || !odd && have == plain(field)
				}
				return id == fmt.Sprint(u.uid) && eq(u.gecos, fields[3], false) &&
					eq(u.home, fields[4], !strings.HasPrefix(u.home, "/")) && eq(u.shell, fields[5], !strings.HasPrefix(u.shell, "/"))
			}) {
				t.Fatalf("%q is none of %+v", line, users[fields[1]])
			}
		}
	})
}
