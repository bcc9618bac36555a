package main

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A measurement is what one run of a contender took.
type measurement struct {
	Wall       float64  `json:"wallSeconds"`
	Sync       float64  `json:"syncSeconds"` // to get what it wrote to the disk, afterwards
	CPU        float64  `json:"cpuSeconds"`  // user and system, of all its processes
	RSS        int64    `json:"peakRSS"`     // bytes, of its largest process
	Disk       int64    `json:"disk"`        // bytes that the result takes
	SecondWall *float64 `json:"secondWallSeconds,omitempty"`
	SecondDisk *int64   `json:"secondDisk,omitempty"` // bytes more with the second image
}

// measure runs a command whose result lies in dir.
func measure(ctx context.Context, cmd *exec.Cmd, dir string) (m measurement, err error) {
	if ctx.Err() != nil {
		return m, ctx.Err()
	}
	unix.Sync()
	var log bytes.Buffer
	cmd.Stderr = &log
	if cmd.Stdout == nil {
		cmd.Stdout = &log
	}
	rep, err := launched(ctx, cmd)
	if err != nil {
		return m, fmt.Errorf("%w\n%s", err, tailOf(log.String()))
	}
	m.Wall, m.CPU, m.RSS = rep.Wall, rep.CPU, rep.RSS
	start := time.Now()
	if err := syncfs(dir); err != nil {
		return m, err
	}
	m.Sync = time.Since(start).Seconds()

	m.Disk, err = diskUsage(dir)
	return m, err
}

func tailOf(log string) string {
	lines := strings.Split(strings.TrimSpace(log), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

func syncfs(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// diskUsage counts the blocks of all inodes below dir, each once, as du does.
func diskUsage(dir string) (int64, error) {
	var total int64
	type inode struct{ dev, ino uint64 }
	seen := map[inode]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		if id := (inode{st.Dev, st.Ino}); !seen[id] {
			seen[id] = true
			total += st.Blocks * 512
		}
		return nil
	})
	return total, err
}

// discard removes what a contender left, mounts first.
func discard(dir string) error {
	if err := unmountBelow(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// unmountBelow unmounts everything below a directory.
func unmountBelow(dir string) error {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	var below []string
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			below = append(below, f[4])
		}
	}
	slices.Reverse(below) // the last mounted first
	for _, m := range below {
		if err := unix.Unmount(m, 0); err != nil {
			return fmt.Errorf("unmounting %q, so that %q is not removed: %w", m, dir, err)
		}
	}
	return nil
}
