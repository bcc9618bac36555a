package program

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDeadline: a program that hangs fails its test, and takes what it started and the
// services along.
func TestDeadline(t *testing.T) {
	service := Start(t, "sleep", "2000")
	began := time.Now()
	_, _, err := Within(time.Second, exec.Command("sh", "-c", "echo busy >&2; sleep 1000; true"))
	if !errors.Is(err, errHung) {
		t.Fatalf("got %v, want that it hung", err)
	}
	for _, want := range []string{"sleep 1000", "sleep 2000", "busy"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not tell of %q: %v", want, err)
		}
	}
	if took := time.Since(began); took > quitTime {
		t.Errorf("took %s", took)
	}
	<-service.Done()
	if err := service.Stop(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) || !strings.Contains(err.Error(), "quit") {
		t.Errorf("stopping a service that SIGQUIT ended: got %v", err)
	}
	if out, _, err := Within(time.Minute, exec.Command("echo", "x")); out != "x\n" || err != nil {
		t.Errorf("got %q, %v", out, err)
	}
}

// TestStop: who stops a service hears how it ended, unless it was to be killed.
func TestStop(t *testing.T) {
	for sig, want := range map[syscall.Signal]string{syscall.SIGKILL: "", syscall.SIGTERM: "signal: terminated"} {
		var got string
		if err := Start(t, "sleep", "1000").Stop(sig); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", sig, got, want)
		}
	}
}
