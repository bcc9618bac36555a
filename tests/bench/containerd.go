package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// The contenders are containerd's snapshotters, each with a containerd that starts from
// nothing, all of one release. Layers are on this machine before the clock starts, so
// that what is measured is the snapshotter and its differ.

// A containerdResult is the part of the results that is about containerd.
type containerdResult struct {
	Release      string               `json:"release"`
	UniqueBytes  int64                `json:"uniqueBytes"`  // of the five images: each content once
	UniqueBlocks int64                `json:"uniqueBlocks"` // the same as 4 KiB blocks, in bytes
	Snapshotters []*snapshotterResult `json:"snapshotters"`
}

type snapshotterResult struct {
	Name    string               `json:"name"`
	Skipped string               `json:"skipped,omitempty"`
	Runs    map[string][]float64 `json:"runs,omitempty"` // by measure
}

// A column is one thing that is measured. Less is better in all of them.
type column struct {
	name, unit string
	// target is how many times as much overlayfs shall take; 0 for no aim.
	target float64
}

var containerdMeasures = []column{
	{"unpack the server", "s", 1.5},
	{"the same, and sync", "s", 0},
	{"pull the server", "s", 0},
	{"first process, 1 layer", "s", 1},
	{"first process, 20 layers", "s", 0},
	{"first process, 100 layers", "s", 1},
	{"again, 1 layer", "s", 1},
	{"again, 20 layers", "s", 0},
	{"again, 100 layers", "s", 1},
	{"open a file, cold", "µs", 0},
	{"open a file, warm", "µs", 0},
	{"page cache of a second image", "MiB", 0},
	{"disk of five images", "MiB", 0},
}

// turnPrefix begins the names of the directories of turns.
const turnPrefix = "ctd-"

// starts is how often a container is started in a round, after the first time.
const starts = 5

// benchContainerd runs all snapshotters in turns.
func benchContainerd(ctx context.Context, in *inputs, rounds int) (_ *containerdResult, err error) {
	bin, release, err := newestContainerd()
	if err != nil {
		fmt.Fprintf(os.Stderr, "containerd: %v\n", err)
		return nil, nil
	}
	images, err := prepareContainerd(in)
	if err != nil {
		return nil, fmt.Errorf("preparing images for containerd: %w", err)
	}
	res := &containerdResult{Release: release}
	for _, name := range []string{"particle", "overlayfs", "erofs"} {
		sr := &snapshotterResult{Name: name, Runs: map[string][]float64{}}
		if name == "erofs" {
			sr.Skipped = missingErofs(in, release)
		}
		res.Snapshotters = append(res.Snapshotters, sr)
	}
	// What a turn leaves is removed after the last one: ext4 without a journal passes over
	// inodes that were deleted in the last minutes, one by one for each new file, so that
	// each turn would pay for the one before.
	defer func() {
		dirs, gerr := filepath.Glob(filepath.Join(in.scratch, turnPrefix+"*"))
		err = errors.Join(err, gerr)
		for _, dir := range dirs {
			err = errors.Join(err, discard(dir))
		}
	}()
	able := slices.DeleteFunc(slices.Clone(res.Snapshotters), func(s *snapshotterResult) bool { return s.Skipped != "" })
	for round := range rounds {
		for i := range able {
			sr := able[(i+round)%len(able)]
			fmt.Fprintf(os.Stderr, "containerd: round %d of %d: %s\n", round+1, rounds, sr.Name)
			if err := containerdTurn(ctx, in, images, bin, sr, res); err != nil {
				return nil, fmt.Errorf("containerd with %s: %w", sr.Name, err)
			}
		}
	}
	return res, nil
}

// newestContainerd returns the newest of the releases in $PARTICLE_CONTAINERDS, else the
// one in $PATH.
func newestContainerd() (bin, release string, err error) {
	found, err := filepath.Glob(filepath.Join(os.Getenv("PARTICLE_CONTAINERDS"), "*", "containerd"))
	if err != nil {
		return "", "", err
	}
	if os.Getenv("PARTICLE_CONTAINERDS") == "" || len(found) == 0 {
		path, err := exec.LookPath("containerd")
		if err != nil {
			return "", "", fmt.Errorf("%w: apt install containerd, or set PARTICLE_CONTAINERDS", err)
		}
		found = []string{path}
	}
	var best [2]int
	for _, path := range found {
		out, err := exec.Command(path, "--version").Output()
		f := strings.Fields(string(out))
		if err != nil || len(f) < 3 {
			return "", "", fmt.Errorf("%s --version prints %q: %w", path, out, err)
		}
		var v [2]int
		fmt.Sscanf(strings.TrimPrefix(f[2], "v"), "%d.%d", &v[0], &v[1])
		if bin == "" || slices.Compare(v[:], best[:]) > 0 {
			bin, release, best = filepath.Dir(path), f[2], v
		}
	}
	return bin, release, nil
}

