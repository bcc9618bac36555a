package bootloader

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

// grub is GRUB 2, under UEFI and BIOS. Debian's has no command that reads the entries, so
// grub/grub.cfg is made from them: one menuentry each, in the order of the entries.
//
// It counts in grub/grubenv: the variable particle_12 is "3-0", tries left and done, as in
// the name of an entry's file. The menu's script writes the next pair before it loads the
// kernel and takes as the default the first entry that has tries left, so it falls back
// without anyone rewriting it. An entry without a variable has proved good. Where GRUB
// cannot write nothing is counted: an entry that fails would be tried for ever.
type grub struct {
	entryDir
	name string
}

func (l grub) Name() string { return l.name }

// grubTries bounds the script: it has no arithmetic, so each step is a line of its own.
const grubTries = 9

func (l grub) Tries() Tries {
	if why := grubCannotWrite(l.p.Boot); why != "" {
		return Tries{How: "not at all: GRUB cannot write its environment block to " + why}
	}
	return Tries{Max: grubTries, How: "in GRUB's environment block"}
}

func (l grub) cfg() string { return filepath.Join(l.p.Boot, "grub", "grub.cfg") }
func (l grub) env() string { return filepath.Join(l.p.Boot, "grub", "grubenv") }

func grubVar(id string) string { return strings.ReplaceAll(id, "-", "_") }

var grubVarName = regexp.MustCompile(`^particle_[1-9][0-9]{0,8}$`)

// records returns the entries with their counters.
func (l grub) records(warn func(format string, args ...any)) ([]record, error) {
	records, _, err := l.read(warn)
	if err != nil {
		return nil, err
	}
	vars, _, err := readEnv(l.env())
	if err != nil {
		return nil, err
	}
	for i := range records {
		records[i].Counter = parseGrubCounter(getEnv(vars, grubVar(records[i].ID)))
	}
	order(records)
	if !l.startsEFI() {
		startableFirst(records)
	}
	return records, nil
}

// parseGrubCounter reads "LEFT-DONE"; nil for what is no counter of this loader.
func parseGrubCounter(s string) *Counter {
	n, _ := bls.ParseName("x+" + s + bls.Suffix)
	if !n.Counted || grubCounter(n.Left, n.Done) != s || n.Left+n.Done > grubTries {
		return nil
	}
	return &Counter{Left: n.Left, Done: n.Done}
}

func grubCounter(left, done int) string { return fmt.Sprintf("%d-%d", left, done) }

func (l grub) Entries(warn func(format string, args ...any)) ([]Entry, error) {
	records, err := l.records(warn)
	return entriesOf(records), err
}

// startsEFI: "grub" may be either GRUB, and only one of them can.
func (l grub) startsEFI() bool { return l.name == "grub-efi" }

func (l grub) Check(e Entry) error {
	if err := l.checkMenu(&e, l.Tries().Max, l.startsEFI()); err != nil {
		return err
	}
	if _, err := grubArgs(e.Options); err != nil {
		return fmt.Errorf("boot entry %q: %w", e.ID, err)
	}
	return nil
}

func (l grub) Add(e Entry) error {
	if err := l.Check(e); err != nil {
		return err
	}
	value := ""
	if e.Counter != nil {
		value = grubCounter(e.Counter.Left, e.Counter.Done)
	}
	// The counter is there before the entry is: one without a counter would have to be
	// taken for a good one.
	if err := l.setCounter(e.ID, value); err != nil {
		return err
	}
	if err := l.write(&e, nil); err != nil {
		return err
	}
	return l.Sync()
}

func (l grub) setCounter(id, value string) error {
	return changeEnv(l.env(), func(vars []envVar) []envVar { return setEnv(vars, grubVar(id), value) })
}

func (l grub) Remove(id string) error {
	if err := l.remove(id); err != nil {
		return err
	}
	return l.Sync()
}

func (l grub) Good(id string) error {
	if err := l.good(id); err != nil {
		return err
	}
	if err := l.setCounter(id, ""); err != nil {
		return err
	}
	return l.Sync()
}

