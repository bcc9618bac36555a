package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"

	xterm "golang.org/x/term"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/tree"
)

const mkcomposefsUsage = `usage: mkcomposefs [OPTIONS] SOURCE IMAGE

makes a composefs image of the directory SOURCE, or of a dump of one

options:
  --digest-store=DIR    put the files' contents into this directory
  --use-epoch           date everything 1970
  --skip-devices        leave out device nodes
  --skip-xattrs         leave out extended attributes
  --user-xattrs         leave out extended attributes but user.*
  --print-digest        print the image's fs-verity digest
  --print-digest-only   print the digest and write no image
  --from-file           SOURCE is a dump (composefs-dump(5)), "-" is standard input
  --min-version=N       lowest version of the image format, 0 (default) or 1
  --max-version=N       highest version of the image format, 0 or 1 (default)
  --threads=N           read so many files side by side (default: one a processor)

IMAGE "-" is standard output
`

// mkcomposefsOptions are the options of mkcomposefs(1).
type mkcomposefsOptions struct {
	source, image string // image is "" if only the digest is wanted
	digestStore   string
	printDigest   bool
	fromFile      bool
	strict        bool
	format        erofs.Format
	scan          scan.Options
}

// mkcomposefsMain is mkcomposefs of the composefs project (tools/mkcomposefs.c), with
// its options and output, and its exit statuses: 1 for all failures, of usage too.
// Unlike that one it opens the image when it has read the source: a bad source
// leaves an old image as it is.
func mkcomposefsMain(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	if wantsHelp(args) {
		io.WriteString(stdout, mkcomposefsUsage)
		return exitOK
	}
	// Nearly all that is allocated lives until the end.
	debug.SetGCPercent(400)
	o, err := parseMkcomposefs(args)
	if err != nil {
		fmt.Fprintf(stderr, "mkcomposefs: %v\n", err)
		if errors.As(err, new(usageError)) {
			io.WriteString(stderr, mkcomposefsUsage)
		}
		return exitFailure
	}
	if err := o.run(ctx, stdin, stdout); err != nil {
		fmt.Fprintf(stderr, "mkcomposefs: %v\n", err)
		return exitFailure
	}
	return exitOK
}

func parseMkcomposefs(args []string) (*mkcomposefsOptions, error) {
	_, strict := os.LookupEnv("CFS_PARSE_STRICT")
	o := &mkcomposefsOptions{strict: strict}
	o.scan.SplitLinks = true
	o.scan.Threads = runtime.GOMAXPROCS(0)
	minVersion, maxVersion := 0, 1
	digestOnly, versionSet := false, false

	setVersion := func(which *int, name, value string) error {
		n, err := strconv.Atoi(value)
		if err != nil {
			return fmt.Errorf("--%s %q is not a number", name, value)
		}
		if !versionSet { // whoever names one has 0 for the other
			minVersion, maxVersion, versionSet = 0, 0, true
		}
		*which = n
		return nil
	}
	rest, err := getopt(args, []longOption{
		{"skip-xattrs", false}, {"user-xattrs", false}, {"skip-devices", false}, {"use-epoch", false},
		{"digest-store", true}, {"print-digest", false}, {"print-digest-only", false},
		{"from-file", false}, {"max-version", true}, {"min-version", true}, {"threads", true},
	}, func(name, value string) error {
		switch name {
		case "skip-xattrs":
			o.scan.SkipXattrs = true
		case "user-xattrs":
			o.scan.UserXattrs = true
		case "skip-devices":
			o.scan.SkipDevices = true
		case "use-epoch":
			o.scan.UseEpoch = true
		case "digest-store":
			o.digestStore = value
		case "print-digest":
			o.printDigest = true
		case "print-digest-only":
			o.printDigest, digestOnly = true, true
		case "from-file":
			o.fromFile = true
		case "min-version":
			return setVersion(&minVersion, name, value)
		case "max-version":
			return setVersion(&maxVersion, name, value)
		case "threads":
			n, err := strconv.Atoi(value)
			if err != nil || n <= 0 {
				return fmt.Errorf("--threads %q is not a positive number", value)
			}
			o.scan.Threads = n
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, usageError{err}
	case len(rest) == 0:
		return nil, usageError{errors.New("no SOURCE given")}
	case rest[0] == "":
		return nil, errors.New("SOURCE is empty")
	case len(rest) > 2:
		return nil, usageError{errors.New("too many arguments")}
	case len(rest) == 1 && !digestOnly:
		return nil, usageError{errors.New("no IMAGE given")}
	case len(rest) == 2 && digestOnly:
		return nil, usageError{errors.New("--print-digest-only writes no IMAGE")}
	}
	o.source = rest[0]
	if !digestOnly {
		o.image = rest[1]
	}
	if o.format, err = erofs.FormatFor(minVersion, maxVersion); err != nil {
		return nil, err
	}
	return o, nil
}

func (o *mkcomposefsOptions) run(ctx context.Context, stdin io.Reader, stdout io.Writer) error {
	if o.image == "-" {
		if f, ok := stdout.(*os.File); ok && xterm.IsTerminal(int(f.Fd())) {
			return errors.New("standard output is a terminal, which cannot take an image")
		}
	}
	t, err := o.tree(ctx, stdin)
	if err != nil {
		return err
	}
	hasher := fsverity.NewHasher(fsverity.SHA256)
	if err := o.write(t, hasher, stdout); err != nil {
		return err
	}
	if o.printDigest {
		_, err = fmt.Fprintln(stdout, hasher.Sum())
	}
	return err
}

func (o *mkcomposefsOptions) tree(ctx context.Context, stdin io.Reader) (*tree.Tree, error) {
	if o.fromFile {
		in := stdin
		if o.source != "-" {
			f, err := os.Open(o.source)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			in = f
		}
		t, err := dump.Parse(in, dump.Options{Strict: o.strict})
		if err != nil {
			return nil, fmt.Errorf("reading dump %q: %w", o.source, err)
		}
		return t, nil
	}
	if o.digestStore == "" {
		return scan.Dir(ctx, o.source, scan.Hash(fsverity.SHA256), o.scan)
	}
	store := newDigestStore(o.digestStore)
	t, err := scan.Dir(ctx, o.source, store, o.scan)
	return t, store.close(err)
}

// write writes the image, and gives its bytes to hasher if they are wanted.
func (o *mkcomposefsOptions) write(t *tree.Tree, hasher io.Writer, stdout io.Writer) error {
	if o.image == "" {
		return o.writeTo(hasher, t)
	}
	out := stdout
	var file *os.File
	if o.image != "-" {
		f, err := os.OpenFile(o.image, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o666)
		if err != nil {
			return err
		}
		defer f.Close() // closed below, but for errors
		out, file = f, f
	}
	if o.printDigest {
		out = io.MultiWriter(out, hasher)
	}
	if err := o.writeTo(out, t); err != nil {
		return err
	}
	if file != nil {
		return file.Close()
	}
	return nil
}

// writeTo lets making the image, and writing and hashing it, overlap.
func (o *mkcomposefsOptions) writeTo(w io.Writer, t *tree.Tree) error {
	r, pipe := io.Pipe()
	done := make(chan error, 1)
	go func() {
		_, err := io.CopyBuffer(struct{ io.Writer }{w}, r, make([]byte, 128<<10))
		r.CloseWithError(err)
		done <- err
	}()
	err := erofs.Write(pipe, t, erofs.Options{Format: o.format})
	pipe.CloseWithError(err) // nil is the end
	return cmp.Or(err, <-done)
}
