// Package disk makes an empty disk, or the file of one, ready for an installation: the
// partition table, the file systems, and directories in which they can be filled.
//
// Block devices and image files are treated alike. Each partition is reached over a loop
// device at its offset: nodes of partitions come late, and in containers not at all, and
// the kernel need not understand the partition table. The loop devices free themselves
// when the last user is gone, so a killed process leaves at most mounts, which the next
// run on the same disk takes away; after [Isolate] it leaves nothing.
//
// The ESP is not mounted, since kernels without vfat install too: its directory is a
// memory file system of the ESP's size, which [Disk.Finish] copies into a FAT. The FAT is
// made by mkfs.vfat and mtools and accepted when fsck.vfat finds nothing. The FAT32
// writer of go-diskfs 1.9.4 was measured against them with 317 files of 62 MB: it takes
// 1.6 s, not 0.6 s, gives loader.conf and loader.config the same short name, and
// fsck.vfat objects to that, to the ".." of directories and to empty files. The partition
// table is written by go-diskfs, except for the protective MBR, whose length it truncates
// on disks over 2 TiB.
//
// What a disk holds is asked of wipefs, partx and blkid (util-linux): no parser of
// partition tables or superblocks is better tried than libblkid.
//
// Left out: encryption, RAID and LVM, growing or changing what is there, and boot loaders
// (package bootloader).
package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/hostdeploy/bootloader"
)

// Errors of this package; test with errors.Is.
var (
	// ErrNotEmpty: the disk holds something, and Options.Wipe is not set.
	ErrNotEmpty = errors.New("disk is not empty")
	// ErrBusy: the disk, or a part of it, is mounted or used in another way.
	ErrBusy = errors.New("disk is in use")
	// ErrSize: the disk, a partition or a file system is too small for what shall be in it.
	ErrSize = errors.New("too small")
	// ErrMissing: a program is not installed, or the kernel lacks a file system.
	ErrMissing = errors.New("missing on this machine")
	// ErrOptions: the options exclude each other, or the path is no disk.
	ErrOptions = errors.New("bad options for a disk")
	// ErrName: a file cannot be on the ESP as it is.
	ErrName = errors.New("not possible on a FAT file system")
)

// An FS is a type of file system, as mount(8) names it.
type FS string

const (
	Ext4  FS = "ext4" // with the feature verity: the only one but Btrfs that can have fs-verity
	Btrfs FS = "btrfs"
	XFS   FS = "xfs" // has no fs-verity as of Linux 6.18
	vfat  FS = "vfat"
)

// Options say what a disk shall become. The zero value is a disk with a root of ext4 and a
// small ext4 /boot, for this machine's architecture.
type Options struct {
	// Layout is what the boot loader needs.
	Layout bootloader.Layout
	// FS is the root's type; "" is Ext4.
	FS FS
	// Size is the length in bytes of an image file that is missing, empty or wiped; 0
	// keeps the length of one that is there. Block devices have their own.
	Size int64
	// Sector is the length of an image file's sectors, 512 (also if 0) or 4096 bytes: that
	// of the disk it will be copied to. Block devices have their own.
	Sector int
	// BootSize is the length of the ESP, or of /boot, in bytes, 0 for DefaultBootSize.
	BootSize int64
	// RootMin is the least length of the root in bytes; it gets all that is left. 0 asks
	// for what the file system itself needs.
	RootMin int64
	// Arch is the root's architecture as Go names it; "" is that of this program.
	Arch string
	// Wipe erases what the disk holds. Nothing that is in use is ever erased.
	Wipe bool
}

// DefaultBootSize holds kernel and initramfs of some deployments.
const DefaultBootSize = 512 << 20

// A Disk is being made. It has a lock on the device or file (flock(2), as udev respects it)
// until Finish or Close.
type Disk struct {
	// Path is the block device or image file.
	Path string
	// Size is its length in bytes, Sector that of a sector.
	Size   int64
	Sector int
	// Partitions are in the order of their numbers and places.
	Partitions []Partition

	o       Options
	target  *target
	mounts  *mounts
	loops   []*loop
	whole   *loop          // over an image file
	parts   map[Role]*loop // over partitions
	cluster int64          // bytes; of the ESP's FAT
	fatFree int64          // bytes in free clusters of the new FAT
	done    bool
}

// Create partitions a disk, makes its file systems and mounts them. An image file that is
// missing is made; Close removes it unless Finish succeeded. Before anything is changed
// the error is ErrSize, ErrMissing, ErrOptions, ErrBusy, or ErrNotEmpty, which says what
// is there.
func Create(ctx context.Context, path string, o Options) (d *Disk, err error) {
	o, err = o.check()
	if err != nil {
		return nil, err
	}
	if err := o.supported(); err != nil {
		return nil, err
	}
	d = &Disk{Path: path, o: o, parts: map[Role]*loop{}}
	defer func() {
		if err != nil {
			err = fmt.Errorf("preparing disk %q: %w", path, err)
			if cerr := d.Close(); cerr != nil {
				err = fmt.Errorf("%w; then %w", err, cerr)
			}
			d = nil
		}
	}()
	if d.target, err = openTarget(path, o); err != nil {
		return d, err
	}
	d.Path, d.Size, d.Sector = d.target.path, d.target.size, d.target.sector
	// The layout first: a disk that is too small stays as it is.
	if d.Partitions, err = Layout(d.Size, d.Sector, o); err != nil {
		return d, err
	}
	if err := d.target.claim(ctx); err != nil {
		return d, err
	}
	if err := d.target.clear(ctx, o.Wipe); err != nil {
		return d, err
	}
	if err := d.makeIDs(); err != nil {
		return d, err
	}
	if err := writeTable(d.target.f, d.Size, d.Sector, d.Partitions, !o.Layout.ESP); err != nil {
		return d, err
	}
	if err := d.attach(); err != nil {
		return d, err
	}
	if err := d.format(ctx); err != nil {
		return d, err
	}
	return d, d.mount()
}

