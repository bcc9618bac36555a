package hostdeploy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// tempSuffix ends the names of what is not finished: it may be removed by whoever has
// the lock.
const tempSuffix = ".tmp"

// writeFile writes a file so that a power loss leaves the old one, or none, or all of
// the new one.
func writeFile(name string, data []byte, mode os.FileMode) error {
	tmp := name + tempSuffix
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, name)
	}
	if err != nil {
		os.Remove(tmp)
		return err
	}
	return syncDir(filepath.Dir(name))
}

// copyDurably writes size bytes of r to a new file and makes them durable; the
// directory entry is not, yet.
func copyDurably(name string, r io.Reader, size int64) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, r)
	if err == nil && n != size {
		err = fmt.Errorf("got %d bytes, want %d", n, size)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		os.Remove(name)
	}
	return err
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("making the names in %q durable: %w", dir, err)
	}
	return nil
}

// syncFS makes all that was written to the file system of a directory durable.
func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("making the file system of %q durable: %w", dir, err)
	}
	return nil
}

// removeTree takes a directory out of sight at once and then removes it.
func removeTree(dir string) error {
	gone := dir + ".gone" + tempSuffix
	if err := removeAll(gone); err != nil {
		return err
	}
	if err := os.Rename(dir, gone); err != nil {
		if os.IsNotExist(err) {
			return nil
		}
		return err
	}
	if err := syncDir(filepath.Dir(dir)); err != nil {
		return err
	}
	return removeAll(gone)
}

// removeAll is os.RemoveAll, also for files that somebody has made immutable or append-only
// (chattr +i /etc/resolv.conf).
func removeAll(dir string) error {
	err := os.RemoveAll(dir)
	if !errors.Is(err, fs.ErrPermission) {
		return err
	}
	werr := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() && !e.Type().IsRegular() {
			return err // nothing else has these flags
		}
		return thaw(path)
	})
	return errors.Join(werr, os.RemoveAll(dir))
}

// unchangeable are FS_IMMUTABLE_FL and FS_APPEND_FL of linux/fs.h.
const unchangeable = 0x10 | 0x20

func thaw(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&unchangeable == 0 {
		return nil // a file system without flags, or a file without these
	}
	if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags&^unchangeable)); err != nil {
		return fmt.Errorf("making %q one that can be removed: %w", path, err)
	}
	return nil
}
