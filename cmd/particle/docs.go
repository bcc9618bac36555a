package main

import (
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// The scripts only ask "particle docs complete"; what they offer is in complete.go.
//
//go:embed completion
var completionScripts embed.FS

// newDocsCommand makes the verb that packages and shells use, and people do not see.
func newDocsCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:   "docs",
		Usage:  "write manual pages, shell completions and what the initramfs needs",
		Hidden: true,
		Subcommands: []*cli.Command{
			{
				Name:      "man",
				Usage:     "write the manual pages into a directory",
				ArgsUsage: "DIR",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "release", Usage: "the `VERSION` at the foot of the pages"},
					&cli.StringFlag{Name: "epoch", EnvVars: []string{"SOURCE_DATE_EPOCH"}, Usage: "`SECONDS` since 1970, for the date of the pages", Value: "0"},
				},
				Action: func(c *cli.Context) error { return writeManPages(c) },
			},
			{
				Name:      "completion",
				Usage:     "print a shell's completion script",
				ArgsUsage: "bash|zsh|fish",
				Action: func(c *cli.Context) error {
					script, err := completionScripts.ReadFile("completion/particle." + c.Args().First())
					if c.NArg() != 1 || err != nil {
						return usagef("docs completion takes bash, zsh or fish, got %q", c.Args().Slice())
					}
					_, err = t.out.Write(script)
					return err
				},
			},
			{
				Name:      "initramfs",
				Usage:     "write the files of initramfs-tools and dracut below a directory",
				ArgsUsage: "DIR",
				Action:    func(c *cli.Context) error { return writeInitramfsFiles(c) },
			},
			{
				Name:            "complete",
				Usage:           "print what the last of WORDS may become",
				ArgsUsage:       "WORDS...",
				SkipFlagParsing: true,
				HideHelp:        true,
				Action: func(c *cli.Context) error {
					for _, line := range complete(newApp(t), c.Args().Slice(), imageNames) {
						t.printf("%s\n", line)
					}
					return nil
				},
			},
		},
		Action: func(*cli.Context) error { return usagef("docs takes man, completion, complete or initramfs") },
	}
}

func writeManPages(c *cli.Context) error {
	if c.NArg() != 1 {
		return usagef("docs man takes a DIR, got %d arguments", c.NArg())
	}
	epoch, err := strconv.ParseInt(c.String("epoch"), 10, 64)
	if err != nil {
		return usagef("--epoch takes seconds since 1970, got %q", c.String("epoch"))
	}
	dir := c.Args().First()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// A new app: what flags were given to this one would count as defaults.
	for name, page := range manPages(newApp(&term{}), c.String("release"), time.Unix(epoch, 0).UTC()) {
		if err := os.WriteFile(filepath.Join(dir, name), page, 0o644); err != nil {
			return fmt.Errorf("writing a manual page: %w", err)
		}
	}
	return nil
}

// writeInitramfsFiles writes all files but the program, which is built apart.
func writeInitramfsFiles(c *cli.Context) error {
	if c.NArg() != 1 {
		return usagef("docs initramfs takes a DIR, got %d arguments", c.NArg())
	}
	for _, f := range initramfs.Files() {
		if f.Data == nil {
			continue
		}
		name := filepath.Join(c.Args().First(), f.Path)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, f.Data, 0o600); err != nil {
			return fmt.Errorf("writing a file of the initramfs: %w", err)
		}
		if err := os.Chmod(name, f.Mode); err != nil {
			return err
		}
	}
	return nil
}
