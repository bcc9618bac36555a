package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/hostdeploy"
	podmanext "github.com/particle-os/particle/podman-ext"
	"github.com/particle-os/particle/registry"
)

func newSwitchCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "switch",
		Usage:     "deploy another image, and take updates from there",
		ArgsUsage: "IMAGE",
		Description: "IMAGE is HOST/REPO[:TAG] of a registry, a reference such as containers-storage:NAME or\n" +
			"oci:DIR, or a name in the host's store, which gets no updates.",
		Flags: append(deployFlags(), bootFlags()...),
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return usagef("switch takes an IMAGE, got %d arguments; see particle hostdeploy switch --help", c.NArg())
			}
			return runSwitch(t, c, c.Args().First())
		},
	}
}

// change opens the host, locks it, and lists its deployments. It does not wait for another
// run to end.
func change(t *term, c *cli.Context) (h *hostdeploy.Host, all []*hostdeploy.Deployment, unlock func(), err error) {
	return changeWithin(t, c, 0)
}

// changeWithin is change for who waits for another run.
func changeWithin(t *term, c *cli.Context, wait time.Duration) (h *hostdeploy.Host, all []*hostdeploy.Deployment, unlock func(), err error) {
	if h, err = openHost(t, c); err != nil {
		return nil, nil, nil, err
	}
	ctx, cancel := context.WithTimeout(c.Context, wait)
	defer cancel()
	if unlock, err = h.WaitLock(ctx); err != nil {
		return nil, nil, nil, err
	}
	if all, err = h.Deployments(); err != nil {
		unlock()
		return nil, nil, nil, err
	}
	return h, all, unlock, nil
}

// next returns what boots next; where nothing does, one that is like nothing.
func next(all []*hostdeploy.Deployment) *hostdeploy.Deployment {
	if len(all) == 0 {
		return &hostdeploy.Deployment{}
	}
	return all[0]
}

// succeed runs f, which makes a new deployment, on the locked host. from is what the new one
// is based on.
func succeed(t *term, c *cli.Context, f func(h *hostdeploy.Host, all []*hostdeploy.Deployment, from *hostdeploy.Deployment) error) error {
	h, all, unlock, err := change(t, c)
	if err != nil {
		return err
	}
	defer unlock()
	from, err := h.Base(all)
	if err != nil {
		return err
	}
	return f(h, all, from)
}

// look opens the host without keeping its lock: what it finds may change. It fails where
// another run is at work, before anything is fetched for nothing.
func look(t *term, c *cli.Context) (*hostdeploy.Host, []*hostdeploy.Deployment, error) {
	h, all, unlock, err := change(t, c)
	if err == nil {
		unlock()
	}
	return h, all, err
}

func runSwitch(t *term, c *cli.Context, image string) error {
	h, all, err := look(t, c)
	if err != nil {
		return err
	}
	if _, err := h.Base(all); err != nil {
		return err
	}
	p := &phases{t: t}
	manifest, reference, err := fetch(c.Context, t, c, h.Store, image, p)
	if err != nil {
		if ref, _, perr := parseImage(image); perr == nil {
			if s, ferr := converter.Find(h.Store, nameOfRef(ref)); ferr == nil {
				err = fmt.Errorf("%w\nthe store has one of that name; %s names it, without updates", err, s.Manifest)
			}
		}
		return err
	}
	return succeed(t, c, func(h *hostdeploy.Host, _ []*hostdeploy.Deployment, from *hostdeploy.Deployment) error {
		req := hostdeploy.Request{Manifest: manifest, Reference: reference, Base: from.ID}
		return deploy(t, c, h, req, p, nil)
	})
}

func newUpgradeCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "upgrade",
		Usage: "deploy the newest version of the running image",
		Description: "An image that used up its tries on this host, or was rolled back from, is not deployed\n" +
			"again without --force. What is staged keeps its other changes, as those of the kernel\n" +
			"arguments.",
		Flags: append(append(deployFlags(), bootFlags()...),
			&cli.BoolFlag{Name: "check", Usage: "only look whether there is one: status 0 if so, 3 if not"}),
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return usagef("upgrade takes no arguments; particle hostdeploy switch IMAGE deploys another image")
			}
			return runUpgrade(t, c)
		},
	}
}

// exitNoUpdate is upgrade --check's status for nothing new.
const exitNoUpdate = 3

