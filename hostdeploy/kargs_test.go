package hostdeploy

import (
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/tree"
)

func TestParseArgs(t *testing.T) {
	for line, want := range map[string]Args{
		"":                                  nil,
		"quiet":                             {"quiet"},
		"  a=1\tb \n":                       {"a=1", "b"},
		`a="x y" b`:                         {`a="x y"`, "b"},
		`"a=x y" b`:                         {`"a=x y"`, "b"},
		`console=tty0 console=ttyS0,115200`: {"console=tty0", "console=ttyS0,115200"},
		`a="open`:                           {`a="open`},
	} {
		if got := ParseArgs(line); !slices.Equal(got, want) {
			t.Errorf("ParseArgs(%q): got %q, want %q", line, got, want)
		}
	}
	args := ParseArgs(`a=1 "b=x y" c a=2`)
	for name, want := range map[string]string{"a": "2", "b": "x y", "c": ""} {
		if got, ok := args.Value(name); !ok || got != want {
			t.Errorf("Value(%q): got %q, %v, want %q", name, got, ok, want)
		}
	}
	if _, ok := args.Value("d"); ok {
		t.Error("there is no d")
	}
}

func TestEdit(t *testing.T) {
	k := KArgs{Boot: Args{"root=UUID=1", "rw"}, Machine: Args{"console=ttyS0"}, Image: Args{"quiet", "splash"}, User: Args{"a=1", "a=2"}}
	for _, test := range []struct {
		name string
		edit Edit
		want string // all arguments, or the error's beginning after "error: "
	}{
		{"append", Edit{Append: Args{"b=3"}}, "root=UUID=1 rw console=ttyS0 quiet splash a=1 a=2 b=3"},
		{"delete of the image", Edit{Delete: Args{"quiet"}}, "root=UUID=1 rw console=ttyS0 splash a=1 a=2"},
		{"delete by value", Edit{Delete: Args{"a=1"}}, "root=UUID=1 rw console=ttyS0 quiet splash a=2"},
		{"delete all of a name", Edit{Delete: Args{"a"}}, "root=UUID=1 rw console=ttyS0 quiet splash"},
		{"replace", Edit{Replace: Args{"console=tty1"}}, "root=UUID=1 rw quiet splash a=1 a=2 console=tty1"},
		{"replace what is not there", Edit{Replace: Args{"new=1"}}, "root=UUID=1 rw console=ttyS0 quiet splash a=1 a=2 new=1"},
		{"delete what another image had", Edit{Delete: Args{"zzz", "quiet"}, Carried: true}, "root=UUID=1 rw console=ttyS0 splash a=1 a=2"},
		{"delete nothing", Edit{Delete: Args{"zzz"}}, `error: deleting the kernel argument "zzz": there is none`},
		{"delete the root", Edit{Delete: Args{"root"}}, `error: deleting the kernel argument "root": Particle boots by it`},
		{"append a root", Edit{Append: Args{"root=/dev/sda"}}, `error: adding the kernel argument "root=/dev/sda": Particle sets it`},
		{"two in one", Edit{Append: Args{"a b"}}, `error: kernel argument "a b"`},
		{"blanks in quotes", Edit{Append: Args{`d="a b"`}}, `root=UUID=1 rw console=ttyS0 quiet splash a=1 a=2 d="a b"`},
		{"open quote", Edit{Append: Args{`d="a`}}, `error: kernel argument "d=\"a"`},
		{"a line of its own", Edit{Append: Args{"x\ny"}}, `error: kernel argument "x\ny"`},
	} {
		before := k.All().String()
		got, err := test.edit.Apply(k)
		text := got.All().String()
		if err != nil {
			text = "error: " + err.Error()
		}
		if text != test.want && !(strings.HasPrefix(test.want, "error: ") && strings.HasPrefix(text, test.want)) {
			t.Errorf("%s: got %s, want %s", test.name, text, test.want)
		}
		if k.All().String() != before {
			t.Fatalf("%s changed its argument", test.name)
		}
	}
	// What was deleted of the image and comes back by hand is there once.
	got, err := (&Edit{Delete: Args{"quiet"}}).Apply(k)
	if err == nil {
		got, err = (&Edit{Append: Args{"quiet"}}).Apply(got)
	}
	if n := strings.Count(got.All().String(), "quiet"); err != nil || n != 1 {
		t.Errorf("got %s, %v", got.All(), err)
	}
}

func TestImageArgs(t *testing.T) {
	dir := func(entries map[string]*tree.Node) *tree.Node {
		n := tree.NewImplied()
		n.Dir = entries
		return n
	}
	file := func(s string) *tree.Node {
		return &tree.Node{Stat: tree.Stat{Mode: tree.TypeRegular | 0o644}, File: &tree.File{Size: int64(len(s)), Inline: []byte(s)}}
	}
	build := func(bootc, own map[string]*tree.Node) *tree.Tree {
		return &tree.Tree{Root: dir(map[string]*tree.Node{"usr": dir(map[string]*tree.Node{"lib": dir(map[string]*tree.Node{
			"bootc": dir(map[string]*tree.Node{"kargs.d": dir(bootc)}), "particle": dir(map[string]*tree.Node{"kargs.d": dir(own)}),
		})})})}
	}
	read := func(n *tree.Node) ([]byte, error) { return readNode(nil, n, maxKargs) }
	got, err := imageArgs(build(
		map[string]*tree.Node{"10-a.toml": file(`kargs = ["a=1", "b"]`), "20-x.toml": file(`kargs = ["hidden"]`), "README": file("no")},
		map[string]*tree.Node{
			"20-x.toml": file(`kargs = ["c=1 d"]`),
			"30-y.toml": file("kargs = ['arm']\nmatch-architectures = ['aarch64']"),
			"40-z.toml": file("kargs = ['pc']\nmatch-architectures = ['x86_64']"),
		}), "amd64", read)
	if want := (Args{"a=1", "b", "c=1", "d", "pc"}); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	for _, bad := range []string{"kargs = [", "kargz = []", "kargs = ['a\nb']", "kargs = 'a'"} {
		if _, err := imageArgs(build(nil, map[string]*tree.Node{"a.toml": file(bad)}), "amd64", read); err == nil || !strings.Contains(err.Error(), "a.toml") {
			t.Errorf("%q: got %v, want an error that names the file", bad, err)
		}
	}
}
