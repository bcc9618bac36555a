package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/particle-os/particle"
	"github.com/particle-os/particle/snapshotter/service"
)

// The first lines of files that enable writes; the second one names what else disable
// has to remove.
const (
	dropInMark = "# Written by \"particle plugins enable\"; \"particle plugins disable\" removes it.\n"
	madeMark   = "# made with it: "
	// Of a config.toml, which is removed only if it is as enable wrote it.
	mainMark = "# Written by \"particle plugins enable\"; \"particle plugins disable\" removes it if nothing else is in it.\n"
)

var (
	errContainerdConfig  = errors.New("unfit configuration of containerd")
	errContainerdVersion = errors.New("unknown version of containerd")
)

// A containerdBridge makes containerd use the snapshotter, by a file that its
// config.toml imports.
type containerdBridge struct {
	decl   containerdDeclaration
	config string // containerd's own file
	subst  *strings.Replacer
	socket string
}

// A containerdDeclaration is the table "containerd" of plugins.toml.
type containerdDeclaration struct {
	Program string           `toml:"program"`
	Config  string           `toml:"config"`
	DropIn  string           `toml:"drop-in"`
	Forms   []containerdForm `toml:"form"`
}

type containerdForm struct {
	Since    string                           `toml:"since"`
	Version  int                              `toml:"version"`
	Replaces *bool                            `toml:"replaces"`
	Config   map[string]any                   `toml:"config"`
	Lists    map[string]map[string]sharedList `toml:"list"` // by plugin and key
}

// A sharedList is a list that the user has a say in.
type sharedList struct {
	Before  []any `toml:"before"`
	Default []any `toml:"default"`
	After   []any `toml:"after"`
}

func newContainerdBridge(o bridgeOptions) (*containerdBridge, error) {
	var all struct {
		Containerd containerdDeclaration `toml:"containerd"`
	}
	if err := toml.Unmarshal([]byte(particle.Plugins), &all); err != nil {
		return nil, fmt.Errorf("reading plugins.toml: %w", err)
	}
	b := &containerdBridge{decl: all.Containerd, config: all.Containerd.Config, socket: snapshotterSocket}
	root := snapshotterRoot
	for _, s := range []struct {
		option string
		value  *string
	}{{o.config, &b.config}, {o.socket, &b.socket}, {o.root, &root}} {
		if s.option == "" {
			continue
		}
		abs, err := filepath.Abs(s.option)
		if err != nil {
			return nil, err
		}
		*s.value = abs
	}
	if o.config != "" {
		b.decl.DropIn = filepath.Join(filepath.Dir(b.config), filepath.Base(filepath.Dir(b.decl.DropIn)), filepath.Base(b.decl.DropIn))
	}
	arch := runtime.GOARCH
	if arch == "arm" {
		arch += "/v7"
	}
	b.subst = strings.NewReplacer("${socket}", b.socket, "${root}", root, "${arch}", arch)
	return b, nil
}

func (b *containerdBridge) name() string { return "containerd" }

// version returns the version of the containerd in $PATH, exec.ErrNotFound for none.
func (b *containerdBridge) version(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, b.decl.Program, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("running %s --version: %w", b.decl.Program, err)
	}
	// "containerd github.com/containerd/containerd/v2 v2.1.9 COMMIT"
	f := strings.Fields(string(out))
	if len(f) < 3 {
		return "", fmt.Errorf("%w: %s --version says %.100q", errContainerdVersion, b.decl.Program, out)
	}
	return strings.TrimPrefix(f[2], "v"), nil
}

// form returns what a release of containerd knows.
func (d *containerdDeclaration) form(version string) (*containerdForm, error) {
	at, err := parseRelease(version)
	if err != nil {
		return nil, err
	}
	all := &containerdForm{Config: map[string]any{}, Lists: map[string]map[string]sharedList{}}
	for _, f := range d.Forms {
		since, err := parseRelease(f.Since)
		if err != nil {
			return nil, err
		}
		if slices.Compare(since[:], at[:]) > 0 {
			break
		}
		all.Since = f.Since
		if f.Version != 0 {
			all.Version = f.Version
		}
		if f.Replaces != nil {
			all.Replaces = f.Replaces
		}
		mergeTables(all.Config, f.Config)
		maps.Copy(all.Lists, f.Lists)
	}
	if all.Since == "" {
		return nil, fmt.Errorf("%w: %s; the oldest that works is %s", errContainerdVersion, version, d.Forms[0].Since)
	}
	return all, nil
}

// parseRelease returns major and minor number of a version.
func parseRelease(version string) (r [2]int, err error) {
	if _, err := fmt.Sscanf(version, "%d.%d", &r[0], &r[1]); err != nil {
		return r, fmt.Errorf("%w: %.40q", errContainerdVersion, version)
	}
	return r, nil
}