func runUpgrade(t *term, c *cli.Context) error {
	h, all, err := look(t, c)
	if err != nil {
		return err
	}
	reference, err := updatesFrom(h, all)
	if err != nil {
		return err
	}
	if c.Bool("check") {
		return checkUpgrade(t, c, h, all, reference)
	}
	p := &phases{t: t}
	manifest, reference, err := fetch(c.Context, t, c, h.Store, reference, p)
	if err != nil {
		return err
	}
	return succeed(t, c, func(h *hostdeploy.Host, all []*hostdeploy.Deployment, from *hostdeploy.Deployment) error {
		noUpdate, err := noUpdateReason(c, h, all, from, reference)
		if err != nil {
			return err
		}
		req := hostdeploy.Request{Manifest: from.Manifest, Base: from.ID, Kernel: from.Kernel}
		if next(all).Staged {
			if req, err = h.StagedRequest(); err != nil {
				return err
			}
		}
		if req.Manifest != manifest {
			// What was said of the one image does not hold for the other.
			req.Kernel, req.Force = "", false
			for i := range req.Edits {
				req.Edits[i].Carried = true
			}
		}
		req.Manifest, req.Reference = manifest, reference
		return deploy(t, c, h, req, p, func(plan *hostdeploy.Plan) string {
			if plan.Same(next(all)) {
				if next(all).Staged && c.Bool("now") || !next(all).Booted && c.Bool("soft-reboot") {
					return "" // it is to be more than it is
				}
				return "no update: " + reference + " is what boots next"
			}
			return noUpdate(plan.Manifest)
		})
	})
}

// noUpdateReason returns a function that says of an image, other than what boots next, why
// it is no update, "" where it is one.
func noUpdateReason(c *cli.Context, h *hostdeploy.Host, all []*hostdeploy.Deployment, from *hostdeploy.Deployment, reference string) (func(manifest string) string, error) {
	failures, err := h.Failures()
	if err != nil {
		return nil, err
	}
	left, err := h.Left()
	if err != nil {
		return nil, err
	}
	return func(manifest string) string {
		return noUpdate(c.Bool("force"), all, from, failures, left, reference, manifest)
	}, nil
}

func noUpdate(force bool, all []*hostdeploy.Deployment, from *hostdeploy.Deployment, failures, left []hostdeploy.Event, reference, manifest string) string {
	first := next(all)
	// What is on trial was not rolled back from, and what has no entry boots no more.
	waits := from.Booted && from.Entry != nil && from.Tries == nil && first.Entry != nil && !first.Booted
	of := func(e hostdeploy.Event) bool { return e.Manifest == manifest }
	failed := func(d *hostdeploy.Deployment) bool { // it need not be in the history yet
		return d.Failed && !d.Booted && d.Manifest == manifest
	}
	switch {
	case waits && manifest == from.Manifest:
		return "no update: " + reference + " is what runs; " + first.Name() + " boots next"
	case force:
	case waits && first.Tries == nil && first.Created.Before(from.Created):
		return "no update: a rollback to " + first.Name() + " waits for its restart; --force deploys " + reference + " instead"
	case slices.ContainsFunc(failures, of) || slices.ContainsFunc(all, failed):
		return "no update: " + reference + " is the image that used up its tries here; --force deploys it again"
	case slices.ContainsFunc(left, of):
		return "no update: " + reference + " is the image that was rolled back from; --force deploys it again"
	}
	return ""
}

// updatesFrom returns the reference that updates come from: that of the running
// deployment, or of what is staged, which may come from a switch.
func updatesFrom(h *hostdeploy.Host, all []*hostdeploy.Deployment) (string, error) {
	from, err := h.Base(all)
	if err != nil {
		return "", err
	}
	if next(all).Staged {
		from = next(all)
	}
	if from.Reference == "" {
		return "", fmt.Errorf("upgrading: the running image came from no place that has updates; particle hostdeploy switch IMAGE names one")
	}
	return from.Reference, nil
}

