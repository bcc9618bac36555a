package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
	"github.com/particle-os/particle/converter/store"
)

// mountsDir is where images are mounted that nobody gave a place.
const mountsDir = "/run/particle"

func newMountCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "mount",
		Usage:     "mount an image read-only, or list what is mounted",
		ArgsUsage: "[NAME|FILE [DIR]]",
		Description: "NAME is an image of the store, FILE a composefs image. Without DIR a directory below\n" +
			mountsDir + " is made. The directory is printed with the state of the mount: enforced (the\n" +
			"kernel checks every read), checked (digests were compared when files were stored) or\n" +
			"none. Without arguments the mounted images are listed.",
		Flags: []cli.Flag{
			kindFlag(),
			&cli.StringFlag{Name: "verity", Value: "try", Usage: "let the kernel check each file: `off|try|require`"},
			&cli.StringSliceFlag{Name: "basedir", Usage: "take a FILE's objects from this `DIR`ectory (default: the store's)"},
			&cli.StringFlag{Name: "digest", Usage: "the fs-verity `DIGEST` that a FILE must have"},
			&cli.BoolFlag{Name: "json", Usage: "print JSON"},
		},
		Action: func(c *cli.Context) error {
			switch c.NArg() {
			case 0:
				return listMounts(t, c)
			case 1, 2:
				return runMount(t, c, c.Args().Get(0), c.Args().Get(1))
			}
			return usagef("mount takes a NAME or FILE and perhaps a DIR, got %d arguments", c.NArg())
		},
	}
}

// mounted is the result of the verb mount.
type mounted struct {
	Target string `json:"target"`
	mount.State
}

func runMount(t *term, c *cli.Context, name, target string) error {
	o, err := mountOptions(t, c, name)
	if err != nil {
		return err
	}
	defer o.Image.Close()
	made := target == ""
	if made {
		target = filepath.Join(mountsDir, o.Name)
		if all, err := mount.List(); err == nil && slices.ContainsFunc(all, func(m mount.Mounted) bool { return m.Target == target }) {
			return fmt.Errorf("%s is mounted already, on %s", name, target)
		}
		err = os.MkdirAll(target, 0o755)
	}
	var st mount.State
	if err == nil {
		st, err = mount.Mount(target, o)
	}
	if err != nil {
		if made {
			os.Remove(target)
		}
		if os.Geteuid() != 0 {
			err = fmt.Errorf("%w\nmounting needs root: try sudo", err)
		}
		return err
	}
	for _, w := range st.Warnings {
		t.warnf("%s", w)
	}
	if c.Bool("json") {
		return t.printJSON(mounted{target, st})
	}
	t.infof("%s: %s", st.Verification, st.Why)
	t.printf("%s\n", target)
	return nil
}

// mountOptions finds the image and its objects.
func mountOptions(t *term, c *cli.Context, name string) (o mount.Options, err error) {
	switch v := c.String("verity"); v {
	case "off":
		o.Verity = mount.VerityOff
	case "try":
		o.Verity = mount.VerityTry
	case "require":
		o.Verity = mount.VerityRequire
	default:
		return o, usagef("--verity: got %q, want off, try or require", v)
	}
	if d := c.String("digest"); d != "" {
		if o.Digest, err = fsverity.Parse(d); err != nil {
			return o, usageError{fmt.Errorf("--digest: %w", err)}
		}
	}
	img, err := openImage(t, c, name)
	if err != nil {
		return o, err
	}
	o.Image = img.File
	if img.store != nil {
		if o.Digest.IsZero() {
			o.Digest = img.digest
		}
		o.Objects, o.ObjectsChecked, o.Name = []string{img.store.ObjectsDir()}, true, img.digest.String()
		return o, nil
	}
	o.Name = filepath.Base(name)
	if o.Objects = c.StringSlice("basedir"); len(o.Objects) > 0 {
		return o, nil
	}
	st, err := readStore(t, c)
	if err != nil {
		return o, fmt.Errorf("finding the objects of %q: %w; --basedir names their directory", name, err)
	}
	o.Objects, o.ObjectsChecked = []string{st.ObjectsDir()}, true
	// By its digest gc knows that the image is in use, if the store has it.
	if d, _, err := fsverity.Read(st.Algorithm(), io.NewSectionReader(img, 0, 1<<62)); err == nil {
		if _, err := st.ImageDigest(d.String()); err == nil {
			o.Name = d.String()
		}
	}
	return o, nil
}

// A listed is a mount with its state.
type listed struct {
	mount.Mounted
	Verification mount.Verification `json:"verification"`
}

func listMounts(t *term, c *cli.Context) error {
	mounts, err := mount.List()
	if err != nil {
		return err
	}
	st, err := freeStore(t, c)
	if err != nil && !errors.Is(err, store.ErrNotStore) {
		return err
	}
	all := []listed{}
	for _, m := range mounts {
		all = append(all, listed{m, stateOf(m, st)})
	}
	if c.Bool("json") {
		return t.printJSON(all)
	}
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DIRECTORY\tSTATE\tIMAGE")
	for _, m := range all {
		fmt.Fprintf(w, "%s\t%s\t%s\n", m.Target, m.Verification, m.Name)
	}
	return w.Flush()
}

// stateOf tells the state of a mount as far as it can be known afterwards: of an image
// of the store at hand, which was compared when it was mounted. Of others nothing is
// known but what the kernel does.
func stateOf(m mount.Mounted, st *store.Store) mount.Verification {
	if st == nil || !slices.Contains(m.Objects, st.ObjectsDir()) {
		return mount.None
	}
	f, d, err := st.OpenImage(m.Name)
	if err != nil {
		return mount.None
	}
	defer f.Close()
	if measured, err := fsverity.Measure(f); err == nil && measured == d && m.Verity {
		return mount.Enforced
	}
	return mount.Checked
}

func newUmountCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "umount",
		Usage:     "unmount images",
		ArgsUsage: "DIR...",
		Action: func(c *cli.Context) error {
			if c.NArg() == 0 {
				return usagef("umount takes the DIRs that images are mounted on, got none; particle mount lists them")
			}
			for _, dir := range c.Args().Slice() {
				if err := mount.Unmount(dir); err != nil {
					return err
				}
				if abs, err := filepath.Abs(dir); err == nil && filepath.Dir(abs) == mountsDir {
					os.Remove(abs) // it was made for the mount
				}
			}
			return nil
		},
	}
}