// missingErofs says why containerd's EROFS snapshotter cannot run, "" if it can.
func missingErofs(in *inputs, release string) string {
	var major, minor int
	fmt.Sscanf(strings.TrimPrefix(release, "v"), "%d.%d", &major, &minor)
	switch {
	case major < 2 || major == 2 && minor < 1:
		return "containerd has it since 2.1"
	case in.oracle == "":
		return "it needs a mkfs.erofs that reads tars, which Debian 12 has not; tests/setup/setup.sh makes a chroot of sid with one"
	}
	return ""
}

// A ctrHost is a containerd that runs for one turn.
type ctrHost struct {
	ctx        context.Context
	in         *inputs
	dir, bin   string
	sn         string // snapshotter
	containerd *exec.Cmd
	daemon     *exec.Cmd
}

// containerdTurn measures one snapshotter in a new directory of the scratch directory,
// which it leaves there.
func containerdTurn(ctx context.Context, in *inputs, images *containerdImages, bin string, sr *snapshotterResult, res *containerdResult) (err error) {
	dir, err := os.MkdirTemp(in.scratch, turnPrefix)
	if err != nil {
		return err
	}
	h := &ctrHost{ctx: ctx, in: in, dir: dir, bin: bin, sn: sr.Name}
	defer func() { err = errors.Join(err, h.stop(), unmountBelow(dir)) }()
	if err := h.start(); err != nil {
		return err
	}
	add := func(name string, v float64) { sr.Runs[name] = append(sr.Runs[name], v) }

	// The five come first: disk is counted while nothing else is there.
	for _, img := range images.five {
		if err := h.unpack(img); err != nil {
			return err
		}
	}
	disk, err := h.disk()
	if err != nil {
		return err
	}
	add("disk of five images", mib(disk))
	if res.UniqueBytes == 0 {
		if res.UniqueBytes, res.UniqueBlocks, err = h.unique(images.five); err != nil {
			return err
		}
	}

	if _, err := h.ctr("images", "import", "--no-unpack", images.server.archive); err != nil {
		return err
	}
	digest, err := h.digestOf(images.server)
	if err != nil {
		return err
	}
	if err := in.warm(archives); err != nil {
		return err
	}
	unix.Sync()
	took, err := h.timed("snapshots", "--snapshotter", h.sn, "unpack", digest)
	if err != nil {
		return err
	}
	add("unpack the server", took)
	began := time.Now()
	if err := syncfs(dir); err != nil {
		return err
	}
	add("the same, and sync", took+time.Since(began).Seconds())
	if err := h.files(images, add); err != nil {
		return err
	}
	for _, img := range images.starts {
		if err := h.unpack(img); err != nil {
			return err
		}
		unix.Sync()
		time.Sleep(time.Second) // as a pull and a start by hand would have between them
		for i := range starts + 1 {
			took, err := h.timed("run", "--rm", "--snapshotter", h.sn, "--net-host", img.name, fmt.Sprintf("c%d-%d", img.layers, i), "/bin/true")
			if err != nil {
				return err
			}
			what := "again"
			if i == 0 {
				what = "first process"
			}
			add(fmt.Sprintf("%s, %s", what, img.what()), took)
		}
	}

	// A pull, where layers are unpacked while others are fetched.
	if _, err := h.ctr("images", "rm", "--sync", images.server.name); err != nil {
		return err
	}
	unix.Sync()
	if took, err = h.timed("images", "pull", "--plain-http", "--snapshotter", h.sn, in.host+"/"+in.first.name+":latest"); err != nil {
		return err
	}
	add("pull the server", took)
	return nil
}

// digestOf returns the digest of an imported image's manifest.
func (h *ctrHost) digestOf(img ctrImage) (string, error) {
	out, err := h.ctr("images", "ls", "name=="+img.name)
	if err != nil {
		return "", err
	}
	for _, word := range strings.Fields(out) {
		if strings.HasPrefix(word, "sha256:") {
			return word, nil
		}
	}
	return "", fmt.Errorf("ctr images ls prints %q", out)
}

