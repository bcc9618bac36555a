package service_test

import (
	"errors"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/snapshotter/service"
)

// TestAsk: only a server that works is said to answer.
func TestAsk(t *testing.T) {
	dir := t.TempDir()
	if err := service.Ask(t.Context(), filepath.Join(dir, "none"), time.Second); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a socket: got %v", err)
	}
	// As systemd does for a service that is starting.
	silent, err := net.Listen("unix", filepath.Join(dir, "silent"))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	if err := service.Ask(t.Context(), filepath.Join(dir, "silent"), 300*time.Millisecond); err == nil || !strings.Contains(err.Error(), "no answer in 300ms") {
		t.Errorf("where nobody accepts: got %v", err)
	}
	dying, err := net.Listen("unix", filepath.Join(dir, "dying"))
	if err != nil {
		t.Fatal(err)
	}
	defer dying.Close()
	go func() {
		for {
			conn, err := dying.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	if err := service.Ask(t.Context(), filepath.Join(dir, "dying"), 10*time.Second); err == nil {
		t.Error("a server that hangs up is said to answer")
	}
}

func TestAskServer(t *testing.T) {
	sn, dir := newSnapshotter(t)
	srv, err := service.New(service.Options{Snapshotter: sn})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "socket")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go srv.Serve(t.Context(), l)
	defer srv.Close()
	if err := service.Ask(t.Context(), socket, 10*time.Second); err != nil {
		t.Error(err)
	}
}
