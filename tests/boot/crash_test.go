package boot

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/particle-os/particle/tests/boot/vm"
	"github.com/particle-os/particle/tests/boot/writelog"
)

// The crash matrix: one upgrade is made in a machine whose disk writes are recorded. For
// many moments of it the disk is made as a power loss there would have left it, and
// booted. What is recorded and what was found lie in a directory, so that a matrix that
// takes hours can be stopped and gone on with.
//
//	PARTICLE_TEST_CRASH_DIR     where; without it, a directory of the test
//	PARTICLE_TEST_CRASH_POINTS  how many moments; 6 by default
//	PARTICLE_TEST_CRASH_JOBS    machines at a time; 1 by default
//
// The directory has base.raw (the disk before), log (the writes), recording.json,
// results.jsonl (a line a moment) and table.md.

// A recording says what was recorded. Numbers of writes are those of entries in the log.
type recording struct {
	Loader     string      `json:"loader"`
	Old        string      `json:"old"` // ids of the deployments
	New        string      `json:"new"`
	Partitions []partInfo  `json:"partitions"`
	Phases     []phaseMark `json:"phases"`
}

type partInfo struct {
	Name  string `json:"name"`
	Start int64  `json:"start"`
	Size  int64  `json:"size"`
}

// A phaseMark says at which write a phase begins.
type phaseMark struct {
	Name string `json:"name"`
	From int    `json:"from"`
}

// A point is a moment: the power fails after the first Writes writes. Of those since the
// last flush all have reached the disk, or, with Lost, some: a disk's cache writes
// back in any order.
type point struct {
	Writes int  `json:"writes"`
	Lost   bool `json:"lost,omitempty"`
}

// An outcome is what was found after a power loss.
type outcome struct {
	point
	Phase   string `json:"phase"`
	What    string `json:"what"`    // what the last write was
	Dropped int    `json:"dropped"` // writes that were lost
	// Entries of the boot menu on the disk.
	Entries []string `json:"entries"`
	Booted  string   `json:"booted"` // "old" or "new"
	Boots   int      `json:"boots"`  // kernels started until the login prompt
	Fsck    string   `json:"fsck"`   // "clean", or what it says
	// Again is what a new upgrade came to: "upgraded", "same" where the new system ran
	// already, or "-" where none was tried: it is at each fourth moment.
	Again   string  `json:"again"`
	Seconds float64 `json:"seconds"`
	Error   string  `json:"error,omitempty"`
}

func (o *outcome) good() bool {
	return o.Error == "" && (o.Booted == "old" || o.Booted == "new") && o.Fsck == "clean" && o.Again != ""
}

// "The VM is killed at many moments of upgrade (at least 50, by write count), and each
// time the next boot reaches a login prompt on the old or the new system with a clean
// store fsck. The table is in the docs."
func TestCrash(t *testing.T) {
	need(t, all, "mdir", "debugfs", "cp")
	l := oneLoader(t)
	dir := os.Getenv("PARTICLE_TEST_CRASH_DIR")
	if dir == "" {
		dir = dirFor(t)
	} else if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := &crash{t: t, dir: dir, loader: l}
	c.record()
	// Upgrades after the power loss come from here.
	push(t, "next-kernel", l.name)
	points := c.choose(number(t, "PARTICLE_TEST_CRASH_POINTS", 6))
	c.runAll(points, number(t, "PARTICLE_TEST_CRASH_JOBS", 1))
	c.report(points)
}

// number reads a number of the environment.
func number(t testing.TB, name string, def int) int {
	t.Helper()
	v := os.Getenv(name)
	if v == "" {
		return def
	}
	n, err := strconv.Atoi(v)
	if err != nil || n < 1 {
		t.Fatalf("%s is %q; it must be a number from 1", name, v)
	}
	return n
}

type crash struct {
	t      testing.TB
	dir    string
	loader loader
	rec    recording
	log    *writelog.Log

	mu   sync.Mutex
	done map[point]*outcome
}

func (c *crash) file(name string) string { return filepath.Join(c.dir, name) }

