package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/hostdeploy/prepare"
)

func newPrepareCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "prepare",
		Usage:     "make a tree of apt's run from a read-only root: the last step of an image's build",
		ArgsUsage: "[ROOT]",
		Description: "Ends a Containerfile as RUN particle prepare. ROOT is the tree's directory, / by\n" +
			"default; the root of a running system is refused.\n\n" +
			"The database of dpkg moves to /usr/lib/sysimage, so that it tells the truth after each\n" +
			"upgrade and rollback. /home, /root, /srv, /mnt and /media become links into /var. Users,\n" +
			"groups and what packages have in /var are written to sysusers.d and tmpfiles.d. Keys,\n" +
			"machine-id, logs and caches go. The initramfs is made anew, with Particle's part in it.\n\n" +
			"Running it again after further steps is right, and changes only what is new.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "check", Usage: "change nothing, only list what is not as it should be; exit status 1 if anything"},
			&cli.BoolFlag{Name: "no-initramfs", Usage: "leave the initramfs as it is"},
			&cli.BoolFlag{Name: "json", Usage: "print JSON"},
		},
		Action: func(c *cli.Context) error { return runPrepare(t, c) },
	}
}

func runPrepare(t *term, c *cli.Context) error {
	if c.NArg() > 1 {
		return usagef("prepare takes one ROOT at most, got %d arguments; see particle prepare --help", c.NArg())
	}
	o := prepare.Options{Root: c.Args().First(), NoInitramfs: c.Bool("no-initramfs")}
	if !t.quiet {
		o.Output = t.err
	}
	do := prepare.Run
	if c.Bool("check") {
		do = prepare.Check
	}
	r, err := do(c.Context, o)
	if c.Bool("json") {
		if jerr := t.printJSON(r); err == nil {
			err = jerr
		}
	} else {
		for _, change := range r.Changes {
			t.printf("%s\n", change)
		}
		for _, w := range r.Warnings {
			t.warnf("%s", w)
		}
	}
	if err != nil {
		return err
	}
	if c.Bool("check") && !r.Clean() {
		t.infof("%s to do, %s; particle prepare does it", count(len(r.Changes), "thing"), count(len(r.Warnings), "warning"))
		return statusError(exitFailure)
	}
	return nil
}

// count says a number of things: "1 thing", "2 things".
func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
