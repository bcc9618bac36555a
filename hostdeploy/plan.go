package hostdeploy

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
	"github.com/particle-os/particle/hostdeploy/bootloader"
	"github.com/particle-os/particle/hostdeploy/etcmerge"
)

// DefaultTries is how often a new entry is tried before the one before it is.
const DefaultTries = 3

// architecture is what images must be for.
const architecture = runtime.GOARCH

// A Request says what is to be deployed.
type Request struct {
	// Manifest is the image, by the digest of its manifest in the host's store.
	Manifest string `json:"manifest"`
	// Reference is where the image came from, and where updates come from.
	Reference string `json:"reference,omitempty"`
	// Base is the id of the deployment whose /etc and kernel arguments are carried on;
	// "" makes both anew.
	Base string `json:"base,omitempty"`
	// KArgs are used where there is no Base: Boot and Machine of it.
	KArgs KArgs `json:"kargs"`
	// Edits change the arguments, one after the other.
	Edits []Edit `json:"edits,omitempty"`
	// NoUserArgs leaves out what was added and deleted on the Base.
	NoUserArgs bool `json:"noUserArgs,omitempty"`
	// Kernel is the release to boot, "" for the newest.
	Kernel string `json:"kernel,omitempty"`
	// FreshEtc makes /etc anew although there is a Base, of whose files it takes the
	// added lines of fstab only.
	FreshEtc bool `json:"freshEtc,omitempty"`
	// FreshVar gives the deployment a /var of its own, made from the image.
	FreshVar bool `json:"freshVar,omitempty"`
	// Force deploys what Particle thinks does not boot: an image without initramfs, or
	// with one that does not set up the root.
	Force bool `json:"force,omitempty"`
	// Insecure lets the system boot where files have no fs-verity. What is based on such
	// a deployment is such a deployment.
	Insecure bool `json:"insecure,omitempty"`
	// Fstab is appended to the image's /etc/fstab where there is no Base.
	Fstab string `json:"fstab,omitempty"`
	// ID is set once the deployment is staged, and then only Finalize asks with it.
	ID string `json:"id,omitempty"`
}

// A Step is one thing that a plan does.
type Step struct {
	// Name is short and stable: "keep", "kernel", "stage", "unstage", "etc", "state",
	// "entry".
	Name string `json:"name"`
	// Text says what is done, to what.
	Text string `json:"text"`
	// Bytes that are written, where that is known.
	Bytes int64 `json:"bytes,omitempty"`

	run func(context.Context) error
}

// A Plan is a deployment that is about to be made: what there is to know about it and
// the steps that make it. Nothing has been written when NewPlan returns.
type Plan struct {
	Origin
	// Etc is the merge that would be made now; nil where /etc is made anew. What is
	// merged when a staged deployment is finalized may be more.
	Etc   *etcmerge.Merge `json:"etc,omitempty"`
	Steps []Step          `json:"steps"`

	h       *Host
	req     Request
	image   *converter.Stored
	objects Opener
	tree    *tree.Tree // what is booted
	files   *bootFiles
	forget  bool // what is staged is superseded
}

// NewPlan works out how to deploy an image. With stage it is only made ready: Finalize
// does the rest, at shutdown. Errors are ErrNoKernel, ErrNoInitrd, ErrNoSetup,
// ErrArchitecture, ErrNoSpace, ErrReadOnly and those of the store.
func NewPlan(ctx context.Context, h *Host, req Request, stage bool) (*Plan, error) {
	p := &Plan{h: h, req: req, objects: h.Store}
	if err := h.checkWritable(); err != nil {
		return nil, err
	}
	if err := p.readImage(ctx); err != nil {
		return nil, err
	}
	if err := p.settle(); err != nil {
		return nil, err
	}
	if !stage && req.ID == "" {
		staged, err := h.staged()
		if err != nil {
			return nil, err
		}
		p.forget = staged != nil
	}
	// What the loader cannot write must not come out at shutdown.
	entry, err := p.newEntry()
	if err == nil {
		err = h.Loader.Check(*entry)
	}
	if err != nil {
		return nil, fmt.Errorf("writing the boot entry for %q: %w", p.Title, err)
	}
	entries, err := h.Loader.Entries(h.Warn)
	if err != nil {
		return nil, err
	}
	present, err := p.files.present(ctx, h.Paths, entries)
	if err != nil {
		return nil, err
	}
	if !present {
		unused, err := h.unusedKernels(entries)
		if err == nil {
			err = p.files.checkRoom(h.Paths, unused)
		}
		if err != nil {
			return nil, err
		}
	}
	if !stage || p.req.Base != "" {
		if err := p.planEtc(ctx); err != nil {
			return nil, err
		}
	}
	p.addSteps(stage, present)
	return p, nil
}

