package mount

import (
	"encoding/binary"
	"fmt"
)

// A Support says whether something works here, and why not.
type Support struct {
	OK  bool   `json:"ok"`
	Why string `json:"why,omitempty"` // if not OK: the error, or NotTried
}

// NotTried in Support.Why says that something could not be tried for want of
// something else.
const NotTried = "not tried"

func support(err error) Support {
	if err != nil {
		return Support{Why: err.Error()}
	}
	return Support{OK: true}
}

// Features is what a kernel and the filesystem of one directory can do, found by
// trying. The versions are those of the mainline Linux that brought each.
type Features struct {
	Kernel string `json:"kernel"` // release, as uname(2) has it
	Dir    string `json:"dir"`    // the directory probed: the one asked for or the nearest above that exists

	Privilege Support `json:"privilege"` // this process may mount
	Erofs     Support `json:"erofs"`
	File      Support `json:"file"` // EROFS on a file of Dir without a loop device, 6.12
	// FileStacks says that two overlays fit on an EROFS mounted so. Linux 6.12.63 to
	// 6.18.4 allow one; Options.Loop is the way around.
	FileStacks Support `json:"fileStacks"`
	Loop       Support `json:"loop"` // EROFS on a loop device, 5.8
	Overlay    Support `json:"overlay"`
	DataOnly   Support `json:"dataOnly"`  // data-only lower layers, 6.5
	LayerFds   Support `json:"layerFds"`  // detached mounts as layers, 6.15
	Whiteouts  Support `json:"whiteouts"` // escaped whiteouts and xattrs, for overlays on overlays, 6.8
	VerityOpt  Support `json:"verityOpt"` // overlayfs takes verity=require, 6.6
	FsVerity   Support `json:"fsVerity"`  // files in Dir can have fs-verity
	UserNS     Support `json:"userNs"`    // anybody may make user namespaces
}

// Mountable returns nil if Mount can work, or an error that says what is missing.
func (f *Features) Mountable() error {
	missing := func(what string, s Support) error {
		return fmt.Errorf("mounting composefs images: %w: %s: %s", ErrUnsupported, what, s.Why)
	}
	switch {
	case !f.Privilege.OK:
		return fmt.Errorf("mounting composefs images: no right to mount: %s", f.Privilege.Why)
	case !f.Erofs.OK:
		return missing("EROFS", f.Erofs)
	case !f.File.OK && !f.Loop.OK:
		return missing("EROFS on a file or loop device", f.Loop)
	case !f.Overlay.OK:
		return missing("overlayfs", f.Overlay)
	}
	return nil
}

// Best returns the best verification that a mount with objects in Dir can have,
// and the reason why it is not better.
func (f *Features) Best() (Verification, string) {
	switch {
	case f.Mountable() != nil:
		return None, f.Mountable().Error()
	case !f.FsVerity.OK:
		return Checked, f.FsVerity.Why
	case !f.VerityOpt.OK:
		return Checked, "overlayfs has no verity=require (Linux 6.6): " + f.VerityOpt.Why
	}
	return Enforced, "the kernel checks the image and every file"
}

// emptyImage returns a composefs image of nothing but an empty root directory: one
// block with the headers, a compact inode and its two inline entries (Linux
// Documentation/filesystems/erofs.rst, "On-disk details").
func emptyImage() []byte {
	const (
		inode   = superOffset + superSize
		nid     = inode / 32 // inodes are numbered by their place
		entries = inode + 32
		size    = 2*12 + len(".") + len("..")
	)
	b := make([]byte, 1<<blockBits)
	le := binary.LittleEndian
	le.PutUint32(b, headerMagic)
	le.PutUint32(b[4:], headerVersion)

	super := b[superOffset:]
	le.PutUint32(super, superMagic)
	super[12] = blockBits
	le.PutUint16(super[14:], nid) // root_nid
	le.PutUint64(super[16:], 1)   // inos
	le.PutUint32(super[36:], 1)   // blocks

	le.PutUint16(b[inode:], 2<<1) // i_format: compact, data inline
	le.PutUint16(b[inode+4:], 0o40755)
	le.PutUint16(b[inode+6:], 2) // nlink
	le.PutUint32(b[inode+8:], uint32(size))
	le.PutUint32(b[inode+16:], 1<<32-1) // no data blocks
	le.PutUint32(b[inode+20:], 1)       // ino

	for i, nameoff := range []uint16{2 * 12, 2*12 + 1} {
		e := b[entries+12*i:]
		le.PutUint64(e, nid)
		le.PutUint16(e[8:], nameoff)
		e[10] = 2 // directory
	}
	copy(b[entries+2*12:], "...")
	return b
}
