package bootloader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// The auxiliary data vector is what syslinux remembers from boot to boot
// (libinstaller/setadv.c, libinstaller/syslxint.h and core/adv.c of syslinux 6.04): the
// last 1024 bytes of ldlinux.sys, two equal copies of 512 bytes in little-endian order:
//
//	0    u32  0x5a2d2fa5
//	4    u32  checksum: the sum of the words from here up to the last but one is 0xa3041767
//	8    496  items: tag (u8), length (u8), data; tag 0 ends the list
//	508  u32  0xdd28bf64
//
// The loader takes the first copy that is right. It reads and writes the sectors where the
// file lies, so the file is never replaced, only written in place.
const (
	advSize     = 512
	advHead     = 0x5a2d2fa5
	advChecksum = 0xa3041767
	advTail     = 0xdd28bf64
	// advBootOnce is the tag of the label to be booted once.
	advBootOnce = 1
)

type advItem struct {
	tag  byte
	data []byte
}

// parseADV reads both copies. The error is ErrMenu where neither is right.
func parseADV(data []byte) ([]advItem, error) {
	if len(data) != 2*advSize {
		return nil, fmt.Errorf("%w: auxiliary data vector: got %d bytes, want %d", ErrMenu, len(data), 2*advSize)
	}
	for _, c := range [][]byte{data[:advSize], data[advSize:]} {
		if advRight(c) {
			return advItems(c[8 : advSize-4]), nil
		}
	}
	return nil, fmt.Errorf("%w: auxiliary data vector: no copy has the marks and the checksum of one", ErrMenu)
}

func advRight(c []byte) bool {
	if binary.LittleEndian.Uint32(c) != advHead || binary.LittleEndian.Uint32(c[advSize-4:]) != advTail {
		return false
	}
	return advSum(c[4:]) == advChecksum
}

// advSum adds up the words before the mark at the end.
func advSum(c []byte) (sum uint32) {
	for ; len(c) > 4; c = c[4:] {
		sum += binary.LittleEndian.Uint32(c)
	}
	return sum
}

// advItems reads up to the end of the list or to an item that would reach beyond it.
func advItems(data []byte) []advItem {
	var items []advItem
	for len(data) >= 2 && data[0] != 0 && int(data[1])+2 <= len(data) {
		n := int(data[1]) + 2
		items = append(items, advItem{data[0], data[2:n]})
		data = data[n:]
	}
	return items
}

// formatADV prints both copies. The error is ErrMenu where the items do not fit.
func formatADV(items []advItem) ([]byte, error) {
	c := make([]byte, 8, advSize)
	for _, it := range items {
		if it.tag == 0 || len(it.data) > 255 {
			return nil, fmt.Errorf("%w: auxiliary data vector: tag %d with %d bytes, want a tag and at most 255 bytes", ErrMenu, it.tag, len(it.data))
		}
		c = append(append(c, it.tag, byte(len(it.data))), it.data...)
	}
	if len(c) > advSize-4 {
		return nil, fmt.Errorf("%w: auxiliary data vector: no room for %d bytes", ErrMenu, len(c)-8)
	}
	c = c[:advSize]
	binary.LittleEndian.PutUint32(c, advHead)
	binary.LittleEndian.PutUint32(c[advSize-4:], advTail)
	binary.LittleEndian.PutUint32(c[4:], advChecksum-advSum(c[4:]))
	return append(c, c...), nil
}

// advFile is the vector of a ldlinux.sys.
type advFile string

// armed returns the label to be booted once. Without an installed loader, or with a vector
// that it would not read, either, there is none.
func (name advFile) armed() (string, error) {
	items, err := name.read()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrMenu) {
		return "", nil
	} else if err != nil {
		return "", err
	}
	for _, it := range items {
		if it.tag == advBootOnce {
			return string(bytes.TrimRight(it.data, "\x00")), nil
		}
	}
	return "", nil
}

func (name advFile) read() ([]advItem, error) {
	f, err := os.Open(string(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	buf, _, err := readADV(f)
	if err != nil {
		return nil, fmt.Errorf("reading %q: %w", string(name), err)
	}
	return parseADV(buf)
}

// readADV reads the vector of an open ldlinux.sys and tells where it begins.
func readADV(f *os.File) (buf []byte, off int64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if off = fi.Size() - 2*advSize; off < 0 {
		return nil, 0, fmt.Errorf("%w: got %d bytes, too few for ldlinux.sys", ErrMenu, fi.Size())
	}
	buf = make([]byte, 2*advSize)
	_, err = f.ReadAt(buf, off)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return buf, off, err
}

// mend makes the second copy like the first, or the other way round.
func (name advFile) mend() error {
	f, err := os.Open(string(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer f.Close()
	buf, _, err := readADV(f)
	if err != nil || bytes.Equal(buf[:advSize], buf[advSize:]) {
		return nil // no loader, or nothing to do
	}
	id, err := name.armed()
	if err != nil {
		return err
	}
	return name.arm(id)
}

// arm sets the label to be booted once; "" takes it away. The copies are written one after
// the other, each made durable, so that one of them is always right.
func (name advFile) arm(label string) (err error) {
	items, err := name.read()
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: no %q: is extlinux installed there?", ErrMissing, string(name))
	} else if err != nil && !errors.Is(err, ErrMenu) {
		return err
	}
	kept := items[:0]
	for _, it := range items {
		if it.tag != advBootOnce {
			kept = append(kept, it)
		}
	}
	if label != "" {
		kept = append(kept, advItem{advBootOnce, []byte(label)})
	}
	data, err := formatADV(kept)
	if err != nil {
		return err
	}
	thaw, err := thawFile(string(name))
	if err != nil {
		return err
	}
	defer func() {
		if ferr := thaw(); err == nil {
			err = ferr
		}
	}()
	f, err := os.OpenFile(string(name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, off, err := readADV(f)
	if err != nil {
		return err
	}
	for at := 0; at < len(data); at += advSize {
		if err := step("write", string(name)); err != nil {
			return err
		}
		if _, err := f.WriteAt(data[at:at+advSize], off+int64(at)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

// immutable is FS_IMMUTABLE_FL of linux/fs.h.
const immutable = 0x10

// thawFile takes away the flag "immutable", with which extlinux keeps ldlinux.sys in its
// place, and returns what sets it again.
func thawFile(name string) (freeze func() error, err error) {
	none := func() error { return nil }
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&immutable == 0 {
		return none, nil // a file system without flags, or a file without this one
	}
	set := func(flags uint32) error {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(flags)); err != nil {
			return fmt.Errorf("setting the flags of %q: %w", name, err)
		}
		return nil
	}
	if err := set(flags &^ immutable); err != nil {
		return nil, err
	}
	return func() error { return set(flags) }, nil
}