// mergeTables adds a table's values to another's; tables in both are merged.
func mergeTables(to, from map[string]any) {
	for k, v := range from {
		sub, ok := v.(map[string]any)
		if !ok {
			to[k] = v
			continue
		}
		into, ok := to[k].(map[string]any)
		if !ok {
			into = map[string]any{}
			to[k] = into
		}
		mergeTables(into, sub)
	}
}

// enable plans the drop-in, and a config.toml that imports it where there is none.
func (b *containerdBridge) enable(ctx context.Context) (*bridgePlan, error) {
	version, err := b.version(ctx)
	if err != nil {
		return nil, err
	}
	form, err := b.decl.form(version)
	if err != nil {
		return nil, err
	}
	user, err := b.readConfig(*form.Replaces)
	if err != nil {
		return nil, err
	}
	p := &bridgePlan{Name: b.name(), Changes: []fileChange{}}
	text, err := b.dropIn(form, user)
	if err != nil {
		return nil, err
	}
	var ours containerdFile
	if err := toml.Unmarshal([]byte(text), &ours); err != nil {
		return nil, err
	}
	old, err := readFileIfAny(user.dropIn)
	if err != nil {
		return nil, err
	}
	header, dirs := dropInMark, missingDirs(user.dropIn)
	switch {
	case old != nil && !strings.HasPrefix(*old, dropInMark):
		return nil, fmt.Errorf("%w: %s is somebody else's", errContainerdConfig, user.dropIn)
	case old != nil:
		for _, path := range madeWith(*old) {
			header += madeMark + path + "\n"
		}
	default:
		for _, path := range dirs {
			header += madeMark + path + "\n"
		}
	}
	if text = header + "\n" + text; old == nil || *old != text {
		p.Changes = append(p.Changes, fileChange{Path: user.dropIn, Old: old, New: &text, Dirs: dirs})
	}
	// The drop-in comes first: a config.toml that imports nothing does no harm, but a
	// file that only we would take away should not stay behind alone.
	overridden := user.overridden(&ours, *form.Replaces)
	switch {
	case user.absent:
		main := b.mainConfig(form.Version)
		p.Changes = append(p.Changes, fileChange{Path: b.config, New: &main})
	case !user.imported:
		p.Missing, p.without = user.howToImport(b.config), bridgeUnused
	case overridden != "":
		p.Missing, p.without = overridden, bridgeOverridden
	}
	for _, path := range user.ours {
		if path == user.dropIn {
			continue
		}
		if err := user.remove(p, path); err != nil {
			return nil, err
		}
	}
	if len(p.Changes) > 0 {
		p.Notes = append(p.Notes,
			"next: systemctl enable --now particle-snapshotter.socket && systemctl restart containerd",
			"use it: ctr images pull --snapshotter particle IMAGE; ctr run --snapshotter particle IMAGE NAME")
		if _, asked := ours.Proxies["particle-diff"]; asked {
			p.Notes = append(p.Notes, "from then on containerd needs the socket to unpack for other snapshotters, too")
		}
	}
	return p, nil
}

// mainConfig is the text of a config.toml that only imports.
func (b *containerdBridge) mainConfig(version int) string {
	return fmt.Sprintf("%s\nversion = %d\nimports = [%q]\n", mainMark, version, filepath.Join(filepath.Dir(b.decl.DropIn), "*.toml"))
}

// disable plans the removal of what enable wrote.
func (b *containerdBridge) disable(context.Context) (*bridgePlan, error) {
	p := &bridgePlan{Name: b.name(), Changes: []fileChange{}}
	// Whichever way containerd merges files, the places are the same.
	user, err := b.readConfig(false)
	if err != nil {
		return nil, err
	}
	main, err := readFileIfAny(b.config)
	if err != nil {
		return nil, err
	}
	if main != nil && strings.HasPrefix(*main, mainMark) {
		// With what somebody has added it is his.
		if slices.ContainsFunc(b.decl.Forms, func(f containerdForm) bool { return *main == b.mainConfig(f.Version) }) {
			p.Changes = append(p.Changes, fileChange{Path: b.config, Old: main})
		} else if len(user.ours) > 0 {
			p.Notes = append(p.Notes, b.config+" stays, because more is in it than enable wrote; of that are its first line and the import, which do no harm")
		}
	}
	for _, path := range user.ours {
		if err := user.remove(p, path); err != nil {
			return nil, err
		}
	}
	if len(p.Changes) > 0 {
		p.Notes = append(p.Notes,
			"until containerd is restarted it has the snapshotter still: remove containers and images that are in it before, they do not work without",
			"next: systemctl restart containerd && systemctl disable --now particle-snapshotter.socket particle-snapshotter.service")
	}
	return p, nil
}

