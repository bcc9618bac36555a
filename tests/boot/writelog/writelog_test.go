package writelog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// logOf writes a log as drivers/md/dm-log-writes.c describes it.
func logOf(sector int, entries ...entry) []byte {
	le := binary.LittleEndian
	b := make([]byte, sector)
	le.PutUint64(b, 0x6a736677736872)
	le.PutUint64(b[8:], 1)
	le.PutUint64(b[16:], uint64(len(entries)))
	le.PutUint32(b[24:], uint32(sector))
	for _, e := range entries {
		h := make([]byte, sector)
		le.PutUint64(h, e.sector)
		le.PutUint64(h[8:], e.count)
		le.PutUint64(h[16:], e.flags)
		le.PutUint64(h[24:], uint64(len(e.text)))
		copy(h[32:], e.text)
		b = append(append(b, h...), e.data...)
	}
	return b
}

type entry struct {
	sector, count, flags uint64
	text                 string
	data                 []byte
}

func write(sector uint64, fill ...byte) entry {
	e := entry{sector: sector, count: uint64(len(fill))}
	for _, f := range fill {
		e.data = append(e.data, bytes.Repeat([]byte{f}, 512)...)
	}
	return e
}

// memory is a disk.
type memory []byte

func (m memory) WriteAt(b []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(b)) > int64(len(m)) {
		return 0, io.ErrShortWrite
	}
	return copy(m[off:], b), nil
}

// sectors shows the first byte of each sector.
func (m memory) sectors() string {
	var s strings.Builder
	for i := 0; i < len(m); i += 512 {
		s.WriteByte(m[i])
	}
	return s.String()
}

