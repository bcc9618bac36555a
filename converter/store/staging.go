package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const stagingPrefix = "txn-"

// A staging is the directory of one transaction. The flock on it says that its
// owner lives: the kernel drops it with the process, so whoever can take the lock
// may sweep the directory away.
type staging struct {
	path string
	dir  *os.File // open and locked
}

// newStaging makes a staging directory that nobody sweeps before it is closed.
func (s *Store) newStaging() (*staging, error) {
	// Between the making and the lock a sweeper may come by. Then it has the lock,
	// or the directory has no link any more; take another one.
	for range 100 {
		path, err := os.MkdirTemp(s.path(stagingDir), stagingPrefix)
		if err != nil {
			return nil, fmt.Errorf("making a staging directory: %w", err)
		}
		dir, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("opening a staging directory: %w", err)
		}
		var st unix.Stat_t
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			err = unix.Fstat(int(dir.Fd()), &st)
		}
		if err == nil && st.Nlink > 0 {
			return &staging{path, dir}, nil
		}
		dir.Close()
		if err != nil && err != unix.EWOULDBLOCK {
			return nil, fmt.Errorf("locking staging directory %q: %w", path, err)
		}
	}
	return nil, fmt.Errorf("making a staging directory in %q: others remove it again and again", s.path(stagingDir))
}

// close removes the directory with all that is in it.
func (g *staging) close() error {
	err := os.RemoveAll(g.path)
	return errors.Join(err, g.dir.Close())
}

// sweep removes what transactions of dead processes left and returns how many
// there were.
func (s *Store) sweep() (int, error) {
	entries, err := os.ReadDir(s.path(stagingDir))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("looking for abandoned transactions: %w", err)
	}
	n := 0
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), stagingPrefix) {
			continue
		}
		path := s.path(stagingDir, e.Name())
		dir, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return n, fmt.Errorf("looking at an abandoned transaction: %w", err)
		}
		switch err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err {
		case nil:
			if err = os.RemoveAll(path); err == nil {
				n++
			}
		case unix.EWOULDBLOCK: // alive
			err = nil
		}
		dir.Close()
		if err != nil {
			return n, fmt.Errorf("sweeping an abandoned transaction: %w", err)
		}
	}
	return n, nil
}

// syncDir makes the entries of a directory durable.
func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("syncing directory %q: %w", name, err)
	}
	return nil
}

// umaskHides reports whether the process's umask takes bits of mode away. The kernel
// tells the umask without changing it only in /proc; where that cannot be read, say yes.
func umaskHides(mode uint32) bool {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "Umask:"); ok {
			var mask uint32
			if _, err := fmt.Sscanf(strings.TrimSpace(rest), "%o", &mask); err == nil {
				return mask&mode != 0
			}
		}
	}
	return true
}

// mkdirAll makes the directories of rel below base, which exists, and makes each of
// them durable in its parent.
func mkdirAll(base, rel string) error {
	if rel == "." || rel == "" {
		return nil
	}
	if err := mkdirAll(base, filepath.Dir(rel)); err != nil {
		return err
	}
	path := filepath.Join(base, rel)
	if err := os.Mkdir(path, dirMode); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	}
	return syncDir(filepath.Dir(path))
}
