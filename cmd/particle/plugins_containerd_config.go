package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// A containerdConfig is what containerd's own files say, without ours.
type containerdConfig struct {
	absent   bool  // there is no config.toml
	version  int64 // of config.toml
	imports  []string
	plugins  map[string]map[string]any // sections by plugin
	usual    string                    // where ours belongs if nothing else is imported
	dropIn   string                    // where it belongs
	imported bool                      // config.toml imports what is there
	ours     []string                  // files that enable wrote
	named    map[string]string         // by which file an import names one, without a pattern
	later    []*containerdFile         // what containerd reads after ours
}

// readConfig reads config.toml and what it imports.
func (b *containerdBridge) readConfig(replaces bool) (*containerdConfig, error) {
	c := &containerdConfig{plugins: map[string]map[string]any{}, usual: b.decl.DropIn, dropIn: b.decl.DropIn, named: map[string]string{}}
	if _, err := os.Stat(b.config); errors.Is(err, fs.ErrNotExist) {
		c.absent = true
		return c, c.findOurs(nil)
	}
	files, err := b.readFiles("")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errContainerdConfig, err)
	}
	c.version, c.imports = files[0].Version, files[0].Imports
	if c.version < 2 {
		return nil, fmt.Errorf("%w: %s is of version 1, which has no room for this\n\"containerd config migrate\" prints it as a later one", errContainerdConfig, b.config)
	}
	// What is in force stays where it is, also by a name that the user gave it.
	at := -1
	for i, f := range files {
		if f.ours {
			at = i
		}
	}
	if at >= 0 {
		c.dropIn, c.imported = files[at].path, true
	} else if c.findDropIn(); c.imported {
		if files, err = b.readFiles(c.dropIn); err != nil {
			return nil, fmt.Errorf("%w: %w", errContainerdConfig, err)
		}
		at = slices.IndexFunc(files, func(f *containerdFile) bool { return f.path == c.dropIn })
	}
	for i, f := range files {
		if i > at && at >= 0 {
			c.later = append(c.later, f)
		}
		for _, path := range f.Imports {
			c.named[absoluteImport(f.path, path)] = f.path
		}
		for plugin, section := range f.Plugins {
			if f.ours {
				break
			}
			if c.plugins[plugin] == nil || replaces {
				c.plugins[plugin] = map[string]any{}
			}
			mergeTables(c.plugins[plugin], section)
		}
	}
	return c, c.findOurs(files)
}

// findOurs looks for files of ours among the imported ones and at the places for them.
func (c *containerdConfig) findOurs(files []*containerdFile) error {
	for _, f := range files {
		if f.ours && !f.missing {
			c.ours = append(c.ours, f.path)
		}
	}
	for _, path := range []string{c.dropIn, c.usual} {
		text, err := readFileIfAny(path)
		if err != nil {
			return err
		}
		if text != nil && strings.HasPrefix(*text, dropInMark) && !slices.Contains(c.ours, path) {
			c.ours = append(c.ours, path)
		}
	}
	return nil
}

// readFiles reads config.toml and what it imports, in containerd's order (LoadConfig in
// services/server/config of 1.x and cmd/containerd/server/config of 2.x): as they are
// named, what is matched by a pattern in order of names, and imports of imports last. A
// drop-in that is not there yet has the place in it that it would have.
func (b *containerdBridge) readFiles(dropIn string) (files []*containerdFile, err error) {
	seen := map[string]bool{}
	for pending := []string{b.config}; len(pending) > 0; {
		path := pending[0]
		pending = pending[1:]
		if seen[path] {
			continue
		}
		seen[path] = true
		f, err := readContainerdFile(path)
		switch {
		case err == nil:
		case errors.Is(err, fs.ErrNotExist) && path == dropIn:
			f = &containerdFile{ours: true, missing: true}
		case errors.Is(err, fs.ErrNotExist) && filepath.Base(path) == filepath.Base(b.decl.DropIn):
			// An import that names what disable has removed: enable mends it.
			continue
		default:
			return nil, err
		}
		f.path = path
		f.ours = f.ours && path != b.config
		files = append(files, f)
		for _, pattern := range f.Imports {
			pattern = absoluteImport(path, pattern)
			if !strings.Contains(pattern, "*") {
				pending = append(pending, pattern)
				continue
			}
			matches, err := filepath.Glob(pattern)
			if err != nil {
				return nil, fmt.Errorf("imports of %s: %w", path, err)
			}
			if here, err := filepath.Match(pattern, dropIn); err == nil && here && !slices.Contains(matches, dropIn) {
				matches = append(matches, dropIn)
				slices.Sort(matches)
			}
			pending = append(pending, matches...)
		}
	}
	return files, nil
}

