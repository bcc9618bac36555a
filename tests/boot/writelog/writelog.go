// Package writelog reads logs of the writes to a disk, and makes from them the disk as
// it was after any of the writes: what a machine finds that lost its power there.
//
// The format is that of Linux' dm-log-writes target, which QEMU's blklogwrites driver
// writes too. It is described by Documentation/admin-guide/device-mapper/log-writes.rst
// and by the comments of drivers/md/dm-log-writes.c: a sector with the super block, then
// for each entry a sector with its header and as many sectors of data as it has, unless
// it is a discard. The two programs differ in what they know:
//
//   - The kernel logs a write once it has been flushed, QEMU when it is done. So a prefix
//     of QEMU's log has writes in it that a disk with a cache might still lose;
//     see [Log.Durable].
//   - QEMU (before 10) does not log that a write was a FUA write.
//   - The kernel ends the log with a mark, QEMU has no marks.
//
// Left out: writing logs, and telling what the bytes mean.
package writelog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
)

// ErrFormat: the log is not one, or is damaged.
var ErrFormat = errors.New("bad log of writes")

// Constants of drivers/md/dm-log-writes.c.
const (
	magic   = 0x6a736677736872 // WRITE_LOG_MAGIC
	version = 1                // WRITE_LOG_VERSION

	superSize = 28 // struct log_write_super: le64 magic, version, nr_entries; le32 sectorsize
	entrySize = 32 // struct log_write_entry: le64 sector, nr_sectors, flags, data_len
)

// Flags of an entry.
type Flags uint64

const (
	Flush    Flags = 1 << iota // LOG_FLUSH_FLAG
	FUA                        // LOG_FUA_FLAG
	Discard                    // LOG_DISCARD_FLAG
	Mark                       // LOG_MARK_FLAG
	Metadata                   // LOG_METADATA_FLAG
)

// An Entry is one write, flush, discard or mark.
type Entry struct {
	Offset int64 // of the write on the disk, bytes
	Length int64 // bytes
	Flags  Flags
	Text   string // of a mark

	data int64 // where the bytes are in the log
}

// A Log is an open log.
type Log struct {
	Entries    []Entry
	SectorSize int64 // bytes

	r io.ReaderAt
}

// Count returns how many entries the super block of a log tells of. QEMU writes it with
// each flush, so it can be asked while the machine runs. An empty log has none.
func Count(r io.ReaderAt) (int, error) {
	n, _, err := readSuper(r)
	if errors.Is(err, io.EOF) {
		return 0, nil
	}
	return n, err
}

func readSuper(r io.ReaderAt) (entries int, sector int64, err error) {
	b := make([]byte, superSize)
	if _, err := r.ReadAt(b, 0); err != nil {
		return 0, 0, fmt.Errorf("reading the super block: %w", err)
	}
	le := binary.LittleEndian
	if got := le.Uint64(b); got != magic {
		return 0, 0, fmt.Errorf("%w: magic number %#x, want %#x", ErrFormat, got, uint64(magic))
	}
	if got := le.Uint64(b[8:]); got != version {
		return 0, 0, fmt.Errorf("%w: version %d, want %d", ErrFormat, got, version)
	}
	n, size := le.Uint64(b[16:]), le.Uint32(b[24:])
	if size < 512 || size > 1<<23 || size&(size-1) != 0 {
		return 0, 0, fmt.Errorf("%w: sectors of %d bytes", ErrFormat, size)
	}
	if n > math.MaxInt32 {
		return 0, 0, fmt.Errorf("%w: %d entries", ErrFormat, n)
	}
	return int(n), int64(size), nil
}

