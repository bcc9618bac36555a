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
	"github.com/particle-os/particle/hostdeploy/disk"
	podmanext "github.com/particle-os/particle/podman-ext"
	"github.com/particle-os/particle/registry"
)

func newInstallCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "install",
		Usage: "make a disk, or a system that is there, boot an image",
		Subcommands: []*cli.Command{
			{
				Name:      "to-disk",
				Usage:     "partition a disk, or a disk's image file, and install to it",
				ArgsUsage: "DEVICE|FILE",
				Description: "A GUID partition table with what the boot loader needs, a boot file system and a root.\n" +
					"A FILE that does not exist is made with --size. A disk that holds anything is refused\n" +
					"without --wipe.",
				Flags: append(installFlags(),
					&cli.StringFlag{Name: "size", Value: "8G", Usage: "make a FILE of `BYTES` (k, M, G, T)"},
					&cli.StringFlag{Name: "boot-size", Usage: "give the boot file system `BYTES` (default: 512M)"},
					&cli.StringFlag{Name: "filesystem", Value: "ext4", Usage: "of the root: `ext4|btrfs|xfs`"},
					&cli.BoolFlag{Name: "wipe", Usage: "overwrite what is on the disk"}),
				Action: func(c *cli.Context) error {
					if c.NArg() != 1 {
						return usagef("install to-disk takes a DEVICE or FILE, got %d arguments", c.NArg())
					}
					return installToDisk(t, c, c.Args().First())
				},
			},
			{
				Name:      "to-filesystem",
				Usage:     "install to a root file system that is mounted",
				ArgsUsage: "DIR",
				Description: "The boot file system is what is mounted at DIR/boot, or that directory. The boot\n" +
					"loader itself is installed where --loader-disk names the disk, and expected to be\n" +
					"there otherwise.",
				Flags: append(installFlags(), &cli.StringFlag{Name: "loader-disk", Usage: "install the boot loader on this `DEVICE`"}),
				Action: func(c *cli.Context) error {
					if c.NArg() != 1 {
						return usagef("install to-filesystem takes a DIR, got %d arguments", c.NArg())
					}
					return installToFilesystem(t, c, c.Args().First())
				},
			},
			{
				Name:  "to-existing-root",
				Usage: "turn the running system into one that boots an image",
				Description: "The running system's files stay, and are found below /sysroot afterwards; its /etc and\n" +
					"/var are not taken over. Its boot loader is used.",
				Flags: installFlags(),
				Action: func(c *cli.Context) error {
					if err := noArgs(c); err != nil {
						return err
					}
					return installToFilesystem(t, c, "/")
				},
			},
		},
		Action: func(c *cli.Context) error {
			return usagef("install takes to-disk, to-filesystem or to-existing-root; see particle hostdeploy install --help")
		},
	}
}

func installFlags() []cli.Flag {
	return append(registryFlags(),
		&cli.StringFlag{Name: "image", Usage: "`IMAGE` to install: a name in the store, or a reference as HOST/REPO:TAG or containers-storage:NAME"},
		&cli.StringFlag{Name: "bootloader", Usage: "`LOADER`: " + strings.Join(bootloader.Names(), ", ") + " (default: systemd-boot for a disk, the present one else)"},
		&cli.StringSliceFlag{Name: "karg", Usage: "kernel `ARG`ument of this machine, kept over all upgrades"},
		&cli.StringFlag{Name: "target-imgref", Usage: "take updates from this `REFERENCE` instead of IMAGE"},
		&cli.StringFlag{Name: "kernel", Usage: "boot this `VERSION` of the image's kernels (default: the newest)"},
		&cli.BoolFlag{Name: "force", Usage: "install an image that lacks an initramfs, or Particle's part of it"},
		&cli.BoolFlag{Name: "allow-missing-verity", Usage: "let it boot where files have no fs-verity"},
		&cli.BoolFlag{Name: "dry-run", Aliases: []string{"n"}, Usage: "print what would be done and leave nothing behind"},
		&cli.BoolFlag{Name: "json", Usage: "print the result as JSON"},
	)
}

