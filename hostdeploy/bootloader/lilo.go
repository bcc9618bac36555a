package bootloader

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// lilo is LILO: lilo/lilo.conf is made from the entries, and the program lilo(8) notes
// where on the disk the kernels lie, so it runs after each change; "lilo -R" has an entry
// booted once. Debian has no package of it since 2022, so unlike the others it has been
// tested with a program that stands in for it, never by a boot.
//
// lilo cannot be asked what it is to boot once, so lilo/once has the ID and the kernel's
// boot ID of the time: after the next boot it is over.
type lilo struct{ once }

// lilo's own limit of a label (MAX_IMAGE_NAME).
const liloLabel = 15

func newLilo(p Paths) lilo {
	m := liloMemory{p}
	l := lilo{once{entryDir: entryDir{p}, memory: m}}
	l.menu = m.write
	return l
}

func (lilo) Name() string { return "lilo" }

func (lilo) Tries() Tries { return Tries{Max: 1, How: "by \"lilo -R\""} }

func (l lilo) Check(e Entry) error {
	switch {
	case len(e.Initrd) > 1:
		return fmt.Errorf("boot entry %q: %w: LILO takes one initramfs, got %q", e.ID, ErrEntry, e.Initrd)
	case len(e.ID) > liloLabel:
		return fmt.Errorf("boot entry %q: %w: got %d bytes, LILO takes %d", e.ID, ErrEntry, len(e.ID), liloLabel)
	}
	if err := l.checkMenu(&e, 1, false); err != nil {
		return err
	}
	for _, name := range append([]string{e.Linux}, e.Initrd...) {
		if _, err := l.p.local(name); err != nil {
			return err
		}
	}
	return nil
}

func (l lilo) Add(e Entry) error {
	if err := l.Check(e); err != nil {
		return err
	}
	return l.add(e)
}

type liloMemory struct{ p Paths }

func (m liloMemory) file(name string) string { return filepath.Join(m.p.Boot, "lilo", name) }

// bootID is where the kernel has a number for the time since it was booted (random(4)).
var bootID = "/proc/sys/kernel/random/boot_id"

func (m liloMemory) armed() (string, error) {
	id, _, err := m.note()
	return id, err
}

