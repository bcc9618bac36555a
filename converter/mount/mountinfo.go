package mount

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// An Entry is a line of /proc/self/mountinfo (proc_pid_mountinfo(5)), its escapes
// resolved.
type Entry struct {
	ID, Parent   int
	Device       string // major:minor
	Root         string // the directory of the filesystem that is mounted
	Target       string // where, as the process sees it
	Options      string // of the mount, comma-separated
	Type         string // of the filesystem
	Source       string
	SuperOptions string // of the superblock, comma-separated, still escaped: see Option
}

// ParseMountinfo calls fn for each line, in the kernel's order: of several mounts
// at one target the last is the visible one.
func ParseMountinfo(r io.Reader, fn func(Entry) error) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20) // lines with many overlay layers are long
	for n := 1; sc.Scan(); n++ {
		e, err := parseEntry(sc.Text())
		if err != nil {
			return fmt.Errorf("reading mountinfo: line %d: %w", n, err)
		}
		if err := fn(e); err != nil {
			return err
		}
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("reading mountinfo: %w", err)
	}
	return nil
}

// parseEntry reads a line: ID PARENT DEVICE ROOT TARGET OPTIONS [TAG...] - TYPE
// SOURCE SUPEROPTIONS.
func parseEntry(line string) (Entry, error) {
	fields := strings.Split(line, " ")
	sep := -1
	for i := 6; i < len(fields); i++ {
		if fields[i] == "-" {
			sep = i
			break
		}
	}
	if sep < 0 || len(fields) < sep+4 {
		return Entry{}, fmt.Errorf("%.200q has too few fields", line)
	}
	id, err := strconv.Atoi(fields[0])
	if err != nil {
		return Entry{}, fmt.Errorf("mount id: %w", err)
	}
	parent, err := strconv.Atoi(fields[1])
	if err != nil {
		return Entry{}, fmt.Errorf("parent's mount id: %w", err)
	}
	return Entry{
		ID: id, Parent: parent,
		Device:       fields[2],
		Root:         unescape(fields[3]),
		Target:       unescape(fields[4]),
		Options:      fields[5],
		Type:         unescape(fields[sep+1]),
		Source:       unescape(fields[sep+2]),
		SuperOptions: fields[sep+3],
	}, nil
}

// unescape resolves the kernel's \ooo: a backslash and three octal digits. Anything
// else stands for itself.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	b := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && s[i+1] <= '3' && isOctal(s[i+1]) && isOctal(s[i+2]) && isOctal(s[i+3]) {
			b = append(b, (s[i+1]-'0')<<6|(s[i+2]-'0')<<3|(s[i+3]-'0'))
			i += 3
			continue
		}
		b = append(b, s[i])
	}
	return string(b)
}

func isOctal(c byte) bool { return '0' <= c && c <= '7' }

// SuperOption returns the values of a superblock option in their order; one without
// a value is "".
func (e Entry) SuperOption(key string) []string {
	var values []string
	for opt := range strings.SplitSeq(e.SuperOptions, ",") {
		if k, v, _ := strings.Cut(opt, "="); k == key {
			values = append(values, unescape(v))
		}
	}
	return values
}

// A Mounted is a mounted composefs image.
type Mounted struct {
	Target   string   `json:"target"`
	Name     string   `json:"name,omitempty"` // as in Options
	Objects  []string `json:"objects"`
	Upper    string   `json:"upper,omitempty"`
	ReadOnly bool     `json:"readOnly"`
	// Verity says that the kernel checks the files. Whether anybody compared the
	// image's digest is not to be seen from here.
	Verity bool `json:"verity"`
}

// composefs interprets an entry that is a composefs image's overlay: by its source,
// which C mount.composefs and composefs-rs set in the same way.
func (e Entry) composefs() (Mounted, bool) {
	kind, name, _ := strings.Cut(e.Source, ":")
	if e.Type != "overlay" || kind != "composefs" {
		return Mounted{}, false
	}
	m := Mounted{Target: e.Target, Name: name, Objects: e.SuperOption("datadir+")}
	for _, lower := range e.SuperOption("lowerdir") {
		dirs := strings.Split(lower, ":")
		for _, dir := range dirs[1:] {
			if dir != "" { // between two colons
				m.Objects = append(m.Objects, dir)
			}
		}
	}
	if upper := e.SuperOption("upperdir"); len(upper) > 0 {
		m.Upper = upper[0]
	}
	for opt := range strings.SplitSeq(e.Options+","+e.SuperOptions, ",") {
		switch opt {
		case "ro":
			m.ReadOnly = true
		case "verity=require":
			m.Verity = true
		}
	}
	return m, true
}

// List returns the composefs images that this process sees mounted, in the order of
// mounting.
func List() ([]Mounted, error) {
	var list []Mounted
	err := each(func(e Entry) error {
		if m, ok := e.composefs(); ok {
			list = append(list, m)
		}
		return nil
	})
	return list, err
}

func each(fn func(Entry) error) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	return ParseMountinfo(f, fn)
}

// Unmount unmounts a composefs image, and sets its loop device free if it has one.
// While files are open it fails with EBUSY. Anything else than a composefs image at
// target gives ErrNotMounted.
func Unmount(target string) error { return unmount(target, 0) }

// Detach is like Unmount, but where files are open the image goes from view now and
// away when the last one is closed.
func Detach(target string) error { return unmount(target, unix.MNT_DETACH) }

func unmount(target string, flags int) error {
	path, err := filepath.Abs(target)
	if err == nil {
		path, err = filepath.EvalSymlinks(path)
	}
	if err != nil {
		return fmt.Errorf("unmounting: %w", err)
	}
	mounted := false // by the last entry at path, which is on top
	err = each(func(e Entry) error {
		if e.Target == path {
			_, mounted = e.composefs()
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("unmounting %q: %w", target, err)
	}
	if !mounted {
		return fmt.Errorf("unmounting %q: %w", target, ErrNotMounted)
	}
	err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|flags)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("unmounting %q: %w: a process has a file open or its working directory there, or something is mounted below it", target, err)
	}
	if err != nil {
		return fmt.Errorf("unmounting %q: %w", target, err)
	}
	return nil
}
