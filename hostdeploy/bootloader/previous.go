package bootloader

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// On a machine that had another system before, the loader's menu lists that system and is
// about to be replaced. It is saved beside first, durably, and the new menu ends with an
// entry that leads to it: an image that does not come up must not leave a machine that
// does not boot.

// madeByUs is a line of each menu that Particle writes.
const madeByUs = "# Made by Particle from loader/entries: changes are lost."

// previousTitle is what the menus call the old one.
const previousTitle = "Previous system (before Particle)"

// mostPrevious is how many old menus are kept. The first is never replaced: a later one
// may have been made by a program of the image that knows nothing of the old system.
const mostPrevious = 3

// A previousMenu is a saved menu: its ID in the new one, its title and its file's name
// in the directory of the loader.
type previousMenu struct{ id, title, file string }

func newPrevious(n int, ext string) previousMenu {
	m := previousMenu{id: "particle-previous", title: previousTitle}
	if n > 0 {
		m.id, m.title = fmt.Sprintf("%s-%d", m.id, n), fmt.Sprintf("%s, menu %d", m.title, n+1)
	}
	m.file = m.id + ext
	return m
}

// savePrevious saves a menu beside the one that the loader reads, unless Particle made it
// or it is there already. name may be that menu itself or another file that leads to the
// old system.
func savePrevious(menu, name string) error {
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("reading the menu that was there before: %w", err)
	}
	if len(bytes.TrimSpace(text)) == 0 || isOurs(text) {
		return nil
	}
	// Its mode, since it may have passwords in it.
	fi, err := os.Stat(name)
	if err != nil {
		return err
	}
	dir := filepath.Dir(menu)
	for n := range mostPrevious {
		to := filepath.Join(dir, newPrevious(n, filepath.Ext(menu)).file)
		old, err := os.ReadFile(to)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("looking for a menu that was there before: %w", err)
		}
		if err == nil && bytes.Equal(old, text) {
			// Whoever saved it may have been killed before its name was durable.
			return syncDir(dir)
		}
		if err == nil && n < mostPrevious-1 {
			continue
		}
		if err := makeDir(dir); err != nil {
			return err
		}
		if err := replaceFilePerm(to, text, fi.Mode().Perm()); err != nil {
			return fmt.Errorf("saving the menu that was there before: %w", err)
		}
		return nil
	}
	return nil
}

func isOurs(menu []byte) bool {
	for line := range bytes.Lines(menu) {
		if strings.TrimSpace(string(line)) == madeByUs {
			return true
		}
	}
	return false
}

// previousMenus saves the menu, if it is another's, and lists what has been saved.
func previousMenus(menu string) ([]previousMenu, error) {
	if err := savePrevious(menu, menu); err != nil {
		return nil, err
	}
	var list []previousMenu
	for n := range mostPrevious {
		m := newPrevious(n, filepath.Ext(menu))
		if _, err := os.Stat(filepath.Join(filepath.Dir(menu), m.file)); err == nil {
			list = append(list, m)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("looking for a menu that was there before: %w", err)
		}
	}
	return list, nil
}