// remove plans the removal of a drop-in.
func (c *containerdConfig) remove(p *bridgePlan, path string) error {
	old, err := readFileIfAny(path)
	if err != nil {
		return err
	}
	if old == nil {
		return nil
	}
	p.Changes = append(p.Changes, fileChange{Path: path, Old: old, Dirs: madeWith(*old)})
	if by := c.named[path]; by != "" {
		p.Notes = append(p.Notes, fmt.Sprintf("take %q out of the imports of %s: containerd does not start without a file that is named there", path, by))
	}
	return nil
}

// madeWith returns the directories that were made for a drop-in.
func madeWith(text string) (dirs []string) {
	for line := range strings.Lines(text) {
		if dir, ok := strings.CutPrefix(line, madeMark); ok {
			dirs = append(dirs, strings.TrimSpace(dir))
		}
	}
	return dirs
}

// status compares what there is with what enable would write.
func (b *containerdBridge) status(ctx context.Context) (*bridgeStatus, error) {
	st := &bridgeStatus{Name: b.name(), State: bridgeOff}
	version, err := b.version(ctx)
	if errors.Is(err, exec.ErrNotFound) {
		st.State = bridgeAbsent
		return st, nil
	}
	if err != nil {
		return nil, err
	}
	st.Version = version
	undo, err := b.disable(ctx)
	if err != nil {
		return nil, err
	}
	for _, ch := range undo.Changes {
		st.Files = append(st.Files, ch.Path)
	}
	if len(st.Files) == 0 {
		return st, nil
	}
	st.State = bridgeOn
	do, err := b.enable(ctx)
	if err != nil {
		return nil, err
	}
	if len(do.Changes) > 0 {
		st.State = bridgeOutdated
		st.Notes = append(st.Notes, "particle plugins enable containerd brings "+do.Changes[0].Path+" up to date")
	}
	if do.Missing != "" {
		st.State = do.without
		st.Notes = append(st.Notes, do.Missing)
	}
	var note string
	if st.Daemon, note = daemonState(service.Ask(ctx, b.socket, askWait)); note != "" {
		st.Notes = append(st.Notes, note)
	}
	return st, nil
}

// askWait is how long status waits for the daemon.
const askWait = 5 * time.Second

// daemonState says what came of asking the daemon, and what to do about it.
func daemonState(err error) (state, note string) {
	switch {
	case err == nil:
		return "answers", ""
	case errors.Is(err, fs.ErrPermission):
		return "not asked", fmt.Sprintf("%v: only root may ask the daemon", err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return "does not answer", fmt.Sprintf("%v: systemctl enable --now particle-snapshotter.socket", err)
	}
	return "does not answer", fmt.Sprintf("%v: journalctl -u particle-snapshotter says why", err)
}

// dropIn returns the text of the drop-in without its header.
func (b *containerdBridge) dropIn(form *containerdForm, user *containerdConfig) (string, error) {
	config := b.substituted(form.Config).(map[string]any)
	plugins := map[string]any{}
	for plugin, keys := range form.Lists {
		section := map[string]any{}
		if *form.Replaces {
			maps.Copy(section, user.plugins[plugin])
		}
		for key, list := range keys {
			middle, ok := user.plugins[plugin][key].([]any)
			if !ok {
				middle = list.Default
			}
			var value []any
			for _, part := range [][]any{list.Before, middle, list.After} {
				for _, v := range part {
					v = b.substituted(v)
					if !slices.ContainsFunc(value, func(have any) bool { return reflect.DeepEqual(have, v) }) {
						value = append(value, v)
					}
				}
			}
			section[key] = value
		}
		plugins[plugin] = section
	}
	if len(plugins) > 0 {
		config["plugins"] = plugins
	}
	// The version of the file that imports it: 1.x takes the last file's for all.
	config["version"] = int64(form.Version)
	if !user.absent {
		config["version"] = user.version
	}
	var text bytes.Buffer
	if err := toml.NewEncoder(&text).SetIndentTables(true).Encode(config); err != nil {
		return "", err
	}
	return text.String(), nil
}

// substituted returns a copy of a value of plugins.toml with its variables filled in.
func (b *containerdBridge) substituted(v any) any {
	switch v := v.(type) {
	case string:
		return b.subst.Replace(v)
	case []any:
		all := make([]any, len(v))
		for i := range v {
			all[i] = b.substituted(v[i])
		}
		return all
	case map[string]any:
		all := make(map[string]any, len(v))
		for k := range v {
			all[k] = b.substituted(v[k])
		}
		return all
	}
	return v
}