// checkUpgrade tells whether an upgrade to the manifest at the reference would deploy it.
func checkUpgrade(t *term, c *cli.Context, h *hostdeploy.Host, all []*hostdeploy.Deployment, reference string) error {
	from, err := h.Base(all)
	if err != nil {
		return err
	}
	noUpdate, err := noUpdateReason(c, h, all, from, reference)
	if err != nil {
		return err
	}
	raw, err := currentManifest(c, reference)
	if err != nil {
		return err
	}
	res := struct {
		Reference string `json:"reference"`
		Manifest  string `json:"manifest"`
		Update    bool   `json:"update"`
	}{Reference: reference, Manifest: sha256Of(raw).String()}
	why := noUpdate(res.Manifest)
	if res.Manifest == next(all).Manifest {
		why = "no update: " + reference + " is what boots next"
	}
	res.Update = why == ""
	if c.Bool("json") {
		if err := t.printJSON(res); err != nil {
			return err
		}
	} else if res.Update {
		t.printf("update: %s is %s\n", reference, res.Manifest)
	} else {
		t.printf("%s\n", why)
	}
	if !res.Update {
		return statusError(exitNoUpdate)
	}
	return nil
}

// currentManifest asks for the manifest that fetch would bring from a reference.
func currentManifest(c *cli.Context, reference string) ([]byte, error) {
	ref, err := registry.ParseRef(reference)
	if err != nil {
		return nil, err
	}
	if ref.Transport == registry.ContainersStorage {
		img, err := podmanext.FindLocal(c.Context, ref.Name)
		if err == nil {
			raw, _, err := img.Manifest(c.Context)
			return raw, err
		}
		if !errors.Is(err, podmanext.ErrUnreadable) || errors.Is(err, podmanext.ErrNoImage) {
			return nil, err
		}
	}
	o, err := registryOptions(c)
	if err != nil {
		return nil, err
	}
	img, err := registry.Open(c.Context, ref, o)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	raw, _, err := img.Manifest(c.Context)
	return raw, err
}

func newRollbackCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "rollback",
		Usage:     "boot the previous deployment, or the one that is named",
		ArgsUsage: "[DEPLOYMENT]",
		Description: "What is staged is forgotten. Where another deployment than the running one would boot\n" +
			"next and the running one has proved good, that stays; else the one before it is taken,\n" +
			"with the /etc it had.\n" +
			"DEPLOYMENT is the beginning of an id as status shows it.",
		Flags: append(bootFlags(),
			&cli.BoolFlag{Name: "reboot", Usage: "reboot into it"},
			&cli.BoolFlag{Name: "json", Usage: "print the result as JSON"}),
		Action: func(c *cli.Context) error {
			if c.NArg() > 1 {
				return usagef("rollback takes one DEPLOYMENT at most, got %d arguments", c.NArg())
			}
			h, _, unlock, err := change(t, c)
			if err != nil {
				return err
			}
			defer unlock()
			d, err := h.Rollback(c.Args().First())
			if err != nil {
				return err
			}
			if c.Bool("json") {
				err = t.printJSON(d)
			} else {
				t.printf("%s boots next: %s\n", d.Name(), d.Title)
			}
			if err == nil && c.Bool("reboot") {
				err = systemctl(c.Context, "reboot")
			}
			return err
		},
	}
}

func newKargsCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "kargs",
		Usage: "show the kernel arguments by their origin, or change them",
		Description: "A change makes a new deployment of the running image (or of the staged one), which can\n" +
			"be rolled back. An argument with blanks is quoted: 'name=\"a b\"'.",
		Flags: append(append(deployFlags(), bootFlags()...),
			&cli.StringSliceFlag{Name: "append", Usage: "add `ARG`"},
			&cli.StringSliceFlag{Name: "delete", Usage: "remove `ARG`: a name, or NAME=VALUE"},
			&cli.StringSliceFlag{Name: "replace", Usage: "set `NAME=VALUE` in place of all of that name"}),
		Action: func(c *cli.Context) error {
			if c.NArg() > 0 {
				return usagef("kargs takes no arguments, got %q; --append, --delete and --replace change the kernel's", c.Args().First())
			}
			return runKargs(t, c)
		},
	}
}

