package snapshotter

import (
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"runtime"
	"strconv"
	"unsafe"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// parseMaxSize returns the size in bytes to which a snapshot's files are to be
// limited, 0 for no limit.
func parseMaxSize(labels map[string]string) (int64, error) {
	text, ok := labels[snapshots.LabelSnapshotMaxSize]
	if !ok {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("label %s: %q is no size in bytes: %w", snapshots.LabelSnapshotMaxSize, text, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// limit limits what a snapshot's upper directory can take, by a project quota, which
// the root's filesystem must have (ext4 and XFS mounted with prjquota). Where it has
// not, the size is not enforced: containerd's interface asks for no more.
func (s *Snapshotter) limit(id string, size int64) error {
	project := s.project(id)
	for _, dir := range []string{s.upper(id), s.work(id)} {
		if err := setProject(dir, project); err != nil {
			return s.unlimited(id, err)
		}
	}
	if err := setQuota(s.upper(id), project, size); err != nil {
		return s.unlimited(id, err)
	}
	return nil
}

// unlimited tells that a limit cannot be had, and returns other errors.
func (s *Snapshotter) unlimited(id string, err error) error {
	for _, cannot := range []error{unix.ENOTTY, unix.EOPNOTSUPP, unix.ENOSYS, unix.ESRCH, unix.EINVAL} {
		if errors.Is(err, cannot) {
			s.log.Warn("not limiting a snapshot: its filesystem has no project quotas", "id", id, "error", err)
			return nil
		}
	}
	return err
}

// project returns the project ID of a snapshot. The IDs of a root begin at a place of
// its own above 2^30, away from those that administrators and kubelet give.
func (s *Snapshotter) project(id string) uint32 {
	n, err := strconv.ParseUint(id, 10, 64)
	if err != nil {
		panic(err) // containerd's storage package makes numbers
	}
	const bits = 20
	return 1<<30 | crc32.ChecksumIEEE([]byte(s.instance))%(1<<10)<<bits | uint32(n)%(1<<bits)
}

// fsxattr is struct fsxattr of Linux include/uapi/linux/fs.h.
type fsxattr struct {
	flags, extsize, nextents, project, cowextsize uint32
	_                                             [8]byte
}

// projInherit is FS_XFLAG_PROJINHERIT: what is made in a directory has its project.
const projInherit = 0x200

// The ioctls FS_IOC_FSGETXATTR and FS_IOC_FSSETXATTR: _IOR('X', 31, struct fsxattr) and
// _IOW('X', 32, struct fsxattr). The bits of the direction are others on PowerPC and
// MIPS (arch/*/include/uapi/asm/ioctl.h).
func projectIoctls() (get, set uint) {
	const r, w = 2, 1
	shift, read, write := 30, uint(r), uint(w)
	switch runtime.GOARCH {
	case "ppc64", "ppc64le", "mips", "mipsle", "mips64", "mips64le":
		shift, read, write = 29, 2, 4
	}
	const what = unsafe.Sizeof(fsxattr{})<<16 | 'X'<<8
	return read<<shift | uint(what) | 31, write<<shift | uint(what) | 32
}

// setProject makes a directory, and what will be made in it, belong to a project.
func setProject(dir string, project uint32) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	get, set := projectIoctls()
	var x fsxattr
	if err := ioctl(f, get, &x); err != nil {
		return fmt.Errorf("reading the project of %q: %w", dir, err)
	}
	x.project, x.flags = project, x.flags|projInherit
	if err := ioctl(f, set, &x); err != nil {
		return fmt.Errorf("setting the project of %q: %w", dir, err)
	}
	return nil
}

func ioctl(f *os.File, request uint, x *fsxattr) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(x))); errno != 0 {
		return errno
	}
	return nil
}

// ifDqblk is struct if_dqblk of Linux include/uapi/linux/quota.h.
type ifDqblk struct {
	blockHard, blockSoft, space, inodeHard, inodeSoft, inodes, blockTime, inodeTime uint64
	valid                                                                           uint32
	_                                                                               uint32
}

// setQuota limits the bytes of a project on the filesystem of dir (quotactl_fd(2),
// Linux 5.14).
func setQuota(dir string, project uint32, size int64) error {
	const (
		setQuota     = 0x800008<<8 | 2 // QCMD(Q_SETQUOTA, PRJQUOTA)
		blockLimits  = 1               // QIF_BLIMITS
		bytesInBlock = 1024            // QIF_DQBLKSIZE
	)
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	q := ifDqblk{blockHard: uint64((size + bytesInBlock - 1) / bytesInBlock), valid: blockLimits}
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), setQuota, uintptr(project), uintptr(unsafe.Pointer(&q)), 0, 0)
	if errno != 0 {
		return fmt.Errorf("setting the quota of project %d: %w", project, errno)
	}
	return nil
}