func TestReplay(t *testing.T) {
	data := logOf(512,
		write(0, 'a', 'a'),
		write(1, 'b'),
		entry{flags: 1}, // flush
		write(3, 'c'),
		entry{sector: 0, count: 1, flags: 4}, // discard
		entry{flags: 8, text: "halfway"},
		write(3, 'd'),
	)
	l, err := Read(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := Count(bytes.NewReader(data)); n != 7 || err != nil {
		t.Errorf("Count is %d, %v", n, err)
	}
	if got := l.Entries[5].Text; got != "halfway" {
		t.Errorf("the mark says %q", got)
	}
	for _, c := range []struct {
		n, durable int
		want       string
	}{
		{0, 0, "...."}, {1, 0, "aa.."}, {2, 0, "ab.."}, {3, 3, "ab.."}, {4, 3, "ab.c"},
		{5, 3, "\x00b.c"}, {6, 3, "\x00b.c"}, {7, 3, "\x00b.d"},
	} {
		disk := memory(bytes.Repeat([]byte{'.'}, 4*512))
		if err := l.Apply(disk, 0, c.n, nil); err != nil {
			t.Fatal(err)
		}
		if got := disk.sectors(); got != c.want {
			t.Errorf("after %d entries the disk is %q, want %q", c.n, got, c.want)
		}
		if got := l.Durable(c.n); got != c.durable {
			t.Errorf("Durable(%d) is %d, want %d", c.n, got, c.durable)
		}
	}
	disk := memory(bytes.Repeat([]byte{'.'}, 4*512))
	if err := l.Apply(disk, 0, 7, func(i int) bool { return i != 1 && i != 6 }); err != nil {
		t.Fatal(err)
	}
	if got := disk.sectors(); got != "\x00a.c" {
		t.Errorf("with two writes lost the disk is %q", got)
	}
}

func TestReadSectorSize(t *testing.T) {
	e := entry{sector: 2, count: 1, data: bytes.Repeat([]byte{'x'}, 4096)}
	data := logOf(4096, e)
	l, err := Read(bytes.NewReader(data), int64(len(data)))
	if err != nil {
		t.Fatal(err)
	}
	if e := l.Entries[0]; e.Offset != 8192 || e.Length != 4096 {
		t.Errorf("the write is of %d bytes at %d", e.Length, e.Offset)
	}
}

func TestReadRefuses(t *testing.T) {
	super := func(change func(b []byte)) []byte {
		b := logOf(512, write(0, 'a'))
		change(b)
		return b
	}
	le := binary.LittleEndian
	for name, data := range map[string][]byte{
		"empty":           nil,
		"short":           logOf(512)[:20],
		"magic":           super(func(b []byte) { b[0]++ }),
		"version":         super(func(b []byte) { b[8] = 2 }),
		"sector size":     super(func(b []byte) { le.PutUint32(b[24:], 1000) }),
		"no sector size":  super(func(b []byte) { le.PutUint32(b[24:], 0) }),
		"too many":        super(func(b []byte) { b[16] = 2 }),
		"far too many":    super(func(b []byte) { le.PutUint64(b[16:], 1<<40) }),
		"flags":           logOf(512, entry{flags: 32}),
		"data missing":    logOf(512, entry{count: 1}),
		"data overflow":   logOf(512, entry{count: 1 << 63}),
		"offset overflow": logOf(512, entry{sector: 1 << 62}),
		"sum overflow":    logOf(512, entry{sector: 1<<54 - 2, count: 4, flags: 4}),
		"mark too long":   super(func(b []byte) { le.PutUint64(b[512+8:], 0); b[512+16] = 8; le.PutUint64(b[512+24:], 481) }),
	} {
		if _, err := Read(bytes.NewReader(data), int64(len(data))); err == nil {
			t.Errorf("%s: no error", name)
		} else if len(data) >= 512 && !errors.Is(err, ErrFormat) {
			t.Errorf("%s: the error is not ErrFormat: %v", name, err)
		}
	}
}

// TestQemu has QEMU's driver log the writes of qemu-io, and makes the disk of each
// moment from them.
func TestQemu(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		t.Skip("there is no qemu-io here (Debian package qemu-utils)")
	}
	dir := t.TempDir()
	const size = 1 << 20
	disk, log := filepath.Join(dir, "disk"), filepath.Join(dir, "log")
	if err := os.WriteFile(disk, bytes.Repeat([]byte{0xee}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// What each command must leave, worked out here.
	r := rand.New(rand.NewPCG(1, 2))
	state := bytes.Repeat([]byte{0xee}, size)
	var states [][]byte
	args := []string{"--image-opts", "-t", "writeback"}
	for i := range 60 {
		off, n := r.IntN(size/512-64)*512, (1+r.IntN(64))*512
		switch {
		case i%7 == 6:
			args = append(args, "-c", "flush")
		default:
			fill := byte(i + 1)
			args = append(args, "-c", strings.Join([]string{"write -P", strconv.Itoa(int(fill)), strconv.Itoa(off), strconv.Itoa(n)}, " "))
			copy(state[off:off+n], bytes.Repeat([]byte{fill}, n))
		}
		states = append(states, bytes.Clone(state))
	}
	args = append(args, "-c", "flush", "driver=blklogwrites,file.driver=file,file.filename="+disk+",log.driver=file,log.filename="+log+",log-sector-size=512")
	if out, err := exec.Command("qemu-io", args...).CombinedOutput(); err != nil {
		t.Fatalf("qemu-io: %v\n%s", err, out)
	}
	f, err := os.Open(log)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	l, err := Read(f, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	if len(l.Entries) < len(states) {
		t.Fatalf("%d entries for %d commands", len(l.Entries), len(states))
	}
	replayed := memory(bytes.Repeat([]byte{0xee}, size))
	for i, want := range states {
		if err := l.Apply(replayed, i, i+1, nil); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(replayed, want) {
			t.Fatalf("after entry %d (%+v) the disk differs", i, l.Entries[i])
		}
		if flush := l.Entries[i].Flags&Flush != 0; flush != (i%7 == 6) {
			t.Errorf("entry %d: flush is %v", i, flush)
		}
	}
	if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, replayed) {
		t.Errorf("the disk itself differs from the last state: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(logOf(512, write(0, 'a', 'b'), entry{flags: 1}, entry{flags: 8, text: "m"}, entry{sector: 1, count: 1, flags: 4}))
	f.Add(logOf(4096))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := Read(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return
		}
		// What is read can be replayed: the log has all the data that its entries promise.
		var total int64
		for i, e := range l.Entries {
			if e.Offset < 0 || e.Length < 0 || e.Offset+e.Length < 0 {
				t.Fatalf("entry %d: %+v", i, e)
			}
			if e.Flags&Discard != 0 {
				continue // has no data, may be of any length
			}
			total += e.Length
			if err := l.Apply(discard{}, i, i+1, nil); err != nil {
				t.Fatalf("entry %d: %v", i, err)
			}
		}
		if total > int64(len(data)) {
			t.Fatalf("%d bytes of data in a log of %d", total, len(data))
		}
		if d := l.Durable(len(l.Entries)); d < 0 || d > len(l.Entries) {
			t.Fatalf("Durable is %d of %d", d, len(l.Entries))
		}
	})
}

type discard struct{}

func (discard) WriteAt(b []byte, _ int64) (int, error) { return len(b), nil }