// needImage refuses an installation of nothing.
func needImage(c *cli.Context) error {
	if c.String("image") == "" {
		return usagef("%s needs an --image IMAGE to install", strings.TrimPrefix(c.Command.HelpName, c.App.Name+" hostdeploy "))
	}
	return nil
}

// newHost fills in what all ways of installing have in common.
func newHost(t *term, c *cli.Context, p *phases) *hostdeploy.NewHost {
	n := &hostdeploy.NewHost{
		Loader: c.String("bootloader"), Kernel: c.String("kernel"), Force: c.Bool("force"),
		Insecure: c.Bool("allow-missing-verity"), Warn: t.warnf, Done: p.step,
	}
	for _, a := range c.StringSlice("karg") {
		n.Machine = append(n.Machine, hostdeploy.ParseArgs(a)...)
	}
	return n
}

// imageHere finds an image in this machine's store, nil where it is not there.
func imageHere(t *term, c *cli.Context, image string) (*store.Store, *converter.Stored, error) {
	st, err := readStore(t, c)
	if err == nil {
		var s *converter.Stored
		if s, err = converter.Find(st, image); err == nil {
			return st, s, nil
		}
	}
	if errors.Is(err, converter.ErrNotFound) || errors.Is(err, store.ErrNotStore) {
		err = nil
	}
	return nil, nil, err
}

// checkImage refuses an image that is not there, or that this machine's store knows to be
// none to boot, before a disk is erased for it.
func checkImage(t *term, c *cli.Context) error {
	image := c.String("image")
	st, s, err := imageHere(t, c, image)
	if err != nil {
		return err
	}
	if s != nil {
		return hostdeploy.CheckImage(c.Context, st, s, c.String("kernel"), c.Bool("force"))
	}
	ref, _, err := parseImage(image)
	if err != nil {
		return noImage(err)
	}
	if ref.Transport == registry.ContainersStorage {
		// Opened as others are, podman would write all of it to a directory.
		if _, err = podmanext.FindLocal(c.Context, ref.Name); errors.Is(err, podmanext.ErrNoImage) || errors.Is(err, podmanext.ErrNoPodman) {
			return err
		}
		return nil
	}
	o, err := registryOptions(c)
	if err != nil {
		return err
	}
	img, err := registry.Open(c.Context, ref, o)
	if err != nil {
		return err
	}
	defer img.Close()
	arch, err := converter.Architecture(c.Context, img)
	if err != nil {
		return err
	}
	return hostdeploy.CheckArchitecture(arch)
}

// fill brings the image into the new host's store: from this machine's, or from where its
// reference leads.
func fill(t *term, c *cli.Context, n *hostdeploy.NewHost, p *phases) hostdeploy.Fill {
	return func(ctx context.Context, to *store.Store) (manifest string, err error) {
		image, reference := c.String("image"), ""
		from, s, err := imageHere(t, c, image)
		if err != nil {
			return "", err
		}
		if s != nil {
			if _, err = converter.Copy(ctx, from, s, to, converter.Options{Name: image}); err != nil {
				return "", err
			}
			manifest = s.Manifest.String()
			if ref, name, err := parseImage(image); err == nil && !name {
				reference = ref.String()
			}
		} else if manifest, reference, err = fetch(ctx, t, c, to, image, p); err != nil {
			return "", err
		}
		if n.Reference = c.String("target-imgref"); n.Reference == "" && strings.HasPrefix(reference, "docker://") {
			// Other places are this machine's, not the new one's.
			n.Reference = reference
		}
		return manifest, nil
	}
}

// An installed is the result of an installation.
type installed struct {
	*hostdeploy.Plan
	Phases []phase `json:"phases"`
}

