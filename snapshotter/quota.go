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
	s.projects.Lock() // until the project is in use
	defer s.projects.Unlock()
	project, err := s.freeProject(id)
	if err != nil {
		return s.unlimited(id, err)
	}
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

// unlimit takes away the limit of a snapshot that goes, if it has one: the filesystem
// keeps limits until somebody does.
func (s *Snapshotter) unlimit(id string) {
	project, err := projectOf(s.upper(id))
	if err != nil || project&^projectMask != s.firstProject() {
		return // there is no directory, no project, or not one of ours
	}
	if err := setQuota(s.upper(id), project, 0); err != nil {
		s.log.Warn("taking the limit from a snapshot that is removed", "id", id, "error", err)
	}
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

// projectMask has the bits of a project ID that a root gives as it likes.
const projectMask = 1<<20 - 1

// firstProject returns the first project ID of a root. They begin at a place of its own
// above 2^30, away from those that administrators and kubelet give.
func (s *Snapshotter) firstProject() uint32 {
	return 1<<30 | crc32.ChecksumIEEE([]byte(s.instance))%(1<<10)*(projectMask+1)
}

// freeProject returns a project ID for a snapshot. It follows from the snapshot's, and
// those begin anew after a million: whoever still has it must not share the limit.
func (s *Snapshotter) freeProject(id string) (uint32, error) {
	n, err := strconv.ParseUint(id, 10, 64)
	if err != nil {
		panic(err) // containerd's storage package makes numbers
	}
	const tries = 64
	for try := range uint64(tries) {
		project := s.firstProject() | uint32(n+try)&projectMask
		q, err := getQuota(s.upper(id), project)
		if err != nil {
			return 0, err
		}
		if q.space == 0 && q.inodes == 0 {
			return project, nil
		}
	}
	return 0, fmt.Errorf("limiting snapshot %s: %d project IDs from its own on are in use: %w", id, tries, errdefs.ErrResourceExhausted)
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

// projectOf returns the project that a directory belongs to, 0 for none.
func projectOf(dir string) (uint32, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	get, _ := projectIoctls()
	var x fsxattr
	if err := ioctl(f, get, &x); err != nil {
		return 0, fmt.Errorf("reading the project of %q: %w", dir, err)
	}
	return x.project, nil
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

// setQuota limits the bytes of a project on the filesystem of dir, 0 is no limit.
func setQuota(dir string, project uint32, size int64) error {
	const (
		setQuota     = 0x800008<<8 | 2 // QCMD(Q_SETQUOTA, PRJQUOTA)
		blockLimits  = 1               // QIF_BLIMITS
		bytesInBlock = 1024            // QIF_DQBLKSIZE
	)
	q := ifDqblk{blockHard: uint64((size + bytesInBlock - 1) / bytesInBlock), valid: blockLimits}
	if err := quotactl(dir, setQuota, project, &q); err != nil {
		return fmt.Errorf("setting the quota of project %d: %w", project, err)
	}
	return nil
}

// getQuota returns what a project uses of the filesystem of dir, and its limits.
func getQuota(dir string, project uint32) (q ifDqblk, err error) {
	const getQuota = 0x800007<<8 | 2 // QCMD(Q_GETQUOTA, PRJQUOTA)
	err = quotactl(dir, getQuota, project, &q)
	if errors.Is(err, unix.ENOENT) {
		return ifDqblk{}, nil // XFS knows nothing of it yet
	}
	if err != nil {
		return q, fmt.Errorf("reading the quota of project %d: %w", project, err)
	}
	return q, nil
}

// quotactl is quotactl_fd(2), of Linux 5.14.
func quotactl(dir string, command uint, project uint32, q *ifDqblk) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	_, _, errno := unix.Syscall6(unix.SYS_QUOTACTL_FD, f.Fd(), uintptr(command), uintptr(project), uintptr(unsafe.Pointer(q)), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
