package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Contents are what is on a disk.
type Contents struct {
	Path   string `json:"path"`
	Device bool   `json:"device"` // a block device, not a file
	Size   int64  `json:"size"`   // bytes
	// Sector is the length of the sectors in bytes: the device's, or what the partition
	// table of a file was made for.
	Sector int `json:"sector"`
	// Table is the kind of partition table, as "gpt" or "dos"; "" if there is none.
	Table string `json:"table,omitempty"`
	// Signatures are those of partition tables, file systems, swap, RAID, LVM and so on that
	// cover the whole disk.
	Signatures []Signature `json:"signatures,omitempty"`
	Partitions []Partition `json:"partitions,omitempty"`
	// Data: none of these, but the file is not all zeros.
	Data bool `json:"data,omitempty"`
	// InUse says in words what the disk is used for right now.
	InUse []string `json:"inUse,omitempty"`
}

// A Signature is what something is recognised by.
type Signature struct {
	Offset int64  `json:"offset"` // bytes
	Type   string `json:"type"`   // as blkid(8) has it: "gpt", "ext4"
	UUID   string `json:"uuid,omitempty"`
	Label  string `json:"label,omitempty"`
}

// Empty reports whether nothing was found that would be lost.
func (c *Contents) Empty() bool {
	return len(c.Signatures) == 0 && len(c.Partitions) == 0 && !c.Data
}

// String says it for people, on one line.
func (c *Contents) String() string {
	var found []string
	for _, s := range c.Signatures {
		if !slices.Contains(found, s.Type) {
			found = append(found, s.Type)
		}
	}
	what := "nothing"
	switch {
	case len(found) > 0:
		what = "found " + strings.Join(found, ", ")
	case len(c.Partitions) > 0:
		what = "found a partition table (" + c.Table + ")"
	case c.Data:
		what = "found data of an unknown kind"
	}
	var parts []string
	for _, p := range c.Partitions {
		s := fmt.Sprintf("%d: %s", p.Number, mibs(p.Size))
		for _, word := range []string{string(p.FS), strconv.Quote(p.Label), strconv.Quote(p.Name)} {
			if word != "" && word != `""` {
				s += " " + word
			}
		}
		parts = append(parts, s)
	}
	if len(parts) > 0 {
		what += " with partitions " + strings.Join(parts, "; ")
	}
	return what
}

// Inspect finds out what is on a block device or in an image file, which it only reads.
func Inspect(ctx context.Context, path string) (*Contents, error) {
	path, err := resolve(path)
	if err != nil {
		return nil, fmt.Errorf("inspecting disk: %w", err)
	}
	// A FIFO must not keep us waiting.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("inspecting disk: %w", err)
	}
	defer f.Close()
	c, err := inspect(ctx, f, path)
	if err != nil {
		return nil, fmt.Errorf("inspecting disk %q: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("inspecting disk %q: %w", path, err)
	}
	if c.InUse, err = uses(&st); err != nil {
		return nil, fmt.Errorf("finding the users of disk %q: %w", path, err)
	}
	return c, nil
}

func inspect(ctx context.Context, f *os.File, path string) (*Contents, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	c := &Contents{Path: path, Sector: 512, Size: fi.Size()}
	switch {
	case fi.Mode().IsRegular():
	case fi.Mode()&fs.ModeDevice != 0 && fi.Mode()&fs.ModeCharDevice == 0:
		c.Device = true
		if c.Size, c.Sector, err = deviceSize(path); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("%w: it is neither a block device nor a file", ErrOptions)
	}
	out, err := run(ctx, "wipefs", "--json", "--no-act", path)
	if err != nil {
		return nil, err
	}
	if c.Signatures, err = parseWipefs(out); err != nil {
		return nil, err
	}
	sectors := []int{c.Sector}
	if !c.Device {
		sectors = []int{512, 4096}
	}
	for _, sector := range sectors {
		if err := c.partitions(ctx, sector); err != nil {
			return nil, err
		}
		if len(c.Partitions) > 0 {
			break
		}
	}
	for _, s := range c.Signatures {
		if c.Table == "" && (s.Type == "gpt" || s.Type == "dos" || s.Type == "PMBR") {
			c.Table = strings.Replace(s.Type, "PMBR", "gpt", 1)
		}
	}
	for i := range c.Partitions {
		if err := c.Partitions[i].probe(ctx, path, c.Size); err != nil {
			return nil, err
		}
	}
	if c.Empty() && !c.Device {
		c.Data, err = hasData(ctx, f)
	}
	return c, err
}

// parseWipefs reads what wipefs --json prints: offsets are strings of hexadecimal digits.
func parseWipefs(out []byte) ([]Signature, error) {
	if len(bytes.TrimSpace(out)) == 0 { // as old versions have it
		return nil, nil
	}
	var list struct {
		Signatures []struct{ Offset, Type, UUID, Label string }
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return nil, fmt.Errorf("reading the output of wipefs: %w", err)
	}
	var signatures []Signature
	for _, s := range list.Signatures {
		off, err := strconv.ParseInt(s.Offset, 0, 64)
		if err != nil {
			return nil, fmt.Errorf("reading the output of wipefs: %w", err)
		}
		signatures = append(signatures, Signature{off, s.Type, s.UUID, s.Label})
	}
	return signatures, nil
}