func installToDisk(t *term, c *cli.Context, path string) error {
	if err := needImage(c); err != nil {
		return err
	}
	loader := c.String("bootloader")
	if loader == "" {
		loader = "systemd-boot"
	}
	installer, err := bootloader.InstallerByName(loader)
	if err != nil {
		return usageError{err}
	}
	o := disk.Options{Layout: installer.Layout(), FS: disk.FS(c.String("filesystem")), Wipe: c.Bool("wipe")}
	if o.FS != disk.Ext4 && o.FS != disk.Btrfs && o.FS != disk.XFS {
		return usagef("--filesystem: got %q, want ext4, btrfs or xfs", o.FS)
	}
	// A device has its size, and so has a file that is there.
	if fi, err := os.Stat(path); c.IsSet("size") || errors.Is(err, os.ErrNotExist) || err == nil && fi.Mode().IsRegular() && fi.Size() == 0 {
		if o.Size, err = parseSize(c.String("size")); err != nil {
			return usageError{fmt.Errorf("--size: %w", err)}
		}
	}
	if s := c.String("boot-size"); s != "" {
		if o.BootSize, err = parseSize(s); err != nil {
			return usageError{fmt.Errorf("--boot-size: %w", err)}
		}
	}
	if o.FS == disk.XFS && !c.Bool("allow-missing-verity") {
		return (&hostdeploy.FileSystem{Type: "xfs"}).CanVerity()
	}
	if c.Bool("dry-run") {
		return planDisk(t, c, path, loader, o)
	}
	// Whatever happens to this process, no mount of it stays.
	if err := disk.Isolate(); err != nil {
		return err
	}
	if err := checkImage(t, c); err != nil {
		return err
	}
	p := &phases{t: t}
	start := time.Now()
	d, err := disk.Create(c.Context, path, o)
	if err != nil {
		return err
	}
	defer func() {
		if err := d.Close(); err != nil {
			t.warnf("%v", err)
		}
	}()
	p.add("disk", start, 0)
	n := newHost(t, c, p)
	root, target := d.Partition(disk.RoleRoot), d.BootTarget()
	n.Root, n.Paths, n.Loader, n.Fstab = d.Root(), bootloader.Paths{Boot: d.Boot()}, loader, d.Fstab()
	n.Args = (&hostdeploy.FileSystem{UUID: root.FSUUID, Type: string(root.FS), Subvolume: "/"}).RootArgs()
	n.Target = &target
	n.Target.Serial = serialOf(n.Machine)
	plan, err := n.Prepare(c.Context, fill(t, c, n, p))
	if err != nil {
		return err
	}
	if err := n.Install(c.Context, plan); err != nil {
		return err
	}
	start = time.Now()
	if err := d.Finish(c.Context); err != nil {
		return err
	}
	p.add("finish", start, 0)
	return printInstalled(t, c, plan, p, path)
}

// serialOf returns the speed of the first serial line where the kernel's console is
// there, so that the loader's menu is, too.
func serialOf(args hostdeploy.Args) string {
	for _, a := range args {
		console, ok := strings.CutPrefix(a, "console=ttyS0")
		if !ok {
			continue
		}
		speed := strings.TrimLeft(console, ",")
		if i := strings.IndexFunc(speed, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
			speed = speed[:i]
		}
		if speed == "" {
			speed = "9600" // the kernel's default (Documentation/admin-guide/serial-console.rst)
		}
		return speed
	}
	return ""
}

func printInstalled(t *term, c *cli.Context, plan *hostdeploy.Plan, p *phases, where string) error {
	if c.Bool("json") {
		return t.printJSON(installed{plan, p.all})
	}
	t.printf("%s is installed on %s\n", plan.Title, where)
	return nil
}

// planDisk prints what would be made of a disk: its partitions and the very plan. That is
// made in a directory in the root's place, which the image is fetched into; it is gone
// in the end, and so is its name from what is printed.
func planDisk(t *term, c *cli.Context, path, loader string, o disk.Options) (err error) {
	have, err := disk.Inspect(c.Context, path)
	length, sector := o.Size, 512
	switch {
	case err == nil:
		sector = have.Sector
		if length == 0 {
			length = have.Size
		}
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	parts, err := disk.Layout(length, sector, o)
	if err != nil {
		return err
	}
	p := &phases{t: t}
	plan, err := planOnDisk(t, c, loader, o.FS, p)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return t.printJSON(struct {
			installed
			Disk       string           `json:"disk"`
			Bootloader string           `json:"bootloader"`
			Partitions []disk.Partition `json:"partitions"`
		}{installed{plan, p.all}, path, loader, parts})
	}
	if have != nil && !have.Empty() {
		verb := "would be refused without --wipe"
		if o.Wipe {
			verb = "would be erased"
		}
		t.warnf("what is on %s %s: %s", path, verb, have)
	}
	t.printf("partition %s, %s\n", path, size(length))
	for _, p := range parts {
		t.printf("%2d. %-14s %-6s %s\n", p.Number, p.Name, p.FS, size(p.Size))
	}
	t.printf("install the boot loader %s\n", loader)
	printPlan(t, plan)
	return nil
}

