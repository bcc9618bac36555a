package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
)

func TestHint(t *testing.T) {
	denied := fmt.Errorf("opening: %w", &os.PathError{Op: "open", Path: "store", Err: syscall.EACCES})
	for _, c := range []struct {
		err  error
		uid  int
		want string
	}{
		{denied, 1000, "\nthis user may not do that: try sudo"},
		{denied, 0, ""},
		{fmt.Errorf("unmounting: %w", syscall.EPERM), 1000, "\nthis user may not do that: try sudo"},
		{fmt.Errorf("%w\nmounting needs root: try sudo", denied), 1000, ""},
		{errors.New("no such image"), 1000, ""},
	} {
		if got := hint(c.err, c.uid); got != c.want {
			t.Errorf("%v for user %d: got %q, want %q", c.err, c.uid, got, c.want)
		}
	}
}
