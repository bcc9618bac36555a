package initramfs

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
)

var (
	hexA = strings.Repeat("0a", 32)
	hexB = strings.Repeat("0b", 32)
	hex5 = strings.Repeat("05", 64)
)

func digest(t testing.TB, hex string) fsverity.Digest {
	t.Helper()
	d, err := fsverity.Parse(hex)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestParseArgs(t *testing.T) {
	a, b, five := digest(t, hexA), digest(t, hexB), digest(t, hex5)
	for _, c := range []struct {
		line string
		want Args
	}{
		{"", Args{}},
		{"quiet ro root=/dev/vda1\n", Args{}},
		{"composefs.digest=v1-sha256-12:" + hexA, Args{Images: []Image{{a, false}}}},
		{"composefs.digest=?v1-sha256-12:" + hexA, Args{Images: []Image{{a, true}}}},
		{"composefs.digest=v1-sha512-12:" + hex5, Args{Images: []Image{{five, false}}}},
		{"composefs=" + hexA + " composefs=?" + hex5, Args{Images: []Image{{a, false}, {five, true}}}},
		{"composefs.digest=v1-sha256-12:" + hexB + "\tcomposefs.digest=?v1-sha256-12:" + hexA, Args{Images: []Image{{b, false}, {a, true}}}},
		{`composefs.digest="v1-sha256-12:` + hexA + `"`, Args{Images: []Image{{a, false}}}},
		{`"composefs.digest=v1-sha256-12:` + hexA + `"`, Args{Images: []Image{{a, false}}}},
		// Quoted blanks separate nothing: what they hide is no argument.
		{`dyndbg="file x +p composefs=` + hexA + ` "`, Args{}},
		{"composefs=" + hexA + " -- composefs=" + hexB, Args{Images: []Image{{a, false}}}},
		{"particle.deployment=" + hexA + " particle.deployment=" + hexB + ".12", Args{Deployment: hexB + ".12"}},
		{"particle.root=transient particle.etc=transient particle.var=transient", Args{TransientRoot: true, TransientEtc: true, TransientVar: true}},
		{"particle.root=transient particle.root=readonly particle.etc=transient particle.etc=persistent particle.var=persistent", Args{}},
		{"particle.shell", Args{Shell: true}},
		{"particle.shell=on particle.shell=no", Args{}},
		{"particle.manifest=layers/manifest.json", Args{Manifest: "/layers/manifest.json"}},
		{"particle.manifest=/../../a//b", Args{Manifest: "/a/b"}},
		{`particle.manifest="/with blanks"`, Args{Manifest: "/with blanks"}},
		{"init=/bin/sh init=/sbin/init", Args{Init: "/sbin/init"}},
		{"particle.ect=transient", Args{Warnings: []string{"the kernel argument particle.ect is not known here and was passed over"}}},
	} {
		got, err := ParseArgs(c.line)
		if err != nil || !reflect.DeepEqual(*got, c.want) {
			t.Errorf("%q: got %+v, %v, want %+v", c.line, *got, err, c.want)
		}
	}
}

func TestParseArgsErrors(t *testing.T) {
	for line, want := range map[string]string{
		"composefs.digest=":                             "want v1-sha256-12",
		"composefs.digest":                              "want v1-sha256-12",
		"composefs.digest=" + hexA:                      "want v1-sha256-12",
		"composefs.digest=v2-sha256-12:" + hexA:         `got the format "v2-sha256-12"`,
		"composefs.digest=??v1-sha256-12:" + hexA:       `got the format "?v1-sha256-12"`,
		"composefs.digest=v1-sha256-12:" + hexA[2:]:     "not an fs-verity digest",
		"composefs.digest=v1-sha512-12:" + hexA:         "got 64 hexadecimal digits, want 128",
		"composefs.digest=v1-sha256-12:" + hexA + "/..": "not an fs-verity digest",
		"composefs=" + strings.ToUpper(hexA):            "not an fs-verity digest",
		"composefs=":                                    "not an fs-verity digest",
		"particle.deployment=../../etc":                 "want a digest",
		"particle.deployment=" + hexA + ".0":            "want a number from 1",
		"particle.deployment=" + hexA + ".01":           "want a number from 1",
		"particle.deployment=" + hexA + ".":             "want a number from 1",
		"particle.deployment=" + hexA + ".1/..":         "want a number from 1",
		"particle.root=persistent":                      "want particle.root=transient or particle.root=readonly",
		"particle.etc":                                  "want particle.etc=transient or particle.etc=persistent",
		"particle.var=Transient":                        "got particle.var=Transient",
		"particle.shell=maybe":                          "want particle.shell,",
		"particle.manifest=":                            "want the path of a file",
		"particle.manifest=/dir/":                       "want the path of a file",
		"particle.manifest=/m composefs=" + hexA:        "exclude each other",
		// An error does not hide behind what comes later.
		"particle.etc=x particle.etc=transient": "got particle.etc=x",
	} {
		_, err := ParseArgs(line)
		if !errors.Is(err, ErrArgs) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want ErrArgs with %q", line, err, want)
		}
	}
	if a, err := ParseArgs("particle.etc=x particle.shell"); err == nil || !a.Shell {
		t.Errorf("a shell is not allowed where another argument is bad: got %+v, %v", a, err)
	}
}

