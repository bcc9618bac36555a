package bootloader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

// settings are what the menus of all loaders have besides the entries.
//
// The timeout is that of loader/loader.conf (loader.conf(5)), whatever the loader. What
// systemd-boot has no word for is in loader/particle.conf, in the same form: "serial" is
// the speed of the first serial line, where the menu is shown, too.
type settings struct {
	// timeout is how long the menu is shown, in seconds; 0 shows none.
	timeout int
	// serial is "" for no serial line.
	serial string
}

const defaultTimeout = 3

func (p Paths) loaderConf() string   { return filepath.Join(p.Boot, "loader", "loader.conf") }
func (p Paths) particleConf() string { return filepath.Join(p.Boot, "loader", "particle.conf") }

func (p Paths) settings() (settings, error) {
	s := settings{timeout: defaultTimeout}
	fields, err := readFields(p.loaderConf())
	if err != nil {
		return s, err
	}
	if v, ok := bls.Last(fields, "timeout"); ok {
		if n, err := strconv.Atoi(v); err == nil && n >= 0 && n <= 3600 {
			s.timeout = n
		} else if v == "menu-hidden" || v == "menu-disabled" {
			s.timeout = 0
		}
	}
	if fields, err = readFields(p.particleConf()); err != nil {
		return s, err
	}
	if v, ok := bls.Last(fields, "serial"); ok {
		if err := checkSerial(v); err != nil {
			return s, fmt.Errorf("reading %q: %w", p.particleConf(), err)
		}
		s.serial = v
	}
	return s, nil
}

// checkSerial checks the speed of a serial line. The error is ErrMenu.
func checkSerial(speed string) error {
	if n, err := strconv.Atoi(speed); err != nil || n < 75 || n > 4000000 {
		return fmt.Errorf("%w: %q is no speed of a serial line, as 115200", ErrMenu, speed)
	}
	return nil
}

func readFields(name string) ([]bls.Field, error) {
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("reading the loader's settings: %w", err)
	}
	return bls.Parse(string(text)), nil
}

// installSettings writes both files for a new boot file system, and the directory of
// entries. A loader.conf that is there is someone's choice.
func (p Paths) installSettings(serial string) error {
	if err := (entryDir{p}).makeDir(); err != nil {
		return err
	}
	if serial != "" {
		if err := checkSerial(serial); err != nil {
			return err
		}
	}
	if _, err := os.Stat(p.loaderConf()); errors.Is(err, fs.ErrNotExist) {
		if err := updateFile(p.loaderConf(), fmt.Appendf(nil, "%-10s %d\n", "timeout", defaultTimeout)); err != nil {
			return fmt.Errorf("writing the loader's settings: %w", err)
		}
	} else if err != nil {
		return fmt.Errorf("reading the loader's settings: %w", err)
	}
	if serial == "" {
		return nil
	}
	if err := updateFile(p.particleConf(), []byte(fmt.Sprintf("%-10s %s\n", "serial", serial))); err != nil {
		return fmt.Errorf("writing the loader's settings: %w", err)
	}
	return nil
}

// freeOrder makes comments of those lines of loader.conf that would have systemd-boot
// take another entry than the first one.
func (p Paths) freeOrder() error {
	fields, err := readFields(p.loaderConf())
	if err != nil {
		return err
	}
	overrides := func(f bls.Field) bool { return f.Key == "default" || f.Key == "preferred" }
	if !slices.ContainsFunc(fields, overrides) {
		return nil
	}
	for i, f := range fields {
		if overrides(f) {
			fields[i] = bls.Field{Key: bls.Comment, Value: fmt.Sprintf(" %s %s (Particle: the first entry is the default)", f.Key, f.Value)}
		}
	}
	text, err := bls.Format(fields)
	if err != nil {
		return fmt.Errorf("writing %q: %w", p.loaderConf(), err)
	}
	return replaceFile(p.loaderConf(), []byte(text))
}
