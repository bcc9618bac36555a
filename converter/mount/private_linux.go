package mount

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// inPrivate calls fn in a thread that has a mount namespace of its own. What is
// mounted there is seen by nobody else and goes with the thread, also if the process
// is killed. Detached mounts and descriptors outlive it.
func inPrivate(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end before the process does. While this goroutine
			// holds it, another one gets another thread.
			defer runtime.UnlockOSThread()
			done <- inPrivate(fn)
			return
		}
		// Not unlocked: the thread ends with the goroutine.
		done <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("unsharing the mount namespace: %w", err)
			}
			// Not private: what the machine unmounts meanwhile is to go here too.
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
				return fmt.Errorf("unsharing mounts: %w", err)
			}
			return fn()
		}()
	}()
	return <-done
}

// mountPoints are directories to cover in a private namespace.
var mountPoints = []string{"/mnt", "/tmp", "/run", "/"}

// attachPrivate attaches a detached mount somewhere in the private namespace of the
// calling thread. The mount's descriptor stays good. What lies below the mount point
// cannot be opened any more.
func attachPrivate(f *os.File) error {
	var err error
	for _, dir := range mountPoints {
		err = unix.MoveMount(int(f.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH)
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("attaching a mount in a private namespace: %w", err)
}
