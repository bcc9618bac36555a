package hostdeploy

import (
	"bytes"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/particle-os/particle/converter/tree"
)

// Args are kernel arguments in their order, quotes as they were written. Arguments may
// repeat.
type Args []string

// ParseArgs splits a kernel command line as the kernel does: at white space outside of
// double quotes (Linux lib/cmdline.c, next_arg).
func ParseArgs(line string) Args {
	var args Args
	start, quoted := -1, false
	for i := range len(line) {
		switch c := line[i]; {
		case c == '"':
			quoted = !quoted
			if start < 0 {
				start = i
			}
		case strings.IndexByte(" \t\n\v\f\r", c) >= 0 && !quoted:
			if start >= 0 {
				args = append(args, line[start:i])
			}
			start = -1
		case start < 0:
			start = i
		}
	}
	if start >= 0 {
		args = append(args, line[start:])
	}
	return args
}

func (a Args) String() string { return strings.Join(a, " ") }

// Value returns the value of the last argument of that name, without quotes.
func (a Args) Value(name string) (string, bool) {
	for _, arg := range slices.Backward(a) {
		if n, v := cutArg(arg); n == name {
			return v, true
		}
	}
	return "", false
}

// cutArg splits an argument into its name and its value without quotes.
func cutArg(arg string) (name, value string) {
	if u := strings.Trim(arg, `"`); strings.HasPrefix(arg, `"`) {
		arg = u
	}
	name, value, _ = strings.Cut(arg, "=")
	return name, strings.Trim(value, `"`)
}

// Delete removes all arguments that equal arg, or that have its name when arg has no
// value. It reports whether there was one.
func (a Args) Delete(arg string) (Args, bool) {
	rest := slices.DeleteFunc(slices.Clone(a), func(have string) bool {
		name, _ := cutArg(have)
		return have == arg || !strings.Contains(arg, "=") && name == arg
	})
	return rest, len(rest) < len(a)
}

// checkArgs refuses what would not survive the way into a boot entry and back.
func checkArgs(args Args) error {
	for _, a := range args {
		if a == "" || strings.ContainsAny(a, "\n\r\x00") || len(ParseArgs(a)) != 1 {
			return fmt.Errorf("kernel argument %q: want one argument; what has blanks goes into double quotes, as in name=\"a b\"", a)
		}
		if strings.Count(a, `"`)%2 != 0 {
			return fmt.Errorf("kernel argument %q: a double quote is not closed", a)
		}
	}
	return nil
}

// reserved reports whether an argument says which deployment boots.
func reserved(arg string) bool {
	switch name, _ := cutArg(arg); name {
	case "composefs", "composefs.digest", "particle.deployment":
		return true
	}
	return false
}

// KArgs are a deployment's kernel arguments by where they come from.
type KArgs struct {
	Boot    Args `json:"boot"`    // what Particle needs: the root and the image's digest
	Machine Args `json:"machine"` // given when the machine was installed
	Image   Args `json:"image"`   // the image's kargs.d
	User    Args `json:"user"`    // added on the running system
	// Deleted are arguments of the machine or the image that the user does not want.
	Deleted Args `json:"deleted,omitempty"`
}

// All returns the whole command line.
func (k *KArgs) All() Args {
	var all Args
	for _, a := range slices.Concat(k.Machine, k.Image) {
		if !slices.Contains(k.Deleted, a) {
			all = append(all, a)
		}
	}
	return slices.Concat(k.Boot, all, k.User)
}

// An Edit changes the arguments of a deployment, in the order of the fields.
type Edit struct {
	Delete  Args // NAME or NAME=VALUE: must exist
	Replace Args // NAME=VALUE: takes the place of all of that name
	Append  Args
	// Carried: it was made of another image, so that what it deletes may be gone already.
	Carried bool `json:",omitempty"`
}

// Empty reports whether nothing is to be changed.
func (e *Edit) Empty() bool { return len(e.Delete)+len(e.Replace)+len(e.Append) == 0 }

var errNoArg = errors.New("there is none")

