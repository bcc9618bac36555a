package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/hostdeploy"
	"github.com/particle-os/particle/hostdeploy/bootloader"
	podmanext "github.com/particle-os/particle/podman-ext"
	"github.com/particle-os/particle/registry"
)

func newHostdeployCommand(t *term) *cli.Command {
	cmd := &cli.Command{
		Name:      "hostdeploy",
		Usage:     "boot this host, or a new disk, from an image",
		ArgsUsage: "[IMAGE]",
		Description: "With an IMAGE, the same as particle hostdeploy switch IMAGE; without one, as particle\n" +
			"hostdeploy status. A deployment is an image made ready to boot, with an /etc of its own\n" +
			"and the /var of the machine. A new one is staged: it becomes the one that boots when\n" +
			"the machine shuts down, with /etc as it is then. When it does not reach\n" +
			"boot-complete.target, the machine falls back to the one before.",
		Flags: append(deployFlags(), bootFlags()...),
		Subcommands: []*cli.Command{
			newInstallCommand(t),
			newUpgradeCommand(t),
			newSwitchCommand(t),
			newRollbackCommand(t),
			newStatusCommand(t),
			newHistoryCommand(t),
			newKargsCommand(t),
			newResetCommand(t),
			newPinCommand(t),
			newHostGCCommand(t),
			newFinalizeCommand(t),
			newBootSuccessCommand(t),
			newBootFailedCommand(t),
		},
		Action: func(c *cli.Context) error {
			switch c.NArg() {
			case 0:
				return runStatus(t, c)
			case 1:
				return runSwitch(t, c, c.Args().First())
			}
			return usagef("hostdeploy takes one IMAGE or a verb, got %d arguments; see particle hostdeploy --help", c.NArg())
		},
	}
	return cmd
}

// bootFlags say where the parts of the host are; the running host needs none.
func bootFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "sysroot", Hidden: true, Value: "/sysroot", Usage: "the physical root's `DIR`ectory"},
		&cli.StringFlag{Name: "boot", Hidden: true, Value: "/boot", Usage: "where the boot file system is mounted"},
		&cli.StringFlag{Name: "bootloader", Usage: "the boot `LOADER`, where it is not found by itself"},
	}
}

// deployFlags are those of verbs that make a deployment of an image.
func deployFlags() []cli.Flag {
	return append(registryFlags(),
		&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "fetch the image, then print what would be done and do nothing"},
		&cli.BoolFlag{Name: "now", Usage: "do not stage: write the boot entry at once, /etc as it is now"},
		&cli.BoolFlag{Name: "reboot", Usage: "reboot into it when all is done"},
		&cli.BoolFlag{Name: "soft-reboot", Usage: "restart only user space into it, at once; refused where the kernel differs"},
		&cli.StringFlag{Name: "kernel", Usage: "boot this `VERSION` of the image's kernels (default: the newest)"},
		&cli.BoolFlag{Name: "fresh-var", Usage: "give it a /var of its own, made from the image; gc erases the old one once no deployment has it"},
		&cli.BoolFlag{Name: "force", Usage: "deploy an image that lacks an initramfs, or Particle's part of it"},
		&cli.BoolFlag{Name: "allow-missing-verity", Usage: "let it boot where files have no fs-verity"},
		&cli.BoolFlag{Name: "json", Usage: "print the result as JSON"},
	)
}

func openHost(t *term, c *cli.Context) (*hostdeploy.Host, error) {
	h, err := hostdeploy.Open(hostdeploy.HostOptions{
		Root: c.String("sysroot"), Boot: c.String("boot"), Loader: c.String("bootloader"), Warn: t.warnf,
	})
	if errors.Is(err, bootloader.ErrNone) {
		return nil, fmt.Errorf("%w\n--bootloader names one: %s", err, bootloader.Names())
	}
	if err != nil {
		return nil, err
	}
	h.Store.Waiting = func(message string) { t.infof("%s", message) }
	return h, nil
}