func runKargs(t *term, c *cli.Context) error {
	edit := hostdeploy.Edit{Append: c.StringSlice("append"), Delete: c.StringSlice("delete"), Replace: c.StringSlice("replace")}
	if edit.Empty() {
		h, err := openHost(t, c)
		if err != nil {
			return err
		}
		all, err := h.Deployments()
		if err != nil {
			return err
		}
		d, err := h.Base(all)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return t.printJSON(d.KArgs)
		}
		printKargs(t, "", &d.KArgs)
		return nil
	}
	return succeed(t, c, func(h *hostdeploy.Host, all []*hostdeploy.Deployment, from *hostdeploy.Deployment) error {
		req := hostdeploy.Request{Manifest: from.Manifest, Reference: from.Reference, Base: from.ID, Kernel: from.Kernel}
		if next(all).Staged {
			// What is staged is staged again, with its changes and this one.
			var err error
			if req, err = h.StagedRequest(); err != nil {
				return err
			}
		}
		req.Edits = append(req.Edits, edit)
		return deploy(t, c, h, req, &phases{t: t}, nil)
	})
}

func printKargs(t *term, indent string, k *hostdeploy.KArgs) {
	for _, l := range []struct {
		name string
		args hostdeploy.Args
	}{{"boot", k.Boot}, {"machine", k.Machine}, {"image", k.Image}, {"user", k.User}, {"deleted", k.Deleted}} {
		if len(l.args) > 0 {
			t.printf("%s%-8s %s\n", indent, l.name, l.args)
		}
	}
}

func newResetCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "reset",
		Usage: "factory reset: deploy the running image with /etc and /var as in the image",
		Description: "The machine's kernel arguments and its lines of /etc/fstab stay; those of the user go.\n" +
			"The present deployment stays, too, and can be rolled back to. Its /var is erased by gc\n" +
			"once no deployment has it.",
		Flags: append(deployFlags(), bootFlags()...),
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			return succeed(t, c, func(h *hostdeploy.Host, _ []*hostdeploy.Deployment, from *hostdeploy.Deployment) error {
				req := hostdeploy.Request{Manifest: from.Manifest, Reference: from.Reference, Base: from.ID, Kernel: from.Kernel, FreshEtc: true, FreshVar: true, NoUserArgs: true}
				return deploy(t, c, h, req, &phases{t: t}, nil)
			})
		},
	}
}

func newPinCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "pin",
		Usage:     "keep a deployment whatever comes after it",
		ArgsUsage: "[DEPLOYMENT]",
		Flags:     append(bootFlags(), &cli.BoolFlag{Name: "unpin", Aliases: []string{"u"}, Usage: "no longer keep it"}),
		Action: func(c *cli.Context) error {
			if c.NArg() > 1 {
				return usagef("pin takes one DEPLOYMENT (default: the running one), got %d arguments", c.NArg())
			}
			h, _, unlock, err := change(t, c)
			if err != nil {
				return err
			}
			defer unlock()
			name := c.Args().First()
			if name == "" {
				name = "booted"
			}
			d, err := h.Pin(name, !c.Bool("unpin"))
			if err != nil {
				return err
			}
			verb := "pinned"
			if c.Bool("unpin") {
				verb = "no longer pinned"
			}
			t.printf("%s is %s\n", d.Name(), verb)
			return nil
		},
	}
}

func newHostGCCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "gc",
		Usage: "remove what no longer boots, from store, state and boot file system",
		Description: "The running deployment, the one a rollback leads to, the last one that proved good, what\n" +
			"boots next, what is staged and what is pinned stay. A /var that none of them has, as a\n" +
			"reset or --fresh-var leaves one behind, is erased: --dry-run tells.",
		Flags: append(bootFlags(),
			&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "remove nothing, only tell"},
			&cli.BoolFlag{Name: "json", Usage: "print the result as JSON"}),
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			h, _, unlock, err := change(t, c)
			if err != nil {
				return err
			}
			defer unlock()
			roots, err := mountedImages(t, h.Store)
			if err != nil {
				return err
			}
			res, err := h.Collect(c.Context, c.Bool("dry-run"), roots)
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return t.printJSON(res)
			}
			verb := "removed"
			if c.Bool("dry-run") {
				verb = "would remove"
			}
			for _, dir := range res.Vars {
				t.printf("%s %s, which was the /var of deployments before a reset\n", verb, dir)
			}
			t.printf("%s %d deployments, %d kernels (%s), %d objects (%s)\n", verb, len(res.Deployments), len(res.Kernels), size(res.BootBytes), res.Store.ObjectsRemoved, size(res.Store.BytesRemoved))
			return nil
		},
	}
}

// systemctl asks systemd, which may not answer in time any more when it stops us, too.
func systemctl(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("running systemctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
