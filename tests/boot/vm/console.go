package vm

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"
)

// A Console keeps what the machine prints on its first serial line.
type Console struct {
	in io.Writer // to the machine

	mu      sync.Mutex
	buf     []byte
	pos     int // where the next Wait starts
	changed chan struct{}
	ended   bool
}

func newConsole() *Console { return &Console{changed: make(chan struct{})} }

// read copies what comes in to the file, until the end.
func (c *Console) read(r io.Reader, file *os.File) {
	b := make([]byte, 4096)
	for {
		n, err := r.Read(b)
		// The log is for people; a full disk must not stop the machine.
		_, _ = file.Write(b[:n])
		c.mu.Lock()
		c.buf = append(c.buf, b[:n]...)
		c.ended = err != nil
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// Type sends text to the machine as if typed at its console. "\r" is the Enter key.
func (c *Console) Type(text string) error {
	_, err := io.WriteString(c.in, text)
	return err
}

// Wait waits until one of the expressions matches what was printed since the last
// match, and returns which did, the earliest in the text, and the matched text with its
// groups. The error, when the machine ends or ctx does, shows the last lines.
func (c *Console) Wait(ctx context.Context, exprs ...*regexp.Regexp) (int, []string, error) {
	for {
		c.mu.Lock()
		text, changed, ended := c.buf[c.pos:], c.changed, c.ended
		which, best := -1, []int(nil)
		for i, e := range exprs {
			if m := e.FindSubmatchIndex(text); m != nil && (best == nil || m[0] < best[0]) {
				which, best = i, m
			}
		}
		if best != nil {
			groups := make([]string, len(best)/2)
			for i := range groups {
				if best[2*i] >= 0 {
					groups[i] = string(text[best[2*i]:best[2*i+1]])
				}
			}
			c.pos += best[1]
			c.mu.Unlock()
			return which, groups, nil
		}
		c.mu.Unlock()
		var why error
		if ended {
			why = ErrEnded
		} else {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				why = context.Cause(ctx)
			}
		}
		return 0, nil, fmt.Errorf("waiting for %q on the console: %w; its last lines:\n%s", exprs, why, c.Tail(60))
	}
}

// WaitWithin is Wait with a time limit.
func (c *Console) WaitWithin(ctx context.Context, limit time.Duration, exprs ...*regexp.Regexp) (int, []string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not within %v", limit))
	defer cancel()
	return c.Wait(ctx, exprs...)
}

// Mark lets the next Wait ignore what was printed until now.
func (c *Console) Mark() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pos = len(c.buf)
}

// Text returns all that was printed.
func (c *Console) Text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.buf)
}

// escapes are what terminals interpret and a test's report is better without.
var escapes = regexp.MustCompile("\x1b\\[[0-9;?!]*[a-zA-Z]|\x1b[()][0-9A-B]|\r|\x00")

// Tail returns the last n lines that are not blank, without terminal escapes.
func (c *Console) Tail(n int) string {
	c.mu.Lock()
	text := bytes.Clone(c.buf)
	c.mu.Unlock()
	var lines []string
	for line := range strings.Lines(escapes.ReplaceAllString(string(text), "")) {
		if line = strings.TrimRight(line, " \n"); line != "" {
			lines = append(lines, "  | "+line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
