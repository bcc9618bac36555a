package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
)

const mountComposefsUsage = `usage: mount.composefs [-t type] [-o opt[,opt...]] IMAGE MOUNTPOINT
or, where it is installed as /sbin/mount.composefs:
  mount -t composefs -o basedir=/composefs/objects IMAGE MOUNTPOINT

options:
  basedir=DIR[:DIR...]  the directories of the files' contents
  digest=HEX            the fs-verity digest that the image must have; implies verity
  verity                files must have fs-verity digests, which the kernel checks
  tryverity             the same where the kernel can
  idmap=FILE            a user namespace, whose mapping of ids is used
  upperdir=DIR          a directory for writes, with workdir
  workdir=DIR           an empty directory on the filesystem of upperdir
  ro, rw                read-only, or read-write where there is an upperdir
`

// mountComposefsMain is mount.composefs of the composefs project
// (tools/mountcomposefs.c), with its options, messages and exit statuses: 1 for all
// failures, of usage too.
func mountComposefsMain(_ context.Context, args []string, _ io.Reader, _, stderr io.Writer) int {
	image, target, opts, err := parseMountComposefs(args)
	var usage *mountUsageError
	switch {
	case errors.As(err, &usage):
		if usage.text != "" {
			fmt.Fprintln(stderr, usage.text)
		}
		io.WriteString(stderr, mountComposefsUsage)
		return usage.status
	case err != nil:
		fmt.Fprintf(stderr, "mount.composefs: %v\n", err)
		return exitFailure
	}
	if opts.UserNS != nil {
		defer opts.UserNS.Close()
	}
	f, err := os.Open(image)
	if err != nil {
		fmt.Fprintf(stderr, "mount.composefs: Failed to open %s: %s\n", image, strerror(err))
		return exitFailure
	}
	defer f.Close()
	opts.Image = f
	st, err := mount.Mount(target, opts)
	if err != nil {
		why := err.Error()
		switch {
		case errors.Is(err, mount.ErrNoVerity):
			why = "Image has no fs-verity"
		case errors.Is(err, mount.ErrWrongDigest):
			why = "Image has wrong fs-verity"
		}
		fmt.Fprintf(stderr, "mount.composefs: Failed to mount composefs %s: %s\n", image, why)
		return exitFailure
	}
	for _, w := range st.Warnings {
		fmt.Fprintf(stderr, "mount.composefs: warning: %s\n", w)
	}
	return exitOK
}

// A mountUsageError is answered with the usage.
type mountUsageError struct {
	text   string
	status int
}

func (e *mountUsageError) Error() string { return e.text }

// A toolError is a message in the words of the C program.
type toolError string

func (e toolError) Error() string { return string(e) }

func toolErrorf(format string, args ...any) error { return toolError(fmt.Sprintf(format, args...)) }

// strerror words a system error as C programs do: "No such file or directory".
func strerror(err error) string {
	var errno syscall.Errno
	if !errors.As(err, &errno) {
		return err.Error()
	}
	s := errno.Error()
	return strings.ToUpper(s[:1]) + s[1:]
}

// parseMountComposefs reads the command line. Options may follow arguments, as
// mount(8) puts them.
func parseMountComposefs(args []string) (image, target string, o mount.Options, err error) {
	var operands []string
	var options string
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if arg == "--" {
			operands = append(operands, args...)
			break
		}
		if len(arg) < 2 || arg[0] != '-' {
			operands = append(operands, arg)
			continue
		}
		for i := 1; i < len(arg); i++ {
			switch c := arg[i]; c {
			case 'h':
				return "", "", o, &mountUsageError{status: exitOK}
			case 't', 'o':
				value := arg[i+1:]
				if value == "" {
					if len(args) == 0 {
						return "", "", o, &mountUsageError{fmt.Sprintf("mount.composefs: option requires an argument -- '%c'", c), exitFailure}
					}
					value, args = args[0], args[1:]
				}
				i = len(arg)
				if c == 'o' {
					options = value
				} else if value != "composefs" {
					return "", "", o, toolErrorf("Unsupported fs type '%s'", value)
				}
			default:
				return "", "", o, &mountUsageError{fmt.Sprintf("mount.composefs: invalid option -- '%c'", c), exitFailure}
			}
		}
	}
	if len(operands) < 1 {
		return "", "", o, &mountUsageError{"No source path specified", exitFailure}
	}
	if len(operands) < 2 {
		return "", "", o, &mountUsageError{"No mount path specified", exitFailure}
	}
	o, err = parseComposefsOptions(options)
	return operands[0], operands[1], o, err
}

// parseComposefsOptions reads what follows -o.
func parseComposefsOptions(options string) (o mount.Options, err error) {
	var basedir, digest, idmap string
	var verity, tryVerity bool
	values := map[string]*string{
		"basedir": &basedir, "digest": &digest, "idmap": &idmap,
		"upperdir": &o.Upper, "workdir": &o.Work,
	}
	for _, opt := range splitMountOptions(options) {
		if into := values[opt.key]; into != nil {
			if !opt.hasValue {
				return o, toolErrorf("No value specified for %s option", opt.key)
			}
			*into = opt.value
			continue
		}
		switch opt.key {
		case "verity":
			verity = true
		case "tryverity":
			tryVerity = true
		case "ro":
			o.ReadOnly = true
		case "rw":
			o.ReadOnly = false
		default:
			return o, toolErrorf("Unsupported option %s", opt.key)
		}
	}
	if basedir == "" {
		return o, &mountUsageError{"No object dirs specified", exitFailure}
	}
	for dir := range strings.SplitSeq(basedir, ":") {
		if dir == "" {
			return o, toolErrorf("Value for basedir option has incorrect format")
		}
		o.Objects = append(o.Objects, dir)
	}
	if (o.Upper == "") != (o.Work == "") {
		return o, toolErrorf("Both workdir and upperdir must be specified if used")
	}
	switch {
	case verity || digest != "":
		o.Verity = mount.VerityRequire
	case tryVerity:
		o.Verity = mount.VerityTry
	}
	if digest != "" {
		if o.Digest, err = fsverity.Parse(strings.ToLower(digest)); err != nil {
			return o, toolErrorf("Invalid value for digest option: %v", err)
		}
	}
	if idmap != "" {
		if o.UserNS, err = os.Open(idmap); err != nil {
			return o, toolErrorf("Failed to open userns %s: %s", idmap, strerror(err))
		}
	}
	return o, nil
}

type mountOption struct {
	key, value string
	hasValue   bool
}

// splitMountOptions splits at commas. A backslash takes the meaning from the
// character that follows it; in values it then goes away.
func splitMountOptions(s string) (opts []mountOption) {
	for s != "" {
		var o mountOption
		var value []byte
		equal := -1
		i := 0
		for ; i < len(s) && s[i] != ','; i++ {
			if s[i] == '=' && equal < 0 {
				equal = i
				continue
			}
			if s[i] == '\\' && i+1 < len(s) {
				i++
			}
			if equal >= 0 {
				value = append(value, s[i])
			}
		}
		o.key = s[:i]
		if equal >= 0 {
			o.key, o.value, o.hasValue = s[:equal], string(value), true
		}
		opts = append(opts, o)
		s = s[min(i+1, len(s)):]
	}
	return opts
}
