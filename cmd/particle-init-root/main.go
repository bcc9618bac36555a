// Command particle-init-root sets up the root of a deployment in the initramfs.
//
//	particle-init-root DIR
//	particle-init-root --next ARGUMENTS [--target DIR] DIR
//
// DIR is where the physical root is mounted: /root in initramfs-tools, /sysroot in
// dracut. What to boot is on the kernel command line (docs/boot.md). When it fails, all
// consoles say why; after ten seconds the machine restarts, so that the boot loader can
// fall back, unless a shell may come: then the exit status is 1.
//
// With --next it sets up the root of another boot entry, whose kernel arguments are
// given, at /run/nextroot, for "systemctl soft-reboot".
//
// Exit status: 0 the root is set up, 1 it is not, 2 wrong usage, 3 the kernel command
// line names no image, so that there is nothing to do.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/hostdeploy/initramfs"
)

// restartAfter leaves time to read the message.
const restartAfter = 10 * time.Second

func main() { os.Exit(run(os.Args[1:], os.Stderr)) }

func run(args []string, stderr io.Writer) int {
	flags := flag.NewFlagSet("particle-init-root", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, "usage: particle-init-root DIR\n       particle-init-root --next ARGUMENTS [--target DIR] DIR\n")
		flags.PrintDefaults()
	}
	next := flags.String("next", "", "prepare a soft reboot to the boot entry with these kernel `ARGUMENTS`")
	target := flags.String("target", "/run/nextroot", "the `DIR` for --next")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return initramfs.ExitDone
	case err != nil:
		return initramfs.ExitUsage
	case flags.NArg() != 1:
		flags.Usage()
		return initramfs.ExitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	o := initramfs.Options{Root: flags.Arg(0)}
	if *next != "" {
		o.Cmdline = *next
		r, err := initramfs.PrepareNext(ctx, o, *target)
		if err != nil {
			fmt.Fprintf(stderr, "particle-init-root: preparing the next root: %v\n", err)
			return initramfs.ExitFailed
		}
		fmt.Fprintf(stderr, "particle-init-root: %s is ready at %s: %s\n", initramfs.Describe(r), *target, r.Verification)
		return initramfs.ExitDone
	}
	if !inInitramfs() {
		fmt.Fprint(stderr, "particle-init-root: this is not an initramfs: it replaces the root that is being booted, and restarts the machine when that fails\n")
		return initramfs.ExitUsage
	}
	return boot(ctx, o)
}

// inInitramfs reports whether / is in memory, as it is until init is started.
func inInitramfs() bool {
	var st unix.Statfs_t
	err := unix.Statfs("/", &st)
	return err == nil && (st.Type == unix.RAMFS_MAGIC || st.Type == unix.TMPFS_MAGIC)
}

// onlyDeployments reports whether a physical root has a store and no system of its own.
func onlyDeployments(root string) bool {
	if _, err := os.Stat(filepath.Join(root, "composefs/meta.json")); err != nil {
		return false
	}
	for _, name := range []string{"sbin/init", "etc/init", "bin/init", "bin/sh"} {
		if _, err := os.Lstat(filepath.Join(root, name)); err == nil {
			return false
		}
	}
	return true
}

func boot(ctx context.Context, o initramfs.Options) int {
	var console initramfs.Console
	line, err := os.ReadFile("/proc/cmdline")
	if err == nil {
		o.Cmdline = string(line)
		o.Progress = func(done, total int) { console.Progress("enabling fs-verity in the store", done, total) }
		var r *initramfs.Report
		if r, err = initramfs.Setup(ctx, o); err == nil {
			if e := r.Enabled; e != nil {
				console.Info(fmt.Sprintf("fs-verity enabled on %d objects in %.1f s", e.Objects, e.Seconds))
			}
			console.Info(fmt.Sprintf("root is %s, %s: %s", initramfs.Describe(r), r.Verification, r.Why))
			for _, w := range r.Warnings {
				console.Info("warning: " + w)
			}
			return initramfs.ExitDone
		}
	}
	if errors.Is(err, initramfs.ErrNotDeployed) {
		if onlyDeployments(o.Root) {
			console.Error("this disk has nothing to boot but deployments, and the kernel command line names none: add composefs.digest=…, or choose another entry in the boot menu")
		}
		return initramfs.ExitNothing
	}
	console.Error("the system cannot be booted: " + err.Error())
	if initramfs.ShellAllowed(o.Cmdline) {
		return initramfs.ExitFailed
	}
	console.Error(fmt.Sprintf("restarting in %d seconds; add particle.shell to the kernel command line for a shell instead", restartAfter/time.Second))
	select {
	case <-ctx.Done():
	case <-time.After(restartAfter):
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		console.Error(fmt.Sprintf("restarting: %v", err))
	}
	return initramfs.ExitFailed
}
