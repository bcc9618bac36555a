package main

import (
	"errors"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/hostdeploy"
)

// The verbs of this file are called by systemd's units, not by people.

// lockWait is how long they wait for another run: without them a good boot counts as a
// failed one, and what is staged is lost.
const lockWait = 5 * time.Minute

func newFinalizeCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:   "finalize",
		Usage:  "make the staged deployment the one that boots; run at shutdown",
		Hidden: true,
		Flags:  bootFlags(),
		Action: func(c *cli.Context) error {
			h, _, unlock, err := changeWithin(t, c, lockWait)
			if err != nil {
				return err
			}
			defer unlock()
			p := &phases{t: t}
			plan, err := h.Finalize(c.Context, p.step)
			if err != nil {
				return err
			}
			if plan == nil {
				t.infof("nothing is staged")
				return nil
			}
			printDeployed(t, plan, false)
			return nil
		},
	}
}

func newBootSuccessCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:   "boot-success",
		Usage:  "the running deployment has proved good; run when boot-complete.target is reached",
		Hidden: true,
		Flags:  bootFlags(),
		Action: func(c *cli.Context) error {
			h, _, unlock, err := changeWithin(t, c, lockWait)
			if err != nil {
				return err
			}
			defer unlock()
			d, err := h.Good()
			if err != nil {
				return err
			}
			if d == nil {
				t.infof("no deployment of this host is running")
				return nil
			}
			t.infof("deployment %s is good", d.Name())
			// What it replaces but one is no longer needed; the store's space is freed by gc.
			removed, err := h.Prune()
			if errors.Is(err, hostdeploy.ErrInUse) {
				t.warnf("%v", err)
				return nil
			}
			if err == nil && len(removed.Deployments) > 0 {
				t.infof("removed %d deployments and %d kernels", len(removed.Deployments), len(removed.Kernels))
			}
			return err
		},
	}
}

func newBootFailedCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:   "boot-failed",
		Usage:  "boot-complete.target was not reached; run by its unit's failure",
		Hidden: true,
		Flags:  bootFlags(),
		Action: func(c *cli.Context) error {
			h, err := openHost(t, c)
			var all []*hostdeploy.Deployment
			if err == nil {
				all, err = h.Deployments()
			}
			if err != nil || !slices.ContainsFunc(all, func(d *hostdeploy.Deployment) bool { return d.Booted }) {
				return bootFailedBlind(t, c, err)
			}
			fallback := false
			for _, d := range all {
				if d.Booted {
					// One that proved good before is not left for another: restarting would
					// only take away the means to look what is wrong.
					if d.Entry == nil || d.Entry.Counter == nil {
						t.warnf("deployment %s did not reach boot-complete.target; it was good before, so it stays: systemctl --failed shows what is wrong", d.Name())
						return nil
					}
					t.warnf("deployment %s did not reach boot-complete.target, %d tries left", d.Name(), d.Entry.Counter.Left)
				} else if !d.Staged && !d.Failed {
					fallback = true
				}
			}
			if !fallback {
				t.warnf("there is no other deployment to fall back to")
				return nil
			}
			// What was staged by a system that does not work must not be finalized on its way
			// down.
			if unlock, err := h.Lock(); err == nil {
				_, err = h.Unstage()
				unlock()
				if err != nil && !errors.Is(err, os.ErrNotExist) {
					t.warnf("%v", err)
				}
			}
			return systemctl(c.Context, "reboot")
		},
	}
}

// bootFailedBlind is for a system that cannot read its boot entries, whose boot file
// system may be what failed. The loader counts the tries: one more start is one less.
func bootFailedBlind(t *term, c *cli.Context, reason error) error {
	if reason != nil {
		t.warnf("%v", reason)
	}
	trial, err := hostdeploy.OnTrial(hostdeploy.HostOptions{Root: c.String("sysroot"), Warn: t.warnf})
	if err != nil {
		return errors.Join(reason, err)
	}
	if !trial {
		t.warnf("the boot entries cannot be read; the running system was good before, so it stays")
		return nil
	}
	t.warnf("the boot entries cannot be read; the running system has never been good: another try, or another system, is next")
	return systemctl(c.Context, "reboot")
}