// planOnDisk makes the plan of an installation to a disk that is not there.
func planOnDisk(t *term, c *cli.Context, loader string, fs disk.FS, p *phases) (plan *hostdeploy.Plan, err error) {
	dir, err := os.MkdirTemp(largeTemp(), "particle-plan-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	boot := filepath.Join(dir, "boot")
	if err := os.Mkdir(boot, 0o755); err != nil {
		return nil, err
	}
	n := newHost(t, c, p)
	n.Root, n.Paths, n.Loader = dir, bootloader.Paths{Boot: boot}, loader
	n.Args = (&hostdeploy.FileSystem{UUID: "NEW", Type: string(fs), Subvolume: "/"}).RootArgs()
	if plan, err = n.Prepare(c.Context, fill(t, c, n, p)); err != nil {
		return nil, err
	}
	for i := range plan.Steps {
		plan.Steps[i].Text = strings.ReplaceAll(plan.Steps[i].Text, dir, "")
	}
	return plan, nil
}

// loaderTarget describes a disk that others have partitioned to those who install a boot
// loader on it.
func loaderTarget(ctx context.Context, device, boot string, bootFS *hostdeploy.FileSystem) (*bootloader.Target, error) {
	have, err := disk.Inspect(ctx, device)
	if err != nil {
		return nil, err
	}
	t := &bootloader.Target{
		Boot: boot, Mounted: true, Disk: device, Device: device, BootDevice: bootFS.Device, BootUUID: bootFS.UUID,
	}
	for _, p := range have.Partitions {
		if p.Role == disk.RoleBIOS {
			t.BIOSBootStart, t.BIOSBootSize = p.Start, p.Size
		}
		if p.FSUUID != "" && p.FSUUID == bootFS.UUID {
			t.BootNumber = p.Number
		}
	}
	return t, nil
}

func installToFilesystem(t *term, c *cli.Context, dir string) error {
	if err := needImage(c); err != nil {
		return err
	}
	fs, err := hostdeploy.FileSystemOf(c.Context, dir)
	if err != nil {
		return err
	}
	if err := fs.CanVerity(); err != nil && !c.Bool("allow-missing-verity") {
		return err
	}
	p := &phases{t: t}
	n := newHost(t, c, p)
	n.Root, n.Args = dir, fs.RootArgs()
	boot := filepath.Join(dir, "boot")
	if n.Paths, err = hostdeploy.BootPaths(boot); err != nil {
		return err
	}
	bootFS, err := hostdeploy.FileSystemOf(c.Context, boot)
	if err != nil {
		return err
	}
	// A directory of the physical root is bound to its place: the loader's files, and the
	// programs that look after them, are at /boot on every host.
	if n.Fstab = "/sysroot/boot /boot none bind 0 0\n"; bootFS.Target != fs.Target {
		n.Fstab = bootFS.Fstab("/boot")
	}
	if n.Loader == "" {
		found, err := bootloader.Detect(n.Paths)
		if err != nil {
			return fmt.Errorf("%w\n--bootloader names one, --loader-disk has it installed", err)
		}
		n.Loader = found.Name()
	}
	if device := c.String("loader-disk"); device != "" {
		if n.Target, err = loaderTarget(c.Context, device, boot, bootFS); err != nil {
			return err
		}
		n.Target.Serial = serialOf(n.Machine)
	}
	plan, err := n.Prepare(c.Context, fill(t, c, n, p))
	if err != nil {
		return err
	}
	if c.Bool("dry-run") {
		if err := n.Discard(); err != nil {
			return err
		}
		if c.Bool("json") {
			return t.printJSON(installed{plan, p.all})
		}
		printPlan(t, plan)
		return nil
	}
	if err := n.Install(c.Context, plan); err != nil {
		return err
	}
	return printInstalled(t, c, plan, p, dir)
}
