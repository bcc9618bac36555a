package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"
	"time"
)

// results is the JSON file.
type results struct {
	Started time.Time         `json:"started"`
	Rounds  int               `json:"rounds"`
	Machine map[string]string `json:"machine"`
	Inputs  map[string]string `json:"inputs"`
	Groups  []*groupResult    `json:"groups"`

	Containerd *containerdResult `json:"containerd,omitempty"`
}

type groupResult struct {
	Name       string             `json:"name"`
	What       string             `json:"what"`
	Contenders []*contenderResult `json:"contenders"`
}

type contenderResult struct {
	Name    string       `json:"name"`
	Skipped string       `json:"skipped,omitempty"` // why it did not run
	Median  *measurement `json:"median,omitempty"`  // each column by itself
	// Ratio is its wall time over Particle's: over 1, Particle is faster.
	Ratio  float64       `json:"ratio,omitempty"`
	Target float64       `json:"target,omitempty"` // the ratio aimed at
	Met    *bool         `json:"met,omitempty"`    // whether it was reached
	Runs   []measurement `json:"runs,omitempty"`

	contender *contender
}

// summarize computes medians and ratios.
func (g *groupResult) summarize() {
	for _, c := range g.Contenders {
		if len(c.Runs) > 0 {
			c.Median = medians(c.Runs)
		}
	}
	us := g.Contenders[0].Median
	for _, c := range g.Contenders {
		if c.Median == nil || us == nil {
			continue
		}
		c.Ratio = c.Median.Wall / us.Wall
		if c.Target > 0 {
			met := c.Ratio >= c.Target
			c.Met = &met
		}
	}
}

func medians(runs []measurement) *measurement {
	m := &measurement{
		Wall: median(runs, func(r measurement) float64 { return r.Wall }),
		Sync: median(runs, func(r measurement) float64 { return r.Sync }),
		CPU:  median(runs, func(r measurement) float64 { return r.CPU }),
		RSS:  median(runs, func(r measurement) int64 { return r.RSS }),
		Disk: median(runs, func(r measurement) int64 { return r.Disk }),
	}
	if runs[0].SecondDisk != nil {
		wall := median(runs, func(r measurement) float64 { return *r.SecondWall })
		disk := median(runs, func(r measurement) int64 { return *r.SecondDisk })
		m.SecondWall, m.SecondDisk = &wall, &disk
	}
	return m
}

// median is the middle value, the mean of the middle two where their number is even.
func median[T int64 | float64](runs []measurement, of func(measurement) T) T {
	var v []T
	for _, r := range runs {
		v = append(v, of(r))
	}
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// print writes the tables for people.
func (r *results) print(w io.Writer) {
	for _, m := range []map[string]string{r.Machine, r.Inputs} {
		for _, k := range slices.Sorted(maps.Keys(m)) {
			fmt.Fprintf(w, "%s: %s\n", k, m[k])
		}
	}
	fmt.Fprintf(w, "medians of %d rounds (dump: 5 times as many); ratio: times Particle's wall time, over 1 is slower than Particle\n", r.Rounds)
	for _, g := range r.Groups {
		fmt.Fprintf(w, "\n%s: %s\n", g.Name, g.What)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprint(t, "  \tratio\twall s\t+sync s\tcpu s\tpeak MiB\tdisk MiB\t2nd: s\tMiB\t\n")
		for _, c := range g.Contenders {
			if c.Median == nil {
				continue
			}
			second := "\t\t"
			if c.Median.SecondDisk != nil {
				second = fmt.Sprintf("%.2f\t%.1f\t", *c.Median.SecondWall, mib(*c.Median.SecondDisk))
			}
			fmt.Fprintf(t, "  %s\t%.2f\t%.3f\t%.3f\t%.2f\t%.0f\t%.1f\t%s\n", c.Name, c.Ratio, c.Median.Wall,
				c.Median.Wall+c.Median.Sync, c.Median.CPU, mib(c.Median.RSS), mib(c.Median.Disk), second)
		}
		t.Flush()
		for _, c := range g.Contenders {
			switch {
			case c.Skipped != "":
				fmt.Fprintf(w, "  %s did not run: %s\n", c.Name, c.Skipped)
			case c.Met != nil && *c.Met:
				fmt.Fprintf(w, "  aim: at least %.0f times as fast as %s: %.2f, reached\n", c.Target, c.Name, c.Ratio)
			case c.Met != nil:
				fmt.Fprintf(w, "  aim: at least %.0f times as fast as %s: %.2f, MISSED by %.0f %%\n", c.Target, c.Name, c.Ratio, 100*(1-c.Ratio/c.Target))
			}
		}
	}
	if r.Containerd != nil {
		r.Containerd.print(w)
	}
}

func mib(n int64) float64 { return float64(n) / (1 << 20) }

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", mib(n)) }
