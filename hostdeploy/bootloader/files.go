package bootloader

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Files on a boot file system are written beside their place, made durable and renamed;
// then the directory is made durable, which Linux does on vfat, too.
//
// A name of a file that is not finished begins with a dot and ends in ".tmp": no loader
// takes it for anything. One that a crash left is removed by the next change, with the
// care that FAT needs (see discard).

// step is called before each change of a file system, with what is done and to which
// file, so that tests can end the work there.
var step = func(op, name string) error { return nil }

const (
	tempPrefix = ".particle-"
	tempSuffix = ".tmp"
	filePerm   = 0o644
	dirPerm    = 0o755
)

func isTemp(name string) bool {
	return strings.HasPrefix(name, tempPrefix) && strings.HasSuffix(name, tempSuffix)
}

// replaceFile writes a file so that a power loss leaves the old one or the new one.
func replaceFile(name string, data []byte) error { return replaceFilePerm(name, data, filePerm) }

func replaceFilePerm(name string, data []byte, perm fs.FileMode) error {
	tmp, err := writeTemp(filepath.Dir(name), filepath.Base(name), data, perm)
	if err != nil {
		return fmt.Errorf("writing %q: %w", name, err)
	}
	if err := renameFile(tmp, name); err != nil {
		if step("remove", tmp) == nil {
			os.Remove(tmp)
		}
		return err
	}
	return nil
}

// writeTemp writes a durable file beside where it shall be. Its name was not in use: on
// FAT a file that a crash left may share its clusters with another one, so none is opened
// for writing again.
func writeTemp(dir, base string, data []byte, perm fs.FileMode) (tmp string, err error) {
	var f *os.File
	for n := 0; ; n++ {
		tmp = filepath.Join(dir, fmt.Sprintf("%s%s-%d%s", tempPrefix, base, n, tempSuffix))
		if err := step("create", tmp); err != nil {
			return "", err
		}
		f, err = os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrExist) || n > 100 {
			return "", err
		}
	}
	if err = step("write", tmp); err == nil {
		_, err = f.Write(data)
	}
	if err == nil {
		if err = step("sync", tmp); err == nil {
			err = f.Sync()
		}
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		if step("remove", tmp) == nil {
			os.Remove(tmp)
		}
		return "", err
	}
	return tmp, nil
}

// updateFile is replaceFile for a file that may be what it should be already.
func updateFile(name string, data []byte) error {
	old, err := os.ReadFile(name)
	if err == nil && bytes.Equal(old, data) {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("reading %q: %w", name, err)
	}
	if err := makeDir(filepath.Dir(name)); err != nil {
		return err
	}
	return replaceFile(name, data)
}

func renameFile(from, to string) error {
	if err := step("rename", to); err != nil {
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	// The file before the directory: on FAT a new name leads to an empty file until the
	// file's inode is written (Linux fs/fat/namei_vfat.c, vfat_rename), which making the
	// directory durable does not do.
	if err := syncFile(to); err != nil {
		return err
	}
	return syncDir(filepath.Dir(to))
}

// syncFile makes a file durable that somebody has written.
func syncFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("making %q durable: %w", name, err)
	}
	return nil
}