// files measures what reading an unpacked image costs.
func (h *ctrHost) files(images *containerdImages, add func(string, float64)) error {
	first, second := filepath.Join(h.dir, "first"), filepath.Join(h.dir, "second")
	for target, img := range map[string]ctrImage{first: images.server, second: images.flat} {
		if img.name != images.server.name {
			if err := h.unpack(img); err != nil {
				return err
			}
		}
		if err := os.Mkdir(target, 0o755); err != nil {
			return err
		}
		if _, err := h.ctr("images", "mount", "--snapshotter", h.sn, img.name, target); err != nil {
			return err
		}
	}
	names, err := regularFiles(first)
	if err != nil {
		return err
	}
	if err := dropCaches(); err != nil {
		return err
	}
	for _, how := range []string{"cold", "warm"} {
		began := time.Now()
		for _, name := range names {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			f.Close()
		}
		add("open a file, "+how, float64(time.Since(began).Microseconds())/float64(len(names)))
	}
	// The second image has the same files in one layer of its own.
	if err := dropCaches(); err != nil {
		return err
	}
	if err := readAll(first); err != nil {
		return err
	}
	before, err := cached()
	if err != nil {
		return err
	}
	if err := readAll(second); err != nil {
		return err
	}
	after, err := cached()
	add("page cache of a second image", mib(after-before))
	for _, target := range []string{first, second} {
		_, uerr := h.ctr("images", "unmount", "--rm", "--snapshotter", h.sn, target)
		err = errors.Join(err, uerr)
	}
	if err != nil {
		return err
	}
	_, err = h.ctr("images", "rm", "--sync", images.flat.name)
	return err
}

func regularFiles(dir string) (names []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			names = append(names, path)
		}
		return err
	})
	return names, err
}

func readAll(dir string) error {
	names, err := regularFiles(dir)
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for _, name := range names {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, buf)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// cached returns the bytes of the machine's page cache.
func cached() (int64, error) {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(info)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "Cached: %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, errors.New("there is no size of the page cache in /proc/meminfo")
}

// print writes the table for people.
func (r *containerdResult) print(w io.Writer) {
	fmt.Fprintf(w, "\ncontainerd %s: snapshotters on the same images; medians, in brackets times Particle's\n", r.Release)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(t, "  \t")
	for _, s := range r.Snapshotters {
		fmt.Fprintf(t, "%s\t", s.Name)
	}
	fmt.Fprintln(t)
	us, overlayfs := r.Snapshotters[0], r.Snapshotters[1]
	for _, m := range containerdMeasures {
		fmt.Fprintf(t, "  %s, %s\t", m.name, m.unit)
		for _, s := range r.Snapshotters {
			if len(s.Runs[m.name]) == 0 {
				fmt.Fprint(t, "-\t")
				continue
			}
			fmt.Fprintf(t, "%.3g (%.2f)\t", middle(s.Runs[m.name]), middle(s.Runs[m.name])/middle(us.Runs[m.name]))
		}
		fmt.Fprintln(t)
	}
	t.Flush()
	for _, s := range r.Snapshotters {
		if s.Skipped != "" {
			fmt.Fprintf(w, "  %s did not run: %s\n", s.Name, s.Skipped)
		}
	}
	verdict := func(aim string, got float64, met bool) {
		word := "MISSED"
		if met {
			word = "reached"
		}
		fmt.Fprintf(w, "  aim: %s: %.2f, %s\n", aim, got, word)
	}
	for _, m := range containerdMeasures {
		if m.target > 0 {
			ratio := middle(overlayfs.Runs[m.name]) / middle(us.Runs[m.name])
			verdict(fmt.Sprintf("%s at least %.1f times as fast as overlayfs", m.name, m.target), ratio, ratio >= m.target)
		}
	}
	disk := middle(us.Runs["disk of five images"])
	verdict("disk at most the unique bytes and 5 %", disk/mib(r.UniqueBytes), disk <= 1.05*mib(r.UniqueBytes))
	fmt.Fprintf(w, "  the five images have %s of unique content, %s as blocks of 4 KiB\n", mebibytes(r.UniqueBytes), mebibytes(r.UniqueBlocks))
}

func middle(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if len(v) == 0 {
		return 0
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

// stop ends both daemons; what they have mounted discard unmounts.
func (h *ctrHost) stop() (err error) {
	for _, cmd := range []*exec.Cmd{h.containerd, h.daemon} {
		if cmd == nil || cmd.Process == nil {
			continue
		}
		err = errors.Join(err, cmd.Process.Signal(syscall.SIGTERM))
		cmd.Wait() // how it ended does not matter any more
	}
	return err
}
