package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	podmanext "github.com/particle-os/particle/podman-ext"
)

// Where podman's configuration lies (containers-storage.conf(5)).
const (
	storageConf       = "/etc/containers/storage.conf"
	vendorStorageConf = "/usr/share/containers/storage.conf"
	storageDropIn     = "/etc/containers/storage.rootful.conf.d/50-particle.conf" // since 6
)

// A podmanBridge makes podman use the layer store and, where it can, the image store.
//
// Up to version 5 podman has no drop-ins for storage.conf: it is edited, by lines that
// can be taken back to the byte, or made. Version 6 reads drop-ins, those of root alone
// among them (design document config-file-parsing of podman).
type podmanBridge struct {
	config string // "" is podman's usual one
	layers string // the directory of the layer store
	images string // of the image store
}

func newPodmanBridge(o bridgeOptions) (*podmanBridge, error) {
	b := &podmanBridge{layers: podmanext.LayerStoreDir, images: podmanext.ImageStoreDir}
	var err error
	if o.config != "" {
		if b.config, err = filepath.Abs(o.config); err != nil {
			return nil, err
		}
	}
	if o.root != "" {
		root, err := filepath.Abs(o.root)
		if err != nil {
			return nil, err
		}
		b.layers, b.images = filepath.Join(root, "layers"), filepath.Join(root, "images")
	}
	return b, nil
}

func (b *podmanBridge) name() string { return "podman" }

// A podmanPlace is where an installed podman is told about the stores.
type podmanPlace struct {
	version string
	major   int
	minor   int
	path    string // the file to change
	dropIn  bool
}

// place asks podman which version it is.
func (b *podmanBridge) place(ctx context.Context) (*podmanPlace, error) {
	out, err := podmanVersion(ctx) // "podman version 5.4.2"
	if err != nil {
		return nil, err
	}
	f := strings.Fields(out)
	p := &podmanPlace{}
	if len(f) > 0 {
		p.version = f[len(f)-1]
	}
	if _, err := fmt.Sscanf(p.version, "%d.%d", &p.major, &p.minor); err != nil {
		return nil, fmt.Errorf("podman --version says %.100q, which is no version", out)
	}
	p.path, p.dropIn = storageDropIn, true
	if p.major < 6 || b.config != "" || os.Getenv("CONTAINERS_STORAGE_CONF") != "" {
		p.path, p.dropIn = b.usualConf(), false
	}
	return p, nil
}

// podmanVersion runs podman --version, which reads storage.conf and fails where that is
// unfit, as all commands do.
func podmanVersion(ctx context.Context, env ...string) (string, error) {
	program := os.Getenv("PARTICLE_PODMAN")
	if program == "" {
		program = "podman"
	}
	cmd := exec.CommandContext(ctx, program, "--version")
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("running %s --version: %w: %s", program, err, strings.TrimSpace(string(exit.Stderr)))
	}
	if err != nil {
		return "", fmt.Errorf("running %s --version: %w", program, err)
	}
	return string(out), nil
}

// tryConf has podman read a storage.conf before it becomes podman's.
func tryConf(ctx context.Context, text string) error {
	f, err := os.CreateTemp("", "particle-storage-*.conf")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if _, err := podmanVersion(ctx, "CONTAINERS_STORAGE_CONF="+f.Name()); err != nil {
		return fmt.Errorf("podman does not take the storage.conf that would be written: %w", err)
	}
	return nil
}

// usualConf is the file that root's podman reads.
func (b *podmanBridge) usualConf() string {
	switch {
	case b.config != "":
		return b.config
	case os.Getenv("CONTAINERS_STORAGE_CONF") != "":
		return os.Getenv("CONTAINERS_STORAGE_CONF")
	}
	return storageConf
}

// takesLayers reports whether podman keeps the layers of a layer store. Version 5.5
// (storage 1.58) and newer record them in no file: the image is gone with the process
// that pulled it.
func (p *podmanPlace) takesLayers() bool { return p.major == 4 || p.major == 5 && p.minor < 5 }

// takesImages reports whether podman mounts the layers of image stores
// (podmanext.ImageStore); older ones would start containers on nothing but objects.
func (p *podmanPlace) takesImages() bool { return p.major > 5 || p.major == 5 && p.minor >= 4 }

