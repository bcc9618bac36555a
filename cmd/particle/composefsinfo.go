package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

const composefsInfoUsage = `usage: composefs-info [--basedir=DIR] [--filter=NAME]... COMMAND FILE...

commands:
  ls               list the names in images, and where their contents are
  objects          list the paths of the objects that images need
  missing-objects  list those of them that are not below --basedir
  dump             print images as text (composefs-dump(5))
  measure-file     print the fs-verity digests of files

--filter shows nothing of the root directory but this name and what is below it.
`

// composefsInfoMain is composefs-info of the composefs project
// (tools/composefs-info.c), with its options and output, and its exit statuses: 1 for
// all failures, of usage too.
func composefsInfoMain(_ context.Context, args []string, _ io.Reader, stdout, stderr io.Writer) int {
	if wantsHelp(args) {
		io.WriteString(stdout, composefsInfoUsage)
		return exitOK
	}
	w := bufio.NewWriterSize(stdout, 64<<10)
	err := composefsInfo(args, w)
	if e := w.Flush(); err == nil {
		err = e
	}
	if err == nil {
		return exitOK
	}
	fmt.Fprintf(stderr, "composefs-info: %v\n", err)
	if errors.As(err, new(usageError)) {
		io.WriteString(stderr, composefsInfoUsage)
	}
	return exitFailure
}

func composefsInfo(args []string, w *bufio.Writer) error {
	var basedir string
	filter := map[string]bool{}
	rest, err := getopt(args, []longOption{{"basedir", true}, {"filter", true}}, func(name, value string) error {
		if name == "basedir" {
			basedir = value
			return nil
		}
		if strings.Contains(value, "/") {
			return fmt.Errorf("--filter %q is not the name of one file", value)
		}
		filter[value] = true
		return nil
	})
	switch {
	case err != nil:
		return usageError{err}
	case len(rest) == 0:
		return usageError{errors.New("no COMMAND given")}
	}
	command, files := rest[0], rest[1:]

	var show func(*erofs.View) error
	objects := map[string]bool{}
	switch command {
	case "ls":
		show = func(v *erofs.View) error { list(w, v.Tree); return nil }
	case "dump":
		show = func(v *erofs.View) error {
			p := dump.Printer{Size: v.Size, Xattrs: v.Xattrs}
			return p.Print(w, v.Tree)
		}
	case "objects", "missing-objects":
		show = func(v *erofs.View) error { collectObjects(objects, v.Tree); return nil }
	case "measure-file":
		if len(files) == 0 {
			return usageError{errors.New("no FILE given")}
		}
		return measureFiles(w, files)
	default:
		return usageError{fmt.Errorf("unknown command %q", command)}
	}

	exists := func(string) bool { return false }
	if basedir != "" {
		fd, err := unix.Open(basedir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: basedir, Err: err}
		}
		defer unix.Close(fd)
		exists = func(path string) bool {
			var st unix.Stat_t
			return unix.Fstatat(fd, strings.TrimLeft(path, "/"), &st, unix.AT_EMPTY_PATH) == nil
		}
	}
	if len(files) == 0 {
		return usageError{errors.New("no image given")}
	}
	for _, name := range files {
		v, err := viewImage(name)
		if err != nil {
			return err
		}
		if len(filter) > 0 {
			root := *v.Tree.Root
			root.Dir = maps.Clone(root.Dir)
			maps.DeleteFunc(root.Dir, func(name string, _ *tree.Node) bool { return !filter[name] })
			v = v.WithRoot(&root)
		}
		if err := show(v); err != nil {
			return err
		}
	}
	for _, path := range slices.Sorted(maps.Keys(objects)) {
		if command == "objects" || !exists(path) {
			fmt.Fprintln(w, path)
		}
	}
	return nil
}

func viewImage(name string) (*erofs.View, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	v, err := erofs.ReadView(f, fi.Size())
	if err != nil {
		return nil, fmt.Errorf("%q: %w", name, err)
	}
	return v, nil
}

// list prints the names in a tree but the root's. Further names of a file have
// nothing behind them.
func list(w *bufio.Writer, t *tree.Tree) {
	seen := map[*tree.Node]bool{}
	_ = t.Walk(func(path string, n *tree.Node) error {
		if path == "/" {
			return nil
		}
		w.WriteString(dump.Escape(path, dump.KeepSpaces))
		switch {
		case seen[n]:
		case n.IsDir():
			w.WriteString("/\t")
		case n.Type() == tree.TypeSymlink:
			w.WriteString("\t-> " + dump.Escape(n.Target, 0))
		case n.IsRegular() && n.File.Path() != "":
			w.WriteString("\t@ " + dump.Escape(n.File.Path(), 0))
		}
		if !n.IsDir() {
			seen[n] = true
		}
		return w.WriteByte('\n')
	})
}

// collectObjects adds the paths of the objects that a tree needs.
func collectObjects(objects map[string]bool, t *tree.Tree) {
	_ = t.Walk(func(_ string, n *tree.Node) error {
		if n.IsRegular() {
			if p := n.File.Path(); p != "" {
				objects[p] = true
			}
		}
		return nil
	})
}

// measureFiles prints the digests of files: the kernel's where it has them.
func measureFiles(w io.Writer, names []string) error {
	for _, name := range names {
		d, err := measureFile(name)
		if err != nil {
			return err
		}
		fmt.Fprintln(w, d)
	}
	return nil
}

func measureFile(name string) (fsverity.Digest, error) {
	f, err := os.Open(name)
	if err != nil {
		return fsverity.Digest{}, err
	}
	defer f.Close()
	d, err := fsverity.Measure(f)
	switch {
	case errors.Is(err, fsverity.ErrUnsupported), errors.Is(err, fsverity.ErrNotEnabled):
		d, _, err = fsverity.Read(fsverity.SHA256, f)
	case err == nil && d.Algorithm() != fsverity.SHA256:
		err = fmt.Errorf("measuring %q: got a digest of %s, want %s", name, d.Algorithm(), fsverity.SHA256)
	}
	return d, err
}