func (l grub) Sync() error {
	if err := l.tidy(); err != nil {
		return err
	}
	if err := removeTemps(filepath.Dir(l.cfg())); err != nil {
		return err
	}
	records, err := l.records(nil)
	if err != nil {
		return err
	}
	s, err := l.p.settings()
	if err != nil {
		return err
	}
	previous, err := previousMenus(l.cfg())
	if err != nil {
		return err
	}
	listed := records
	if !l.startsEFI() {
		listed = startable(records)
	}
	text, err := grubConfig(listed, s, previous)
	if err != nil {
		return err
	}
	if err := updateFile(l.cfg(), []byte(text)); err != nil {
		return fmt.Errorf("writing GRUB's menu: %w", err)
	}
	// Counters of entries that are gone go last: the old menu may have used them. The
	// block itself has to exist, since GRUB cannot make it.
	err = changeEnv(l.env(), func(vars []envVar) []envVar {
		return slices.DeleteFunc(vars, func(v envVar) bool {
			return grubVarName.MatchString(v.name) && !slices.ContainsFunc(records, func(r record) bool { return grubVar(r.ID) == v.name })
		})
	})
	if err != nil {
		return err
	}
	return settle(l.p.Boot)
}

// grubConfig prints grub.cfg. $prefix is the directory that it is in, and $root the boot
// file system: both are set by whoever loads it.
func grubConfig(records []record, s settings, previous []previousMenu) (string, error) {
	var b strings.Builder
	b.WriteString(madeByUs + "\n\n")
	var counted []string
	for _, r := range records {
		if r.Counter != nil {
			counted = append(counted, grubVar(r.ID))
		}
	}
	if len(counted) > 0 {
		// Only these are taken: the block could set anything else.
		fmt.Fprintf(&b, "load_env %s\n", strings.Join(counted, " "))
	}
	if s.serial != "" {
		fmt.Fprintf(&b, "serial --unit=0 --speed=%s\nterminal_input console serial\nterminal_output console serial\n", s.serial)
	}
	// Under UEFI the kernel draws on the screen as the firmware left it. Under BIOS it
	// gets text mode, which is what there is without a video driver.
	b.WriteString("if [ \"$grub_platform\" = efi ]; then\n  insmod all_video\n  set gfxpayload=keep\nfi\n")
	fmt.Fprintf(&b, "set timeout=%d\n", s.timeout)
	if s.timeout == 0 {
		b.WriteString("set timeout_style=hidden\n")
	} else {
		b.WriteString("set timeout_style=menu\n")
	}
	grubDefault(&b, records, len(records)+len(previous))
	for _, r := range records {
		if err := grubEntry(&b, &r.Entry); err != nil {
			return "", err
		}
	}
	for _, m := range previous {
		fmt.Fprintf(&b, "\nmenuentry %s --id %s {\n  configfile \"$prefix/%s\"\n}\n", grubQuote(m.title), m.id, m.file)
	}
	return b.String(), nil
}

// grubDefault prints the choice of the default: the first entry with tries left, or the
// first one where none has any. "fallback" are those after it: GRUB takes them when a
// kernel cannot be loaded. all counts the menus of the previous system, too.
func grubDefault(b *strings.Builder, records []record, all int) {
	b.WriteString("\n")
	if len(records) == 0 {
		return
	}
	choose := func(i int, indent string) {
		fmt.Fprintf(b, "%sset default=%s\n", indent, records[i].ID)
		var after []string
		for j := i + 1; j < all; j++ {
			after = append(after, fmt.Sprint(j))
		}
		fmt.Fprintf(b, "%sset fallback=\"%s\"\n", indent, strings.Join(after, " "))
	}
	word := "if"
	for i, r := range records {
		if r.Counter == nil {
			if i == 0 {
				choose(i, "")
				return
			}
			b.WriteString("else\n")
			choose(i, "  ")
			b.WriteString("fi\n")
			return
		}
		fmt.Fprintf(b, "%s [ \"$%s\" != %s ]; then\n", word, grubVar(r.ID), grubCounter(0, r.Counter.Left+r.Counter.Done))
		choose(i, "  ")
		word = "elif"
	}
	b.WriteString("else\n")
	choose(0, "  ")
	b.WriteString("fi\n")
}

