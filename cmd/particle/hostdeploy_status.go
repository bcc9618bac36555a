package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter/dpkg"
	"github.com/particle-os/particle/hostdeploy"
)

func newStatusCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show what is booted, staged and kept",
		Flags: append(bootFlags(),
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "list packages and changes of /etc one by one"},
			&cli.BoolFlag{Name: "json", Usage: "print JSON"}),
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			return runStatus(t, c)
		},
	}
}

func runStatus(t *term, c *cli.Context) error {
	h, err := openHost(t, c)
	if err != nil {
		return err
	}
	release, err := h.Store.Hold(c.Context)
	if err != nil {
		return err
	}
	defer release()
	s, err := h.Status(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return t.printJSON(s)
	}
	for i, d := range s.Deployments {
		if i > 0 {
			t.printf("\n")
		}
		printDeployment(t, s, d, c.Bool("verbose"))
	}
	for _, e := range s.Failures {
		t.printf("\nfailed: %s (%s) used up its tries, so another system was booted\n", e.Title, hostdeploy.ShortID(e.ID))
	}
	fallback := "no fall back by itself"
	if s.Fallback != "" {
		fallback = "falls back by itself: " + s.Fallback
	}
	t.printf("\nboot loader: %s, %s\n", s.Loader, fallback)
	t.printf("boot file system: %s of %s free\n", size(s.BootFree), size(s.BootSize))
	return nil
}

// printDeployment prints one deployment: a line with what it is to the host, then what
// there is to know, a line each.
func printDeployment(t *term, s *hostdeploy.Status, d *hostdeploy.DeploymentStatus, verbose bool) {
	var roles []string
	for _, r := range []struct {
		is   bool
		name string
	}{{d.Booted, "booted"}, {d.Staged, "staged"}, {d.Default && !d.Booted, "boots next"}, {d.Kept == "rollback", "rollback"}, {d.Pinned, "pinned"}, {d.Failed, "failed"}} {
		if r.is {
			roles = append(roles, r.name)
		}
	}
	if d.Kept == "" {
		roles = append(roles, "no longer needed")
	}
	mark := " "
	if d.Booted {
		mark = "*"
	}
	t.printf("%s %s  %s\n", mark, d.Title, strings.Join(roles, ", "))
	line := func(name, format string, args ...any) {
		t.printf("    %-13s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("deployment", "%s, made %s", d.Name(), d.Created.Local().Format(time.DateTime))
	if d.Reference != "" {
		line("image", "%s", d.Reference)
	}
	line("manifest", "%s", d.Manifest)
	line("composefs", "%s", d.Digest)
	line("kernel", "%s", d.Kernel)
	if d.Booted && s.Boot != nil {
		line("verification", "%s: %s", s.Boot.Verification, s.Boot.Why)
		if len(s.Boot.Transient) > 0 {
			line("transient", "%s: what is written there is lost, and not what was verified", strings.Join(s.Boot.Transient, ", "))
		}
	}
	if d.Tries != nil && !d.Failed {
		line("tries left", "%d", *d.Tries)
	}
	if d.Missing != "" {
		line("damaged", "%s", d.Missing)
	}
	line("arguments", "%s", d.KArgs.All())
	if verbose {
		printKargs(t, "        ", &d.KArgs)
	}
	if len(d.Packages) > 0 {
		line("packages", "%s", packageSummary(d.Packages))
		if verbose {
			w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
			for _, p := range d.Packages {
				fmt.Fprintf(w, "        %s\t%s\t%s\n", p.Name, orDash(p.Old), orDash(p.New))
			}
			w.Flush()
		}
	}
	if d.Booted {
		for _, c := range s.Conflicts {
			line("conflict", "%s", c)
		}
	}
	if d.Booted && len(s.EtcChanges) > 0 {
		line("/etc", "%d changes since the image", len(s.EtcChanges))
		if verbose {
			for _, change := range s.EtcChanges {
				t.printf("        %s\n", change)
			}
		}
	}
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func packageSummary(all []dpkg.Change) string {
	added, removed, changed := 0, 0, 0
	for _, p := range all {
		switch {
		case p.Old == "":
			added++
		case p.New == "":
			removed++
		default:
			changed++
		}
	}
	return fmt.Sprintf("%d other versions, %d more, %d fewer than the running system", changed, added, removed)
}

func newHistoryCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "history",
		Usage: "show what was deployed, booted and removed",
		Flags: append(bootFlags(), &cli.BoolFlag{Name: "json", Usage: "print JSON"}),
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			h, err := openHost(t, c)
			if err != nil {
				return err
			}
			events, err := h.History()
			if err != nil {
				return err
			}
			if c.Bool("json") {
				if events == nil {
					events = []hostdeploy.Event{}
				}
				return t.printJSON(events)
			}
			w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
			for _, e := range events {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", e.Time.Local().Format(time.DateTime), e.What, hostdeploy.ShortID(e.ID), e.Title)
			}
			return w.Flush()
		},
	}
}
