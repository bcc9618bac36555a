package program

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// states tells where in the kernel the processes of a group and the services are, and
// who waits for whose locks.
func states(group int) string {
	var b strings.Builder
	locks, err := os.ReadFile("/proc/locks")
	if err == nil {
		fmt.Fprintf(&b, "/proc/locks:\n%s", locks)
	}
	pids, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err.Error()
	}
	for _, dir := range pids {
		var pid int
		if _, err := fmt.Sscanf(dir, "/proc/%d", &pid); err != nil {
			continue
		}
		if pgid, err := syscall.Getpgid(pid); err != nil || pgid != group && !isService(pid) {
			continue
		}
		name, _ := os.ReadFile(dir + "/cmdline")
		fmt.Fprintf(&b, "process %d: %s\n", pid, bytes.ReplaceAll(name, []byte{0}, []byte{' '}))
		fds, _ := filepath.Glob(dir + "/fd/*")
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "/") {
				fmt.Fprintf(&b, "  fd %s %s\n", filepath.Base(fd), to)
			}
		}
		tasks, _ := filepath.Glob(dir + "/task/*")
		for _, task := range tasks {
			wchan, _ := os.ReadFile(task + "/wchan")
			fmt.Fprintf(&b, "  thread %s: %s\n", filepath.Base(task), wchan)
			if strings.HasPrefix(string(wchan), "futex") {
				continue // idle, as Go has it
			}
			stack, _ := os.ReadFile(task + "/stack")
			b.Write(stack)
		}
	}
	return b.String()
}
