package program

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// stopTime is how long a service may take to end when it is told to.
const stopTime = 40 * time.Second

// A Process is a service: a program that runs until it is stopped.
type Process struct {
	cmd  *exec.Cmd
	log  lockedBuffer
	done chan struct{} // closed at its end
	err  error         // what Wait says
}

// services are those that run.
var services struct {
	sync.Mutex
	all map[*Process]bool
}

// Start starts a service, which finds other programs in its own directory first:
// containerd its shims, and those runc. Log has what it prints.
func Start(t testing.TB, name string, args ...string) *Process {
	t.Helper()
	cmd := exec.Command(name, args...)
	if filepath.IsAbs(name) {
		cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(name)+":"+os.Getenv("PATH"))
	}
	p := &Process{cmd: cmd, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.log, &p.log
	p.serve(t)
	return p
}

// StartCmd starts a service whose command says what becomes of its output.
func StartCmd(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{cmd: cmd, done: make(chan struct{})}
	p.serve(t)
	return p
}

// serve starts a process as one of the services.
func (p *Process) serve(t testing.TB) {
	t.Helper()
	p.cmd.WaitDelay = time.Second // children that outlive it have its output open
	if err := p.begin(); err != nil {
		t.Fatal(err)
	}
	services.Lock()
	defer services.Unlock()
	if services.all == nil {
		services.all = map[*Process]bool{}
	}
	services.all[p] = true
	go func() {
		<-p.done
		services.Lock()
		defer services.Unlock()
		delete(services.all, p)
	}()
}

// begin starts a process and has its end noticed.
func (p *Process) begin() error {
	if err := p.cmd.Start(); err != nil {
		return err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return nil
}

// quit has a process that hangs tell where, and kills it where that does not end it. It
// reports whether the process has ended.
func (p *Process) quit(send func(syscall.Signal)) bool {
	for _, sig := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGKILL} {
		send(sig)
		select {
		case <-p.done:
			return true
		case <-time.After(quitTime):
		}
	}
	return false
}

// Done returns a channel that is closed when a service has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Log returns what a service of Start has printed.
func (p *Process) Log() string { return p.log.String() }

// Stop sends a service a signal and waits for its end. It returns what Wait says of it,
// but nil if SIGKILL did what it was to do. The error is os.ErrProcessDone where the
// service was gone before.
func (p *Process) Stop(sig os.Signal) error {
	if err := p.cmd.Process.Signal(sig); errors.Is(err, os.ErrProcessDone) {
		<-p.done
		return fmt.Errorf("%w: %s", err, p.cmd.ProcessState)
	} else if err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-time.After(stopTime):
		state := states(p.cmd.Process.Pid)
		p.quit(func(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) })
		return fmt.Errorf("%w: goes on %s after %s\n%s", errHung, stopTime, sig, state)
	}
	if errors.Is(p.err, exec.ErrWaitDelay) || sig == syscall.SIGKILL {
		return nil
	}
	return p.err
}

// quitServices has all services log what each of their threads does, and end.
func quitServices() {
	services.Lock()
	defer services.Unlock()
	for p := range services.all {
		_ = p.cmd.Process.Signal(syscall.SIGQUIT)
	}
}

func isService(pid int) bool {
	services.Lock()
	defer services.Unlock()
	for p := range services.all {
		if p.cmd.Process.Pid == pid {
			return true
		}
	}
	return false
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