// Read reads the headers of a log of size bytes: of the entries that its super block
// counts, so what came after the last flush is not among them.
func Read(r io.ReaderAt, size int64) (*Log, error) {
	n, sector, err := readSuper(r)
	if err != nil {
		return nil, err
	}
	// Each entry takes a sector at least.
	if int64(n) > size/sector {
		return nil, fmt.Errorf("%w: %d entries in %d bytes", ErrFormat, n, size)
	}
	l := &Log{SectorSize: sector, r: r, Entries: make([]Entry, 0, n)}
	pos := sector
	for i := range n {
		e, next, err := l.readEntry(pos, size)
		if err != nil {
			return nil, fmt.Errorf("reading entry %d: %w", i, err)
		}
		l.Entries = append(l.Entries, e)
		pos = next
	}
	return l, nil
}

// readEntry reads the entry at a position of the log, and returns that of the next.
func (l *Log) readEntry(pos, size int64) (Entry, int64, error) {
	if pos > size-l.SectorSize {
		return Entry{}, 0, fmt.Errorf("%w: it would begin at byte %d of %d", ErrFormat, pos, size)
	}
	b := make([]byte, l.SectorSize)
	if _, err := l.r.ReadAt(b, pos); err != nil {
		return Entry{}, 0, err
	}
	le := binary.LittleEndian
	start, count, flags, text := le.Uint64(b), le.Uint64(b[8:]), Flags(le.Uint64(b[16:])), le.Uint64(b[24:])
	if flags >= Metadata<<1 {
		return Entry{}, 0, fmt.Errorf("%w: flags %#x", ErrFormat, uint64(flags))
	}
	limit := uint64(math.MaxInt64 / l.SectorSize)
	if start > limit || count > limit-start {
		return Entry{}, 0, fmt.Errorf("%w: %d sectors from %d", ErrFormat, count, start)
	}
	e := Entry{Offset: int64(start) * l.SectorSize, Length: int64(count) * l.SectorSize, Flags: flags}
	pos += l.SectorSize
	if flags&Mark != 0 {
		// Marks have their text beside the header.
		if text > uint64(l.SectorSize-entrySize) || count != 0 {
			return Entry{}, 0, fmt.Errorf("%w: a mark of %d bytes and %d sectors", ErrFormat, text, count)
		}
		e.Text = string(b[entrySize : entrySize+text])
		return e, pos, nil
	}
	if flags&Discard != 0 {
		return e, pos, nil
	}
	if e.Length > size-pos {
		return Entry{}, 0, fmt.Errorf("%w: %d bytes of data from byte %d of %d", ErrFormat, e.Length, pos, size)
	}
	e.data = pos
	return e, pos + e.Length, nil
}

// Writes reports whether the entry changes the disk.
func (e *Entry) Writes() bool { return e.Length > 0 && e.Flags&Mark == 0 }

// Apply makes on a disk the changes of entries from to to-1. keep, where not nil, tells
// which of them: the others are lost. Discarded sectors become zeroes.
func (l *Log) Apply(disk io.WriterAt, from, to int, keep func(i int) bool) error {
	buf := make([]byte, 1<<20)
	for i := from; i < to; i++ {
		e := &l.Entries[i]
		if !e.Writes() || keep != nil && !keep(i) {
			continue
		}
		for done := int64(0); done < e.Length; {
			b := buf[:min(int64(len(buf)), e.Length-done)]
			if e.Flags&Discard != 0 {
				clear(b)
			} else if _, err := l.r.ReadAt(b, e.data+done); err != nil {
				return fmt.Errorf("reading the data of entry %d: %w", i, err)
			}
			if _, err := disk.WriteAt(b, e.Offset+done); err != nil {
				return fmt.Errorf("making the write of entry %d: %w", i, err)
			}
			done += int64(len(b))
		}
	}
	return nil
}

// Durable returns how many of the first n entries a disk must still have when the power
// fails after the n-th: those before the last flush. Of the others a disk with a cache
// has any, in any order; a write itself may be torn between sectors, which is not told
// apart here.
func (l *Log) Durable(n int) int {
	for n > 0 && l.Entries[n-1].Flags&Flush == 0 {
		n--
	}
	return n
}