func removeFile(name string) error {
	if err := step("remove", name); err != nil {
		return err
	}
	if err := os.Remove(name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// makeDir makes a directory and those above it, durably.
func makeDir(dir string) error {
	fi, err := os.Stat(dir)
	if err == nil {
		if !fi.IsDir() {
			return fmt.Errorf("making directory %q: %w", dir, unix.ENOTDIR)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("making directory %q: %w", dir, err)
	}
	if err := makeDir(filepath.Dir(dir)); err != nil {
		return err
	}
	if err := step("mkdir", dir); err != nil {
		return err
	}
	if err := os.Mkdir(dir, dirPerm); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("making directory %q: %w", dir, err)
	}
	return syncDir(filepath.Dir(dir))
}

// syncDir makes the names in a directory durable.
func syncDir(dir string) error {
	if err := step("syncdir", dir); err != nil {
		return err
	}
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("making the names in %q durable: %w", dir, err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("making the names in %q durable: %w", dir, err)
	}
	return nil
}

// ext4Checkpoint is EXT4_IOC_CHECKPOINT, _IOW('f', 43, __u32), of Linux 5.14
// (Documentation/filesystems/ext4/journal.rst): write what is in the journal to its
// place. With flags 0 the journal stays.
const ext4Checkpoint = 0x4004662b

// settle makes what was written visible to a loader that does not read an ext4 journal.
// GRUB, extlinux and U-Boot do not: after fsync(2) and a power loss they would see the
// old directory, whose blocks may hold something else by then. FAT is synced as a whole.
// On other file systems, and where the kernel cannot, nothing more than fsync is done.
func settle(dir string) error {
	if err := step("settle", dir); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("looking at the file system of %q: %w", dir, err)
	}
	if st.Type != unix.EXT4_SUPER_MAGIC && st.Type != unix.MSDOS_SUPER_MAGIC {
		return nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if st.Type == unix.MSDOS_SUPER_MAGIC {
		// A file that is what it should be is not written again: whoever wrote it may have
		// been killed before its name was durable.
		if err := unix.Syncfs(int(f.Fd())); err != nil {
			return fmt.Errorf("making the files in %q durable: %w", dir, err)
		}
		return nil
	}
	err = unix.IoctlSetPointerInt(int(f.Fd()), ext4Checkpoint, 0)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("writing back the journal of %q: %w", dir, err)
	}
	return nil
}

// firstBlock returns where on its disk a file begins, in blocks of the file system; 0 for
// a file without blocks. It needs CAP_SYS_RAWIO.
var firstBlock = func(name string) (uint32, error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	// FIBMAP of linux/fs.h takes the number of a block of the file, here 0, in the place
	// where it puts the answer.
	const fibmap = 1
	n, err := unix.IoctlGetUint32(int(f.Fd()), fibmap)
	if err != nil {
		return 0, fmt.Errorf("finding the first block of %q: %w", name, err)
	}
	return n, nil
}

// isFAT reports whether a directory is on a FAT file system; statfs(2) has one that is
// mounted on demand mounted.
var isFAT = func(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.MSDOS_SUPER_MAGIC
}

// discard takes a file away.
//
// FAT has no atomic rename: a crash in the middle of one, here or in systemd-boot, can
// leave both names, with the same clusters, and removing one name frees the clusters of
// the other. So on FAT a file that is not known to begin where no other file of its
// directory does gets the name of an unfinished file instead: no loader looks at it, and
// fsck.fat(8) sorts it out.
func discard(name string) error {
	dir, base := filepath.Split(name)
	if dir = filepath.Clean(dir); !isFAT(dir) || alone(dir, base) {
		return removeFile(name)
	}
	if isTemp(base) {
		return nil
	}
	for n := 0; ; n++ {
		to := filepath.Join(dir, fmt.Sprintf("%slost-%d%s", tempPrefix, n, tempSuffix))
		if _, err := os.Lstat(to); errors.Is(err, fs.ErrNotExist) {
			return renameFile(name, to)
		} else if err != nil {
			return err
		}
	}
}

// removeTemps removes files that a crash left unfinished.
func removeTemps(dir string) error {
	list, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("looking for unfinished files: %w", err)
	}
	for _, e := range list {
		if isTemp(e.Name()) && e.Type().IsRegular() {
			if err := discard(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("removing an unfinished file: %w", err)
			}
		}
	}
	return nil
}

// alone reports whether a file is known not to share its first cluster.
func alone(dir, name string) bool {
	block, err := firstBlock(filepath.Join(dir, name))
	if err != nil {
		return false
	}
	if block == 0 {
		return true
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, other := range list {
		if other.Name() == name || !other.Type().IsRegular() {
			continue
		}
		b, err := firstBlock(filepath.Join(dir, other.Name()))
		if err != nil || b == block {
			return false
		}
	}
	return true
}
