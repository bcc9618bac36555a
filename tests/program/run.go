// Package program runs foreign programs for tests. None of them can keep a test from
// ending: each has a deadline, and one that ends while its children have its output
// open is not waited for. Who hangs has to tell where, together with all that may be
// what it waits for.
//
// It also knows a flaw of containerd's command ctr, which both packages that drive it
// have to live with: see [Whole].
package program

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	// Deadline is how long a program may take. Those of the tests take seconds, but
	// several suites may share a machine with a slow disk.
	Deadline = 4 * time.Minute
	// quitTime is how long a program may take to end once SIGQUIT or SIGKILL told it to,
	// and how long to wait for the output of one that has ended.
	quitTime = 15 * time.Second
)

// errHung: a program did not end.
var errHung = errors.New("hung")

// Try runs a program and returns what it prints. Its error has what it printed to
// either output.
func Try(name string, args ...string) (string, error) { return TryEnv(nil, name, args...) }

// TryEnv is Try with more environment.
func TryEnv(env []string, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	stdout, stderr, err := Run(cmd)
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s%s", filepath.Base(name), strings.Join(args, " "), err, stdout, stderr)
	}
	return stdout, err
}

// Run runs a program and returns what it printed.
func Run(cmd *exec.Cmd) (stdout, stderr string, err error) { return Within(Deadline, cmd) }

// Within is Run for a program that may take another time. One that goes on for longer
// has to tell where it hangs, with all that it started and with the services that run:
// by SIGQUIT, which ends them. Then the error, and not stderr, has what it said; the
// services' part is in their logs.
func Within(limit time.Duration, cmd *exec.Cmd) (stdout, stderr string, err error) {
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = quitTime
	p := &Process{cmd: cmd, done: make(chan struct{})}
	if err := p.begin(); err != nil {
		return "", "", err
	}
	select {
	case <-p.done:
		return o.String(), e.String(), p.err
	case <-time.After(limit):
	}
	group := cmd.Process.Pid
	state := states(group)
	ended := p.quit(func(sig syscall.Signal) {
		_ = syscall.Kill(-group, sig)
		if sig == syscall.SIGQUIT {
			quitServices()
		}
	})
	if !ended {
		return "", "", fmt.Errorf("%w: goes on after SIGKILL\n%s", errHung, state)
	}
	_ = syscall.Kill(-group, syscall.SIGKILL) // what it leaves behind
	return o.String(), "", fmt.Errorf("%w: ended by us after %s: %v\n%s%s", errHung, limit, p.err, state, e.String())
}
