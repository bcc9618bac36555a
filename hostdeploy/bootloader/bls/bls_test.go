package bls

import (
	"errors"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The example of the specification, with a comment that it does not have.
const example = `# kept
title        Fedora 19 (Rawhide)
sort-key     fedora
machine-id   6a9857a393724b7a981ebb5b8495b9ea
version      3.8.0-2.fc19.x86_64
options      root=UUID=6d3376e4-fc93-4509-95ec-a21d68011da2 quiet
architecture x64
linux        /6a9857a393724b7a981ebb5b8495b9ea/3.8.0-2.fc19.x86_64/linux
initrd       /6a9857a393724b7a981ebb5b8495b9ea/3.8.0-2.fc19.x86_64/initrd
initrd       /more
options      ro
x-unknown    kept, too
`

func TestParse(t *testing.T) {
	fields := Parse(example)
	if len(fields) != 12 {
		t.Fatalf("got %d lines, want 12: %q", len(fields), fields)
	}
	if want := (Field{Comment, " kept"}); fields[0] != want {
		t.Errorf("got %q, want %q", fields[0], want)
	}
	if want := (Field{"x-unknown", "kept, too"}); fields[11] != want {
		t.Errorf("got %q, want %q", fields[11], want)
	}
	if got, want := Options(fields), "root=UUID=6d3376e4-fc93-4509-95ec-a21d68011da2 quiet ro"; got != want {
		t.Errorf("options: got %q, want %q", got, want)
	}
	if got := Values(fields, "initrd"); len(got) != 2 || got[1] != "/more" {
		t.Errorf("initrd: got %q", got)
	}
	if got, ok := Last(fields, "initrd"); !ok || got != "/more" {
		t.Errorf("last initrd: got %q", got)
	}
	if _, ok := Last(fields, "efi"); ok {
		t.Error("an entry without the key efi has one")
	}
}

func TestParseLines(t *testing.T) {
	for _, c := range []struct {
		text string
		want []Field
	}{
		{"", nil},
		{"\n\r\n  \t\n", nil},
		{"\t title \t a  b \t", []Field{{"title", "a  b"}}},
		{"title a\rversion 1", []Field{{"title", "a"}, {"version", "1"}}},
		{"title", []Field{{"title", ""}}},
		{" # x ", []Field{{Comment, " x"}}},
		{"title a\x00version 1\n", []Field{{"title", "a"}}},
		{`options "a b"`, []Field{{"options", "a b"}}},
		{`options 'a b'`, []Field{{"options", "a b"}}},
		{`options "a b'`, []Field{{"options", `"a b'`}}},
		{`options "a" "b"`, []Field{{"options", `a" "b`}}},
		{`options "`, []Field{{"options", ""}}},
		{`options a="b c"`, []Field{{"options", `a="b c"`}}},
	} {
		if got := Parse(c.text); !slices.Equal(got, c.want) {
			t.Errorf("%q: got %q, want %q", c.text, got, c.want)
		}
	}
}

func TestFormat(t *testing.T) {
	fields := []Field{
		{Comment, " made by a test"},
		{"title", ` "quoted" and 'so on' `},
		{"version", "1"},
		{"options", `"a b" c="d e"`},
		{"options", `'`},
		{"a-key-that-is-longer-than-the-column", "x"},
		{"lonely", ""},
	}
	text, err := Format(fields)
	if err != nil {
		t.Fatal(err)
	}
	if got := Parse(text); !slices.Equal(got, fields) {
		t.Errorf("after a round trip: got %q, want %q; text:\n%s", got, fields, text)
	}
	for _, bad := range []Field{
		{"", "x"}, {"a b", "x"}, {"#x", "y"}, {"x", "a\nb"}, {"x", "a\rb"}, {"x\x00", "a"}, {Comment, "a\nlinux /evil"},
	} {
		if _, err := Format([]Field{bad}); !errors.Is(err, ErrField) {
			t.Errorf("%q: got error %v, want %v", bad, err, ErrField)
		}
	}
}

func TestName(t *testing.T) {
	for _, c := range []struct {
		file string
		want Name
		ok   bool
	}{
		{"a.conf", Name{ID: "a"}, true},
		{"A.CONF", Name{ID: "A"}, true},
		{"foobar+3.conf", Name{"foobar", true, 3, 0}, true},
		{"foobar+2-1.conf", Name{"foobar", true, 2, 1}, true},
		{"foobar+0-3.conf", Name{"foobar", true, 0, 3}, true},
		{"foobar+003-01.conf", Name{"foobar", true, 3, 1}, true},
		{"foo+1+2-3.conf", Name{"foo+1", true, 2, 3}, true},
		{"foobar+.conf", Name{ID: "foobar+"}, true},
		{"foobar+3-.conf", Name{ID: "foobar+3-"}, true},
		{"foobar+-3.conf", Name{ID: "foobar+-3"}, true},
		{"foobar+3x.conf", Name{ID: "foobar+3x"}, true},
		{"foobar+3-1-1.conf", Name{ID: "foobar+3-1-1"}, true},
		{"foobar+2147483647.conf", Name{"foobar", true, 2147483647, 0}, true},
		{"foobar+2147483648.conf", Name{ID: "foobar+2147483648"}, true},
		{"foobar+99999999999999999999.conf", Name{ID: "foobar+99999999999999999999"}, true},
		{".conf", Name{}, false},
		{".a.conf", Name{}, false},
		{"a.conf.tmp", Name{}, false},
		{"auto-windows.conf", Name{}, false},
		{"conf", Name{}, false},
		{"", Name{}, false},
	} {
		got, ok := ParseName(c.file)
		if got != c.want || ok != c.ok {
			t.Errorf("%q: got %+v %v, want %+v %v", c.file, got, ok, c.want, c.ok)
		}
	}
	for _, want := range []string{"a.conf", "a+3.conf", "a+2-1.conf", "a+0-3.conf", "a+0.conf"} {
		if n, _ := ParseName(want); n.String() != want {
			t.Errorf("%q became %q", want, n)
		}
	}
}

// The examples of the version format specification, those left out where its text and
// systemd's program differ; and more where they agree.
const versions = `
11 = 11
systemd-123 = systemd-123
bar-123 < foo-123
123a > 123
123.a > 123
123.a < 123.b
123a > 123.a
11α = 11β
A < a
0. > 0
0.0 > 0
1_ = 1
_1 = 1
1_ < 1.2
1_2_3 > 1.3.3
1+ = 1
+1 = 1
1+ < 1.2
1+2+3 > 1.3.3
1~rc1 < 1
1~rc1 < 1~rc2
1^post1 > 1
1^post1 < 1.1
1-2 < 1.2
123.4-5 > 123-5
9 < 10
0009 = 9
1.0 > 1.a
18446744073709551616 > 18446744073709551615
particle-12 > particle-9
5.10.0-26 < 5.10.0-27
`

func TestCompareVersions(t *testing.T) {
	for line := range strings.Lines(versions) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		want := strings.Index("<=>", f[1]) - 1
		if got := CompareVersions(f[0], f[2]); got != want {
			t.Errorf("%s against %s: got %d, want %d", f[0], f[2], got, want)
		}
		if got := CompareVersions(f[2], f[0]); got != -want {
			t.Errorf("%s against %s: got %d, want %d", f[2], f[0], got, -want)
		}
	}
}

