package disk

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// keyOf names a block device or file among all others of this machine.
func keyOf(st *unix.Stat_t) string {
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		return "b" + majorMinor(st.Rdev)
	}
	return fmt.Sprintf("f%s:%d", majorMinor(st.Dev), st.Ino)
}

// majorMinor prints a device number as sysfs and mountinfo do.
func majorMinor(dev uint64) string { return fmt.Sprintf("%d:%d", unix.Major(dev), unix.Minor(dev)) }

// uses says what a disk and its partitions are used for, in words, as far as this process
// can see.
func uses(disk *unix.Stat_t) ([]string, error) {
	loops, _, err := loopsOver(disk)
	if err != nil {
		return nil, err
	}
	var used []string
	for _, l := range loops {
		used = append(used, fmt.Sprintf("%s is attached to it (losetup -d %s)", l, l))
	}
	devs := map[string]bool{} // of the disk and its partitions
	if disk.Mode&unix.S_IFMT == unix.S_IFBLK {
		dir := filepath.Join("/sys/dev/block", majorMinor(disk.Rdev))
		devs[majorMinor(disk.Rdev)] = true
		parts, err := filepath.Glob(filepath.Join(dir, "*", "partition"))
		if err != nil {
			return nil, err
		}
		dirs := []string{dir}
		for _, p := range parts {
			dirs = append(dirs, filepath.Dir(p))
			if dev, err := os.ReadFile(filepath.Join(filepath.Dir(p), "dev")); err == nil {
				devs[strings.TrimSpace(string(dev))] = true
			}
		}
		for _, dir := range dirs {
			holders, err := os.ReadDir(filepath.Join(dir, "holders"))
			if err != nil && !os.IsNotExist(err) {
				return nil, err
			}
			for _, h := range holders {
				used = append(used, fmt.Sprintf("it is part of /dev/%s", h.Name()))
			}
		}
	}
	is := func(path string) bool {
		var st unix.Stat_t
		if !strings.HasPrefix(path, "/") || unix.Stat(path, &st) != nil {
			return false
		}
		return st.Mode&unix.S_IFMT == unix.S_IFBLK && devs[majorMinor(st.Rdev)] || keyOf(&st) == keyOf(disk)
	}
	entries, err := mountinfo()
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		// btrfs has device numbers of its own, but names the device as its source.
		if devs[e.Device] || len(devs) > 0 && strings.HasPrefix(e.Source, "/dev/") && is(e.Source) {
			used = append(used, fmt.Sprintf("it is mounted at %q", e.Target))
		}
	}
	swaps, err := os.Open("/proc/swaps")
	if os.IsNotExist(err) {
		return used, nil
	} else if err != nil {
		return nil, err
	}
	defer swaps.Close()
	for s := bufio.NewScanner(swaps); s.Scan(); {
		if fields := strings.Fields(s.Text()); len(fields) > 0 && is(fields[0]) {
			used = append(used, fmt.Sprintf("%s is used for swapping", fields[0]))
		}
	}
	return used, nil
}