func (b *podmanBridge) enable(ctx context.Context) (*bridgePlan, error) {
	place, err := b.place(ctx)
	if err != nil {
		return nil, err
	}
	plan := &bridgePlan{Name: b.name(), Changes: []fileChange{}}
	if place.major < 4 {
		return nil, fmt.Errorf("podman %s has no additional layer stores to rely on: 4.3 or newer is needed", place.version)
	}
	old, err := readFileIfAny(place.path)
	if err != nil {
		return nil, err
	}
	var layers, images []string
	if place.takesLayers() {
		layers = append(layers, b.layers+":ref")
		plan.Notes = append(plan.Notes, "next: systemctl enable --now particle-layer-store, then podman pull uses the store")
	}
	if place.takesImages() {
		images = append(images, b.images)
		plan.Notes = append(plan.Notes, "particle export NAME podman-store:"+b.images+" lets podman run an image without a pull")
	}
	var text string
	if place.dropIn {
		if old != nil && !strings.HasPrefix(*old, dropInMark) {
			return nil, fmt.Errorf("%s is somebody else's", place.path)
		}
		text = podmanDropIn(layers, images)
	} else if text, err = editedConf(old, layers, images); err != nil {
		return nil, fmt.Errorf("editing %s: %w", place.path, err)
	}
	if old == nil || *old != text {
		plan.Changes = append(plan.Changes, fileChange{Path: place.path, Old: old, New: &text, Dirs: missingDirs(place.path)})
	} else {
		plan.Notes = nil
	}
	// Before the configuration: with a directory of these missing, every podman command
	// fails. Made again where they are gone, too.
	plan.prepare = func() error {
		if len(layers) > 0 {
			if err := os.MkdirAll(b.layers, 0o755); err != nil {
				return err
			}
		}
		if len(images) > 0 {
			if _, err := podmanext.InitImageStore(b.images); err != nil {
				return err
			}
		}
		if place.dropIn || len(plan.Changes) == 0 {
			return nil
		}
		return tryConf(ctx, text)
	}
	return plan, nil
}

// podmanDropIn is the text of a drop-in: lists go on where other files' end.
func podmanDropIn(layers, images []string) string {
	text := dropInMark + "\n[storage.options]\n"
	for _, l := range []struct {
		key    string
		stores []string
	}{{"additionallayerstores", layers}, {"additionalimagestores", images}} {
		for _, s := range l.stores {
			text += fmt.Sprintf("%s = [%q, {append=true}]\n", l.key, s)
		}
	}
	return text
}

// editedConf is the text of storage.conf with the stores. Where there is none, podman
// has read the vendor's, or nothing.
func editedConf(old *string, layers, images []string) (string, error) {
	if old != nil {
		return podmanext.AddStores(*old, images, layers)
	}
	base, err := newConfBase()
	if err != nil {
		return "", err
	}
	text, err := podmanext.AddStores(base, images, layers)
	return dropInMark + text, err
}

func newConfBase() (string, error) {
	vendor, err := readFileIfAny(vendorStorageConf)
	if err != nil {
		return "", err
	}
	if vendor != nil {
		return *vendor, nil
	}
	// Podman fails with a storage.conf that lacks one of them.
	return "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/containers/storage\"\ngraphroot = \"/var/lib/containers/storage\"\n", nil
}

func (b *podmanBridge) disable(context.Context) (*bridgePlan, error) {
	plan := &bridgePlan{Name: b.name(), Changes: []fileChange{}}
	// Of whatever version podman was when enable ran.
	for _, path := range []string{storageDropIn, b.usualConf()} {
		old, err := readFileIfAny(path)
		if err != nil {
			return nil, err
		}
		if old == nil {
			continue
		}
		change := fileChange{Path: path, Old: old}
		switch text, made := strings.CutPrefix(*old, dropInMark); {
		case path == storageDropIn && made:
		case path == storageDropIn:
			continue
		case made:
			base, err := newConfBase()
			if err != nil {
				return nil, err
			}
			// What the user has added since stays.
			if text, err = podmanext.TakeStores(text); err != nil {
				return nil, fmt.Errorf("editing %s: %w", path, err)
			}
			if text != base {
				change.New = &text
			}
		default:
			text, err := podmanext.TakeStores(*old)
			if err != nil {
				return nil, fmt.Errorf("editing %s: %w", path, err)
			}
			if text == *old {
				continue
			}
			change.New = &text
		}
		plan.Changes = append(plan.Changes, change)
	}
	if len(plan.Changes) > 0 {
		plan.Notes = append(plan.Notes,
			"next: systemctl disable --now particle-layer-store",
			"images that podman pulled through the layer store do not work from now on: to remove them, enable it again first",
			b.images+" and "+b.layers+" stay; nothing uses them any more")
	}
	return plan, nil
}

func (b *podmanBridge) status(ctx context.Context) (*bridgeStatus, error) {
	st := &bridgeStatus{Name: b.name(), State: bridgeOff}
	place, err := b.place(ctx)
	if errors.Is(err, exec.ErrNotFound) {
		st.State = bridgeAbsent
		return st, nil
	}
	if err != nil {
		return nil, err
	}
	st.Version = place.version
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
		st.Notes = append(st.Notes, "particle plugins enable podman brings "+place.path+" up to date")
	}
	var dirs []string
	if place.takesLayers() {
		dirs = append(dirs, b.layers)
	}
	if place.takesImages() {
		dirs = append(dirs, b.images)
	}
	for _, dir := range dirs {
		if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
			st.State = bridgeOutdated
			st.Notes = append(st.Notes, fmt.Sprintf("%s is no directory that can be read, and podman fails without: particle layer-store stop, then particle plugins enable podman (%v)", dir, err))
		}
	}
	return st, nil
}