// record makes the recording, unless the directory has one.
func (c *crash) record() {
	t := c.t
	if b, err := os.ReadFile(c.file("recording.json")); err == nil {
		if err := json.Unmarshal(b, &c.rec); err != nil {
			t.Fatal(err)
		}
		if c.rec.Loader != c.loader.name {
			t.Fatalf("the recording in %s is of %s, not of %s", c.dir, c.rec.Loader, c.loader.name)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	} else {
		c.makeRecording()
	}
	f, err := os.Open(c.file("log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if c.log, err = writelog.Read(f, fi.Size()); err != nil {
		t.Fatal(err)
	}
}

func (c *crash) makeRecording() {
	t, l := c.t, c.loader
	run(t, "cp", "--sparse=always", "--reflink=auto", goldenDisk(t, l), c.file("base.raw"))
	disk := filepath.Join(dirFor(t), "disk.qcow2")
	if err := vm.Overlay(interrupted, disk, c.file("base.raw"), "raw"); err != nil {
		t.Fatal(err)
	}
	m := start(t, l, vm.Disk{File: disk, WriteLog: c.file("log")})
	m.login()
	m.good()
	c.rec = recording{Loader: l.name, Old: m.status().booted(t).ID}
	for _, p := range partitions(t, c.file("base.raw")) {
		c.rec.Partitions = append(c.rec.Partitions, partInfo{p.name, p.start, p.size})
	}
	mark := func(name string) {
		// A sync lets QEMU bring the log's super block up to date.
		m.sh("sync")
		f, err := os.Open(c.file("log"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		n, err := writelog.Count(f)
		if err != nil {
			t.Fatal(err)
		}
		c.rec.Phases = append(c.rec.Phases, phaseMark{name, n})
	}
	push(t, "next-kernel", l.name)
	m.registry()
	mark("upgrade")
	c.rec.New = m.deployed("particle hostdeploy upgrade --json").ID
	mark("shutdown and boot")
	m.reboot()
	mark("first boot")
	m.good()
	mark("good")
	m.off()
	if c.rec.New == c.rec.Old || c.rec.New == "" {
		t.Fatalf("the upgrade went from %q to %q", c.rec.Old, c.rec.New)
	}
	b, err := json.MarshalIndent(&c.rec, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.file("recording.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// partition tells where a write goes.
func (c *crash) partition(e *writelog.Entry) string {
	for _, p := range c.rec.Partitions {
		if e.Offset >= p.Start && e.Offset < p.Start+p.Size {
			return strings.TrimPrefix(p.Name, "particle-")
		}
	}
	return "table"
}

// isBoot reports whether a write goes to the boot file system.
func (c *crash) isBoot(e *writelog.Entry) bool {
	p := c.partition(e)
	return e.Writes() && (p == "esp" || p == "boot")
}

// choose chooses n moments of the recording, the same each time: before and after all;
// a third at writes and flushes of the boot file system, where what boots is decided, each
// with and without losses; the rest evenly over all writes.
func (c *crash) choose(n int) []point {
	from, to := c.rec.Phases[0].From, len(c.log.Entries)
	var boot, other []int
	pending := false // boot file system written since the last flush
	for i := from; i < to; i++ {
		e := &c.log.Entries[i]
		switch {
		case c.isBoot(e):
			boot, pending = append(boot, i+1), true
		case e.Flags&writelog.Flush != 0 && pending:
			boot, pending = append(boot, i+1), false
		case e.Writes():
			other = append(other, i+1)
		}
	}
	chosen := map[point]bool{{Writes: from}: true, {Writes: to}: true}
	lost := false
	for _, w := range spread(boot, n/2) {
		chosen[point{w, lost}] = true
		lost = !lost
	}
	for _, w := range spread(other, n-len(chosen)) {
		chosen[point{w, lost}] = true
		lost = !lost
	}
	return slices.SortedFunc(maps.Keys(chosen), func(a, b point) int { return cmp.Compare(a.Writes, b.Writes) })
}

// spread takes n of the values, evenly, the first and the last among them.
func spread(all []int, n int) []int {
	if n >= len(all) {
		return all
	}
	var some []int
	for i := range n {
		some = append(some, all[i*(len(all)-1)/max(n-1, 1)])
	}
	return some
}

// runAll finds out what happens at each of the points that there is no result of yet.
func (c *crash) runAll(points []point, jobs int) {
	c.done = map[point]*outcome{}
	f, err := os.OpenFile(c.file("results.jsonl"), os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o644)
	if err != nil {
		c.t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var o outcome
		// The last line of a run that was killed may be cut off: its point is done again.
		if json.Unmarshal(s.Bytes(), &o) == nil {
			c.done[o.point] = &o
		}
	}
	type job struct {
		point
		again bool
	}
	queue := make(chan job)
	var wg sync.WaitGroup
	for range jobs {
		wg.Add(1)
		go func() {
			defer wg.Done()
			w := &crashWorker{crash: c, disk: filepath.Join(dirFor(c.t), "disk.raw")}
			for j := range queue {
				o := w.try(j.point, j.again)
				if interrupted.Err() != nil {
					continue // it tells of whoever stopped us
				}
				line, err := json.Marshal(o)
				c.mu.Lock()
				c.done[j.point] = o
				c.t.Logf("%s", line)
				if err == nil {
					_, err = f.Write(append([]byte{'\n'}, append(line, '\n')...))
				}
				if err != nil {
					c.t.Error(err)
				}
				c.mu.Unlock()
			}
		}()
	}
	for i, p := range points {
		c.mu.Lock()
		known := c.done[p] != nil
		c.mu.Unlock()
		if known {
			continue
		}
		select {
		case queue <- job{p, i%4 == 0}:
		case <-interrupted.Done():
		}
	}
	close(queue)
	wg.Wait()
	if interrupted.Err() != nil {
		c.t.Fatal("interrupted; the next run goes on from here")
	}
}

// A crashWorker has a disk of its own, on which it goes forward from point to point.
type crashWorker struct {
	*crash
	disk string
	at   int // so many writes are on the disk
}

// try boots what a power loss left.
func (w *crashWorker) try(p point, again bool) *outcome {
	o := &outcome{point: p, Phase: w.phase(p.Writes), What: w.what(p.Writes)}
	began := time.Now()
	if err := w.replay(p, o); err != nil {
		o.Error = err.Error()
		return o
	}
	if err := w.boot(o, again); err != nil {
		o.Error = err.Error()
	}
	o.Seconds = float64(time.Since(began).Milliseconds()) / 1000
	return o
}

func (w *crashWorker) phase(n int) string {
	name := "before"
	for _, m := range w.rec.Phases {
		if n > m.From {
			name = m.Name
		}
	}
	return name
}

// what describes the last write.
func (w *crashWorker) what(n int) string {
	if n == 0 {
		return "nothing"
	}
	e := &w.log.Entries[n-1]
	if e.Flags&writelog.Flush != 0 {
		return "flush"
	}
	return fmt.Sprintf("%s +%d", w.partition(e), e.Length)
}

// replay makes the disk of a point.
func (w *crashWorker) replay(p point, o *outcome) error {
	durable := w.log.Durable(p.Writes)
	if w.at == 0 || w.at > durable {
		if _, stderr, err := try(w.t, "cp", "--sparse=always", "--reflink=auto", w.file("base.raw"), w.disk); err != nil {
			return fmt.Errorf("copying the base: %w: %s", err, stderr)
		}
		w.at = 0
	}
	f, err := os.OpenFile(w.disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := w.log.Apply(f, w.at, durable, nil); err != nil {
		return err
	}
	// What follows goes over these writes again, in order, and so makes up for losses.
	w.at = durable
	r := rand.New(rand.NewPCG(uint64(p.Writes), 1))
	err = w.log.Apply(f, durable, p.Writes, func(int) bool {
		if p.Lost && r.IntN(2) == 0 {
			o.Dropped++
			return false
		}
		return true
	})
	if err != nil {
		return err
	}
	o.Entries, err = w.entries()
	return err
}

// entries lists the boot menu of the disk.
func (w *crashWorker) entries() ([]string, error) {
	for _, p := range w.rec.Partitions {
		var out, stderr string
		var err error
		switch strings.TrimPrefix(p.Name, "particle-") {
		case "esp":
			out, stderr, err = try(w.t, "mdir", "-b", "-i", fmt.Sprintf("%s@@%d", w.disk, p.Start), "::/loader/entries")
		case "boot":
			out, stderr, err = try(w.t, "debugfs", "-R", "ls -p /loader/entries", fmt.Sprintf("%s?offset=%d", w.disk, p.Start))
		default:
			continue
		}
		if err != nil {
			// A file system in the middle of a change: who boots it will say more.
			return []string{"? " + strings.TrimSpace(stderr)}, nil
		}
		var names []string
		for _, f := range strings.FieldsFunc(out, func(r rune) bool { return r == '/' || r == '\n' }) {
			if strings.HasPrefix(f, "particle-") {
				names = append(names, strings.TrimSuffix(f, ".conf"))
			}
		}
		slices.Sort(names)
		return names, nil
	}
	return nil, errors.New("the disk has no boot partition")
}

// boot starts a machine from the disk, which it leaves as it is.
func (w *crashWorker) boot(o *outcome, again bool) error {
	dir := dirFor(w.t)
	defer os.RemoveAll(dir)
	overlay := filepath.Join(dir, "disk.qcow2")
	if err := vm.Overlay(interrupted, overlay, w.disk, "raw"); err != nil {
		return err
	}
	v, err := vm.Start(interrupted, vm.Config{
		Dir: dir, Firmware: w.loader.firmware, Memory: 1200, Unsafe: true, Disks: []vm.Disk{{File: overlay}},
	})
	if err != nil {
		return err
	}
	defer func() {
		v.Kill()
		if !o.good() {
			name := w.file(fmt.Sprintf("console-%d-%v.log", o.Writes, o.Lost))
			_ = os.WriteFile(name, []byte(v.Console.Text()), 0o644)
		}
	}()
	if _, _, err := v.Console.WaitWithin(interrupted, 2*bootLimit, loginPrompt); err != nil {
		return err
	}
	o.Boots = len(kernelStart.FindAllString(v.Console.Text(), -1))
	ctx, cancel := within(2 * bootLimit)
	defer cancel()
	sh := func(command string) (vm.Result, error) { return v.Sh(ctx, command) }

	r, err := sh("particle hostdeploy status --json")
	if err != nil {
		return err
	}
	var s status
	if err := json.Unmarshal([]byte(r.Stdout), &s); err != nil {
		return fmt.Errorf("reading the status: %w: %s", err, r.Stderr)
	}
	for _, d := range s.Deployments {
		switch {
		case !d.Booted:
		case d.ID == w.rec.Old:
			o.Booted = "old"
		case d.ID == w.rec.New:
			o.Booted = "new"
		default:
			o.Booted = d.ID
		}
	}
	if s.Boot == nil || s.Boot.Verification != "enforced" {
		return fmt.Errorf("the root is not enforced: %+v", s.Boot)
	}
	if r, err = sh("particle store fsck"); err != nil {
		return err
	}
	if o.Fsck = "clean"; r.Status != 0 {
		o.Fsck = fmt.Sprintf("status %d: %s%s", r.Status, r.Stdout, r.Stderr)
	}
	if !again {
		o.Again = "-"
		return nil
	}
	// Nothing that was left behind may be in the way of the next upgrade.
	if r, err = sh(registryScript(w.t)); err != nil {
		return err
	} else if r.Status != 0 {
		return fmt.Errorf("reaching the registry: %s", r.Stderr)
	}
	if r, err = sh("particle hostdeploy upgrade --now --json"); err != nil {
		return err
	}
	var d deployed
	if r.Status != 0 {
		return fmt.Errorf("upgrading again: status %d: %s", r.Status, r.Stderr)
	}
	if err := json.Unmarshal([]byte(r.Stdout), &d); err != nil {
		return fmt.Errorf("upgrading again: %w", err)
	}
	if o.Again = "upgraded"; d.Same {
		o.Again = "same"
	}
	return nil
}

// report writes the table and fails the test where something went wrong.
func (c *crash) report(points []point) {
	var table strings.Builder
	fmt.Fprintf(&table, "| writes | lost | phase | last write | boot entries on the disk | boots | system | store fsck | upgrade again |\n")
	fmt.Fprintf(&table, "|---|---|---|---|---|---|---|---|---|\n")
	count := map[string]int{}
	first := c.rec.Phases[0].From
	for _, p := range points {
		o := c.done[p]
		if o == nil {
			c.t.Errorf("no result for %+v", p)
			continue
		}
		count[o.Booted]++
		fmt.Fprintf(&table, "| %d | %d | %s | %s | %s | %d | %s | %s | %s |\n", o.Writes-first, o.Dropped, o.Phase, o.What,
			strings.Join(o.Entries, ", "), o.Boots, o.Booted, o.Fsck, o.Again)
		if !o.good() {
			c.t.Errorf("power loss after %d writes (%d lost): %+v", o.Writes, o.Dropped, o)
		}
	}
	c.t.Logf("%d power losses over %d writes: %v\n%s", len(points), len(c.log.Entries)-first, count, table.String())
	if err := os.WriteFile(c.file("table.md"), []byte(table.String()), 0o644); err != nil {
		c.t.Error(err)
	}
	if count["old"] == 0 || count["new"] == 0 {
		c.t.Errorf("the moments do not cover both systems: %v", count)
	}
}