// attach makes the loop devices.
func (d *Disk) attach() error {
	add := func(off, size int64) (*loop, error) {
		l, err := attachLoop(d.target.f, off, size, d.Sector)
		if err == nil {
			d.loops = append(d.loops, l)
		}
		return l, err
	}
	var err error
	if !d.target.device {
		if d.whole, err = add(0, d.Size); err != nil {
			return err
		}
	}
	for _, p := range d.Partitions {
		if d.parts[p.Role], err = add(p.Start, p.Size); err != nil {
			return err
		}
	}
	return nil
}

// mount mounts the file systems, and a memory file system in the place of the ESP.
func (d *Disk) mount() (err error) {
	if d.mounts, err = newMounts(d.target.key); err != nil {
		return err
	}
	if err := d.mounts.add("root", d.parts[RoleRoot].path, string(d.o.FS), unix.MS_NOATIME, ""); err != nil {
		return err
	}
	if d.o.Layout.ESP {
		// Memory counts pages, which are at least as long as clusters, but not what
		// directories take: that of some dozens is set aside.
		size := d.fatFree - 256<<10
		return d.mounts.add("boot", "particle-esp", "tmpfs", unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID,
			fmt.Sprintf("size=%d,mode=0755", max(size, 1)))
	}
	return d.mounts.add("boot", d.parts[RoleBoot].path, string(Ext4), unix.MS_NOATIME, "")
}

// Root is the directory at which the root file system is mounted.
func (d *Disk) Root() string { return d.mounts.path("root") }

// Boot is the directory to fill with what belongs on the boot file system: that mounted,
// or the one that Finish copies to the ESP. Free tells the truth about both.
func (d *Disk) Boot() string { return d.mounts.path("boot") }

// Partition returns the partition of a role, nil if there is none.
func (d *Disk) Partition(r Role) *Partition {
	for i := range d.Partitions {
		if d.Partitions[i].Role == r {
			return &d.Partitions[i]
		}
	}
	return nil
}

// bootRole is the role of the boot file system.
func (d *Disk) bootRole() Role {
	if d.o.Layout.ESP {
		return RoleESP
	}
	return RoleBoot
}

// BootTarget is where a boot loader is installed; the caller sets Root and Serial.
func (d *Disk) BootTarget() bootloader.Target {
	boot := d.Partition(d.bootRole())
	t := bootloader.Target{
		Boot: d.Boot(), Mounted: !d.o.Layout.ESP,
		Disk: d.Path, Device: d.Path, BootDevice: d.parts[boot.Role].path,
		BootNumber: boot.Number, BootUUID: boot.FSUUID,
	}
	if d.whole != nil {
		t.Device = d.whole.path
	}
	if b := d.Partition(RoleBIOS); b != nil {
		t.BIOSBootStart, t.BIOSBootSize = b.Start, b.Size
	}
	return t
}

// Fstab has the machine's line of /etc/fstab for /boot (fstab(5)). The root has none: the
// kernel's command line names it.
func (d *Disk) Fstab() string {
	if boot := d.Partition(d.bootRole()); boot.Role == RoleESP {
		// Whoever can read kernels' files can read the seed of random numbers beside them.
		return fmt.Sprintf("UUID=%s /boot vfat umask=0077 0 2\n", boot.FSUUID)
	} else {
		return fmt.Sprintf("UUID=%s /boot ext4 defaults 0 2\n", boot.FSUUID)
	}
}

// Finish writes the ESP, unmounts, makes everything durable and has the kernel read the
// partition table. The directories are gone then. After an error Close must be called.
func (d *Disk) Finish(ctx context.Context) error {
	if d.done {
		return nil
	}
	if err := d.finish(ctx); err != nil {
		return fmt.Errorf("finishing disk %q: %w", d.Path, err)
	}
	d.done = true
	return nil
}

func (d *Disk) finish(ctx context.Context) error {
	if d.o.Layout.ESP {
		if err := d.writeESP(ctx); err != nil {
			return fmt.Errorf("writing the ESP: %w", err)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.mounts.close(false); err != nil {
		return err
	}
	if err := d.closeLoops(); err != nil {
		return err
	}
	if err := d.target.sync(); err != nil {
		return err
	}
	d.target.keep = true
	return d.target.close()
}

// closeLoops flushes and frees the loop devices, the last one first.
func (d *Disk) closeLoops() (err error) {
	for len(d.loops) > 0 {
		last := len(d.loops) - 1
		err = errors.Join(err, d.loops[last].close())
		d.loops = d.loops[:last]
	}
	return err
}

// Close gives back all that a disk holds: mounts, loop devices, the lock, and an image
// file that was made here but not finished. It may be called at any time and again.
func (d *Disk) Close() error {
	if d == nil || d.done {
		return nil
	}
	err := errors.Join(d.mounts.close(true), d.closeLoops(), d.target.close())
	if err == nil {
		d.done = true
	}
	return err
}

// settle waits until a condition holds, for at most some seconds: the kernel and udev let
// go of devices a little after they are told to.
func settle(cond func() bool) bool {
	for deadline := time.Now().Add(5 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// syncDir makes the names in a file's directory durable.
func syncDir(path string) error {
	f, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