// A phase is a part of a deployment's making, and how long it took.
type phase struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
	Bytes   int64   `json:"bytes,omitempty"`
}

// phases collects them, and tells people of each step that is done.
type phases struct {
	t   *term
	all []phase
}

func (p *phases) add(name string, start time.Time, bytes int64) {
	p.all = append(p.all, phase{name, time.Since(start).Seconds(), bytes})
}

func (p *phases) step(s hostdeploy.Step, took time.Duration) {
	p.all = append(p.all, phase{s.Name, took.Seconds(), s.Bytes})
	p.t.infof("%s", s.Text)
}

// parseImage reads what people call an image: a reference with its transport, or
// HOST/REPO[:TAG] of a registry. All else is a name in the store first, then one of Docker's
// registry. So is localhost/REPO, as podman calls what it builds.
func parseImage(image string) (ref registry.Ref, name bool, err error) {
	ref, err = registry.ParseRef(image)
	if name = err != nil || ref.Transport == registry.Docker && strings.HasPrefix(image, "localhost/"); err != nil && !isReference(image) {
		ref, err = registry.ParseRef(inRegistry(image))
	}
	return ref, name, err
}

// noImage is the error for what is neither a name in the store nor a reference.
func noImage(err error) error {
	return usageError{fmt.Errorf("the store has no image of that name: %w", err)}
}

// fetch brings an image into a store and returns the digest of its manifest and the
// reference that updates come from, "" for a name in the store. A registry is asked
// although the store has an image of its name, which may be an old one.
func fetch(ctx context.Context, t *term, c *cli.Context, st *store.Store, image string, p *phases) (manifest, reference string, err error) {
	ref, name, perr := parseImage(image)
	if name {
		s, err := converter.Find(st, image)
		if err == nil {
			_, err = converter.MakeBootable(ctx, st, s)
			return s.Manifest.String(), "", err
		}
		if !errors.Is(err, converter.ErrNotFound) {
			return "", "", err
		}
	}
	if perr != nil {
		return "", "", noImage(perr)
	}
	if name {
		t.infof("the store has no image %q: asking for %s", image, ref)
	}
	o, err := registryOptions(c)
	if err != nil {
		return "", "", err
	}
	if ref.Path != "" {
		// Updates come from there, whatever directory they are asked for in.
		if ref.Path, err = filepath.Abs(ref.Path); err != nil {
			return "", "", err
		}
	}
	start := time.Now()
	options := converter.Options{Name: nameOfRef(ref), Bootable: true, Warn: t.warnf}
	if ref.Transport == registry.ContainersStorage {
		// What is booted shares no file with podman.
		open := func() (*store.Store, error) { return st, nil }
		find := func() (*podmanext.LocalImage, error) { return podmanext.FindLocal(ctx, ref.Name) }
		res, err := fromPodman(ctx, t, open, find, false, options)
		if err != nil {
			return "", "", err
		}
		if res != nil {
			p.add("pull", start, res.NewBytes)
			return res.Manifest.String(), ref.String(), nil
		}
		start = time.Now()
	}
	img, err := registry.Open(ctx, ref, o)
	if err != nil {
		return "", "", err
	}
	defer img.Close()
	p.add("resolve", start, 0)
	start = time.Now()
	progress := t.newProgress()
	defer progress.stop()
	options.Progress = progress
	res, err := converter.Convert(ctx, img, st, options)
	if err != nil {
		return "", "", err
	}
	p.add("pull", start, res.NewBytes)
	return res.Manifest.String(), ref.String(), nil
}

// A deployed is the result of verbs that make a deployment.
type deployed struct {
	*hostdeploy.Plan
	DryRun bool    `json:"dryRun,omitempty"`
	Staged bool    `json:"staged"`
	Same   bool    `json:"same,omitempty"` // nothing to do: it boots next anyway
	Phases []phase `json:"phases"`
}

