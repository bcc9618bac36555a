package bootloader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

// extlinuxConf is where extlinux and U-Boot both look.
func (p Paths) extlinuxConf() string { return filepath.Join(p.Boot, "extlinux", "extlinux.conf") }

func (p Paths) ldlinux() string { return filepath.Join(p.Boot, "extlinux", "ldlinux.sys") }

// extlinux is the syslinux of BIOS machines on ext4: extlinux/extlinux.conf, and "once" in
// the auxiliary data vector of extlinux/ldlinux.sys.
type extlinux struct{ once }

func newExtlinux(p Paths) extlinux {
	l := extlinux{once{entryDir: entryDir{p}, memory: advFile(p.ldlinux())}}
	l.menu = l.write
	return l
}

func (extlinux) Name() string { return "extlinux" }

func (extlinux) Tries() Tries {
	return Tries{Max: 1, How: "by \"once\" in the auxiliary data vector of ldlinux.sys"}
}

func (l extlinux) Check(e Entry) error { return l.checkMenu(&e, 1, false) }

func (l extlinux) Add(e Entry) error {
	if err := l.Check(e); err != nil {
		return err
	}
	return l.add(e)
}

func (l extlinux) write(records []record, def string) error {
	s, err := l.p.settings()
	if err != nil {
		return err
	}
	// The menu is a program that Install copies, if the image has it.
	_, err = os.Stat(filepath.Join(l.p.Boot, "extlinux", "menu.c32"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if rerr := removeTemps(filepath.Dir(l.p.extlinuxConf())); rerr != nil {
		return rerr
	}
	previous, perr := previousMenus(l.p.extlinuxConf())
	if perr != nil {
		return perr
	}
	if err := updateFile(l.p.extlinuxConf(), []byte(extlinuxConfig(records, def, s, err == nil, previous))); err != nil {
		return fmt.Errorf("writing the menu of extlinux: %w", err)
	}
	return nil
}

// extlinuxConfig prints the menu (doc/syslinux.txt and doc/menu.txt of syslinux 6.04).
// SERIAL has to be the first directive; TIMEOUT counts tenths of a second, 0 waits for
// ever. What follows APPEND is the command line as it is; "^" in a title would mark a
// letter and cannot be written. CONFIG starts anew with another file of the directory.
func extlinuxConfig(records []record, def string, s settings, menu bool, previous []previousMenu) string {
	var b strings.Builder
	if s.serial != "" {
		fmt.Fprintf(&b, "SERIAL 0 %s\n", s.serial)
	}
	b.WriteString(madeByUs + "\n")
	if menu && s.timeout > 0 {
		b.WriteString("UI menu.c32\n")
	}
	fmt.Fprintf(&b, "PROMPT 0\nTIMEOUT %d\n", max(1, 10*s.timeout))
	if def == "" && len(previous) > 0 {
		def = previous[0].id // the first entry is still to come
	}
	if def != "" {
		fmt.Fprintf(&b, "DEFAULT %s\n", def)
	}
	for _, r := range records {
		fmt.Fprintf(&b, "\nLABEL %s\n", r.ID)
		if title := strings.Trim(strings.ReplaceAll(r.Title, "^", ""), " \t"); title != "" {
			fmt.Fprintf(&b, "  MENU LABEL %s\n", title)
		}
		fmt.Fprintf(&b, "  LINUX %s\n", r.Linux)
		if len(r.Initrd) > 0 {
			fmt.Fprintf(&b, "  INITRD %s\n", strings.Join(r.Initrd, ","))
		}
		if r.Options != "" {
			fmt.Fprintf(&b, "  APPEND %s\n", r.Options)
		}
	}
	for _, m := range previous {
		fmt.Fprintf(&b, "\nLABEL %s\n  MENU LABEL %s\n  CONFIG %s\n", m.id, m.title, m.file)
	}
	return b.String()
}

// uboot is the extlinux.conf of U-Boot's "sysboot" and standard boot (doc/README.pxe and
// boot/pxe_utils.c of U-Boot 2025.01). U-Boot remembers nothing that this program could
// set, so it cannot fall back by itself: with CONFIG_BOOTCOUNT_LIMIT and bootlimit the
// board's own altbootcmd can, for example by "setenv bootcmd" to the second label.
type uboot struct{ entryDir }

func (uboot) Name() string { return "u-boot" }

func (uboot) Tries() Tries {
	return Tries{How: "not at all, unless the board's U-Boot has bootcount, bootlimit and an altbootcmd"}
}

func (l uboot) Entries(warn func(format string, args ...any)) ([]Entry, error) {
	records, _, err := l.read(warn)
	return entriesOf(startableFirst(records)), err
}

func (l uboot) Check(e Entry) error {
	if len(e.Initrd) > 1 {
		return fmt.Errorf("boot entry %q: %w: U-Boot takes one initramfs, got %q", e.ID, ErrEntry, e.Initrd)
	}
	return l.checkMenu(&e, 0, false)
}

func (l uboot) Add(e Entry) error {
	if err := l.Check(e); err != nil {
		return err
	}
	if err := l.write(&e, nil); err != nil {
		return err
	}
	return l.Sync()
}

func (l uboot) Remove(id string) error {
	if err := l.remove(id); err != nil {
		return err
	}
	return l.Sync()
}

func (l uboot) Good(id string) error {
	if err := l.good(id); err != nil {
		return err
	}
	return l.Sync()
}

func (l uboot) Sync() error {
	if err := l.tidy(); err != nil {
		return err
	}
	records, _, err := l.read(nil)
	if err != nil {
		return err
	}
	records = startable(records)
	s, err := l.p.settings()
	if err != nil {
		return err
	}
	dirs := map[string]bool{}
	for _, r := range records {
		dir := path.Join(path.Dir(r.Linux), "dtbs")
		rel, err := filepath.Rel(path.Join("/", l.p.Prefix), dir)
		if err != nil {
			continue
		}
		if fi, err := os.Stat(filepath.Join(l.p.Boot, rel)); err == nil && fi.IsDir() {
			dirs[dir] = true
		}
	}
	if err := removeTemps(filepath.Dir(l.p.extlinuxConf())); err != nil {
		return err
	}
	previous, err := previousMenus(l.p.extlinuxConf())
	if err != nil {
		return err
	}
	if err := updateFile(l.p.extlinuxConf(), []byte(ubootConfig(records, s, dirs, previous))); err != nil {
		return fmt.Errorf("writing the menu of U-Boot: %w", err)
	}
	return settle(l.p.Boot)
}

// ubootConfig prints the menu. dirs are the directories of device trees that there are
// beside kernels, as the loader sees them: U-Boot finds its own board's in one. The
// entry's "devicetree" and "devicetree-overlay" go first.
//
// U-Boot has no menu that leads to another, but "include" takes in the labels of a file.
// Of settings that are there twice the last one counts, so ours come after it.
func ubootConfig(records []record, s settings, dirs map[string]bool, previous []previousMenu) string {
	var b strings.Builder
	b.WriteString(madeByUs + "\n")
	head := fmt.Sprintf("menu title Particle\nprompt 0\ntimeout %d\n", max(1, 10*s.timeout))
	if len(records) > 0 {
		head += fmt.Sprintf("default %s\n", records[0].ID)
	}
	if len(previous) == 0 {
		b.WriteString(head)
	}
	for _, r := range records {
		fmt.Fprintf(&b, "\nlabel %s\n", r.ID)
		if r.Title != "" {
			fmt.Fprintf(&b, "  menu label %s\n", r.Title)
		}
		fmt.Fprintf(&b, "  linux %s\n", r.Linux)
		if len(r.Initrd) > 0 {
			fmt.Fprintf(&b, "  initrd %s\n", r.Initrd[0])
		}
		if dtb, ok := bls.Last(r.Extra, "devicetree"); ok {
			fmt.Fprintf(&b, "  fdt %s\n", rooted(dtb))
		} else if dir := path.Join(path.Dir(r.Linux), "dtbs"); dirs[dir] {
			fmt.Fprintf(&b, "  fdtdir %s\n", dir)
		}
		if overlays, ok := bls.Last(r.Extra, "devicetree-overlay"); ok {
			fmt.Fprintf(&b, "  fdtoverlays %s\n", overlays)
		}
		if r.Options != "" {
			fmt.Fprintf(&b, "  append %s\n", ubootQuote(r.Options))
		}
	}
	if len(previous) > 0 {
		b.WriteString("\n")
		for _, m := range previous {
			fmt.Fprintf(&b, "include %s\n", m.file)
		}
		b.WriteString(head)
	}
	return b.String()
}

// ubootQuote writes a command line so that U-Boot's expansion of variables gives it back
// (cli_simple_process_macros of common/cli_simple.c): a backslash takes the dollar sign,
// quote or backslash after it as it is. The program forgets that a backslash was itself
// taken so, and takes the byte after it as it is, too.
func ubootQuote(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		special := s[i] == '$' || s[i] == '\'' || s[i] == '\\'
		if special && (i == 0 || s[i-1] != '\\') {
			b.WriteByte('\\')
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