// readImage looks for all that the image must have.
func (p *Plan) readImage(ctx context.Context) error {
	st := p.h.Store
	var err error
	if p.image, err = converter.Find(st, p.req.Manifest); err != nil {
		return err
	}
	sys, kernel, files, err := lookInto(ctx, st, p.image, p.req.Kernel, p.req.Force)
	if err != nil {
		return err
	}
	p.files = files
	bootable, ok := p.image.Images[converter.Bootable.String()]
	if !ok {
		return fmt.Errorf("deploying %s: %w: it has no composefs image to boot from; convert or pull it with --bootable", p.image.Manifest, ErrNoImage)
	}
	if p.tree, err = converter.ReadImage(st, p.image, converter.Bootable); err != nil {
		return err
	}
	if has, err := hasModules(p.tree, kernel.Version); err == nil && !has && kernel.UKI == nil {
		p.h.Warn("the image has no modules for kernel %s in /usr/lib/modules: only what is in the initramfs and the kernel will work", kernel.Version)
	}
	p.Origin = Origin{
		Reference: p.req.Reference, Manifest: p.image.Manifest.String(), BootDigest: p.files.hash,
		Digest: bootable, Version: imageVersion(p.image, sys), Kernel: kernel.Version,
		Created: time.Now().UTC().Truncate(time.Second),
	}
	p.Title = strings.TrimSpace(sys.Name() + " " + p.Version)
	p.KArgs.Image = sys.Args
	return nil
}

// lookInto finds in an image of a store what it takes to boot it.
func lookInto(ctx context.Context, st *store.Store, image *converter.Stored, version string, force bool) (*System, *Kernel, *bootFiles, error) {
	if err := CheckArchitecture(image.Arch); err != nil {
		return nil, nil, nil, err
	}
	merged, err := converter.ReadImage(st, image, converter.Merged)
	if err != nil {
		return nil, nil, nil, err
	}
	sys, err := Find(merged, st, architecture)
	if err != nil {
		return nil, nil, nil, err
	}
	kernel, err := sys.Kernel(version)
	if err != nil {
		return nil, nil, nil, err
	}
	files, err := newBootFiles(ctx, st, kernel, force)
	return sys, kernel, files, err
}

// CheckImage looks for all that an image of a store must have to be deployed, for those
// who have no host yet. version and force are Kernel and Force of a [Request]; errors are
// those of NewPlan.
func CheckImage(ctx context.Context, st *store.Store, image *converter.Stored, version string, force bool) error {
	_, _, _, err := lookInto(ctx, st, image, version, force)
	return err
}

// CheckArchitecture returns ErrArchitecture for images that this machine cannot boot; arch is
// Go's name, "" where the image does not say.
func CheckArchitecture(arch string) error {
	if arch != "" && arch != architecture {
		return fmt.Errorf("%w: it is for %s, this machine is %s", ErrArchitecture, arch, architecture)
	}
	return nil
}

// imageVersion returns the image's own version: its label, or that of the system.
func imageVersion(s *converter.Stored, sys *System) string {
	var c struct {
		Config struct{ Labels map[string]string } `json:"config"`
	}
	if json.Unmarshal(s.RawConfig, &c) == nil {
		if v := c.Config.Labels["org.opencontainers.image.version"]; v != "" && !strings.ContainsAny(v, "\n\r\x00") {
			return v
		}
	}
	return sys.Release["IMAGE_VERSION"]
}

// settle chooses the id and the kernel arguments.
func (p *Plan) settle() error {
	machine, user := p.req.KArgs, KArgs{}
	if p.req.Base != "" {
		base, err := p.h.origin(p.req.Base)
		if err != nil {
			return err
		}
		machine = base.KArgs
		if !p.req.NoUserArgs {
			user = base.KArgs
		}
	}
	insecure := p.req.Insecure
	if v, ok := machine.Boot.Value("composefs.digest"); ok {
		insecure = insecure || strings.HasPrefix(v, "?")
	}
	p.ID = p.req.ID
	for n := 0; p.ID == ""; n++ {
		id := p.Digest.String()
		if n > 0 {
			id = fmt.Sprintf("%s.%d", id, n)
		}
		if used, err := p.h.used(id); err != nil {
			return err
		} else if !used {
			p.ID = id
		}
	}
	k := KArgs{Machine: machine.Machine, Image: p.KArgs.Image, User: user.User, Deleted: user.Deleted}
	for _, a := range machine.Boot {
		if !reserved(a) {
			k.Boot = append(k.Boot, a)
		}
	}
	for origin, args := range map[string]Args{"image": k.Image, "machine": k.Machine} {
		if i := slices.IndexFunc(args, reserved); i >= 0 {
			return fmt.Errorf("%w: %q, which comes from the %s", ErrReserved, args[i], origin)
		}
	}
	digest := digestText(p.Digest)
	if insecure {
		digest = "?" + digest
	}
	k.Boot = append(k.Boot, "composefs.digest="+digest)
	if p.ID != p.Digest.String() {
		k.Boot = append(k.Boot, "particle.deployment="+p.ID)
	}
	for _, e := range p.req.Edits {
		var err error
		if k, err = e.Apply(k); err != nil {
			return err
		}
	}
	p.KArgs = k
	return nil
}

