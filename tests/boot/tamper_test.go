package boot

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/diskfs/go-diskfs"
	"github.com/diskfs/go-diskfs/partition/gpt"

	"github.com/particle-os/particle/tests/boot/vm"
)

// A partition of a disk's file, in bytes.
type partition struct {
	name        string
	start, size int64
}

// partitions reads a disk's partition table.
func partitions(t testing.TB, disk string) []partition {
	t.Helper()
	d, err := diskfs.Open(disk, diskfs.WithOpenMode(diskfs.ReadOnly))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	table, err := d.GetPartitionTable()
	if err != nil {
		t.Fatal(err)
	}
	var parts []partition
	for _, p := range table.(*gpt.Table).Partitions {
		if p.Type != gpt.Unused {
			parts = append(parts, partition{p.Name, p.GetStart(), p.GetSize()})
		}
	}
	return parts
}

// rootPartition returns the physical root's, which is the last.
func rootPartition(t testing.TB, disk string) partition {
	t.Helper()
	parts := partitions(t, disk)
	p := parts[len(parts)-1]
	if !strings.HasSuffix(p.name, "root") {
		t.Fatalf("the last of the partitions %+v is not the root", parts)
	}
	return p
}

// copyDisk makes a copy of a disk's file that shares or leaves out what it can.
func copyDisk(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(dirFor(t), "disk.raw")
	run(t, "cp", "--sparse=always", "--reflink=auto", from, to)
	return to
}

// debugfs runs a command on the ext4 of a partition.
func debugfs(t testing.TB, disk string, p partition, command string) string {
	t.Helper()
	return run(t, "debugfs", "-R", command, fmt.Sprintf("%s?offset=%d", disk, p.start))
}

