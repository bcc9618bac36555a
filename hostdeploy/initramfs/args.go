package initramfs

import (
	"fmt"
	"iter"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
)

// Args is what a kernel command line says about the root.
type Args struct {
	// Images may be booted; the first that the store has is taken.
	Images []Image
	// Deployment names the state, "" where it is that of the image's digest.
	Deployment string
	// TransientRoot, TransientEtc and TransientVar: what is written there goes to memory.
	TransientRoot, TransientEtc, TransientVar bool
	// Shell lets a shell come when the root cannot be set up.
	Shell bool
	// Manifest is the path of a manifest of squashfs layers below the physical root;
	// there are no Images then.
	Manifest string
	// Init is the program that init= names, "" for none.
	Init string
	// Warnings say what was passed over.
	Warnings []string
}

// An Image is one that may be booted.
type Image struct {
	Digest fsverity.Digest
	// Insecure lets it boot where the kernel cannot check it by fs-verity.
	Insecure bool
}

// ShellAllowed reports whether a shell may come when the boot fails: where the image
// says so, by [ShellMark] in the initramfs, or the command line.
func ShellAllowed(cmdline string) bool {
	if a, _ := ParseArgs(cmdline); a.Shell {
		return true
	}
	_, err := os.Stat(ShellMark)
	return err == nil
}

// formats are the beginnings of composefs.digest= that this program mounts.
var formats = map[string]fsverity.Algorithm{
	"v1-sha256-12": fsverity.SHA256,
	"v1-sha512-12": fsverity.SHA512,
}

// ParseArgs reads a kernel command line. Of arguments that may be there once the last
// counts. The error is [ErrArgs] and names the argument; Shell is right even then.
func ParseArgs(line string) (*Args, error) {
	a := &Args{}
	var bad error
	for name, value := range params(line) {
		if err := a.set(name, value); err != nil && bad == nil {
			bad = err
		}
	}
	if bad == nil && a.Manifest != "" && len(a.Images) > 0 {
		bad = fmt.Errorf("%w: particle.manifest= and composefs.digest= exclude each other; remove one of the two", ErrArgs)
	}
	return a, bad
}

// A param's value: nil for an argument without "=".
func (a *Args) set(name string, value *string) (err error) {
	text := ""
	if value != nil {
		text = *value
	}
	switch name {
	case "composefs.digest", "composefs":
		parse := parseDigest
		if name == "composefs" {
			parse = parseHex
		}
		img, err := parse(text)
		if err != nil {
			return fmt.Errorf("%w: %s=%s: %w", ErrArgs, name, text, err)
		}
		a.Images = append(a.Images, img)
	case "particle.deployment":
		if err := checkID(text); err != nil {
			return fmt.Errorf("%w: %s=%s: %w", ErrArgs, name, text, err)
		}
		a.Deployment = text
	case "particle.root":
		a.TransientRoot, err = transient(name, text, "readonly")
	case "particle.etc":
		a.TransientEtc, err = transient(name, text, "persistent")
	case "particle.var":
		a.TransientVar, err = transient(name, text, "persistent")
	case "particle.shell":
		a.Shell, err = truth(name, value)
	case "particle.manifest":
		if text == "" || strings.HasSuffix(text, "/") || strings.ContainsRune(text, 0) {
			return fmt.Errorf("%w: %s=%s: want the path of a file on the physical root, as %s=/particle/manifest.json", ErrArgs, name, text, name)
		}
		a.Manifest = path.Clean("/" + text)
	case "init":
		a.Init = text
	default:
		if strings.HasPrefix(name, "particle.") || strings.HasPrefix(name, "composefs.") {
			a.Warnings = append(a.Warnings, fmt.Sprintf("the kernel argument %s is not known here and was passed over", name))
		}
	}
	return err
}

// parseDigest reads the value of composefs.digest=: [?]FORMAT-ALGORITHM:HEX
// (crates/composefs-boot/src/cmdline.rs of composefs-rs).
func parseDigest(s string) (Image, error) {
	rest, insecure := strings.CutPrefix(s, "?")
	format, hex, ok := strings.Cut(rest, ":")
	alg, known := formats[format]
	if !ok || !known {
		return Image{}, fmt.Errorf("got the format %q, want v1-sha256-12:… or v1-sha512-12:…", format)
	}
	d, err := fsverity.Parse(hex)
	if err != nil {
		return Image{}, err
	}
	if d.Algorithm() != alg {
		return Image{}, fmt.Errorf("got %d hexadecimal digits, want %d for %s", len(hex), 2*alg.Size(), format)
	}
	return Image{d, insecure}, nil
}

// parseHex reads the value of the older composefs=: [?]HEX.
func parseHex(s string) (Image, error) {
	hex, insecure := strings.CutPrefix(s, "?")
	d, err := fsverity.Parse(hex)
	return Image{d, insecure}, err
}

// checkID accepts ids of deployments: the hexadecimal digits of a digest and perhaps a
// dot and a number. They become the name of a directory.
func checkID(id string) error {
	hex, n, dotted := strings.Cut(id, ".")
	if _, err := fsverity.Parse(hex); err != nil {
		return fmt.Errorf("want a digest in hexadecimal, perhaps with a dot and a number: %w", err)
	}
	if !dotted {
		return nil
	}
	if v, err := strconv.ParseUint(n, 10, 31); err != nil || v == 0 || strconv.FormatUint(v, 10) != n {
		return fmt.Errorf("got %q behind the dot, want a number from 1", n)
	}
	return nil
}

func transient(name, value, otherwise string) (bool, error) {
	switch value {
	case "transient":
		return true, nil
	case otherwise:
		return false, nil
	}
	return false, fmt.Errorf("%w: got %s=%s, want %s=transient or %s=%s", ErrArgs, name, value, name, name, otherwise)
}

// truth reads a switch, as systemd reads those of its own (kernel-command-line(7)).
func truth(name string, value *string) (bool, error) {
	if value == nil {
		return true, nil
	}
	switch *value {
	case "1", "yes", "true", "on":
		return true, nil
	case "0", "no", "false", "off":
		return false, nil
	}
	return false, fmt.Errorf("%w: got %s=%s, want %s, %s=yes or %s=no", ErrArgs, name, *value, name, name, name)
}

// params splits a command line as the kernel does (Linux lib/cmdline.c, next_arg):
// white space separates outside of double quotes; the quotes around a value, or around
// a whole argument, are not part of it; there are no escapes. What comes behind "--" is
// for init.
func params(line string) iter.Seq2[string, *string] {
	return func(yield func(string, *string) bool) {
		for {
			line = strings.TrimLeft(line, space)
			if line == "" {
				return
			}
			end, quoted := len(line), false
			for i := range len(line) {
				if line[i] == '"' {
					quoted = !quoted
				} else if !quoted && strings.IndexByte(space, line[i]) >= 0 {
					end = i
					break
				}
			}
			arg := line[:end]
			line = line[end:]
			if arg == "--" {
				return
			}
			if whole, ok := strings.CutPrefix(arg, `"`); ok {
				arg = strings.TrimSuffix(whole, `"`)
			}
			name, text, assigned := strings.Cut(arg, "=")
			if !assigned {
				if !yield(name, nil) {
					return
				}
				continue
			}
			if inner, ok := strings.CutPrefix(text, `"`); ok {
				text = strings.TrimSuffix(inner, `"`)
			}
			if !yield(name, &text) {
				return
			}
		}
	}
}

// space is what isspace() of the kernel takes for white space, without the no-break
// space of Latin-1.
const space = " \t\n\v\f\r"
