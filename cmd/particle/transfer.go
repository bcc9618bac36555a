package main

import (
	"strings"

	"github.com/urfave/cli/v2"
)

func newPullCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "pull",
		Usage:     "bring an image of a registry into the store",
		ArgsUsage: "HOST/REPO[:TAG|@DIGEST] [NAME]",
		Flags:     convertFlags(),
		Action: func(c *cli.Context) error {
			if n := c.NArg(); n < 1 || n > 2 {
				return usagef("pull takes a reference and perhaps a NAME, got %d arguments; see particle pull --help", n)
			}
			return runConvert(t, c, inRegistry(c.Args().Get(0)), c.Args().Get(1))
		},
	}
}

func newPushCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "push",
		Usage:     "give an image of the store to a registry",
		ArgsUsage: "NAME [HOST/REPO[:TAG]]",
		Flags:     exportFlags(),
		Action: func(c *cli.Context) error {
			if n := c.NArg(); n < 1 || n > 2 {
				return usagef("push takes a NAME and perhaps a reference, got %d arguments; see particle push --help", n)
			}
			target := c.Args().Get(1)
			if target == "" {
				target = c.Args().Get(0)
			}
			return runExport(t, c, c.Args().Get(0), inRegistry(target))
		},
	}
}

// inRegistry names an image of a registry, of which the transport may be left out.
func inRegistry(ref string) string {
	if strings.HasPrefix(ref, "docker://") {
		return ref
	}
	return "docker://" + ref
}