// note reads lilo/once: "ID BOOT-ID", with "- BOOT-ID" for none and with a word more while
// lilo has not been told. What was noted before the last boot is over.
func (m liloMemory) note() (id string, pending bool, err error) {
	text, err := os.ReadFile(m.file("once"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	} else if err != nil {
		return "", false, fmt.Errorf("reading what LILO boots once: %w", err)
	}
	now, err := os.ReadFile(bootID)
	if err != nil {
		return "", false, fmt.Errorf("reading the boot ID: %w", err)
	}
	words := strings.Fields(string(text))
	if len(words) < 2 || words[1] != strings.TrimSpace(string(now)) {
		return "", false, nil
	}
	if words[0] != "-" {
		id = words[0]
	}
	return id, len(words) > 2, nil
}

func (m liloMemory) setNote(id, more string) error {
	now, err := os.ReadFile(bootID)
	if err != nil {
		return fmt.Errorf("reading the boot ID: %w", err)
	}
	if id == "" {
		id = "-"
	}
	return updateFile(m.file("once"), fmt.Appendf(nil, "%s %s%s\n", id, bytes.TrimSpace(now), more))
}

// pending marks a note that lilo has not been told of.
const pending = " pending"

func (m liloMemory) arm(id string) error {
	if err := m.setNote(id, pending); err != nil {
		return err
	}
	args := []string{"-R"} // without a label it takes one away (lilo(8))
	if id != "" {
		args = append(args, id)
	}
	if err := m.run(args...); err != nil {
		return err
	}
	return m.setNote(id, "")
}

// mend tells lilo what is noted, where a crash came between.
func (m liloMemory) mend() error {
	if err := removeTemps(m.file("")); err != nil {
		return err
	}
	id, late, err := m.note()
	if err != nil || !late {
		return err
	}
	return m.arm(id)
}

func (m liloMemory) run(args ...string) error {
	conf := m.file("lilo.conf")
	if err := step("run", conf); err != nil {
		return err
	}
	return execLilo(append([]string{"-C", conf}, args...)...)
}

// execLilo runs lilo(8).
var execLilo = func(args ...string) error {
	program, err := exec.LookPath("lilo")
	if err != nil {
		return fmt.Errorf("%w: the program lilo is not installed on this system", ErrMissing)
	}
	cmd := exec.Command(program, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("running %q: %w: %s", cmd.Args, err, bytes.TrimSpace(out))
	}
	return nil
}

// write makes lilo.conf and has lilo read it, unless it has read this very one.
func (m liloMemory) write(records []record, def string) error {
	if len(records) == 0 {
		return nil // lilo refuses a menu without kernels: the old one stays
	}
	s, err := m.p.settings()
	if err != nil {
		return err
	}
	disk, err := wholeDisk(m.p.Boot)
	if err != nil {
		return err
	}
	conf, err := liloConfig(records, def, s, disk, m.p)
	if err != nil {
		return err
	}
	if err := updateFile(m.file("lilo.conf"), []byte(conf)); err != nil {
		return fmt.Errorf("writing lilo.conf: %w", err)
	}
	sum := fmt.Appendf(nil, "%x\n", sha256.Sum256([]byte(conf)))
	if done, err := os.ReadFile(m.file("installed")); err == nil && bytes.Equal(done, sum) {
		return nil
	}
	// The new map has nothing to be booted once.
	armed, err := m.armed()
	if err == nil && armed != "" {
		err = m.setNote(armed, pending)
	}
	if err == nil {
		err = m.run()
	}
	if err == nil && armed != "" {
		err = m.arm(armed)
	}
	if err != nil {
		return err
	}
	return updateFile(m.file("installed"), sum)
}

// liloConfig prints lilo.conf (lilo.conf(5) of LILO 24.2). Names are those of the running
// system; "literal" is the whole command line, to which lilo adds nothing.
func liloConfig(records []record, def string, s settings, disk string, p Paths) (string, error) {
	quote := func(s string) string {
		return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`
	}
	var b strings.Builder
	b.WriteString(madeByUs + "\n")
	fmt.Fprintf(&b, "boot = %s\nmap = %s\nlba32\ninstall = menu\nprompt\ntimeout = %d\ndefault = %s\n", disk, filepath.Join(p.Boot, "lilo", "map"), max(1, 10*s.timeout), def)
	if s.serial != "" {
		fmt.Fprintf(&b, "serial = 0,%sn8\n", s.serial)
	}
	for _, r := range records {
		linux, err := p.local(r.Linux)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "\nimage = %s\n  label = %s\n", linux, r.ID)
		if len(r.Initrd) > 0 {
			initrd, err := p.local(r.Initrd[0])
			if err != nil {
				return "", err
			}
			fmt.Fprintf(&b, "  initrd = %s\n", initrd)
		}
		if r.Options != "" {
			fmt.Fprintf(&b, "  literal = %s\n", quote(r.Options))
		}
	}
	return b.String(), nil
}

// local returns where this system has a file of the boot file system.
func (p Paths) local(name string) (string, error) {
	rel, err := filepath.Rel(path.Join("/", p.Prefix), name)
	if err != nil || !filepath.IsLocal(rel) {
		return "", fmt.Errorf("finding %q on the boot file system: %w: it is not below %q", name, ErrEntry, p.Prefix)
	}
	return filepath.Join(p.Boot, rel), nil
}

// wholeDisk returns the disk that a directory's file system is a partition of.
var wholeDisk = func(dir string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", fmt.Errorf("finding the disk of %q: %w", dir, err)
	}
	return diskOf("/sys", unix.Major(st.Dev), unix.Minor(st.Dev))
}

func diskOf(sys string, major, minor uint32) (string, error) {
	link, err := filepath.EvalSymlinks(filepath.Join(sys, "dev", "block", fmt.Sprintf("%d:%d", major, minor)))
	if err != nil {
		return "", fmt.Errorf("finding the disk of block device %d:%d: %w", major, minor, err)
	}
	if _, err := os.Stat(filepath.Join(link, "partition")); err == nil {
		link = filepath.Dir(link)
	}
	return "/dev/" + strings.ReplaceAll(filepath.Base(link), "!", "/"), nil
}

// liloInstaller prepares a boot file system. lilo itself writes the master boot record,
// and cannot without a kernel: the first entry does it, with the lilo of the system that
// runs.
type liloInstaller struct{}

func (liloInstaller) Layout() Layout { return Layout{Active: true, Ext4Options: plainExt4} }

func (liloInstaller) Install(ctx context.Context, t Target) error {
	if _, err := haveProgram(t.Root, "lilo", "lilo"); err != nil {
		return fmt.Errorf("installing LILO: %w", err)
	}
	if !t.Mounted {
		return fmt.Errorf("installing LILO: %w: the boot file system must be mounted", ErrTarget)
	}
	if err := (Paths{Boot: t.Boot}).installSettings(t.Serial); err != nil {
		return fmt.Errorf("installing LILO: %w", err)
	}
	return settle(t.Boot)
}
