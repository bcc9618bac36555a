// Command bench measures Particle and the programs that do the same or part of it, on
// the same input, in one run, and prints how they compare.
//
// Each group of contenders turns the same input into something that can be used. The
// contenders of a group take turns, so that what else the machine does hits all of
// them; the input is in the page cache, what is dirty is written out before each turn,
// and each turn starts from nothing (its own store, storage or directory). Medians are
// reported. Absolute numbers are of that machine; ratios travel better.
//
// Left out: networks (the registry runs on this machine), parallel clients, and the
// speed of what comes out.
//
// Run it by `make bench`, which installs the contenders and builds particle.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type options struct {
	rounds   int
	out      string
	particle string
	cache    string
	only     string
}

func main() {
	if len(os.Args) > 3 && os.Args[1] == launchArg {
		os.Exit(launch(os.Args[2:]))
	}
	var o options
	flag.IntVar(&o.rounds, "n", 5, "`rounds`: how often each contender runs")
	flag.StringVar(&o.out, "json", "bench.json", "write the results to this `file`")
	flag.StringVar(&o.particle, "particle", "bin/particle", "the `program` to measure")
	flag.StringVar(&o.cache, "cache", defaultCache(), "`directory` for inputs, kept for the next run, and results of contenders, which are not")
	flag.StringVar(&o.only, "group", "", "only the groups whose name contains this `text`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func defaultCache() string {
	if dir := os.Getenv("PARTICLE_TEST_CACHE"); dir != "" {
		return filepath.Join(dir, "bench")
	}
	return "/var/cache/particle-test/bench"
}

func run(ctx context.Context, o options) (err error) {
	if o.rounds < 1 {
		return errors.New("-n must be at least 1")
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root, as podman and umoci do for images of root's files: sudo make bench")
	}
	particle, err := filepath.Abs(o.particle)
	if err != nil {
		return err
	}
	in, err := prepare(ctx, o.cache, particle)
	if err != nil {
		return fmt.Errorf("preparing the inputs: %w", err)
	}
	defer func() { err = errors.Join(err, in.close()) }()

	res := &results{Rounds: o.rounds, Started: time.Now().UTC().Truncate(time.Second), Machine: describeMachine(), Inputs: in.describe()}
	all, err := withPodman(ctx, in, o.only)
	if err != nil {
		return err
	}
	for _, g := range all {
		if !strings.Contains(g.name, o.only) {
			continue
		}
		gr, err := runGroup(ctx, in, g, o.rounds*max(1, g.repeat))
		if err != nil {
			return fmt.Errorf("%s: %w", g.name, err)
		}
		res.Groups = append(res.Groups, gr)
	}
	if strings.Contains("containerd", o.only) {
		if res.Containerd, err = benchContainerd(ctx, in, o.rounds); err != nil {
			return err
		}
	}
	if len(res.Groups) == 0 && res.Containerd == nil {
		return fmt.Errorf("no group has %q in its name", o.only)
	}
	res.print(os.Stdout)
	raw, err := json.MarshalIndent(res, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(o.out, append(raw, '\n'), 0o644); err != nil {
		return err
	}
	fmt.Printf("\nwritten to %s\n", o.out)
	return nil
}

// runGroup lets the contenders of a group take turns.
func runGroup(ctx context.Context, in *inputs, g group, rounds int) (*groupResult, error) {
	gr := &groupResult{Name: g.name, What: g.what}
	var able []*contenderResult
	for i := range g.contenders {
		c := &g.contenders[i]
		cr := &contenderResult{Name: c.name, Target: c.target, contender: c}
		gr.Contenders = append(gr.Contenders, cr)
		if cr.Skipped = c.missing(in); cr.Skipped == "" {
			able = append(able, cr)
		}
	}
	for round := range rounds {
		for i := range able {
			cr := able[(i+round)%len(able)] // nobody always comes after the same one
			fmt.Fprintf(os.Stderr, "%s: round %d of %d: %s\n", g.name, round+1, rounds, cr.Name)
			m, err := turn(ctx, in, cr.contender)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", cr.Name, err)
			}
			cr.Runs = append(cr.Runs, m)
		}
	}
	gr.summarize()
	return gr, nil
}

// turn runs a contender once, from nothing.
func turn(ctx context.Context, in *inputs, c *contender) (m measurement, err error) {
	dir, err := os.MkdirTemp(in.scratch, "turn-")
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, discard(dir)) }()
	if err := in.warm(c.reads); err != nil {
		return m, err
	}
	if m, err = measure(ctx, c.run(in, dir, in.first), dir); err != nil || c.second == nil {
		return m, err
	}
	// The image that shares its base with the first one.
	again, err := measure(ctx, c.second(in, dir, in.second), dir)
	if err != nil {
		return m, fmt.Errorf("second image: %w", err)
	}
	added := again.Disk - m.Disk
	m.SecondDisk, m.SecondWall = &added, &again.Wall
	return m, nil
}
