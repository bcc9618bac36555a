package bootloader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The environment block is how GRUB remembers (grub-core/lib/envblk.c of GRUB 2.12 and
// the GRUB manual, "Environment block"): a file of a fixed size, 1024 bytes, that begins
// with a line of its own, then has "name=value" lines, then "#" up to the end. Lines that
// begin with "#" are comments; in names, values and comments a backslash takes the byte
// after it as it is. GRUB writes into the file's blocks, so neither size nor place change
// while it runs.
const (
	envHeader = "# GRUB Environment Block\n"
	envSize   = 1024
)

// An envVar is one variable, its value without backslashes.
type envVar struct{ name, value string }

// grubCannotWrite says what it is that GRUB cannot write a file of a directory to, "" if
// it can. It overwrites blocks where they lie, which file systems with checksums of their
// data do not take, nor does what it reads LVM and RAID with: grub-mkconfig leaves save_env
// out there, too (util/grub.d/00_header.in of GRUB 2.12).
var grubCannotWrite = func(dir string) string {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Statfs(dir, &fs) != nil || unix.Stat(dir, &st) != nil {
		return ""
	}
	const zfs = 0x2fc12fc1 // ZFS_SUPER_MAGIC of OpenZFS
	switch fs.Type {
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case zfs:
		return "ZFS"
	}
	return stackedOn("/sys", unix.Major(st.Dev), unix.Minor(st.Dev))
}

// stackedOn says what a block device consists of, "" for a plain one.
func stackedOn(sys string, major, minor uint32) string {
	dev := filepath.Join(sys, "dev", "block", fmt.Sprintf("%d:%d", major, minor))
	for dir, what := range map[string]string{"dm": "a device of the device mapper (LVM)", "md": "a RAID", "../md": "a RAID"} {
		// The kernel resolves the link of a partition, so ".." is its disk.
		if fi, err := os.Stat(dev + "/" + dir); err == nil && fi.IsDir() {
			return what
		}
	}
	return ""
}

// parseEnv reads an environment block. The error is ErrMenu.
func parseEnv(data []byte) ([]envVar, error) {
	text, ok := strings.CutPrefix(string(data), envHeader)
	if !ok {
		return nil, fmt.Errorf("%w: GRUB's environment block begins with %q, want %q", ErrMenu, data[:min(len(data), len(envHeader))], envHeader)
	}
	var vars []envVar
	for text != "" {
		line, rest := cutEnvLine(text)
		if name, value, ok := strings.Cut(line, "="); ok && line[0] != '#' {
			vars = append(vars, envVar{name, unescapeEnv(value)})
		}
		text = rest
	}
	return vars, nil
}

// cutEnvLine cuts a line off, which ends at the first line break without a backslash.
func cutEnvLine(text string) (line, rest string) {
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '\\':
			i++
		case '\n':
			return text[:i], text[i+1:]
		}
	}
	return text, ""
}

func unescapeEnv(value string) string {
	var b strings.Builder
	for i := 0; i < len(value); i++ {
		if value[i] == '\\' && i+1 < len(value) {
			i++
		}
		b.WriteByte(value[i])
	}
	return b.String()
}

// formatEnv prints an environment block of size bytes. The error is ErrMenu where the
// variables do not fit.
func formatEnv(vars []envVar, size int) ([]byte, error) {
	escape := strings.NewReplacer("\\", "\\\\", "\n", "\\\n")
	var b strings.Builder
	b.WriteString(envHeader)
	for _, v := range vars {
		b.WriteString(v.name + "=" + escape.Replace(v.value) + "\n")
	}
	if b.Len() > size {
		return nil, fmt.Errorf("%w: GRUB's environment block has room for %d bytes, and %d are needed: take old entries away", ErrMenu, size, b.Len())
	}
	return []byte(b.String() + strings.Repeat("#", size-b.Len())), nil
}

// readEnv reads an environment block. A missing one is empty; so is one that GRUB would
// not read, either: what was in it is lost already.
func readEnv(name string) (vars []envVar, size int, err error) {
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, envSize, nil
	} else if err != nil {
		return nil, 0, fmt.Errorf("reading GRUB's environment block: %w", err)
	}
	vars, err = parseEnv(data)
	if errors.Is(err, ErrMenu) {
		return nil, envSize, nil
	}
	return vars, max(envSize, len(data)), err
}

// changeEnv replaces an environment block by one that change made of it, where they
// differ or there was none.
func changeEnv(name string, change func([]envVar) []envVar) error {
	vars, size, err := readEnv(name)
	if err != nil {
		return err
	}
	next := change(slices.Clone(vars))
	if _, err := os.Stat(name); err == nil && slices.Equal(vars, next) {
		if data, err := os.ReadFile(name); err == nil && strings.HasPrefix(string(data), envHeader) {
			return nil
		}
	}
	data, err := formatEnv(next, size)
	if err != nil {
		return err
	}
	if err := updateFile(name, data); err != nil {
		return fmt.Errorf("writing GRUB's environment block: %w", err)
	}
	return nil
}

// setEnv sets a variable, or takes it away where value is "".
func setEnv(vars []envVar, name, value string) []envVar {
	i := slices.IndexFunc(vars, func(v envVar) bool { return v.name == name })
	switch {
	case value == "":
		return slices.DeleteFunc(vars, func(v envVar) bool { return v.name == name })
	case i < 0:
		return append(vars, envVar{name, value})
	}
	vars[i].value = value
	return vars
}

func getEnv(vars []envVar, name string) string {
	for _, v := range vars {
		if v.name == name {
			return v.value
		}
	}
	return ""
}
