package main

import (
	"fmt"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
)

func newStoreCommand(t *term) *cli.Command {
	asJSON := func() cli.Flag { return &cli.BoolFlag{Name: "json", Usage: "print JSON"} }
	return &cli.Command{
		Name:  "store",
		Usage: "look after the store",
		Subcommands: []*cli.Command{
			{
				Name:   "df",
				Usage:  "show what the store holds and what that takes on disk",
				Flags:  []cli.Flag{asJSON()},
				Action: func(c *cli.Context) error { return storeDF(t, c) },
			},
			{
				Name:  "gc",
				Usage: "remove what no name leads to",
				Flags: []cli.Flag{
					&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "remove nothing, only tell"},
					asJSON(),
				},
				Action: func(c *cli.Context) error { return storeGC(t, c) },
			},
			{
				Name:        "fsck",
				Usage:       "look for damage in the store's structure",
				Description: "Checks links, references, streams and images, and that each object they name is\nthere. particle store scrub also reads every object and compares its digest.",
				Flags:       []cli.Flag{asJSON()},
				Action:      func(c *cli.Context) error { return storeFsck(t, c, false) },
			},
			{
				Name:   "scrub",
				Usage:  "as fsck, and read every object and compare its digest",
				Flags:  []cli.Flag{asJSON()},
				Action: func(c *cli.Context) error { return storeFsck(t, c, true) },
			},
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("store takes df, gc, fsck or scrub, not %q", c.Args().First())
			}
			return usagef("store takes df, gc, fsck or scrub; see particle store --help")
		},
	}
}

func storeDF(t *term, c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	st, err := readStore(t, c)
	if err != nil {
		return err
	}
	u, err := converter.DF(c.Context, st)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return t.printJSON(u)
	}
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tOBJECTS\tCONTENT\tDISK")
	for _, l := range []struct {
		name string
		store.Amount
	}{{"all", u.Total}, {"shared by images", u.Shared}, {"unreferenced", u.Unreferenced}} {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", l.name, l.Objects, size(l.Bytes), size(l.Disk))
	}
	w.Flush()
	t.printf("\n%d streams, %d composefs images, %d names; sharing saves %s\n", u.Streams, u.Images, u.StreamRefs+u.ImageRefs, size(u.SavedBytes))
	if u.Unreferenced.Objects > 0 {
		t.infof("particle store gc frees %s", size(u.Unreferenced.Disk))
	}
	return nil
}

func storeGC(t *term, c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	st, err := freeStore(t, c)
	if err != nil {
		return err
	}
	roots, err := mountedImages(t, st)
	if err != nil {
		return err
	}
	s, err := converter.GC(c.Context, st, store.GCOptions{DryRun: c.Bool("dry-run"), Roots: roots})
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return t.printJSON(s)
	}
	verb := "removed"
	if c.Bool("dry-run") {
		verb = "would remove"
	}
	t.printf("%s %d objects (%s), %d streams, %d images; %d objects stay\n", verb, s.ObjectsRemoved, size(s.BytesRemoved), s.StreamsRemoved, s.ImagesRemoved, s.ObjectsKept)
	return nil
}

// mountedImages lists the images of a store that are mounted: their files must stay,
// whether they still have a name or not.
func mountedImages(t *term, st *store.Store) ([]string, error) {
	mounts, err := mount.List()
	if err != nil {
		return nil, fmt.Errorf("looking for mounted images: %w", err)
	}
	var roots []string
	for _, m := range mounts {
		if !slices.Contains(m.Objects, st.ObjectsDir()) {
			continue
		}
		if _, err := st.ImageDigest(m.Name); err != nil {
			t.warnf("what is mounted on %s uses the store's files, which does not know the image: they may go", m.Target)
			continue
		}
		roots = append(roots, m.Name)
	}
	return roots, nil
}

func storeFsck(t *term, c *cli.Context, scrub bool) error {
	if err := noArgs(c); err != nil {
		return err
	}
	st, err := freeStore(t, c)
	if err != nil {
		return err
	}
	start := time.Now()
	p := t.newProgress()
	defer p.stop()
	o := store.FsckOptions{Scrub: scrub}
	if scrub {
		o.Progress = p.bytes
	}
	r, err := converter.Fsck(c.Context, st, o)
	p.stop()
	if err != nil {
		return err
	}
	if c.Bool("json") {
		if err := t.printJSON(r); err != nil {
			return err
		}
	} else {
		for _, problem := range r.Problems {
			t.printf("%s\n", problem)
		}
		read := ""
		if scrub {
			read = fmt.Sprintf(", %s read", size(r.Bytes))
		}
		verdict := "clean"
		if !r.Clean() {
			verdict = fmt.Sprintf("%d problems", len(r.Problems))
		}
		t.printf("%s: %d objects%s, %d streams, %d images, %d names in %s\n", verdict, r.Objects, read, r.Streams, r.Images, r.Refs, seconds(time.Since(start)))
	}
	if !r.Clean() {
		return statusError(exitFailure)
	}
	return nil
}
