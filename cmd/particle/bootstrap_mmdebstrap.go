package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// mmdebstrap runs the program of that name.
type mmdebstrap struct {
	t   *term
	tmp string // where it unpacks the system
}

// An installedRoot is a system in a tar file and what the tar does not tell.
type installedRoot struct {
	tar   string           // file
	start int64            // seconds: what has a later mtime was written by the installation
	times map[string]int64 // true mtimes of packaged files later than the epoch
}

// The hooks write to file descriptor 3: mmdebstrap mixes their standard output with
// its own. First come the fields of each Release file that matter, each file ended
// by an empty line; a NUL; then pairs of mtime and path, each ended by a NUL.
const (
	releaseHook = `for f in "$1"/var/lib/apt/lists/*Release; do
	sed -nE '/^(Suite|Codename|Date): /p' "$f" >&3; echo >&3; done`

	// Fetches the Release files and nothing else, with the options of this run.
	updateHook = `set -e
	APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get update --error-on=any \
	-o Acquire::IndexTargets::deb::Packages::DefaultEnabled=false \
	-o Acquire::IndexTargets::deb::Translations::DefaultEnabled=false >&2` + "\n" + releaseHook

	// tar will clamp every time after the epoch, those of packages newer than the
	// suite's Release file too; Python would find its caches stale then.
	timesHook = `printf '\0' >&3
	find "$1" -xdev -newermt "@%d" ! -newermt "@%d" -printf '%%T@ %%P\0' >&3`
)

// install makes a system of o in the tar file. Where o has no epoch it gets the date
// of the suite's Release file.
func (m mmdebstrap) install(ctx context.Context, o *bootstrapOptions, tar string) (*installedRoot, error) {
	fixed := o.epoch >= 0
	if !fixed {
		m.t.infof("asking the mirrors for the date of %s", o.suite)
		report, err := m.run(ctx, *o, "", "--variant=custom", "--format=null", "--skip=update", "--setup-hook="+updateHook, o.suite, "/dev/null")
		if err != nil {
			return nil, fmt.Errorf("reading the Release file of %s: %w", o.suite, err)
		}
		if o.epoch, err = releaseDate(report, o.suite); err != nil {
			return nil, err
		}
	}
	for attempt := 1; ; attempt++ {
		m.t.infof("installing %s %s (%s) as of %s", o.suite, o.arch, o.variant, time.Unix(o.epoch, 0).UTC().Format("2006-01-02 15:04:05 MST"))
		start := time.Now().Unix()
		args := []string{
			"--variant=" + o.variant,
			"--format=tar",
			"--skip=output/dev", // the kernel fills /dev; nodes cannot be made without root
			"--customize-hook=" + releaseHook,
			"--customize-hook=" + fmt.Sprintf(timesHook, o.epoch, start),
		}
		if len(o.include) > 0 {
			args = append(args, "--include="+strings.Join(o.include, ","))
		}
		args = append(args, o.suite, tar)
		args = append(args, o.mirrors...)
		report, err := m.run(ctx, *o, strconv.FormatInt(o.epoch, 10), args...)
		if err != nil {
			return nil, fmt.Errorf("installing %s: %w", o.suite, err)
		}
		root := &installedRoot{tar: tar, start: start}
		if root.times, err = fileTimes(report); err != nil {
			return nil, err
		}
		if fixed {
			return root, nil
		}
		date, err := releaseDate(report, o.suite)
		if err != nil {
			return nil, err
		}
		if date == o.epoch {
			return root, nil
		}
		if attempt == maxAttempts {
			return nil, fmt.Errorf("installing %s: the mirrors changed %d times while packages were installed; do it again later or fix the date with --epoch", o.suite, maxAttempts)
		}
		m.t.infof("the mirrors were updated meanwhile, starting again")
		o.epoch = date
		if err := os.Remove(tar); err != nil {
			return nil, err
		}
	}
}

// run runs mmdebstrap with what all runs share and returns what its hooks reported.
// What it prints is shown when it fails.
func (m mmdebstrap) run(ctx context.Context, o bootstrapOptions, epoch string, args ...string) ([]byte, error) {
	shared := []string{"--architectures=" + o.arch}
	if len(o.components) > 0 {
		shared = append(shared, "--components="+strings.Join(o.components, ","))
	}
	for _, k := range o.keyrings {
		shared = append(shared, "--keyring="+k)
	}
	for _, a := range o.aptopts {
		shared = append(shared, "--aptopt="+a)
	}
	// An empty epoch is the run that has no system to install; mirrors follow the
	// target, which is the last argument of both.
	if epoch == "" {
		args = append(args, o.mirrors...)
	}
	cmd := exec.CommandContext(ctx, "mmdebstrap", append(shared, args...)...)
	cmd.Env = bootstrapEnv(os.Environ(), m.tmp, epoch)
	// It unmounts and removes its tree when it is asked to stop.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second

	hooks, hooksEnd, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer hooks.Close()
	cmd.ExtraFiles = []*os.File{hooksEnd} // file descriptor 3
	log := &tail{max: 64 << 10}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		hooksEnd.Close()
		return nil, err
	}
	hooksEnd.Close()
	report, readErr := io.ReadAll(hooks)
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		// It repeats our hooks, which help nobody.
		hooks := strings.Join(args, "\n")
		for _, l := range log.lines(40) {
			if !strings.Contains(hooks, strings.TrimSpace(l)) {
				m.t.line("mmdebstrap: %s", l)
			}
		}
		if hint := mmdebstrapHint(log.String()); hint != "" {
			return nil, fmt.Errorf("mmdebstrap: %w; %s", err, hint)
		}
		return nil, fmt.Errorf("mmdebstrap: %w", err)
	}
	if readErr != nil {
		return nil, fmt.Errorf("reading what mmdebstrap's hooks report: %w", readErr)
	}
	return report, nil
}