// Apply returns the arguments after the edit.
func (e *Edit) Apply(k KArgs) (KArgs, error) {
	if err := checkArgs(slices.Concat(e.Delete, e.Replace, e.Append)); err != nil {
		return k, err
	}
	for _, arg := range slices.Concat(e.Append, e.Replace) {
		if reserved(arg) {
			return k, fmt.Errorf("%w: %q", ErrReserved, arg)
		}
	}
	remove := func(arg string) error {
		if rest, ok := k.Boot.Delete(arg); ok {
			return fmt.Errorf("deleting the kernel argument %q: Particle boots by it: %s", arg, k.Boot[len(rest):])
		}
		user, found := k.User.Delete(arg)
		for _, have := range slices.Concat(k.Machine, k.Image) {
			if _, hit := (Args{have}).Delete(arg); hit && !slices.Contains(k.Deleted, have) {
				k.Deleted, found = append(slices.Clip(k.Deleted), have), true
			}
		}
		if !found {
			return fmt.Errorf("deleting the kernel argument %q: %w; the arguments are: %s", arg, errNoArg, k.All())
		}
		k.User = user
		return nil
	}
	for _, arg := range e.Delete {
		if err := remove(arg); errors.Is(err, errNoArg) && e.Carried {
			continue
		} else if err != nil {
			return k, err
		}
	}
	for _, arg := range e.Replace {
		name, _ := cutArg(arg)
		if _, ok := k.All().Value(name); ok {
			if err := remove(name); err != nil {
				return k, err
			}
		}
		k.User = append(slices.Clip(k.User), arg)
	}
	for _, arg := range e.Append {
		if _, ok := k.Boot.Value(first(cutArg(arg))); ok {
			return k, fmt.Errorf("adding the kernel argument %q: Particle sets it itself", arg)
		}
		k.User = append(slices.Clip(k.User), arg)
	}
	return k, nil
}

func first(a, _ string) string { return a }

// kargsDirs are where images keep kernel arguments: ours, and that of bootc
// (docs/src/building/kernel-arguments.md of bootc).
var kargsDirs = []string{"usr/lib/bootc/kargs.d", "usr/lib/particle/kargs.d"}

// maxKargs limits a file of kernel arguments; the kernel takes 2 KiB (4 KiB on some
// architectures) of command line.
const maxKargs = 64 << 10

// imageArgs reads the kernel arguments of an image: files NAME.toml with a list kargs
// and perhaps a list match-architectures, in the order of their names. Of two files of
// one name that in the later directory counts.
func imageArgs(t *tree.Tree, arch string, read func(*tree.Node) ([]byte, error)) (Args, error) {
	files := map[string]string{}
	for _, dir := range kargsDirs {
		n, err := resolve(t, dir)
		if errors.Is(err, errNoFile) {
			continue
		} else if err != nil {
			return nil, err
		}
		for name := range n.Children() {
			if strings.HasSuffix(name, ".toml") {
				files[name] = path.Join(dir, name)
			}
		}
	}
	var args Args
	names := make([]string, 0, len(files))
	for name := range files {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		n, err := resolve(t, files[name])
		if err != nil {
			return nil, err
		}
		data, err := read(n)
		if err != nil {
			return nil, fmt.Errorf("reading the image's kernel arguments in %q: %w", files[name], err)
		}
		more, err := parseKargs(data, arch)
		if err != nil {
			return nil, fmt.Errorf("reading the image's kernel arguments in %q: %w", files[name], err)
		}
		args = append(args, more...)
	}
	return args, nil
}

// rpmArch are the names that bootc's files use for GOARCH.
var rpmArch = map[string]string{"amd64": "x86_64", "arm64": "aarch64", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}

func parseKargs(data []byte, arch string) (Args, error) {
	var f struct {
		Kargs []string `toml:"kargs"`
		Match []string `toml:"match-architectures"`
	}
	if err := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields().Decode(&f); err != nil {
		return nil, err
	}
	if f.Match != nil && !slices.Contains(f.Match, arch) && !slices.Contains(f.Match, rpmArch[arch]) {
		return nil, nil
	}
	var args Args
	for _, k := range f.Kargs {
		args = append(args, ParseArgs(k)...)
	}
	return args, checkArgs(args)
}