// partitions asks partx for a table made for sectors of a length.
func (c *Contents) partitions(ctx context.Context, sector int) error {
	out, err := run(ctx, "partx", "--sector-size", strconv.Itoa(sector), "--pairs", "--bytes",
		"--output", "NR,START,SECTORS,NAME,UUID,TYPE,FLAGS,SCHEME", c.Path)
	if exitStatus(err) == 1 {
		return nil // no partition table
	} else if err != nil {
		return err
	}
	for line := range strings.Lines(string(out)) {
		p, scheme, err := parsePartition(strings.TrimSuffix(line, "\n"))
		if err != nil {
			return fmt.Errorf("reading the output of partx: %w", err)
		}
		c.Partitions, c.Table, c.Sector = append(c.Partitions, p), scheme, sector
	}
	return nil
}

// parsePartition reads one line of partx --pairs. Start and length are in sectors of 512
// bytes, whatever the disk has.
func parsePartition(line string) (p Partition, scheme string, err error) {
	pairs, err := parsePairs(line)
	if err != nil {
		return p, "", err
	}
	num := func(key string, unit uint64) int64 {
		n, perr := strconv.ParseUint(pairs[key], 0, 64)
		if perr == nil && n > (1<<63-1)/unit {
			perr = strconv.ErrRange
		}
		if perr != nil && err == nil {
			err = fmt.Errorf("got %s=%q: %w", key, pairs[key], perr)
		}
		return int64(n * unit)
	}
	p = Partition{
		Number: int(num("NR", 1)), Start: num("START", 512), Size: num("SECTORS", 512),
		Name: pairs["NAME"], UUID: pairs["UUID"], Type: pairs["TYPE"],
	}
	if scheme = pairs["SCHEME"]; scheme == "gpt" {
		p.Role = roleOf(p.Type)
		flags, ferr := strconv.ParseUint(pairs["FLAGS"], 0, 64)
		if ferr != nil && err == nil {
			err = fmt.Errorf("got FLAGS=%q: %w", pairs["FLAGS"], ferr)
		}
		p.Active = flags&attrActive != 0
	}
	return p, scheme, err
}

var errPairs = errors.New(`want KEY="VALUE" with \xHH for special characters`)

// parsePairs reads a line of KEY="VALUE" pairs with a space between, as util-linux prints
// them: bytes that are not printable or mean something to a shell are \xHH.
func parsePairs(line string) (pairs map[string]string, err error) {
	pairs = map[string]string{}
	for rest := line; rest != ""; {
		key, value, ok := strings.Cut(rest, `="`)
		if !ok || key == "" {
			return nil, fmt.Errorf("got %q: %w", rest, errPairs)
		}
		value, rest, ok = strings.Cut(value, `"`)
		if !ok {
			return nil, fmt.Errorf("got %q: %w", line, errPairs)
		}
		if pairs[key], err = unescape(value); err != nil {
			return nil, err
		}
		rest = strings.TrimPrefix(rest, " ")
	}
	return pairs, nil
}

// unescape gives \xHH its meaning.
func unescape(value string) (string, error) {
	var b strings.Builder
	for {
		plain, escaped, found := strings.Cut(value, `\`)
		b.WriteString(plain)
		if !found {
			return b.String(), nil
		}
		if len(escaped) < 3 || escaped[0] != 'x' {
			return "", fmt.Errorf("got %q: %w", value, errPairs)
		}
		n, err := strconv.ParseUint(escaped[1:3], 16, 8)
		if err != nil {
			return "", fmt.Errorf("got %q: %w", value, errPairs)
		}
		b.WriteByte(byte(n))
		value = escaped[3:]
	}
}

// probe asks blkid what is in a partition.
func (p *Partition) probe(ctx context.Context, path string, size int64) error {
	if p.Start < 0 || p.Size <= 0 || p.Start >= size {
		return nil // a table that lies, or is for a larger disk
	}
	out, err := run(ctx, "blkid", "--probe", "--output", "udev", "--usages", "filesystem,raid,crypto,other",
		"--offset", strconv.FormatInt(p.Start, 10), "--size", strconv.FormatInt(min(p.Size, size-p.Start), 10), path)
	switch exitStatus(err) {
	case 2: // nothing known
		return nil
	case 8:
		p.FS = "ambivalent" // blkid's word: signatures of several
		return nil
	}
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		// The plain forms have no more than is safe in a file's name.
		switch key {
		case "ID_FS_TYPE":
			p.FS = FS(value)
		case "ID_FS_UUID_ENC":
			p.FSUUID, err = unescape(value)
		case "ID_FS_LABEL_ENC":
			p.Label, err = unescape(value)
		}
		if err != nil {
			return fmt.Errorf("reading the output of blkid: %w", err)
		}
	}
	return nil
}

// hasData reports whether a file has bytes other than zero. Holes are skipped.
func hasData(ctx context.Context, f *os.File) (bool, error) {
	buf, zero := make([]byte, mib), make([]byte, mib)
	for off := int64(0); ; {
		start, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return false, nil
		} else if err != nil {
			return false, fmt.Errorf("looking for data: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return false, err
		}
		n, err := f.ReadAt(buf, start)
		if !bytes.Equal(buf[:n], zero[:n]) {
			return true, nil
		}
		if errors.Is(err, io.EOF) {
			return false, nil
		} else if err != nil {
			return false, err
		}
		off = start + int64(n)
	}
}
