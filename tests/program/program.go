// Package program runs foreign programs for tests. None of them can keep a test from
// ending: each has a deadline, and one that ends while its children have its output
// open is not waited for.
//
// It also knows a flaw of containerd's command ctr, which both packages that drive it
// have to live with: see [Whole].
package program

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	// deadline is how long a program may take. It is long: several suites may share a
	// machine with a slow disk.
	deadline = 4 * time.Minute
	// waitDelay is how long to wait for the output of a program that has ended.
	waitDelay = 5 * time.Second
	// stopWait is how long a program may take to end when it is told to.
	stopWait = 40 * time.Second
)

// Namespace is containerd's for the tests of this process: runc knows containers by
// namespace and id, on the whole machine and whichever containerd they are of.
var Namespace = fmt.Sprintf("test-%d", os.Getpid())

// errDeadline tells a program that was killed from one that failed.
var errDeadline = fmt.Errorf("it was killed after %v", deadline)

// Try runs a program and returns what it prints. Its error has what it printed to
// either output.
func Try(name string, args ...string) (string, error) { return TryEnv(nil, name, args...) }

// TryEnv is Try with more environment.
func TryEnv(env []string, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), deadline, errDeadline)
	defer cancel()
	var stdout, stderr strings.Builder
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = &stdout, &stderr, waitDelay
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(name), strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// End is what a program that runs in a container prints at its end, for Whole.
const End = "(that was all)\n"

// errLost is what Whole returns when it gives up.
var errLost = errors.New("ctr loses the end of what a container prints again and again")

// Whole returns what a program prints in a container, without End. ctr of containerd
// 1.x may lose the last of it: when the container's process ends, ctr deletes the task,
// and with it closes the pipes that it has not read to their end. So run, which starts
// a new process each time, is called again until End is there.
func Whole(run func() (string, error)) (string, error) {
	var out string
	for range 5 {
		var err error
		if out, err = run(); err != nil {
			return out, err
		}
		if whole, ok := strings.CutSuffix(out, End); ok {
			return whole, nil
		}
	}
	return out, fmt.Errorf("%w: %q", errLost, out)
}

// A Process is a program that runs until it is stopped.
type Process struct {
	cmd  *exec.Cmd
	log  lockedBuffer
	done chan struct{} // closed at its end
	err  error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// Start starts a program, which finds others in its own directory first: containerd its
// shims, and those runc.
func Start(t testing.TB, name string, args ...string) *Process {
	t.Helper()
	p := &Process{cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	path := os.Getenv("PATH")
	if filepath.IsAbs(name) {
		path = filepath.Dir(name) + ":" + path
	}
	p.cmd.Env = append(os.Environ(), "PATH="+path)
	p.cmd.WaitDelay = time.Second // children that outlive it have its output open
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p
}

// Stop ends a process, if it still runs, and waits for its end. It returns what Wait
// says of it.
func (p *Process) Stop(sig syscall.Signal) error {
	p.cmd.Process.Signal(sig) // of one that has ended, it fails
	select {
	case <-p.done:
	case <-time.After(stopWait):
		p.cmd.Process.Kill()
		<-p.done
	}
	if errors.Is(p.err, exec.ErrWaitDelay) {
		return nil
	}
	return p.err
}

// Log returns what a process has printed.
func (p *Process) Log() string { return p.log.String() }
