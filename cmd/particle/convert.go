package main

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
)

func newConvertCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "convert",
		Usage:     "bring an image into the store as composefs",
		ArgsUsage: "SOURCE [NAME]",
		Description: "SOURCE is an image (docker://, oci:, oci-archive:, docker-archive:,\n" +
			"containers-storage:), or the path of a directory, a tar file (- for stdin) or a\n" +
			"composefs image. NAME is what the store calls it; the default follows from SOURCE.",
		Flags: append(convertFlags(),
			&cli.StringFlag{Name: "arch", Usage: "the `NAME` of the architecture of a directory or tar, which do not say (default: this machine's)"},
			&cli.BoolFlag{Name: "link", Usage: "hard-link a directory's files into the store; nobody may write to them any more"},
			&cli.BoolFlag{Name: "cross-mounts", Usage: "take what is mounted below a directory, too"},
			&cli.StringSliceFlag{Name: "basedir", Usage: "take a composefs image's objects from this `DIR`ectory (default: the store's)"},
		),
		Action: func(c *cli.Context) error {
			if n := c.NArg(); n < 1 || n > 2 {
				return usagef("convert takes a SOURCE and perhaps a NAME, got %d arguments; see particle convert --help", n)
			}
			return runConvert(t, c, c.Args().Get(0), c.Args().Get(1))
		},
	}
}

// runConvert converts and prints what was made.
func runConvert(t *term, c *cli.Context, source, name string) error {
	start := time.Now()
	res, err := convertSource(c.Context, t, c, source, name)
	if err != nil {
		return fmt.Errorf("converting %s: %w", source, err)
	}
	if c.Bool("json") {
		return t.printJSON(res)
	}
	printResult(t, res, time.Since(start))
	return nil
}

// printResult prints a conversion for people.
func printResult(t *term, res *converter.Result, took time.Duration) {
	var total int64
	present := 0
	for _, l := range res.Layers {
		total += l.Size
		if l.Present {
			present++
		}
	}
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	row := func(key, format string, args ...any) { fmt.Fprintf(w, key+"\t"+format+"\n", args...) }
	if res.Name != "" {
		row("name", "%s", res.Name)
	}
	row("manifest", "%s", res.Manifest)
	row("config", "%s", res.Config)
	row("layers", "%d, %s (%d in the store before)", len(res.Layers), size(total), present)
	for _, kind := range converter.Kinds {
		if d, ok := res.Images[kind.String()]; ok {
			row(kind.String(), "%s", d)
		}
	}
	row("stored", "%d new objects, %s, in %s", res.NewObjects, size(res.NewBytes), seconds(took))
	w.Flush()
}
