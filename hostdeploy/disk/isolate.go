package disk

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// isolated is the environment variable with the mount namespace that Isolate has made.
const isolated = "PARTICLE_MOUNT_NAMESPACE"

// Isolate gives this program a mount namespace of its own, unless it has one by an earlier
// call: it starts the program again in its place, with the same arguments and process id.
// So it belongs at the very start of a command, and returns only when there is nothing
// to do or with an error.
//
// In there, Create's mounts are seen by nobody, go with the process, however it ends, and
// are not copied into the namespaces that others make meanwhile.
func Isolate() error {
	ns, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	if os.Getenv(isolated) == ns {
		return nil
	}
	// The namespace is this thread's alone, which execve(2) makes the only one.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	// What others unmount goes from here, too; what is mounted here stays here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("separating the mount namespace: %w", err)
	}
	if ns, err = os.Readlink("/proc/thread-self/ns/mnt"); err != nil {
		return fmt.Errorf("making a mount namespace: %w", err)
	}
	env := []string{isolated + "=" + ns}
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, isolated+"=") {
			env = append(env, e)
		}
	}
	return fmt.Errorf("starting again in a mount namespace: %w", syscall.Exec("/proc/self/exe", os.Args, env))
}