// TestParams has the kernel's rules (next_arg in lib/cmdline.c).
func TestParams(t *testing.T) {
	for line, want := range map[string][]string{
		" a  b=c\td=\n": {"a", "b=c", "d="},
		`a="b c" d`:     {"a=b c", "d"},
		`"a=b c" d`:     {"a=b c", "d"},
		`a=b" c "d e`:   {`a=b" c "d`, "e"},
		`a="b`:          {"a=b"},
		`"a`:            {"a"},
		`"`:             {""},
		`a==b`:          {"a==b"},
		`"a="b`:         {`a=b`},
	} {
		var got []string
		for name, value := range params(line) {
			if value != nil {
				name += "=" + *value
			}
			got = append(got, name)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", line, got, want)
		}
	}
}

func FuzzParseArgs(f *testing.F) {
	for _, line := range []string{
		"BOOT_IMAGE=/vmlinuz root=UUID=1 rw composefs.digest=?v1-sha256-12:" + hexA + " quiet",
		"composefs=" + hex5 + ` particle.deployment=` + hexA + `.3 particle.root="transient" -- x`,
		`"particle.manifest=/a b" particle.shell=0 init=/x`,
		"particle.etc=transient particle.var=persistent particle.x",
	} {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, line string) {
		a, err := ParseArgs(line)
		if a == nil {
			t.Fatal("no result")
		}
		if err != nil && !errors.Is(err, ErrArgs) {
			t.Fatalf("got %v, want ErrArgs", err)
		}
		// What becomes a path must not lead elsewhere.
		if a.Deployment != "" && (strings.ContainsAny(a.Deployment, "/\x00") || len(a.Deployment) < 64) {
			t.Errorf("deployment %q", a.Deployment)
		}
		if m := a.Manifest; m != "" && (m[0] != '/' || strings.Contains(m+"/", "/../") || strings.ContainsRune(m, 0)) {
			t.Errorf("manifest %q", m)
		}
		for _, img := range a.Images {
			if img.Digest.IsZero() {
				t.Error("an image without digest")
			}
		}
		// Every argument ends at white space: those of two lines do not grow together.
		if err == nil && strings.Count(line, `"`)%2 == 0 && !strings.Contains(line, "--") {
			twice, err := ParseArgs(line + " " + line)
			if err != nil || len(twice.Images) != 2*len(a.Images) || twice.Deployment != a.Deployment || twice.Shell != a.Shell {
				t.Errorf("twice: got %+v, %v, want %+v twice", twice, err, a)
			}
		}
	})
}
