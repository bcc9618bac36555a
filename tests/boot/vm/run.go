package vm

import (
	"context"
	"fmt"

	"github.com/particle-os/particle/tests/boot/vm/guest"
)

const shellPort = guest.Port

// A Result is what a command in the guest left.
type Result struct {
	Stdout, Stderr string
	Status         int // as shells have it: 128 and the signal's number after a signal
}

// Boot waits until the guest's shell answers and returns the id of this boot.
func (v *VM) Boot(ctx context.Context) (string, error) {
	boot, err := v.shell.waitBoot(ctx, "")
	return boot, v.explain(err, "waiting for the shell in the guest")
}

// NextBoot waits for the shell of another boot than the given one.
func (v *VM) NextBoot(ctx context.Context, boot string) (string, error) {
	next, err := v.shell.waitBoot(ctx, boot)
	return next, v.explain(err, "waiting for the guest to come back")
}

// Sh runs a command as root in the guest by /bin/sh -c. It waits for the guest's shell.
// The error is about running it, not about its status; when ctx ends the command is
// killed.
func (v *VM) Sh(ctx context.Context, command string) (Result, error) {
	return v.ShInput(ctx, command, nil)
}

// ShInput is Sh with bytes for the command's standard input.
func (v *VM) ShInput(ctx context.Context, command string, stdin []byte) (Result, error) {
	r, err := v.shell.run(ctx, command, stdin)
	if err != nil {
		return Result{}, v.explain(err, fmt.Sprintf("running %q in the guest", command))
	}
	return Result{string(r.Stdout), string(r.Stderr), r.Status}, nil
}

// Restart restarts the guest in the orderly way and waits for the shell of the next boot.
func (v *VM) Restart(ctx context.Context) error {
	boot, err := v.Boot(ctx)
	if err != nil {
		return err
	}
	v.Console.Mark()
	// The shell may go down before it answers.
	_, _ = v.Sh(ctx, "systemctl --no-block reboot")
	_, err = v.NextBoot(ctx, boot)
	return err
}

// PowerOff switches the guest off in the orderly way and waits until it is off.
func (v *VM) PowerOff(ctx context.Context) error {
	if r, err := v.Sh(ctx, "systemctl --no-block poweroff"); err == nil && r.Status != 0 {
		return fmt.Errorf("switching the guest off: %s", r.Stderr)
	}
	defer v.shell.conn.Close()
	return v.WaitEnd(ctx)
}

// explain adds to an error what was done and what the console shows.
func (v *VM) explain(err error, doing string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w; the console's last lines:\n%s", doing, err, v.Console.Tail(60))
}
