package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/scan"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

func newDumpCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "dump",
		Usage:     "print an image as text, a line a file (composefs-dump(5))",
		ArgsUsage: "NAME|FILE",
		Flags:     []cli.Flag{kindFlag()},
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return usagef("dump takes one NAME or FILE, got %d arguments", c.NArg())
			}
			f, err := openImage(t, c, c.Args().First())
			if err != nil {
				return err
			}
			defer f.Close()
			tr, err := f.tree()
			if err != nil {
				return err
			}
			w := bufio.NewWriterSize(t.out, 1<<16)
			if err := dump.Print(w, tr); err != nil {
				return err
			}
			return w.Flush()
		},
	}
}

// imageInfo is what the verb info tells of a composefs image.
type imageInfo struct {
	Size    int64           `json:"size"` // bytes of metadata
	Digest  fsverity.Digest `json:"digest"`
	Version int             `json:"version"` // composefs format
	ACLs    bool            `json:"acls"`
	Names   int             `json:"names"`
	Inodes  int             `json:"inodes"`
	Objects int             `json:"objects"`
	Bytes   int64           `json:"bytes"` // of all files, links counted once
}

func newInfoCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:        "info",
		Usage:       "show what a composefs image holds",
		ArgsUsage:   "NAME|FILE",
		Description: "The options of the composefs project's tool are those of composefs-info, a link to\nparticle.",
		Flags:       []cli.Flag{kindFlag(), &cli.BoolFlag{Name: "json", Usage: "print JSON"}},
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return usagef("info takes one NAME or FILE, got %d arguments", c.NArg())
			}
			f, err := openImage(t, c, c.Args().First())
			if err != nil {
				return err
			}
			defer f.Close()
			info, err := describeImage(f)
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return t.printJSON(info)
			}
			w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
			fmt.Fprintf(w, "digest\t%s\n", info.Digest)
			fmt.Fprintf(w, "format\tcomposefs version %d, %s of metadata\n", info.Version, size(info.Size))
			fmt.Fprintf(w, "files\t%d names of %d inodes, %s\n", info.Names, info.Inodes, size(info.Bytes))
			fmt.Fprintf(w, "objects\t%d\n", info.Objects)
			fmt.Fprintf(w, "ACLs\t%v\n", info.ACLs)
			return w.Flush()
		},
	}
}

func describeImage(f *image) (*imageInfo, error) {
	tr, err := f.tree()
	if err != nil {
		return nil, err
	}
	head, err := erofs.ReadInfo(f)
	if err != nil {
		return nil, err
	}
	info := &imageInfo{Version: head.Version, ACLs: head.HasACL}
	seen := map[*tree.Node]bool{}
	objects := map[fsverity.Digest]bool{}
	_ = tr.Walk(func(_ string, n *tree.Node) error {
		info.Names++
		if seen[n] {
			return nil
		}
		seen[n] = true
		if n.IsRegular() && n.File != nil {
			info.Bytes += n.File.Size
			if d := n.File.Object; !d.IsZero() {
				objects[d] = true
			}
		}
		return nil
	})
	info.Inodes, info.Objects = len(seen), len(objects)
	// A file has digests of both algorithms; the one that its objects have is meant.
	alg := fsverity.SHA256
	for d := range objects {
		alg = d.Algorithm()
	}
	if f.store != nil {
		alg = f.store.Algorithm()
	}
	info.Digest, info.Size, err = fsverity.Read(alg, io.NewSectionReader(f, 0, 1<<62))
	return info, err
}

func newDiffCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "diff",
		Usage:     "compare two images or directories, path by path",
		ArgsUsage: "A B",
		Description: "A and B are names of images in the store, composefs images or directories. Compared\n" +
			"are names, types, modes, owners, times, sizes, contents, links, devices and xattrs, and\n" +
			"of a directory what is not mounted below it.\n" +
			"The exit status is 1 where they differ.",
		Flags: []cli.Flag{
			kindFlag(),
			&cli.BoolFlag{Name: "no-root", Usage: "leave the root directory's own metadata out: engines make it up"},
			&cli.BoolFlag{Name: "json", Usage: "print JSON"},
		},
		Action: func(c *cli.Context) error {
			if c.NArg() != 2 {
				return usagef("diff takes two images or directories, got %d arguments", c.NArg())
			}
			var trees [2]*tree.Tree
			for i, name := range c.Args().Slice() {
				var err error
				if trees[i], err = anyTree(t, c, name); err != nil {
					return err
				}
			}
			if c.Bool("no-root") {
				trees[1] = withRootOf(trees[1], trees[0])
			}
			changes := tree.Diff(trees[0], trees[1])
			if c.Bool("json") {
				if changes == nil {
					changes = []tree.Change{}
				}
				if err := t.printJSON(changes); err != nil {
					return err
				}
			} else {
				for _, ch := range changes {
					t.printf("%s\n", ch)
				}
			}
			if len(changes) > 0 {
				return statusError(exitFailure)
			}
			return nil
		},
	}
}

// withRootOf returns t with the other tree's metadata on its root.
func withRootOf(t, other *tree.Tree) *tree.Tree {
	root := *t.Root
	root.Stat = other.Root.Stat
	return &tree.Tree{Root: &root}
}

// anyTree reads the tree of an image of the store, a composefs image or a directory.
func anyTree(t *term, c *cli.Context, name string) (*tree.Tree, error) {
	f, err := openImage(t, c, name)
	if err == nil {
		defer f.Close()
		return f.tree()
	}
	if fi, serr := os.Stat(name); serr != nil || !fi.IsDir() {
		return nil, err
	}
	alg := fsverity.SHA256
	if st, err := store.Open(c.String("store")); err == nil {
		alg = st.Algorithm()
	}
	return scan.Dir(c.Context, name, scan.Hash(alg), scan.Options{OneFileSystem: true})
}
