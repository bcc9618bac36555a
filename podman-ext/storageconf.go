package podmanext

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// ErrStorageConf says that a storage.conf cannot be edited here.
var ErrStorageConf = errors.New("unfit storage.conf")

// Up to version 5 podman reads one storage.conf and no drop-ins
// (containers-storage.conf(5); types/options.go of go.podman.io/storage), so that file
// has to be edited. The edit is one of lines, each marked, and can be taken back to the
// byte: comments and whatever else the file holds stay as they are.
const (
	storageMark = "# particle plugins"          // ends lines of ours
	storageWas  = "# particle plugins, before:" // begins lines of the user's, put aside
	// Behind the last line of a file that did not end one.
	storageNoEnd = "# particle plugins, the line above was not ended"
)

// Keys of [storage.options].
const (
	keyImageStores = "additionalimagestores"
	keyLayerStores = "additionallayerstores"
)

// AddStores adds directories to additionalimagestores and additionallayerstores in the
// text of a storage.conf, which may be empty. Text that has them is returned as it is.
func AddStores(conf string, imageStores, layerStores []string) (string, error) {
	clean := RemoveStores(conf)
	before, err := parseStorageConf(clean)
	if err != nil {
		return "", err
	}
	out := clean
	for _, add := range []struct {
		key    string
		stores []string
	}{{keyLayerStores, layerStores}, {keyImageStores, imageStores}} {
		if len(add.stores) == 0 {
			continue
		}
		have, err := before.list(add.key)
		if err != nil {
			return "", err
		}
		all := slices.Clone(have)
		for _, s := range add.stores {
			if !slices.Contains(all, s) {
				all = append(all, s)
			}
		}
		if len(all) == len(have) {
			continue // the user's own line does
		}
		if out, err = setList(out, add.key, all); err != nil {
			return "", err
		}
		if err := before.set(add.key, all); err != nil {
			return "", err
		}
	}
	// Lines are edited without understanding TOML: parsing again shows whether what came
	// out is what was meant, and nothing else.
	after, err := parseStorageConf(out)
	if err != nil {
		return "", fmt.Errorf("%w; add the stores by hand", err)
	}
	if !reflect.DeepEqual(before, after) || RemoveStores(out) != clean {
		return "", fmt.Errorf("%w: [storage.options] is written in a way that cannot be edited; add the stores by hand", ErrStorageConf)
	}
	return out, nil
}

// RemoveStores takes back what AddStores did to a text.
func RemoveStores(conf string) string {
	var b strings.Builder
	for line := range strings.Lines(conf) {
		text, end := strings.CutSuffix(line, "\n")
		switch {
		case strings.HasPrefix(text, storageWas):
			b.WriteString(strings.TrimPrefix(text, storageWas))
			if end {
				b.WriteString("\n")
			}
		case text == storageNoEnd:
			ended := strings.TrimSuffix(b.String(), "\n")
			b.Reset()
			b.WriteString(ended)
		case strings.HasSuffix(text, storageMark):
		default:
			b.WriteString(line)
		}
	}
	return b.String()
}

// TakeStores is RemoveStores for a file that may have been edited since. The error is
// ErrStorageConf where anything but the stores would change, or lines of ours would stay.
func TakeStores(conf string) (string, error) {
	text := RemoveStores(conf)
	for line := range strings.Lines(text) {
		if strings.HasSuffix(strings.TrimSpace(line), storageMark) {
			return "", fmt.Errorf("%w: lines with %q were changed since they were added; remove them by hand", ErrStorageConf, storageMark)
		}
	}
	if text == conf {
		return conf, nil
	}
	before, err := parseStorageConf(conf)
	if err != nil {
		return "", err
	}
	if err := before.dropStores(); err != nil {
		return "", err
	}
	same := func(text string) bool {
		after, err := parseStorageConf(text)
		return err == nil && after.dropStores() == nil && reflect.DeepEqual(before, after)
	}
	if !same(text) { // keys of the user below our header: that stays
		text = RemoveStores(strings.Replace(conf, "[storage.options] "+storageMark, "[storage.options]", 1))
	}
	if !same(text) {
		return "", fmt.Errorf("%w: without the lines with %q others would mean something else: keys below a table that goes, or a line joined to the one before; "+
			"remove them by hand", ErrStorageConf, storageMark)
	}
	return text, nil
}

// dropStores removes what AddStores sets, and tables that are empty then.
func (c storageConf) dropStores() error {
	options, err := c.options()
	if err != nil {
		return err
	}
	delete(options, keyImageStores)
	delete(options, keyLayerStores)
	storage, err := table(c, "storage")
	if err != nil || storage == nil {
		return err
	}
	if len(options) == 0 {
		delete(storage, "options")
	}
	if len(storage) == 0 {
		delete(c, "storage")
	}
	return nil
}

