package podman

import (
	"bytes"
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
	// programTime is how long a program may take. Those of the tests take seconds, and a
	// minute on a busy machine.
	programTime = 4 * time.Minute
	// quitTime is how long a program may take to end once it was told to.
	quitTime = 15 * time.Second
)

// errHung: a program did not end.
var errHung = errors.New("hung")

// try runs a program and returns what it printed.
func try(cmd *exec.Cmd) (stdout, stderr string, err error) { return within(programTime, cmd) }

// within runs a program and returns what it printed. One that goes on for longer than
// limit has to tell where it hangs, with all that it started and with the services that
// run: by SIGQUIT, which ends them. The error has it, and the log has the services' part.
func within(limit time.Duration, cmd *exec.Cmd) (stdout, stderr string, err error) {
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = quitTime // somebody else may hold its output open
	if err := cmd.Start(); err != nil {
		return "", "", err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return o.String(), e.String(), err
	case <-time.After(limit):
	}
	state := processStates(cmd.Process.Pid)
	for _, sig := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGKILL} {
		_ = syscall.Kill(-cmd.Process.Pid, sig)
		if sig == syscall.SIGQUIT {
			quitServices()
		}
		select {
		case err := <-done:
			_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what it leaves behind
			return o.String(), e.String(), fmt.Errorf("%w: ended by us after %s: %v\n%s%s", errHung, limit, err, state, e.String())
		case <-time.After(quitTime):
		}
	}
	return "", "", fmt.Errorf("%w: goes on after SIGKILL\n%s", errHung, state)
}

// processStates tells where in the kernel the processes of a group and the services
// are, and who waits for whose locks.
func processStates(group int) string {
	var b strings.Builder
	locks, err := os.ReadFile("/proc/locks")
	if err == nil {
		fmt.Fprintf(&b, "/proc/locks:\n%s", locks)
	}
	pids, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err.Error()
	}
	for _, dir := range pids {
		var pid int
		if _, err := fmt.Sscanf(dir, "/proc/%d", &pid); err != nil {
			continue
		}
		if pgid, err := syscall.Getpgid(pid); err != nil || pgid != group && !isService(pid) {
			continue
		}
		name, _ := os.ReadFile(dir + "/cmdline")
		fmt.Fprintf(&b, "process %d: %s\n", pid, bytes.ReplaceAll(name, []byte{0}, []byte{' '}))
		fds, _ := filepath.Glob(dir + "/fd/*")
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "/") {
				fmt.Fprintf(&b, "  fd %s %s\n", filepath.Base(fd), to)
			}
		}
		tasks, _ := filepath.Glob(dir + "/task/*")
		for _, task := range tasks {
			wchan, _ := os.ReadFile(task + "/wchan")
			fmt.Fprintf(&b, "  thread %s: %s\n", filepath.Base(task), wchan)
			if strings.HasPrefix(string(wchan), "futex") {
				continue // idle, as Go has it
			}
			stack, _ := os.ReadFile(task + "/stack")
			b.Write(stack)
		}
	}
	return b.String()
}

// A service is a program of ours or of others that runs until it is stopped.
type service struct {
	cmd  *exec.Cmd
	done chan struct{} // closed at its end
}

// services are those that run.
var services struct {
	sync.Mutex
	all map[*service]bool
}

// start starts a service. Its log should be a logBuffer.
func start(t testing.TB, cmd *exec.Cmd) *service {
	t.Helper()
	cmd.WaitDelay = quitTime // what it started may have its output open
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s := &service{cmd, make(chan struct{})}
	services.Lock()
	defer services.Unlock()
	if services.all == nil {
		services.all = map[*service]bool{}
	}
	services.all[s] = true
	go func() {
		_ = cmd.Wait()
		services.Lock()
		delete(services.all, s)
		services.Unlock()
		close(s.done)
	}()
	return s
}

// end sends a service a signal and waits until it is gone. The error is
// os.ErrProcessDone where it was gone before.
func (s *service) end(sig os.Signal) error {
	if err := s.cmd.Process.Signal(sig); err != nil {
		return err
	}
	for _, next := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGKILL} {
		select {
		case <-s.done:
			return nil
		case <-time.After(2 * quitTime):
			_ = s.cmd.Process.Signal(next)
		}
	}
	select {
	case <-s.done:
	case <-time.After(2 * quitTime):
	}
	return fmt.Errorf("%w: goes on %s after %s", errHung, 2*quitTime, sig)
}

func isService(pid int) bool {
	services.Lock()
	defer services.Unlock()
	for s := range services.all {
		if s.cmd.Process.Pid == pid {
			return true
		}
	}
	return false
}

// quitServices has all services log what each of their goroutines does, and end.
func quitServices() {
	services.Lock()
	defer services.Unlock()
	for s := range services.all {
		_ = s.cmd.Process.Signal(syscall.SIGQUIT)
	}
}

// TestDeadline: a program that hangs fails its test, and takes what it started along.
func TestDeadline(t *testing.T) {
	began := time.Now()
	_, _, err := within(time.Second, exec.Command("sh", "-c", "sleep 1000; true"))
	if !errors.Is(err, errHung) || !strings.Contains(err.Error(), "sleep 1000") {
		t.Errorf("got %v, want that sleep 1000 hung", err)
	}
	if took := time.Since(began); took > quitTime {
		t.Errorf("took %s", took)
	}
	if out, _, err := within(time.Minute, exec.Command("echo", "x")); out != "x\n" || err != nil {
		t.Errorf("got %q, %v", out, err)
	}
}