// TestCompareVersionsSystemd asks systemd's own program about random strings.
func TestCompareVersionsSystemd(t *testing.T) {
	program, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze (Debian package systemd)")
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	word := func() string {
		const alphabet = "0011259abzAZ..--~~^^_+"
		b := []byte{"0123456789ab"[rnd.IntN(12)]} // it takes no empty string, and "-" for an option
		for range rnd.IntN(7) {
			b = append(b, alphabet[rnd.IntN(len(alphabet))])
		}
		return string(b)
	}
	for range 400 {
		a, b := word(), word()
		// Equal beginnings are where the rules bite.
		if n := rnd.IntN(len(a) + 1); rnd.IntN(3) > 0 && n > 0 {
			b = a[:n] + b[1:]
		}
		out, err := exec.Command(program, "compare-versions", a, b).Output()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		f := strings.Fields(string(out))
		if len(f) != 3 {
			t.Fatalf("%s compare-versions %q %q said %q: %v", program, a, b, out, err)
		}
		sign := f[1]
		if sign == "==" {
			sign = "="
		}
		if got, want := CompareVersions(a, b), strings.Index("<=>", sign)-1; got != want {
			t.Errorf("%q against %q: got %d, systemd says %s", a, b, got, f[1])
		}
	}
}

func TestCompare(t *testing.T) {
	entry := func(file, sortKey, machine, version string) Entry {
		n, ok := ParseName(file)
		if !ok {
			t.Fatalf("%q is no name", file)
		}
		return Entry{Name: n, SortKey: sortKey, MachineID: machine, Version: version}
	}
	// In the order of the menu.
	want := []Entry{
		entry("a-old.conf", "debian", "m", "1"),
		entry("p-12.conf", "particle", "", "12"),
		entry("p-11+3.conf", "particle", "", "11"),
		entry("p-9.conf", "particle", "", "9"),
		entry("p-20.conf", "particle", "m1", "20"),
		entry("p-21.conf", "particle", "m2", "21"),
		entry("z.conf", "", "", "1"),
		entry("b+2-1.conf", "", "", "99"),
		entry("B+1.conf", "", "", "99"),
		entry("b+1-2.conf", "", "", "99"),
		entry("a-10.conf", "", "", "1"),
		entry("a-9.conf", "", "", "2"),
		entry("p-99+0-3.conf", "particle", "", "99"),
		entry("zz+0.conf", "", "", ""),
	}
	for i, a := range want {
		for j, b := range want {
			got := Compare(a, b)
			if i < j && got >= 0 || i == j && got != 0 || i > j && got <= 0 {
				t.Errorf("%s (%d) against %s (%d): got %d", a.Name, i, b.Name, j, got)
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(example)
	f.Add("options \"\n#\r'x'\n a  'b' \x00")
	f.Add("k \" \"\nk ' '' '\n#\n# \n")
	f.Fuzz(func(t *testing.T, text string) {
		fields := Parse(text)
		printed, err := Format(fields)
		if err != nil {
			t.Fatalf("%q was read but cannot be written: %v", fields, err)
		}
		if again := Parse(printed); !slices.Equal(again, fields) {
			t.Fatalf("got %q, want %q; text:\n%s", again, fields, printed)
		}
	})
}

func FuzzName(f *testing.F) {
	for _, s := range []string{"a+3.conf", "a+2-1.CONF", "a++1.conf", "+0.conf", "auto-x.conf"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, file string) {
		n, ok := ParseName(file)
		if !ok {
			return
		}
		if again, ok := ParseName(n.String()); ok && again != n {
			t.Fatalf("%q: %+v became %+v by way of %q", file, n, again, n)
		}
	})
}

func FuzzCompareVersions(f *testing.F) {
	f.Add("1.2~rc1", "1.2", "1.10")
	f.Add("a-1^b", "a-1^b.0", "~")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		ab, ba := CompareVersions(a, b), CompareVersions(b, a)
		if ab != -ba {
			t.Fatalf("%q against %q: %d one way, %d the other", a, b, ab, ba)
		}
		if ab <= 0 && CompareVersions(b, c) <= 0 && CompareVersions(a, c) > 0 {
			t.Fatalf("%q, %q, %q have no order", a, b, c)
		}
	})
}