// setList sets a key of [storage.options] by lines of our own.
func setList(conf, key string, values []string) (string, error) {
	quoted := make([]string, len(values))
	for i, v := range values {
		if strings.ContainsAny(v, "\"\\\n\r") {
			return "", fmt.Errorf("%w: a store cannot be called %q", ErrStorageConf, v)
		}
		quoted[i] = `"` + v + `"`
	}
	ours := key + " = [" + strings.Join(quoted, ", ") + "] " + storageMark + "\n"

	lines := slices.Collect(strings.Lines(conf))
	header, table := -1, ""
	for i, line := range lines {
		text := strings.TrimSpace(line)
		if name, ok := tableName(text); ok {
			table = name
			if name == "storage.options" && header < 0 {
				header = i
			}
			continue
		}
		name, _, _ := strings.Cut(text, "=")
		if table != "storage.options" || strings.TrimSpace(name) != key {
			continue
		}
		// Put the user's lines aside, as far as the list goes on.
		end := i + 1
		for end < len(lines) {
			var v map[string]any
			if toml.Unmarshal([]byte(strings.Join(lines[i:end], "")), &v) == nil {
				break
			}
			end++
		}
		var b strings.Builder
		b.WriteString(strings.Join(lines[:i], ""))
		b.WriteString(ours)
		for _, l := range lines[i:end] {
			b.WriteString(storageWas + l)
		}
		b.WriteString(strings.Join(lines[end:], ""))
		return b.String(), nil
	}
	if header >= 0 {
		rest := lines[header+1:]
		head := strings.Join(lines[:header+1], "")
		if !strings.HasSuffix(head, "\n") {
			head += "\n" + storageNoEnd + "\n"
		}
		return head + ours + strings.Join(rest, ""), nil
	}
	if conf != "" && !strings.HasSuffix(conf, "\n") {
		conf += "\n" + storageNoEnd + "\n"
	}
	return conf + "[storage.options] " + storageMark + "\n" + ours, nil
}

// tableName returns the name of a table that a line begins.
func tableName(line string) (string, bool) {
	if !strings.HasPrefix(line, "[") || strings.HasPrefix(line, "[[") {
		return "", false
	}
	name, rest, ok := strings.Cut(line[1:], "]")
	rest = strings.TrimSpace(rest)
	if !ok || rest != "" && rest[0] != '#' {
		return "", false
	}
	return strings.TrimSpace(name), true
}

// storageConf is a storage.conf as TOML has it.
type storageConf map[string]any

func parseStorageConf(text string) (storageConf, error) {
	c := storageConf{}
	if err := toml.Unmarshal([]byte(text), &c); err != nil {
		return nil, fmt.Errorf("%w: %v", ErrStorageConf, err)
	}
	return c, nil
}

// table returns a table of a table, nil for none.
func table(t map[string]any, key string) (map[string]any, error) {
	v, ok := t[key]
	if !ok {
		return nil, nil
	}
	sub, ok := v.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("%w: %q is no table", ErrStorageConf, key)
	}
	return sub, nil
}

func (c storageConf) options() (map[string]any, error) {
	storage, err := table(c, "storage")
	if err != nil || storage == nil {
		return nil, err
	}
	return table(storage, "options")
}

func (c storageConf) list(key string) ([]string, error) {
	options, err := c.options()
	if err != nil {
		return nil, err
	}
	v, ok := options[key]
	if !ok {
		return nil, nil
	}
	values, ok := v.([]any)
	if !ok {
		return nil, fmt.Errorf("%w: %s is no list", ErrStorageConf, key)
	}
	var list []string
	for _, v := range values {
		s, ok := v.(string)
		if !ok {
			return nil, fmt.Errorf("%w: %s has a value that is no text", ErrStorageConf, key)
		}
		list = append(list, s)
	}
	return list, nil
}

// set sets a key of [storage.options] to what parsing would give.
func (c storageConf) set(key string, values []string) error {
	storage, err := table(c, "storage")
	if err != nil {
		return err
	}
	if storage == nil {
		storage = map[string]any{}
		c["storage"] = storage
	}
	options, err := table(storage, "options")
	if err != nil {
		return err
	}
	if options == nil {
		options = map[string]any{}
		storage["options"] = options
	}
	list := make([]any, len(values))
	for i, v := range values {
		list[i] = v
	}
	options[key] = list
	return nil
}
