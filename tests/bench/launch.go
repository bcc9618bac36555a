package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// launchArg makes this program a launcher: see launched.
const launchArg = "launch-and-measure"

// A report is what the launcher tells about a command.
type report struct {
	Wall, CPU float64 // seconds
	RSS       int64   // bytes
	Error     string
}

// launched wraps a command so that a small process starts it. The peak memory that
// wait4(2) tells of a process counts that of the process it was forked from, because
// execve(2) keeps the mark: started from here, all contenders would seem to need
// what the registry in this process needs.
func launched(ctx context.Context, cmd *exec.Cmd) (*report, error) {
	if cmd.Err != nil {
		return nil, cmd.Err
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	l := exec.CommandContext(ctx, self, append([]string{launchArg, cmd.Path}, cmd.Args...)...)
	l.Env, l.Stdout, l.Stderr = cmd.Env, cmd.Stdout, cmd.Stderr
	l.ExtraFiles = []*os.File{w} // file descriptor 3
	// Both stop together.
	l.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	l.Cancel = func() error { return unix.Kill(-l.Process.Pid, unix.SIGTERM) }
	err = l.Start()
	w.Close()
	if err != nil {
		return nil, err
	}
	var rep report
	decodeErr := json.NewDecoder(r).Decode(&rep)
	if err := errors.Join(l.Wait(), decodeErr); err != nil {
		return nil, err
	}
	if rep.Error != "" {
		return nil, errors.New(rep.Error)
	}
	return &rep, nil
}

// launch is the launcher's main function: it runs the program args[0] with the
// argument vector args[1:] and writes a report to file descriptor 3.
func launch(args []string) int {
	out := os.NewFile(3, "report")
	unix.CloseOnExec(3)
	var rep report
	cmd := &exec.Cmd{Path: args[0], Args: args[1:], Stdout: os.Stdout, Stderr: os.Stderr}
	start := time.Now()
	err := cmd.Run() // wait4: rusage counts the children it waited for too
	rep.Wall = time.Since(start).Seconds()
	if err != nil {
		rep.Error = fmt.Sprintf("running %s: %v", strings.Join(cmd.Args, " "), err)
	} else if usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
		rep.CPU = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
		rep.RSS = usage.Maxrss * 1024 // getrusage(2): kibibytes
	}
	if err := json.NewEncoder(out).Encode(rep); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}