// grubEntry prints one menuentry.
func grubEntry(b *strings.Builder, e *Entry) error {
	args, err := grubArgs(e.Options)
	if err != nil {
		return fmt.Errorf("boot entry %q: %w", e.ID, err)
	}
	title := e.Title
	if title == "" {
		title = e.ID
	}
	fmt.Fprintf(b, "\nmenuentry %s --id %s {\n", grubQuote(title), e.ID)
	if e.Counter != nil {
		name, word := grubVar(e.ID), "if"
		for left, done := e.Counter.Left+e.Counter.Done, 0; left > 0; left, done = left-1, done+1 {
			fmt.Fprintf(b, "  %s [ \"$%s\" = %s ]; then set %s=%s\n", word, name, grubCounter(left, done), name, grubCounter(left-1, done+1))
			word = "elif"
		}
		if word == "elif" {
			fmt.Fprintf(b, "  fi\n  if [ -n \"$%s\" ]; then save_env %s; fi\n", name, name)
		}
	}
	command := "linux " + grubQuote(e.Linux)
	if e.EFI != "" {
		command = "chainloader " + grubQuote(e.EFI)
	}
	for _, arg := range args {
		command += " " + grubQuote(arg)
	}
	fmt.Fprintf(b, "  %s\n", command)
	if len(e.Initrd) > 0 {
		b.WriteString("  initrd")
		for _, name := range e.Initrd {
			b.WriteString(" " + grubQuote(name))
		}
		b.WriteString("\n")
	}
	if dtb, ok := bls.Last(e.Extra, "devicetree"); ok {
		fmt.Fprintf(b, "  devicetree %s\n", grubQuote(rooted(dtb)))
	}
	b.WriteString("}\n")
	return nil
}

// grubQuote makes one word of a string: nothing is special between single quotes (GRUB
// manual, "Quoting"), so only these themselves are put outside.
func grubQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// grubArgs splits a kernel command line into the arguments of GRUB's "linux".
//
// GRUB makes the command line of them again (grub_create_loader_cmdline of
// grub-core/lib/cmdline.c): it puts an argument that has a blank into double quotes as a
// whole and a backslash before each quote and backslash; newer ones leave "\xHH" alone,
// Debian 13's 2.12 does not. So an argument a="b c" has to become a=b c, which the kernel
// gets as "a=b c" and reads as the same (Linux lib/cmdline.c, next_arg). What would reach
// the kernel changed is an error: ErrEntry.
func grubArgs(options string) ([]string, error) {
	var args []string
	for _, arg := range splitOptions(options) {
		plain, err := unquoteArg(arg)
		if err != nil {
			return nil, err
		}
		if strings.ContainsAny(plain, `'"\`) {
			return nil, fmt.Errorf("kernel argument %q: %w: GRUB would put a backslash before its quotes and backslashes", arg, ErrEntry)
		}
		if strings.ContainsAny(plain, "\t\v\f\r\n") {
			return nil, fmt.Errorf("kernel argument %q: %w: GRUB would not quote its white space", arg, ErrEntry)
		}
		if plain != "" {
			args = append(args, plain)
		}
	}
	return args, nil
}

// splitOptions splits a command line as the kernel does: at white space outside of
// double quotes.
func splitOptions(options string) []string {
	quoted := false
	return strings.FieldsFunc(options, func(r rune) bool {
		if r == '"' {
			quoted = !quoted
		}
		return !quoted && strings.ContainsRune(" \t\n\v\f\r", r)
	})
}

// unquoteArg takes the double quotes away that the kernel does: around the argument, or
// around its value. Others are an error, as is one without an end.
func unquoteArg(arg string) (string, error) {
	name, value, hasValue := strings.Cut(arg, "=")
	inner := func(s string) (string, bool) {
		if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' {
			return s, !strings.Contains(s, `"`)
		}
		return s[1 : len(s)-1], !strings.Contains(s[1:len(s)-1], `"`)
	}
	if strings.HasPrefix(arg, `"`) {
		if s, ok := inner(arg); ok {
			return s, nil
		}
	} else if !hasValue {
		if !strings.Contains(arg, `"`) {
			return arg, nil
		}
	} else if s, ok := inner(value); ok && !strings.Contains(name, `"`) {
		return name + "=" + s, nil
	}
	return "", fmt.Errorf("kernel argument %q: %w: GRUB cannot pass quotes in the middle of one", arg, ErrEntry)
}
