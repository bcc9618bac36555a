package initramfs

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Console tells people what happens in the initramfs, on every console that the
// kernel has. The zero value is that of this machine.
type Console struct {
	// Dev and Proc are where the devices and proc(5) are: "/dev", "/proc" for "".
	Dev, Proc string

	last time.Time // of Progress
}

// priority is that of syslog(3), as kmsg takes it in angle brackets.
type priority int

const (
	prioError priority = 3
	prioInfo  priority = 6
)

// Info writes a message into the kernel's log, which shows it on the consoles unless
// the command line has "quiet".
func (c *Console) Info(msg string) { c.kmsg(prioInfo, msg) }

// Error shows a message on all consoles, whatever the command line says of them, and
// keeps it in the kernel's log. It may have several lines.
func (c *Console) Error(msg string) {
	// The kernel shows what is more urgent than the console's level (Linux
	// Documentation/core-api/printk-basics.rst): "quiet" leaves errors, "loglevel=1" not.
	if !c.kmsg(prioError, msg) || c.level() <= int(prioError) {
		c.print(msg)
	}
}

// progressEvery is how often progress is shown.
const progressEvery = 2 * time.Second

// Progress shows how far a long step is, at most every two seconds and at its end.
func (c *Console) Progress(doing string, done, total int) {
	now := time.Now()
	if c.last.IsZero() {
		c.last = now
	}
	if now.Sub(c.last) < progressEvery {
		return
	}
	c.last = now
	c.print(fmt.Sprintf("%s: %d of %d", doing, done, total))
}

// kmsg writes each line into the kernel's log.
func (c *Console) kmsg(p priority, msg string) bool {
	f, err := os.OpenFile(c.path(c.Dev, "/dev", "kmsg"), os.O_WRONLY, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	ok := true
	for line := range strings.Lines(msg) {
		// One write is one record, of at most 1 KiB less its head.
		line = clean(strings.TrimSuffix(line, "\n"))
		for first := true; first || line != ""; first = false {
			n := min(len(line), 900)
			if _, err := fmt.Fprintf(f, "<%d>particle: %s", p, line[:n]); err != nil {
				ok = false
			}
			line = line[n:]
		}
	}
	return ok
}

// print writes lines to each console by itself.
func (c *Console) print(msg string) {
	var text bytes.Buffer
	for line := range strings.Lines(msg) {
		fmt.Fprintf(&text, "particle: %s\r\n", clean(strings.TrimSuffix(line, "\n")))
	}
	for _, name := range c.consoles() {
		f, err := os.OpenFile(c.path(c.Dev, "/dev", name), os.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
		if err != nil {
			continue
		}
		f.Write(text.Bytes())
		f.Close()
	}
}

// consoles lists the devices of all consoles that can be written to, "console" where
// the kernel does not tell (Documentation/filesystems/proc.rst, /proc/consoles: NAME,
// what it can do with W for write, flags, device number).
func (c *Console) consoles() []string {
	f, err := os.Open(c.path(c.Proc, "/proc", "consoles"))
	if err != nil {
		return []string{"console"}
	}
	defer f.Close()
	var names []string
	for s := bufio.NewScanner(io.LimitReader(f, 64<<10)); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) >= 2 && strings.Contains(fields[1], "W") && !strings.Contains(fields[0], "/") {
			names = append(names, fields[0])
		}
	}
	if len(names) == 0 {
		return []string{"console"}
	}
	return names
}

// level is the console's loglevel: messages of a smaller number are shown.
func (c *Console) level() int {
	data, err := os.ReadFile(c.path(c.Proc, "/proc", "sys/kernel/printk"))
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(data), "\t")
	n, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil {
		return 0
	}
	return n
}

func (c *Console) path(dir, standard, name string) string {
	if dir == "" {
		dir = standard
	}
	return filepath.Join(dir, name)
}

// clean takes away what a terminal would obey: messages quote kernel arguments.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}
