package disk

import (
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// FAT32 (Microsoft, "FAT: General Overview of On-Disk Format", version 1.03).
const (
	// fat32Clusters is the least number of clusters: with fewer it is FAT16.
	fat32Clusters = 65525
	// fatReserved sectors are before the first FAT; there are two, of 4 bytes a cluster.
	fatReserved = 32
	// maxCluster is the length of clusters in bytes that mkfs.vfat would choose too, for
	// an ESP of the usual length. A page in memory has as much.
	maxCluster = 4096
	// fatEntry is the length of a slot in a directory, in bytes; a long name takes one for
	// each 13 UTF-16 units and one for the short name.
	fatEntry, fatUnits, fatName = 32, 13, 255
)

// fatMin is the least length in bytes of a FAT32 on sectors of a length, with a little for
// rounding.
func fatMin(sector int) int64 { return fatNeeds(sector, int64(sector)) }

func fatNeeds(sector int, cluster int64) int64 {
	return (fat32Clusters+16)*(cluster+2*4) + int64((fatReserved+2)*sector)
}

// clusterSize is the length of clusters, in bytes, that a FAT of a size gets.
func clusterSize(size int64, sector int) int64 {
	c := int64(maxCluster)
	for c > int64(sector) && fatNeeds(sector, c) > size {
		c /= 2
	}
	return c
}

// formatESP makes an empty FAT32.
func (d *Disk) formatESP(ctx context.Context, p Partition) error {
	l := d.parts[RoleESP]
	d.cluster = clusterSize(p.Size, d.Sector)
	if _, err := run(ctx, "mkfs.vfat", "-I", "-F", "32", "-S", strconv.Itoa(d.Sector),
		"-s", strconv.FormatInt(d.cluster/int64(d.Sector), 10),
		"-h", strconv.FormatInt(p.Start/int64(d.Sector), 10),
		"-n", p.Label, "-i", strings.ReplaceAll(p.FSUUID, "-", ""), l.path); err != nil {
		return err
	}
	// The BIOS parameter block says how much of it is for files.
	var b [512]byte
	if _, err := l.dev.ReadAt(b[:], 0); err != nil {
		return fmt.Errorf("reading the new FAT: %w", err)
	}
	le := binary.LittleEndian
	sector, cluster := int64(le.Uint16(b[11:])), int64(b[13])*int64(le.Uint16(b[11:]))
	data := int64(le.Uint32(b[32:])) - int64(le.Uint16(b[14:])) - int64(b[16])*int64(le.Uint32(b[36:]))
	if sector != int64(d.Sector) || cluster != d.cluster {
		return fmt.Errorf("mkfs.vfat made sectors of %d and clusters of %d bytes, want %d and %d", sector, cluster, d.Sector, d.cluster)
	}
	d.fatFree = data*sector/cluster*cluster - cluster // one is the root directory's
	return nil
}

// writeESP copies the directory Boot to the ESP and has the FAT checked.
func (d *Disk) writeESP(ctx context.Context) error {
	l, dir := d.parts[RoleESP], d.Boot()
	need, err := checkFAT(ctx, dir, d.cluster)
	if err != nil {
		return err
	}
	if need > d.fatFree {
		return fmt.Errorf("%w: got %s, want %d bytes in clusters of %d", ErrSize, mibs(d.fatFree), need, d.cluster)
	}
	entries, err := os.ReadDir(dir) // in the order of names: the bytes are always the same
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		args := []string{"-s", "-Q", "-m", "-i", l.path}
		for _, e := range entries {
			args = append(args, filepath.Join(dir, e.Name()))
		}
		if _, err := run(ctx, "mcopy", append(args, "::/")...); err != nil {
			return err
		}
	}
	if err := l.dev.Sync(); err != nil {
		return fmt.Errorf("making it durable: %w", err)
	}
	if _, err := run(ctx, "fsck.vfat", "-n", l.path); err != nil {
		return fmt.Errorf("checking the FAT that was written: %w", err)
	}
	return nil
}

// checkFAT tells whether a directory can become the root of a FAT, and how many bytes of
// its clusters that takes. mcopy would change names, and leave out what is no file.
func checkFAT(ctx context.Context, root string, cluster int64) (need int64, err error) {
	slots := map[string]int64{} // of directories: how many
	names := map[string]string{}
	err = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if path == root {
			slots[path] = 1 // the label
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if err := checkName(e.Name()); err != nil {
			return fmt.Errorf("%q: %w", rel, err)
		}
		fold := strings.ToUpper(rel)
		if other, ok := names[fold]; ok {
			return fmt.Errorf("%w: %q and %q differ only in case", ErrName, other, rel)
		}
		names[fold] = rel
		slots[filepath.Dir(path)] += 1 + int64(len(utf16.Encode([]rune(e.Name())))+fatUnits-1)/fatUnits
		switch {
		case e.IsDir():
			slots[path] = 2 // "." and ".."
		case e.Type().IsRegular():
			fi, err := e.Info()
			if err != nil {
				return err
			}
			if fi.Size() > 1<<32-1 {
				return fmt.Errorf("%w: %q has %d bytes, at most %d can be", ErrName, rel, fi.Size(), int64(1<<32-1))
			}
			need += Cost([]int64{fi.Size()}, cluster)
		default:
			return fmt.Errorf("%w: %q is neither a file nor a directory", ErrName, rel)
		}
		return nil
	})
	for path, n := range slots {
		c := Cost([]int64{n * fatEntry}, cluster)
		if path == root {
			c = max(0, c-cluster) // it has one already
		}
		need += c
	}
	return need, err
}

// checkName refuses names that a FAT cannot have (section 7 of the specification).
func checkName(name string) error {
	switch {
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: the name is not UTF-8", ErrName)
	case len(utf16.Encode([]rune(name))) > fatName:
		return fmt.Errorf("%w: the name is longer than %d", ErrName, fatName)
	case strings.HasSuffix(name, ".") || strings.HasSuffix(name, " ") || strings.HasPrefix(name, " "):
		return fmt.Errorf("%w: the name begins or ends with a space, or ends with a dot", ErrName)
	}
	for _, r := range name {
		if r < ' ' || r == 0x7f || strings.ContainsRune(`"*/:<>?\|`, r) {
			return fmt.Errorf("%w: the name has %q", ErrName, r)
		}
	}
	return nil
}

// Cost is the space in bytes that files of these sizes take where space is given out in
// clusters (blocks) of a length. Directories come on top.
func Cost(sizes []int64, cluster int64) (n int64) {
	for _, s := range sizes {
		n += (s + cluster - 1) / cluster * cluster
	}
	return n
}
