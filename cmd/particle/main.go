// Command particle turns container images into bootable, immutable systems and back.
//
// Called as mkcomposefs, composefs-info or mount.composefs it behaves as the
// program of that name from the composefs project.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"

	"github.com/urfave/cli/v2"
)

// Exit statuses.
const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
)

func main() { os.Exit(run(os.Args, os.Stdin, os.Stdout, os.Stderr)) }

// run is the whole program; it returns the exit status.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	// Trees of a hundred thousand files live as long as the process: collecting at
	// every doubling of a small heap costs more than it frees.
	debug.SetGCPercent(200)

	ctx, stop := interruptible()
	defer stop()

	if tool := tools[filepath.Base(args[0])]; tool != nil {
		return tool(ctx, args[1:], stdin, stdout, stderr)
	}

	t := &term{in: stdin, out: stdout, err: stderr}
	app := newApp(t)
	args, err := arrange(app, args)
	if err == nil {
		err = app.RunContext(ctx, args)
	}
	return t.report(ctx, err)
}

// A toolMain is the main function of a program that particle stands in for.
type toolMain func(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int

var tools = map[string]toolMain{
	"mkcomposefs":     mkcomposefsMain,
	"composefs-info":  composefsInfoMain,
	"mount.composefs": mountComposefsMain,
}

// newApp builds the command from its verbs, grouped by task.
func newApp(t *term) *cli.App {
	app := &cli.App{
		Name:      "particle",
		Usage:     "container images as bootable, immutable systems, and back",
		UsageText: "particle [--store DIR] [--quiet] VERB [options] [arguments]",
		Description: "Images are named as skopeo names them: docker://HOST/REPO:TAG, oci:DIR[:TAG],\n" +
			"oci-archive:FILE, docker-archive:FILE, containers-storage:NAME, or the path of a\n" +
			"directory, a tar file or a composefs image.\n\n" +
			"Exit status: 0 success, 1 failure, 2 wrong usage.",
		HideVersion:          true,
		EnableBashCompletion: true,
		Reader:               t.in,
		Writer:               t.out,
		ErrWriter:            t.err,
		ExitErrHandler:       func(*cli.Context, error) {}, // run reports errors
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "store", EnvVars: []string{"PARTICLE_STORE"}, Value: defaultStore(), Usage: "the store's `DIR`ectory"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print no progress and no warnings"},
		},
		Before: func(c *cli.Context) error {
			t.quiet = c.Bool("quiet")
			if c.String("store") == "" {
				return usagef("--store and PARTICLE_STORE: want a directory, got nothing")
			}
			return nil
		},
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usagef("there is no verb %q; see particle --help", c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	group := func(name string, cmds ...*cli.Command) {
		for _, cmd := range cmds {
			cmd.Category = name
			app.Commands = append(app.Commands, cmd)
		}
	}
	group("Images",
		newBootstrapCommand(t),
		newBuildCommand(t),
		newDiffCommand(t),
		newImagesCommand(t),
		newInspectCommand(t),
		newPrepareCommand(t),
		newRmCommand(t),
	)
	group("Conversion",
		newConvertCommand(t),
		newExportCommand(t),
		newMountCommand(t),
		newUmountCommand(t),
		newToolCommand(t, "mkcomposefs", "make a composefs image of a directory or a dump, as mkcomposefs does", mkcomposefsMain),
		newDumpCommand(t),
		newInfoCommand(t),
	)
	group("Distribution",
		newPullCommand(t),
		newPushCommand(t),
	)
	group("Host",
		newHostdeployCommand(t),
	)
	group("Store",
		newStoreCommand(t),
	)
	group("Bridges",
		newDoctorCommand(t),
		newLayerStoreCommand(t),
		newPluginsCommand(t),
		newSnapshotterCommand(t),
	)
	group("", newDocsCommand(t))
	strict(app.Commands)
	app.OnUsageError = func(_ *cli.Context, err error, _ bool) error { return usageError{err} }
	return app
}

// strict makes every verb report wrong flags as usage errors.
func strict(cmds []*cli.Command) {
	for _, cmd := range cmds {
		cmd.OnUsageError = func(_ *cli.Context, err error, _ bool) error { return usageError{err} }
		strict(cmd.Subcommands)
	}
}

// newToolCommand makes a verb of a program that parses its own options.
func newToolCommand(t *term, name, usage string, main toolMain) *cli.Command {
	return &cli.Command{
		Name:            name,
		Usage:           usage,
		SkipFlagParsing: true,
		HideHelp:        true,
		Action: func(c *cli.Context) error {
			if status := main(c.Context, c.Args().Slice(), t.in, t.out, t.err); status != exitOK {
				return statusError(status)
			}
			return nil
		},
	}
}

// interruptible returns a context that the first SIGINT or SIGTERM cancels; the
// second one kills the process as if nobody had asked.
func interruptible() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	done := make(chan struct{})
	go func() {
		select {
		case s := <-signals:
			signal.Stop(signals)
			cancel(fmt.Errorf("stopped by signal: %v", s))
		case <-done:
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	}
}

// A usageError is a mistake in the command line: exit status 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// A statusError ends the program with a status after the reason was printed.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// report prints err and returns the exit status it stands for.
func (t *term) report(ctx context.Context, err error) int {
	var usage usageError
	var status statusError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &status):
		return int(status)
	case errors.As(err, &usage):
		t.errorf("%v", err)
		return exitUsage
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		t.errorf("%v", context.Cause(ctx))
		return exitFailure
	}
	t.errorf("%v%s", err, hint(err, os.Geteuid()))
	return exitFailure
}