// A containerdFile is what matters of one file.
type containerdFile struct {
	Version int64                     `toml:"version"`
	Imports []string                  `toml:"imports"`
	Plugins map[string]map[string]any `toml:"plugins"`
	Proxies map[string]map[string]any `toml:"proxy_plugins"`

	path    string
	ours    bool // enable wrote it
	missing bool // enable would
}

func readContainerdFile(path string) (*containerdFile, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var f containerdFile
	if err := toml.Unmarshal(text, &f); err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	f.ours = strings.HasPrefix(string(text), dropInMark)
	return &f, nil
}

// absoluteImport returns what an import of a file means.
func absoluteImport(file, pattern string) string {
	if filepath.IsAbs(pattern) {
		return filepath.Clean(pattern)
	}
	return filepath.Join(filepath.Dir(file), pattern)
}

// findDropIn chooses the directory of the drop-in: the one that config.toml imports
// already, else the usual one. Relative patterns do not count: 1.6 takes them from its
// own working directory.
func (c *containerdConfig) findDropIn() {
	name := filepath.Base(c.dropIn)
	dirs := []string{}
	for _, pattern := range c.imports {
		dir, last := filepath.Split(filepath.Clean(pattern))
		if !filepath.IsAbs(pattern) {
			continue
		}
		if matches, err := filepath.Match(last, name); err == nil && matches && !strings.Contains(dir, "*") {
			dirs = append(dirs, filepath.Clean(dir))
		}
	}
	c.imported = len(dirs) > 0
	if c.imported && !slices.Contains(dirs, filepath.Dir(c.usual)) {
		c.dropIn = filepath.Join(dirs[0], name)
	}
}

// howToImport says what the user has to write into config.toml.
func (c *containerdConfig) howToImport(config string) string {
	pattern := filepath.Join(filepath.Dir(c.dropIn), "*.toml")
	if len(c.imports) == 0 {
		return fmt.Sprintf("%s imports nothing; add this line to it, before the first [table]:\nimports = [%q]", config, pattern)
	}
	var quoted []string
	for _, i := range append(slices.Clone(c.imports), pattern) {
		quoted = append(quoted, strconv.Quote(i))
	}
	return fmt.Sprintf("%s imports other files; make the line that says so:\nimports = [%s]", config, strings.Join(quoted, ", "))
}

// overridden says which values of ours files that are read later replace, "" for none.
// 1.x takes a plugin's section from the last file that has it, 2.x a key; a proxy is
// taken as a whole by all.
func (c *containerdConfig) overridden(ours *containerdFile, replaces bool) string {
	by := map[string]string{} // setting to file
	for _, f := range c.later {
		compare := func(setting string, same bool) {
			if by[setting] = f.path; same {
				delete(by, setting)
			}
		}
		for name, proxy := range ours.Proxies {
			if theirs, ok := f.Proxies[name]; ok {
				compare("proxy_plugins."+name, reflect.DeepEqual(theirs, proxy))
			}
		}
		for plugin, section := range ours.Plugins {
			theirs, ok := f.Plugins[plugin]
			if !ok {
				continue
			}
			for key, value := range section {
				if v, ok := theirs[key]; ok || replaces {
					compare(fmt.Sprintf("%s of %s", key, plugin), reflect.DeepEqual(v, value))
				}
			}
		}
	}
	settings := map[string][]string{} // by file
	for _, s := range slices.Sorted(maps.Keys(by)) {
		settings[by[s]] = append(settings[by[s]], s)
	}
	var lines []string
	for _, path := range slices.Sorted(maps.Keys(settings)) {
		lines = append(lines, fmt.Sprintf("%s is read later than %s and replaces %s; give it a place before, or ours a later name",
			path, c.dropIn, strings.Join(settings[path], ", ")))
	}
	return strings.Join(lines, "\n")
}