// deploy plans and, unless only the plan is wanted, applies it. unchanged is for verbs
// that deploy nothing where that would change nothing: it returns what to print then,
// "" where there is something to do.
func deploy(t *term, c *cli.Context, h *hostdeploy.Host, req hostdeploy.Request, p *phases, unchanged func(*hostdeploy.Plan) string) error {
	// What is staged anew keeps what was asked for with it.
	req.ID = ""
	if c.IsSet("kernel") {
		req.Kernel = c.String("kernel")
	}
	req.FreshVar = req.FreshVar || c.Bool("fresh-var")
	req.Force, req.Insecure = req.Force || c.Bool("force"), req.Insecure || c.Bool("allow-missing-verity")
	soft := c.Bool("soft-reboot")
	stage := !c.Bool("now") && !soft
	start := time.Now()
	plan, err := hostdeploy.NewPlan(c.Context, h, req, stage)
	if err != nil {
		return err
	}
	p.add("plan", start, 0)
	res := deployed{Plan: plan, DryRun: c.Bool("dry-run"), Staged: stage}
	why := ""
	if unchanged != nil {
		why = unchanged(plan)
		res.Same = why != ""
	}
	all, err := h.Deployments()
	if err != nil {
		return err
	}
	// It may be staged already, and is to be booted now.
	restart := !res.Same || len(all) > 0 && !all[0].Booted && plan.Same(all[0])
	switch {
	case res.Same:
		plan.Steps = nil
		if !c.Bool("json") {
			t.printf("%s\n", why)
		}
	case res.DryRun:
		if !c.Bool("json") {
			printPlan(t, plan)
			return nil
		}
	default:
		if soft {
			if err := h.CanSoftReboot(plan); err != nil {
				return err
			}
		}
		if err := plan.Apply(c.Context, p.step); err != nil {
			return err
		}
		if stage {
			awaitShutdown(t, c)
		}
	}
	if res.Phases = p.all; c.Bool("json") {
		err = t.printJSON(res)
	} else if !res.Same {
		printDeployed(t, plan, stage)
	}
	if err != nil || !restart || res.DryRun {
		return err
	}
	switch {
	case soft:
		if err := h.PrepareSoftReboot(c.Context, plan); err != nil {
			return err
		}
		return systemctl(c.Context, "soft-reboot")
	case c.Bool("reboot"):
		return systemctl(c.Context, "reboot")
	}
	return nil
}

// finalizeUnit does at shutdown what staging leaves undone.
const finalizeUnit = "particle-finalize.service"

// awaitShutdown starts the unit that finalizes what is staged. Its path unit would do
// so, too, but not before a reboot that is asked for now.
func awaitShutdown(t *term, c *cli.Context) {
	if _, err := os.Stat("/run/systemd/system"); err != nil || c.String("sysroot") != "/sysroot" {
		return // another disk, or a system without systemd
	}
	if err := systemctl(c.Context, "start", finalizeUnit); err != nil {
		t.warnf("%v\nrun particle hostdeploy finalize before the machine goes down", err)
	}
}

func printPlan(t *term, p *hostdeploy.Plan) {
	t.printf("%s\ndeployment %s, image %s\n", p.Title, p.ID, p.Manifest)
	for i, s := range p.Steps {
		t.printf("%2d. %s", i+1, s.Text)
		if s.Bytes > 0 {
			t.printf(" (%s)", size(s.Bytes))
		}
		t.printf("\n")
	}
	t.printf("kernel arguments: %s\n", p.KArgs.All())
}

func printDeployed(t *term, p *hostdeploy.Plan, staged bool) {
	if p.Etc != nil {
		for _, conflict := range p.Etc.Conflicts {
			t.warnf("%s", conflict)
		}
	}
	if staged {
		t.printf("%s is staged: it boots after the next shutdown\n", p.Title)
	} else {
		t.printf("%s boots next\n", p.Title)
	}
}
