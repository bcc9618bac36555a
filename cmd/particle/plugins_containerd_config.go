package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
	dropIn   string                    // where ours belongs
	imported bool                      // config.toml imports what is there
}

// readConfig reads config.toml and what it imports, as containerd does
// (LoadConfig in services/server/config of 1.x and cmd/containerd/server/config of 2.x):
// files in the order in which they are named, what is matched by a pattern in order of
// names, later ones over earlier ones.
func (b *containerdBridge) readConfig(replaces bool) (*containerdConfig, error) {
	c := &containerdConfig{plugins: map[string]map[string]any{}, dropIn: b.decl.DropIn}
	if _, err := os.Stat(b.config); errors.Is(err, fs.ErrNotExist) {
		c.absent = true
		return c, nil
	}
	seen := map[string]bool{}
	for pending := []string{b.config}; len(pending) > 0; {
		path := pending[0]
		pending = pending[1:]
		if seen[path] || path == c.dropIn {
			continue
		}
		seen[path] = true
		f, err := readContainerdFile(path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errContainerdConfig, err)
		}
		if path == b.config {
			c.version = f.Version
			c.imports = f.Imports
			if f.Version < 2 {
				return nil, fmt.Errorf("%w: %s is of version 1, which has no room for this\n\"containerd config migrate\" prints it as a later one", errContainerdConfig, path)
			}
			c.findDropIn()
		}
		for plugin, section := range f.Plugins {
			if c.plugins[plugin] == nil || replaces {
				c.plugins[plugin] = map[string]any{}
			}
			mergeTables(c.plugins[plugin], section)
		}
		for _, pattern := range f.Imports {
			pattern = absoluteImport(path, pattern)
			if !strings.Contains(pattern, "*") {
				pending = append(pending, pattern)
				continue
			}
			matches, err := filepath.Glob(pattern)
			if err != nil {
				return nil, fmt.Errorf("%w: imports of %s: %w", errContainerdConfig, path, err)
			}
			pending = append(pending, matches...)
		}
	}
	return c, nil
}

// A containerdFile is what matters of one file.
type containerdFile struct {
	Version int64                     `toml:"version"`
	Imports []string                  `toml:"imports"`
	Plugins map[string]map[string]any `toml:"plugins"`
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
	usual := filepath.Dir(c.dropIn)
	c.imported = len(dirs) > 0
	if c.imported && !slices.Contains(dirs, usual) {
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
