// Package prepare turns a tree that apt has made into one that runs from a read-only
// root, with /etc and /var that belong to the machine. It is the last step of an image's
// build; docs/prepare.md says what becomes of each directory, and why.
//
// What it does can be told by looking at the tree alone, and is done to a tree that has
// been prepared before without changing a byte: so [Check] is the same walk with the
// changes only listed. Nothing is followed out of the tree, whatever links it has, and
// nothing is touched that the build has mounted into it.
//
// Deliberately left out: what is in the image (packages, users' passwords, enabled
// services), the boot loader's configuration, and durability: a build that was cut off
// is built again, and a second run completes the first.
package prepare

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Errors of this package; test with errors.Is.
var (
	// ErrRunning: the tree is the root of a running system.
	ErrRunning = errors.New("this is a running system, not an image that is being built")
	// ErrNoDpkg: the tree has no database of dpkg, so it is none that apt has made.
	ErrNoDpkg = errors.New("no database of dpkg")
	// ErrConflict: two things want to be at one place.
	ErrConflict = errors.New("there is something else already")
	// ErrMounted: what has to move holds a mount of the build.
	ErrMounted = errors.New("something is mounted there")
	// ErrInitramfs: the initramfs could not be made, or lacks Particle's set-up.
	ErrInitramfs = errors.New("no usable initramfs")
)

// Options say what to prepare. The zero value prepares the tree at "/".
type Options struct {
	// Root is the tree's directory, "/" for "". Programs of the tree (mkinitramfs or
	// dracut) are run in it, by chroot(2) where it is not "/".
	Root string
	// NoInitramfs leaves the initramfs as it is.
	NoInitramfs bool
	// Output takes what those programs print; nil for nowhere. The last lines are in the
	// error when one fails, whatever Output is.
	Output io.Writer
}

// An Action is what is done to a path.
type Action string

// The actions.
const (
	Make    Action = "make"    // a directory
	Link    Action = "link"    // a symbolic link to Change.To
	Move    Action = "move"    // to Change.To
	Write   Action = "write"   // a file
	Remove  Action = "remove"  // one or several
	Rebuild Action = "rebuild" // an initramfs
)

// A Change is one thing that was done, or that Check found to do.
type Change struct {
	Action Action `json:"action"`
	// Path in the tree, beginning with a slash. For Remove it may be a pattern of
	// path.Match.
	Path string `json:"path"`
	To   string `json:"to,omitempty"`
	Why  string `json:"why,omitempty"`
}

// String gives the change as a line for people.
func (c Change) String() string {
	s := fmt.Sprintf("%-7s %s", c.Action, c.Path)
	if c.To != "" {
		s += " -> " + c.To
	}
	if c.Why != "" {
		s += " (" + c.Why + ")"
	}
	return s
}

// A Report says what was done, in order, and what no program can put right.
type Report struct {
	Changes  []Change `json:"changes"`
	Warnings []string `json:"warnings"`
	// Kernels are the versions of the kernels that have modules.
	Kernels []string `json:"kernels"`
}

// Clean reports that nothing is to be done and nothing is wrong.
func (r *Report) Clean() bool { return len(r.Changes) == 0 && len(r.Warnings) == 0 }

// Run prepares a tree. The report is returned with an error, too: it has what was done
// until then. It needs root's rights where files have owners.
func Run(ctx context.Context, o Options) (*Report, error) { return run(ctx, o, false) }

// Check lists what Run would do, and changes nothing. Whether an initramfs is up to date
// cannot be seen: only a missing one, or one without Particle's set-up, is listed.
func Check(ctx context.Context, o Options) (*Report, error) { return run(ctx, o, true) }

func run(ctx context.Context, o Options, check bool) (*Report, error) {
	r := &Report{Changes: []Change{}, Warnings: []string{}, Kernels: []string{}}
	if o.Root == "" {
		o.Root = "/"
	}
	root, err := os.OpenRoot(o.Root)
	if err != nil {
		return r, fmt.Errorf("opening the tree: %w", err)
	}
	defer root.Close()
	e := &editor{root: root, check: check, report: r, gone: map[string]bool{}}
	p := &preparation{editor: e, o: o}
	if !check {
		if err := refuseRunning(o.Root, "/"); err != nil {
			return r, err
		}
	}
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"the packages' database", p.packages},
		{"the directories of the root", p.layout},
		{"units and settings", p.files},
		{"the kernels", p.kernels},
		{"the initramfs", p.initramfs},
		{"what belongs to one machine", p.clean},
		{"users and groups", p.users},
		{"/var", p.variable},
	} {
		if err := ctx.Err(); err != nil {
			return r, err
		}
		if err := step.do(ctx); err != nil {
			return r, fmt.Errorf("preparing %s in %q: %w", step.what, o.Root, err)
		}
	}
	return r, nil
}

// A preparation is one run over a tree.
type preparation struct {
	*editor
	o Options
}

// refuseRunning keeps the command, whose default is "/", from taking keys, logs and
// machine-id off the host on which somebody types it. A build has another root than the
// host's init, or process ids of its own: proc is where the host's /proc is looked for.
func refuseRunning(root, host string) error {
	tree, err := os.Stat(root)
	if err != nil {
		return fmt.Errorf("looking at the tree: %w", err)
	}
	here, err := os.Stat(host)
	if err != nil || !os.SameFile(tree, here) {
		return err
	}
	// sd_booted(3).
	if fi, err := os.Lstat(filepath.Join(host, "run/systemd/system")); err == nil && fi.IsDir() {
		return fmt.Errorf("%w: /run/systemd/system is there; run it in the Containerfile, or name the directory of a tree", ErrRunning)
	}
	init, err := os.ReadFile(filepath.Join(host, "proc/1/comm"))
	if err != nil {
		return nil // a chroot without /proc
	}
	name := strings.TrimSpace(string(init))
	// Machines without systemd have inits of any name; what they all have is the first
	// namespace of process ids. podman has builds in it, too, with pidns = "host".
	ns, _ := os.Readlink(filepath.Join(host, "proc/self/ns/pid"))
	_, err = os.Lstat(filepath.Join(host, "run/.containerenv"))
	if name != "init" && name != "systemd" && (ns != firstPIDs || err == nil) {
		return nil
	}
	// Where process 1 may not be looked at, nothing shows that this is a chroot.
	if first, err := os.Stat(filepath.Join(host, "proc/1/root")); err == nil && !os.SameFile(first, tree) {
		return nil // a chroot
	}
	return fmt.Errorf("%w: process 1 is %s; run it in the Containerfile, or name the directory of a tree", ErrRunning, name)
}

// firstPIDs is the first namespace of process ids, which the machine's own init is in
// (PROC_PID_INIT_INO in Linux include/linux/proc_ns.h).
const firstPIDs = "pid:[4026531836]"
