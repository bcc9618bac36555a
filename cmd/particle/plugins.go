package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
)

// A bridge is another program that can use the store, by its own configuration.
// It only says what there is to change; this file changes it.
type bridge interface {
	// name is what the command line calls it.
	name() string
	// status tells what holds now. A program that is not installed is no error.
	status(ctx context.Context) (*bridgeStatus, error)
	// enable and disable return what there is to change until the bridge is on or off,
	// which may be nothing.
	enable(ctx context.Context) (*bridgePlan, error)
	disable(ctx context.Context) (*bridgePlan, error)
}

// bridges makes all bridges.
func bridges(o bridgeOptions) ([]bridge, error) {
	c, err := newContainerdBridge(o)
	if err != nil {
		return nil, err
	}
	p, err := newPodmanBridge(o)
	return []bridge{c, p}, err
}

// bridgeOptions are those of the command line; empty ones mean what plugins.toml says.
type bridgeOptions struct {
	config string // the program's own configuration file
	socket string // of our daemon
	root   string // of our daemon
}

// States of a bridge.
const (
	bridgeOn         = "enabled"
	bridgeOff        = "disabled"
	bridgeOutdated   = "outdated"      // enable would change something
	bridgeUnused     = "not imported"  // written, and the program does not read it
	bridgeOverridden = "overridden"    // read, and another file has the last word
	bridgeAbsent     = "not installed" // the program is not here
)

type bridgeStatus struct {
	Name    string   `json:"name"`
	State   string   `json:"state"`
	Version string   `json:"version,omitempty"` // of the program
	Files   []string `json:"files,omitempty"`   // of ours that are there
	Daemon  string   `json:"daemon,omitempty"`  // whether it answers
	Notes   []string `json:"notes,omitempty"`   // what people should know or do
}

// A bridgePlan is what there is to change.
type bridgePlan struct {
	Name    string       `json:"name"`
	Changes []fileChange `json:"changes"`
	// Missing is what only the user can do, "" if the plan is all there is to do.
	Missing string `json:"missing,omitempty"`
	without string // the state of the bridge until that is done
	// Notes are what to do next.
	Notes []string `json:"notes,omitempty"`

	prepare func() error // what has to be there before the changes; nil for nothing
}

// A fileChange writes or removes a file.
type fileChange struct {
	Path string  `json:"path"`
	Old  *string `json:"old"` // nil where there is no such file
	New  *string `json:"new"` // nil to remove it
	// Dirs are directories above it that are made before, or, if they are empty then,
	// removed after it; the innermost first.
	Dirs []string `json:"dirs,omitempty"`
}

// errNotInEffect: what could be written is written, and the program does not go by it.
var errNotInEffect = errors.New("not in effect yet")

func newPluginsCommand(t *term) *cli.Command {
	change := func(name, usage string, plan func(bridge, context.Context) (*bridgePlan, error)) *cli.Command {
		return &cli.Command{
			Name: name, Usage: usage, ArgsUsage: "[BRIDGE]",
			Flags: append(bridgeFlags(),
				&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "change nothing, only show what would change"}),
			Action: func(c *cli.Context) error { return changeBridges(t, c, plan) },
		}
	}
	return &cli.Command{
		Name:  "plugins",
		Usage: "make other programs use the store",
		Description: "BRIDGE is a program, containerd or podman; without it, all that are installed are meant.\n" +
			"What a program should know goes into a file beside its own. Only podman up to 5 has no\n" +
			"such files: there it goes between marks into storage.conf. disable takes it out again.",
		Subcommands: []*cli.Command{
			change("enable", "write what a program needs to know", bridge.enable),
			change("disable", "remove what enable wrote", bridge.disable),
			{
				Name: "status", Usage: "show which programs use the store", ArgsUsage: "[BRIDGE]",
				Flags:  bridgeFlags(),
				Action: func(c *cli.Context) error { return showBridges(t, c) },
			},
		},
		Action: func(c *cli.Context) error {
			return usagef("plugins takes enable, disable or status; see particle plugins --help")
		},
	}
}

func bridgeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "config", Usage: "the program's own configuration `FILE` (default: its usual one)"},
		&cli.StringFlag{Name: "socket", Usage: "the `FILE` at which Particle's daemon listens (default: its usual one)"},
		&cli.StringFlag{Name: "root", Usage: "the `DIR`ectory of Particle's daemon (default: its usual one)"},
		&cli.BoolFlag{Name: "json", Usage: "print JSON"},
	}
}

// chosenBridges returns the bridge that the argument names, or all.
func chosenBridges(c *cli.Context) ([]bridge, error) {
	all, err := bridges(bridgeOptions{config: c.String("config"), socket: c.String("socket"), root: c.String("root")})
	if err != nil {
		return nil, err
	}
	var names []string
	for _, b := range all {
		names = append(names, b.name())
	}
	if c.NArg() > 1 {
		return nil, usagef("plugins %s takes one of %s, got %d arguments", c.Command.Name, strings.Join(names, ", "), c.NArg())
	}
	if !c.Args().Present() {
		if c.IsSet("config") {
			return nil, usagef("--config: say of which program: %s", strings.Join(names, ", "))
		}
		return all, nil
	}
	i := slices.Index(names, c.Args().First())
	if i < 0 {
		return nil, usagef("there is no bridge %q: want one of %s", c.Args().First(), strings.Join(names, ", "))
	}
	return all[i : i+1], nil
}

func changeBridges(t *term, c *cli.Context, plan func(bridge, context.Context) (*bridgePlan, error)) error {
	chosen, err := chosenBridges(c)
	if err != nil {
		return err
	}
	// All of them means those that are here.
	if !c.Args().Present() {
		here := chosen[:0]
		for _, b := range chosen {
			st, err := b.status(c.Context)
			if err != nil {
				return fmt.Errorf("%s: %w", b.name(), err)
			}
			if st.State == bridgeAbsent {
				t.infof("%s is not installed", b.name())
				continue
			}
			here = append(here, b)
		}
		chosen = here
	}
	plans, err := planBridges(c.Context, chosen, plan)
	if err != nil {
		return err
	}
	return applyPlans(t, plans, c.Bool("dry-run"), c.Bool("json"))
}

// planBridges makes the plans of all bridges before any is carried out: what is unfit in
// one keeps the others from being changed.
func planBridges(ctx context.Context, chosen []bridge, plan func(bridge, context.Context) (*bridgePlan, error)) (plans []*bridgePlan, err error) {
	var errs []error
	for _, b := range chosen {
		p, err := plan(b, ctx)
		if errors.Is(err, exec.ErrNotFound) {
			err = errors.New("it is not installed: there is no such program in PATH")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", b.name(), err))
		}
		plans = append(plans, p)
	}
	return plans, errors.Join(errs...)
}

// applyPlans carries plans out, unless that is only to be shown. One that fails does not
// keep the others back, and what was done is printed in any case.
func applyPlans(t *term, plans []*bridgePlan, dry, asJSON bool) error {
	done := []*bridgePlan{}
	var errs []error
	for _, p := range plans {
		if !dry {
			n, err := p.apply()
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", p.Name, err))
				p.Changes, p.Missing, p.Notes = p.Changes[:n], "", nil
				if n == 0 {
					continue
				}
			}
			if p.Missing != "" {
				errs = append(errs, fmt.Errorf("%s: %w: %s", p.Name, errNotInEffect, p.Missing))
			}
		}
		if done = append(done, p); !asJSON {
			p.print(t, dry)
		}
	}
	if asJSON {
		errs = append(errs, t.printJSON(done))
	}
	return errors.Join(errs...)
}