// bootstrapEnv is the environment of an installation: nothing of the user's that
// maintainer scripts could carry into the image, only the way to the mirrors.
func bootstrapEnv(env []string, tmp, epoch string) []string {
	out := []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=/root", "LC_ALL=C.UTF-8", "TZ=UTC0", "DEBIAN_FRONTEND=noninteractive",
		"TMPDIR=" + tmp,
	}
	if epoch != "" {
		out = append(out, "SOURCE_DATE_EPOCH="+epoch)
	}
	for _, kv := range env {
		switch name, _, _ := strings.Cut(kv, "="); strings.ToLower(name) {
		case "http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy":
			out = append(out, kv)
		case "user", "logname": // mmdebstrap finds the subordinate ids by them
			out = append(out, kv)
		}
	}
	return out
}

// releaseDate finds the Date of the Release file of suite in a report of the hooks.
// Of several with that codename or suite name the newest counts; where none has it,
// as with the mirrors of derivatives, the newest of all.
func releaseDate(report []byte, suite string) (int64, error) {
	text, _, _ := bytes.Cut(report, []byte{0})
	best, any := int64(-1), int64(-1)
	for file := range strings.SplitSeq(string(text), "\n\n") {
		var date int64 = -1
		named := false
		for line := range strings.Lines(file) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch key {
			case "Suite", "Codename":
				named = named || value == suite
			case "Date":
				when, err := time.Parse(time.RFC1123, value)
				if err != nil {
					return 0, fmt.Errorf("reading the Release file of %s: date %q: %w", suite, value, err)
				}
				date = when.Unix()
			}
		}
		any = max(any, date)
		if named {
			best = max(best, date)
		}
	}
	if best < 0 {
		best = any
	}
	if best < 0 {
		return 0, fmt.Errorf("the mirrors of %s have no dated Release file; give the time with --epoch", suite)
	}
	return best, nil
}

// fileTimes reads the second half of a report of the hooks.
func fileTimes(report []byte) (map[string]int64, error) {
	_, list, ok := bytes.Cut(report, []byte{0})
	if !ok {
		return nil, errors.New("mmdebstrap's hooks reported nothing: want the times of files")
	}
	times := map[string]int64{}
	for entry := range bytes.SplitSeq(list, []byte{0}) {
		if len(entry) == 0 {
			continue
		}
		when, name, ok := strings.Cut(string(entry), " ")
		seconds, _, _ := strings.Cut(when, ".")
		n, err := strconv.ParseInt(seconds, 10, 64)
		if !ok || err != nil {
			return nil, fmt.Errorf("mmdebstrap's hooks reported %q: want a time and a path", entry)
		}
		times[name] = n
	}
	return times, nil
}

// mmdebstrapHint says what to do about the failures that users meet.
func mmdebstrapHint(log string) string {
	for _, h := range []struct{ sign, hint string }{
		{"NO_PUBKEY", "the suite is signed by a key that is not known here: install its keyring package (debian-archive-keyring, ubuntu-keyring) or name the file with --keyring"},
		{"is not valid yet", "this machine's clock is behind the mirrors: set it"},
		{"is expired", "the mirror's Release file is too old or this machine's clock is ahead: set the clock, or use another --mirror"},
		{"does not have a Release file", "the mirror has no such suite: look at the name, or give a --mirror that has it"},
		{"Temporary failure resolving", "the mirrors cannot be reached: look at the network, or give a --mirror"},
		{"Could not connect", "the mirrors cannot be reached: look at the network, or give a --mirror"},
		{"Unable to locate package", "a package of --include is not in the suite's components: look at --include and --components"},
		{"newuidmap", "without root this needs the package uidmap and a range for the user in /etc/subuid and /etc/subgid"},
		{"unknown suite", "mmdebstrap does not know the suite: give a --mirror that has it"},
		{"No space left on device", "free space below TMPDIR (default /var/tmp), or point TMPDIR elsewhere"},
	} {
		if strings.Contains(log, h.sign) {
			return h.hint
		}
	}
	return ""
}

// A tail keeps the last max bytes that are written to it.
type tail struct {
	max int
	buf []byte
}

func (l *tail) Write(p []byte) (int, error) {
	l.buf = append(l.buf, p...)
	if over := len(l.buf) - l.max; over > l.max {
		l.buf = append(l.buf[:0], l.buf[over:]...)
	}
	return len(p), nil
}

func (l *tail) String() string { return string(l.buf) }

// lines returns the last n lines that are not empty.
func (l *tail) lines(n int) []string {
	var out []string
	s := bufio.NewScanner(bytes.NewReader(l.buf))
	s.Buffer(nil, 2*l.max+1)
	for s.Scan() {
		if line := strings.TrimRight(s.Text(), " \r"); line != "" {
			out = append(out, line)
		}
	}
	return out[max(0, len(out)-n):]
}
