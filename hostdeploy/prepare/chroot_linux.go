package prepare

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// runChroot runs a command with the tree as its root. A tree that is not our own root
// gets /proc, /sys, /dev and an empty /run, in a mount namespace that ends with the
// command.
func runChroot(root *os.Root, name string, cmd *exec.Cmd) error {
	if filepath.Clean(name) == "/" {
		return cmd.Run()
	}
	errs := make(chan error, 1)
	go func() {
		// The thread has its own namespace from here on: it is not given back, and ends
		// with the goroutine.
		runtime.LockOSThread()
		errs <- func() error {
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("making a mount namespace: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("making mounts private: %w", err)
			}
			// Files that are open belong to the old namespace: nothing can be mounted there.
			here, err := reopen(root, name)
			if err != nil {
				return err
			}
			defer here.Close()
			for _, m := range []struct {
				dir, source, fstype string
				flags               uintptr
			}{
				{"proc", "proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
				{"sys", "/sys", "", unix.MS_BIND | unix.MS_REC},
				{"dev", "/dev", "", unix.MS_BIND | unix.MS_REC},
				{"run", "run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV},
			} {
				if err := mountIn(here, m.dir, m.source, m.fstype, m.flags); err != nil {
					return fmt.Errorf("mounting /%s in the tree: %w", m.dir, err)
				}
			}
			dir, err := here.Open(".")
			if err != nil {
				return err
			}
			defer dir.Close()
			cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: fdPath(dir)}
			return cmd.Run()
		}()
	}()
	return <-errs
}

// reopen opens the tree anew; it must still be the same.
func reopen(root *os.Root, name string) (*os.Root, error) {
	here, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	before, err := root.Stat(".")
	if err == nil {
		var now os.FileInfo
		if now, err = here.Stat("."); err == nil && !os.SameFile(before, now) {
			err = fmt.Errorf("%q is another directory now", name)
		}
	}
	if err != nil {
		here.Close()
		return nil, err
	}
	return here, nil
}

// mountIn mounts on a directory of the tree, wherever its links try to lead.
func mountIn(root *os.Root, name, source, fstype string, flags uintptr) error {
	dir, err := root.OpenFile(name, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Mount(source, fdPath(dir), fstype, flags, "")
}

// fdPath names an open file.
func fdPath(f *os.File) string {
	return "/proc/thread-self/fd/" + strconv.Itoa(int(f.Fd()))
}