// tag is the name by which the store keeps a deployment's image.
func tag(id string) string { return "localhost/particle-" + id }

// DeploymentOf returns the id of the deployment that an image's name in the store is
// for, and whether it is such a name.
func DeploymentOf(name string) (id string, ok bool) { return cutRef(name, tag("")) }

// imageRef is the name by which it keeps the composefs image that is booted.
func imageRef(id string) string { return "particle/" + id }

func (p *Plan) addSteps(stage, present bool) {
	h := p.h
	add := func(name string, bytes int64, run func(context.Context) error, format string, args ...any) {
		p.Steps = append(p.Steps, Step{Name: name, Text: fmt.Sprintf(format, args...), Bytes: bytes, run: run})
	}
	add("keep", 0, p.keep, "keep image %s in the store as %s", p.image.Manifest, tag(p.ID))
	if !present {
		add("kernel", p.files.size(), p.writeKernel,
			"copy kernel %s to %s", p.Kernel, filepath.Join(h.Paths.Boot, p.files.dir()))
	}
	switch {
	case stage:
		add("stage", 0, p.stage, "stage deployment %s for the next shutdown in %s", ShortID(p.ID), filepath.Join(h.Run, stagedFile))
		return
	case p.forget:
		add("unstage", 0, func(context.Context) error { _, err := h.Unstage(); return err }, "forget the staged deployment")
	}
	add("etc", 0, p.writeEtc, "%s", p.etcText())
	add("state", 0, p.writeState, "name the deployment's state %s", h.stateDir(p.ID))
	add("entry", 0, p.addEntry, "add the boot entry for %q to %s, %s", p.Title, h.Loader.Name(), p.triesText())
}

func (p *Plan) writeKernel(ctx context.Context) error {
	entries, err := p.h.Loader.Entries(p.h.Warn)
	if err != nil {
		return err
	}
	unused, err := p.h.unusedKernels(entries)
	if err != nil {
		return err
	}
	return p.files.write(ctx, p.objects, p.h.Paths, unused)
}

func (p *Plan) etcText() string {
	dir := filepath.Join(p.h.stateDir(p.ID), "etc")
	if p.Etc == nil {
		return fmt.Sprintf("write the image's /etc to %s", dir)
	}
	return fmt.Sprintf("merge /etc of deployment %s with the image's into %s (%s)", ShortID(p.req.Base), dir, p.Etc.Summary())
}

func (p *Plan) tries() int { return min(DefaultTries, p.h.Loader.Tries().Max) }

func (p *Plan) triesText() string {
	n := p.tries()
	if p.req.Base == "" {
		return "as the only one"
	}
	switch n {
	case 0:
		return "which cannot fall back by itself"
	case 1:
		return "to be tried once"
	default:
		return fmt.Sprintf("to be tried %d times", n)
	}
}

// newEntry returns the boot entry as it would be added now.
func (p *Plan) newEntry() (*bootloader.Entry, error) {
	e, err := p.h.entry(&p.Origin, func(e *bootloader.Entry) { p.files.entry(e, p.h.Paths) })
	if err != nil {
		return nil, err
	}
	if n := p.tries(); n > 0 && p.req.Base != "" {
		e.Counter = &bootloader.Counter{Left: n}
	}
	return e, nil
}

// entry returns the boot entry of a new generation for a deployment.
func (h *Host) entry(o *Origin, files func(*bootloader.Entry)) (*bootloader.Entry, error) {
	entries, err := h.Loader.Entries(h.Warn)
	if err != nil {
		return nil, err
	}
	e := &bootloader.Entry{Generation: 1, Options: o.KArgs.All().String()}
	for _, other := range entries {
		e.Generation = max(e.Generation, other.Generation+1)
	}
	e.ID = fmt.Sprintf("particle-%d", e.Generation)
	e.Title = fmt.Sprintf("%s (particle %d)", o.Title, e.Generation)
	files(e)
	return e, nil
}

// Same reports whether the deployment would boot what another one boots.
func (p *Plan) Same(d *Deployment) bool {
	return d != nil && d.Digest == p.Digest && d.BootDigest == p.BootDigest && slices.Equal(argsFor(d.KArgs), argsFor(p.KArgs))
}

func argsFor(k KArgs) Args {
	args, _ := k.All().Delete("particle.deployment")
	return args
}
