package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/particle-os/particle/tests/boot/vm/guest"
)

// shell is the host's end of package guest.
type shell struct {
	conn io.ReadWriteCloser

	mu      sync.Mutex
	boot    string        // of the agent that spoke last
	changed chan struct{} // closed when boot changes or the port ends
	ended   bool
	next    int
	waiting map[int]chan guest.Response
}

func newShell(conn io.ReadWriteCloser) *shell {
	s := &shell{conn: conn, changed: make(chan struct{}), waiting: map[int]chan guest.Response{}}
	go s.read()
	return s
}

func (s *shell) read() {
	lines := guest.NewScanner(s.conn)
	for lines.Scan() {
		var r guest.Response
		if json.Unmarshal(lines.Bytes(), &r) != nil || r.Boot == "" {
			continue
		}
		s.mu.Lock()
		if r.Boot != s.boot {
			s.boot = r.Boot
			s.drop()
		}
		if w := s.waiting[r.ID]; w != nil {
			delete(s.waiting, r.ID)
			w <- r
		}
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.drop()
}

// drop tells all who wait that their request will not be answered.
func (s *shell) drop() {
	for id, w := range s.waiting {
		delete(s.waiting, id)
		close(w)
	}
	close(s.changed)
	s.changed = make(chan struct{})
}

// waitBoot waits for the agent of another boot than not, and returns its boot id.
func (s *shell) waitBoot(ctx context.Context, not string) (string, error) {
	for {
		s.mu.Lock()
		boot, changed, ended := s.boot, s.changed, s.ended
		s.mu.Unlock()
		switch {
		case ended:
			return "", ErrEnded
		case boot != not:
			return boot, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", context.Cause(ctx)
		}
	}
}

func (s *shell) send(r guest.Request) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	_, err = s.conn.Write(append(append([]byte{'\n'}, line...), '\n'))
	return err
}

// errRebooted: the machine went down, or its agent did, while a command ran.
var errRebooted = errors.New("the machine was restarted in between")

func (s *shell) run(ctx context.Context, command string, stdin []byte) (guest.Response, error) {
	boot, err := s.waitBoot(ctx, "")
	if err != nil {
		return guest.Response{}, err
	}
	answer := make(chan guest.Response, 1)
	s.mu.Lock()
	s.next++
	id := s.next
	s.waiting[id] = answer
	s.mu.Unlock()
	if err := s.send(guest.Request{Boot: boot, ID: id, Command: command, Stdin: stdin}); err != nil {
		return guest.Response{}, err
	}
	select {
	case r, ok := <-answer:
		if !ok {
			return r, errRebooted
		}
		if r.Error != "" {
			return r, fmt.Errorf("%s", r.Error)
		}
		return r, nil
	case <-ctx.Done():
		s.mu.Lock()
		delete(s.waiting, id)
		s.mu.Unlock()
		// It may be the machine that hangs: then nobody hears this.
		_ = s.send(guest.Request{Boot: boot, ID: id, Kill: true})
		return guest.Response{}, context.Cause(ctx)
	}
}
