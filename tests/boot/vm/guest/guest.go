// Package guest is the protocol between a test and the root shell inside a virtual
// machine, and the program's part of it that runs there.
//
// The two talk over a virtio serial port, a pipe of bytes that knows nothing of
// connections: the machine may be reset in the middle of a line, and what the host
// wrote before may be read after the next boot. So each message is one line of JSON,
// what is no message is skipped, and each request names the boot that it is meant for.
//
//	guest -> host  {"boot":"B"}                              once, when the agent starts
//	host -> guest  {"boot":"B","id":1,"command":"uname -r"}
//	guest -> host  {"boot":"B","id":1,"status":0,"stdout":"Ni4xMgo="}
//	host -> guest  {"boot":"B","id":1,"kill":true}           ends what runs under id 1
//	host -> guest  {"hello":true}                            asks for the first message again
//
// It has no authentication and runs everything as root: it belongs in images of tests
// and nowhere else.
package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Port is the name of the virtio serial port.
const Port = "particle.test.shell"

// MaxLine bounds a message, in bytes. A command's output must fit in it, encoded.
const MaxLine = 64 << 20

// A Request is a message of the host.
type Request struct {
	Boot    string `json:"boot,omitempty"`
	ID      int    `json:"id,omitempty"`
	Command string `json:"command,omitempty"` // for /bin/sh -c
	Stdin   []byte `json:"stdin,omitempty"`
	Kill    bool   `json:"kill,omitempty"`
	Hello   bool   `json:"hello,omitempty"`
}

// A Response is a message of the guest. ID 0 announces the agent.
type Response struct {
	Boot string `json:"boot"`
	ID   int    `json:"id,omitempty"`
	// Status is the exit status; 128 and the signal's number after a signal, as shells
	// have it.
	Status int    `json:"status"`
	Stdout []byte `json:"stdout,omitempty"`
	Stderr []byte `json:"stderr,omitempty"`
	// Error says why the command could not be run at all.
	Error string `json:"error,omitempty"`
}

// Open opens the port inside the guest. It looks the device up in sysfs, so it needs
// no udev.
func Open() (*os.File, error) {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if b, err := os.ReadFile(name); err == nil && strings.TrimSpace(string(b)) == Port {
			return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(name)), os.O_RDWR, 0)
		}
	}
	return nil, fmt.Errorf("looking for the virtio port %s: %w", Port, os.ErrNotExist)
}

// BootID returns what the kernel calls this boot.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// Serve answers requests of the boot until in ends; it returns nil at the end of in.
// Commands run side by side. Those that still run when Serve ends are killed.
func Serve(in io.Reader, out io.Writer, boot string) error {
	a := &agent{out: out, boot: boot, running: map[int]context.CancelFunc{}}
	ctx, cancel := context.WithCancel(context.Background())
	defer a.wait.Wait()
	defer cancel()
	if err := a.send(Response{}); err != nil {
		return err
	}
	s := NewScanner(in)
	for s.Scan() {
		var req Request
		if json.Unmarshal(s.Bytes(), &req) != nil {
			continue
		}
		if req.Hello {
			if err := a.send(Response{}); err != nil {
				return err
			}
			continue
		}
		if req.Boot != boot || req.ID <= 0 {
			continue
		}
		if req.Kill {
			a.kill(req.ID)
			continue
		}
		ctx, cancel := context.WithCancel(ctx)
		a.mu.Lock()
		a.running[req.ID] = cancel
		a.mu.Unlock()
		a.wait.Add(1)
		go func() {
			defer a.wait.Done()
			defer a.kill(req.ID)
			// When the host does not listen any more, the scanner will say so too.
			_ = a.send(run(ctx, req))
		}()
	}
	return s.Err()
}

// NewScanner splits a stream into messages.
func NewScanner(r io.Reader) *bufio.Scanner {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 64<<10), MaxLine)
	return s
}

type agent struct {
	boot string
	wait sync.WaitGroup

	mu      sync.Mutex
	out     io.Writer
	running map[int]context.CancelFunc
}

func (a *agent) kill(id int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if cancel := a.running[id]; cancel != nil {
		cancel()
		delete(a.running, id)
	}
}

func (a *agent) send(r Response) error {
	r.Boot = a.boot
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	// The first newline ends what an earlier boot may have left unfinished.
	_, err = a.out.Write(append(append([]byte{'\n'}, line...), '\n'))
	return err
}

// run runs one command in a process group of its own.
func run(ctx context.Context, req Request) Response {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", req.Command)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(req.Stdin), &stdout, &stderr
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A daemon that a command left behind may hold its output open.
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	r := Response{ID: req.ID, Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}
	var exit *exec.ExitError
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
	case errors.As(err, &exit):
		r.Status = exit.ExitCode()
		if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
			r.Status = 128 + int(ws.Signal())
		}
	case errors.Is(err, context.Canceled): // killed before it started
		r.Status = 128 + int(syscall.SIGKILL)
	default:
		r.Status, r.Error = 127, err.Error()
	}
	return r
}