func showBridges(t *term, c *cli.Context) error {
	chosen, err := chosenBridges(c)
	if err != nil {
		return err
	}
	all := []*bridgeStatus{}
	for _, b := range chosen {
		st, err := b.status(c.Context)
		if err != nil {
			return fmt.Errorf("%s: %w", b.name(), err)
		}
		all = append(all, st)
	}
	if c.Bool("json") {
		return t.printJSON(all)
	}
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "BRIDGE\tSTATE\tVERSION\tDAEMON\tFILES")
	dash := func(s string) string {
		if s == "" {
			return "-"
		}
		return s
	}
	for _, st := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", st.Name, st.State, dash(st.Version), dash(st.Daemon), dash(strings.Join(st.Files, ",")))
	}
	w.Flush()
	for _, st := range all {
		for _, n := range st.Notes {
			t.infof("%s: %s", st.Name, n)
		}
	}
	return nil
}

// apply makes the changes, each file whole or not at all, and returns how many it made.
func (p *bridgePlan) apply() (done int, err error) {
	if p.prepare != nil {
		if err := p.prepare(); err != nil {
			return 0, err
		}
	}
	for i, ch := range p.Changes {
		now, err := readFileIfAny(ch.Path)
		if err != nil {
			return i, err
		}
		if (now == nil) != (ch.Old == nil) || now != nil && *now != *ch.Old {
			return i, fmt.Errorf("%s was changed by somebody else just now: try again", ch.Path)
		}
		if ch.New == nil {
			err = ch.remove()
		} else {
			err = ch.write()
		}
		if err != nil {
			return i, fmt.Errorf("changing %s: %w", ch.Path, err)
		}
	}
	return len(p.Changes), nil
}

func (ch *fileChange) write() (err error) {
	for _, dir := range slices.Backward(ch.Dirs) {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := syncDir(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	// No name that a pattern like *.toml takes.
	tmp, err := os.CreateTemp(filepath.Dir(ch.Path), "."+filepath.Base(ch.Path)+".new-")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.WriteString(*ch.New)
	if err = errors.Join(err, tmp.Chmod(0o644), tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), ch.Path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(ch.Path))
}

func (ch *fileChange) remove() error {
	if err := os.Remove(ch.Path); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(ch.Path)); err != nil {
		return err
	}
	for _, dir := range ch.Dirs {
		// Not if somebody put something there.
		if os.Remove(dir) != nil {
			break
		}
	}
	return nil
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// readFileIfAny returns a file's text, nil where there is no such file.
func readFileIfAny(path string) (*string, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s := string(b)
	return &s, nil
}

// missingDirs returns the directories above a path that do not exist, the innermost
// first.
func missingDirs(path string) (dirs []string) {
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		if _, err := os.Lstat(dir); err == nil || dir == filepath.Dir(dir) {
			return dirs
		}
		dirs = append(dirs, dir)
	}
}

// print shows a plan that was, or would be, applied.
func (p *bridgePlan) print(t *term, dry bool) {
	if len(p.Changes) == 0 {
		t.printf("%s: nothing to change\n", p.Name)
	}
	verb := func(done, would string) string {
		if dry {
			return "would " + would
		}
		return done
	}
	for _, ch := range p.Changes {
		if ch.New == nil {
			t.printf("%s: %s %s\n", p.Name, verb("removed", "remove"), ch.Path)
			continue
		}
		t.printf("%s: %s %s\n", p.Name, verb("wrote", "write"), ch.Path)
		if dry {
			var old string
			if ch.Old != nil {
				old = *ch.Old
			}
			for _, l := range diffLines(old, *ch.New) {
				t.printf("  %s\n", l)
			}
		}
	}
	if p.Missing != "" && dry {
		t.infof("%s: then it is %v: %s", p.Name, errNotInEffect, p.Missing)
	}
	for _, n := range p.Notes {
		t.infof("%s: %s", p.Name, n)
	}
}

// diffLines shows how a text changes: "- " and "+ " before what goes and what comes,
// between the lines that both begin and end with.
func diffLines(before, after string) (lines []string) {
	a, b := slices.Collect(strings.Lines(before)), slices.Collect(strings.Lines(after))
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	for _, l := range a {
		lines = append(lines, "- "+strings.TrimSuffix(l, "\n"))
	}
	for _, l := range b {
		lines = append(lines, "+ "+strings.TrimSuffix(l, "\n"))
	}
	return lines
}