// spoil changes a byte of a file of the physical root on the disk, below the file system:
// what a bad disk does, or somebody with a screwdriver.
func spoil(t testing.TB, disk, file string, offset int64) {
	t.Helper()
	p := rootPartition(t, disk)
	const block = 4096
	out := debugfs(t, disk, p, fmt.Sprintf("bmap %s %d", file, offset/block))
	n, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil || n == 0 {
		t.Fatalf("finding block %d of %s: %q", offset/block, file, out)
	}
	f, err := os.OpenFile(disk, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	at := p.start + n*block + offset%block
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x55
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// "Tampering in the VM: a changed object, a changed image, a swapped digest on the
// command line: the kernel or the initramfs refuses, and the console says so."
func TestTampering(t *testing.T) {
	need(t, essential, "debugfs", "mcopy", "mdir")
	l := loaders[0]
	golden := goldenDisk(t, l)
	// Where the things are, from the machine itself.
	m := boot(t, l)
	d := m.status().booted(t)
	hex := d.hex()
	const victim = "/usr/share/particle-test/numbers"
	object := m.objectOf(victim)
	size, err := strconv.ParseInt(m.sh("stat -c %%s /sysroot/composefs/objects/%s/%s", object[:2], object[2:]), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	imageSize, err := strconv.ParseInt(m.sh("stat -L -c %%s /sysroot/composefs/images/%s", hex), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	m.off()

	t.Run("object", func(t *testing.T) {
		disk := copyDisk(t, golden)
		spoil(t, disk, "/composefs/objects/"+object[:2]+"/"+object[2:], size/2)
		m := start(t, l, vm.Disk{File: disk})
		m.login()
		m.fails("cat "+victim, "Input/output error")
		m.expectLog(regexp.MustCompile(`fs-verity .*FILE CORRUPTED`))
		// The rest of the system is as it was.
		m.equal("cat /usr/share/particle-test/version", "1")
		// fsck asks for digests, which the kernel answers from the tree of hashes; scrub reads.
		m.sh("particle store fsck")
		r := m.try("particle store scrub")
		if r.Status == 0 || !strings.Contains(r.Stdout+r.Stderr, object[:2]+"/"+object[2:]) {
			t.Errorf("store scrub: status %d\n%s%s", r.Status, r.Stdout, r.Stderr)
		}
	})
	t.Run("image", func(t *testing.T) {
		disk := copyDisk(t, golden)
		spoil(t, disk, "/composefs/objects/"+hex[:2]+"/"+hex[2:], 1024+3)
		m := start(t, l, vm.Disk{File: disk})
		m.refused()
	})
	t.Run("image-middle", func(t *testing.T) {
		// Whatever of the metadata is hit: the kernel does not hand it out.
		disk := copyDisk(t, golden)
		spoil(t, disk, "/composefs/objects/"+hex[:2]+"/"+hex[2:], imageSize/2)
		m := start(t, l, vm.Disk{File: disk})
		if m.expect(regexp.MustCompile(`fs-verity .*FILE CORRUPTED`), loginPrompt, cannotBoot) == 1 {
			m.try("find / -xdev -ls >/dev/null; sync")
			m.expectLog(regexp.MustCompile(`fs-verity .*FILE CORRUPTED`))
		}
	})
	t.Run("digest", func(t *testing.T) {
		disk := copyDisk(t, golden)
		other := strings.Repeat("0123456789abcdef", 4)
		editESP(t, disk, func(entry []byte) []byte {
			if !bytes.Contains(entry, []byte(hex)) {
				t.Fatalf("the entry does not name %s:\n%s", hex, entry)
			}
			return bytes.ReplaceAll(entry, []byte(hex), []byte(other))
		})
		m := start(t, l, vm.Disk{File: disk})
		if text := m.refused(); !strings.Contains(text, other[:12]) {
			t.Errorf("the console says %q, which does not name the digest", text)
		}
	})
	t.Run("other-object", func(t *testing.T) {
		// The digest of a file that is there and no image.
		disk := copyDisk(t, golden)
		editESP(t, disk, func(entry []byte) []byte { return bytes.ReplaceAll(entry, []byte(hex), []byte(object)) })
		m := start(t, l, vm.Disk{File: disk})
		m.refused()
	})
}

// objectOf finds the object that has a file's content.
func (m *machine) objectOf(file string) string {
	m.t.Helper()
	sum := m.sh("sha256sum <%s | cut -d' ' -f1", file)
	size := m.sh("stat -c %%s %s", file)
	out := m.sh("cd /sysroot/composefs/objects && find . -type f -size %sc -exec sha256sum {} + | grep ^%s | cut -d/ -f2,3 | tr -d /", size, sum)
	if len(out) != 64 {
		m.t.Fatalf("the object of %s: %q", file, out)
	}
	return out
}

// refused waits until the initramfs has said that it does not boot, and returns what it
// said. No login prompt may come.
func (m *machine) refused() string {
	m.t.Helper()
	which, groups, err := m.Console.WaitWithin(interrupted, bootLimit, cannotBoot, loginPrompt)
	if err != nil {
		m.t.Fatal(err)
	}
	if which != 0 {
		m.t.Fatalf("it booted nevertheless:\n%s", m.Console.Tail(60))
	}
	m.t.Logf("the console says: %s", groups[0])
	return groups[0]
}

// expectLog waits until the kernel's log has a line.
func (m *machine) expectLog(expr *regexp.Regexp) {
	m.t.Helper()
	if out := m.sh("dmesg"); !expr.MatchString(out) && !expr.MatchString(m.Console.Text()) {
		m.t.Errorf("neither the kernel's log nor the console has %q:\n%s", expr, m.Console.Tail(30))
	}
	if !expr.MatchString(m.Console.Text()) {
		m.t.Errorf("the console does not show %q", expr)
	}
}

// editESP changes the boot entries on a disk's ESP.
func editESP(t testing.TB, disk string, edit func([]byte) []byte) {
	t.Helper()
	esp := fmt.Sprintf("%s@@%d", disk, partitions(t, disk)[0].start)
	names := strings.Fields(run(t, "mdir", "-b", "-i", esp, "::/loader/entries"))
	if len(names) == 0 {
		t.Fatal("there are no entries on the ESP")
	}
	for _, name := range names {
		file := filepath.Join(dirFor(t), "entry.conf")
		run(t, "mcopy", "-i", esp, name, file)
		entry, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, edit(entry), 0o644); err != nil {
			t.Fatal(err)
		}
		run(t, "mcopy", "-o", "-i", esp, file, name)
	}
}
