package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
)

// bootstrapOptions is what decides the bytes of a base image, apart from the state
// of the mirrors.
type bootstrapOptions struct {
	suite       string
	arch        string // Debian's name of the architecture
	variant     string
	components  []string
	include     []string
	mirrors     []string // as mmdebstrap takes them: URI, deb line, file or "-"
	keyrings    []string
	aptopts     []string
	epoch       int64 // seconds; -1 for the date of the suite's Release file
	compression string
}

// newBootstrapCommand makes the verb that makes a base image from apt alone.
func newBootstrapCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:      "bootstrap",
		Usage:     "make a base image of Debian or Ubuntu from apt alone, reproducibly",
		ArgsUsage: "SUITE [TARGET]",
		Description: "Installs SUITE (trixie, bookworm, sid, noble, ...) with mmdebstrap and makes an image\n" +
			"of one layer of it. No registry is asked for anything.\n\n" +
			"TARGET is where the image goes: oci:DIR[:TAG], oci-archive:FILE, docker-archive:FILE,\n" +
			"containers-storage:NAME or docker://HOST/REPO:TAG. Without one it goes into the store,\n" +
			"under the name of the suite or that of --name.\n\n" +
			"The same mirrors in the same state give the same bytes and so the same digest, on any\n" +
			"machine: times are those of the packages, or of the suite's Release file for what the\n" +
			"installation wrote (--epoch); logs, caches, host keys and the machine's id stay out.\n\n" +
			"Needs root, or the newuidmap of package uidmap and entries in /etc/subuid. The suites\n" +
			"of Ubuntu need Ubuntu's keyring (package ubuntu-keyring, or --keyring FILE) and, where\n" +
			"mmdebstrap does not know the suite, a --mirror.",
		Flags: append(registryFlags(),
			&cli.StringSliceFlag{Name: "mirror", Usage: "`URI`, line of sources.list or file to install from instead of the suite's usual ones; may repeat"},
			&cli.StringSliceFlag{Name: "components", Usage: "`NAME` of an archive area: main, contrib, universe, ...; may repeat or be joined by commas"},
			&cli.StringFlag{Name: "variant", Value: "minbase", Usage: "mmdebstrap's `VARIANT`: essential, apt, minbase, important, standard, ..."},
			&cli.StringSliceFlag{Name: "include", Usage: "`PACKAGE` to install as well; may repeat or be joined by commas"},
			&cli.StringSliceFlag{Name: "keyring", Usage: "`FILE` or directory of keys that sign the suite; may repeat"},
			&cli.StringFlag{Name: "arch", Usage: "Debian's `NAME` of the architecture (default: this machine's)"},
			&cli.StringSliceFlag{Name: "aptopt", Usage: "apt `OPTION` for the installation only, such as 'Acquire::http::Proxy \"http://...\"'; may repeat"},
			&cli.StringFlag{Name: "epoch", EnvVars: []string{"SOURCE_DATE_EPOCH"}, Usage: "`SECONDS` since 1970 that stand for now (default: the date of the suite's Release file)"},
			&cli.StringFlag{Name: "compression", Value: "gzip", Usage: "compress the layer in TARGET as `none|gzip|zstd`"},
			&cli.StringFlag{Name: "name", Aliases: []string{"tag"}, Usage: "`NAME` in the store, or tag in a layout or archive given without one (default: SUITE)"},
			&cli.BoolFlag{Name: "json", Usage: "print the result as JSON"},
		),
		Action: func(c *cli.Context) error {
			o, err := parseBootstrap(c)
			if err != nil {
				return err
			}
			name := c.String("name")
			if name == "" {
				name = o.suite
			}
			deliver, err := bootstrapTarget(c, t, c.Args().Get(1), name)
			if err != nil {
				return err
			}
			return runBootstrap(c.Context, t, o, deliver, c.Bool("json"))
		},
	}
}

func parseBootstrap(c *cli.Context) (bootstrapOptions, error) {
	o := bootstrapOptions{
		suite:       c.Args().First(),
		arch:        c.String("arch"),
		variant:     c.String("variant"),
		components:  c.StringSlice("components"),
		include:     c.StringSlice("include"),
		mirrors:     c.StringSlice("mirror"),
		keyrings:    c.StringSlice("keyring"),
		aptopts:     c.StringSlice("aptopt"),
		epoch:       -1,
		compression: c.String("compression"),
	}
	if o.suite == "" {
		return o, usagef("bootstrap needs a suite: particle bootstrap trixie")
	}
	if c.Args().Len() > 2 {
		return o, usagef("bootstrap takes a suite and a target, got %q too", c.Args().Get(2))
	}
	if strings.ContainsAny(o.suite, "/ \t\n") || strings.HasPrefix(o.suite, "-") {
		return o, usagef("%q is not the name of a suite", o.suite)
	}
	if o.arch == "" {
		arch, err := hostArch()
		if err != nil {
			return o, err
		}
		o.arch = arch
	}
	if _, ok := ociArch[o.arch]; !ok {
		return o, usagef("unknown architecture %q; want Debian's name, such as amd64 or arm64", o.arch)
	}
	if s := c.String("epoch"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < 0 {
			return o, usagef("--epoch (or SOURCE_DATE_EPOCH) is %q, want seconds since 1970", s)
		}
		o.epoch = n
	}
	if _, ok := layerMediaTypes[o.compression]; !ok {
		return o, usagef("--compression is %q, want gzip, zstd or none", o.compression)
	}
	return o, nil
}

// command is the command line that makes the same image, for the image's history.
// What only concerns the way to the packages is left out, so that the digest does
// not depend on it.
func (o bootstrapOptions) command() string {
	args := []string{"particle", "bootstrap", o.suite, "--arch=" + o.arch, "--variant=" + o.variant}
	for _, f := range []struct {
		name   string
		values []string
	}{{"components", o.components}, {"include", o.include}} {
		if len(f.values) > 0 {
			args = append(args, "--"+f.name+"="+strings.Join(f.values, ","))
		}
	}
	return strings.Join(append(args, "--epoch="+strconv.FormatInt(o.epoch, 10)), " ")
}

// maxAttempts is how often an installation starts again because the mirrors were
// updated while it ran.
const maxAttempts = 3

func runBootstrap(ctx context.Context, t *term, o bootstrapOptions, deliver deliverFunc, asJSON bool) error {
	if err := checkBootstrap(o, os.Stat); err != nil {
		return err
	}
	start := time.Now()
	tmp := largeTemp()
	dir, err := os.MkdirTemp(tmp, "particle-bootstrap-")
	if err != nil {
		return fmt.Errorf("making a scratch directory: %w", err)
	}
	defer os.RemoveAll(dir)

	deb := mmdebstrap{t: t, tmp: tmp}
	root, err := deb.install(ctx, &o, filepath.Join(dir, "root.tar"))
	if err != nil {
		return err
	}
	t.infof("packing the layer")
	img, err := packImage(ctx, o, root, dir)
	if err != nil {
		return err
	}
	name, err := deliver(ctx, img)
	if err != nil {
		return err
	}
	return printBootstrap(t, o, img, name, time.Since(start), asJSON)
}

// bootstrapResult is what bootstrap prints with --json.
type bootstrapResult struct {
	Image      string `json:"image"`     // where it went
	Digest     string `json:"digest"`    // of the manifest
	Config     string `json:"config"`    // digest of the config: the image's id
	DiffID     string `json:"diffID"`    // digest of the layer's tar
	Suite      string `json:"suite"`     // as it was asked for
	Title      string `json:"title"`     // as os-release has it
	Epoch      int64  `json:"epoch"`     // seconds since 1970
	Entries    int    `json:"entries"`   // in the layer
	TarBytes   int64  `json:"tarBytes"`  // the layer uncompressed
	BlobBytes  int64  `json:"blobBytes"` // the layer as it is stored
	DurationMs int64  `json:"durationMs"`
}

func printBootstrap(t *term, o bootstrapOptions, img *builtImage, name string, took time.Duration, asJSON bool) error {
	if asJSON {
		return t.printJSON(bootstrapResult{
			Image:      name,
			Digest:     img.manifestDigest.String(),
			Config:     img.manifest.Config.Digest.String(),
			DiffID:     img.layer.diffID.String(),
			Suite:      o.suite,
			Title:      img.layer.title(),
			Epoch:      o.epoch,
			Entries:    img.layer.entries,
			TarBytes:   img.layer.tarBytes,
			BlobBytes:  img.layer.blobBytes,
			DurationMs: took.Milliseconds(),
		})
	}
	t.infof("%s: %d entries, a layer of %s (%s uncompressed), in %s", img.layer.title(), img.layer.entries,
		size(img.layer.blobBytes), size(img.layer.tarBytes), seconds(took))
	t.printf("%s@%s\n", name, img.manifestDigest)
	return nil
}

// ociArch maps Debian's names of architectures to the platform of an OCI image.
var ociArch = map[string]struct{ arch, variant string }{
	"amd64":    {"amd64", ""},
	"arm64":    {"arm64", "v8"},
	"armel":    {"arm", "v5"},
	"armhf":    {"arm", "v7"},
	"i386":     {"386", ""},
	"loong64":  {"loong64", ""},
	"mips64el": {"mips64le", ""},
	"ppc64el":  {"ppc64le", ""},
	"riscv64":  {"riscv64", ""},
	"s390x":    {"s390x", ""},
}

// hostArch asks dpkg, which knows better than the Go compiler what this system is.
func hostArch() (string, error) {
	out, err := exec.Command("dpkg", "--print-architecture").Output()
	if err != nil {
		return "", fmt.Errorf("asking dpkg for the architecture: %w; name it with --arch", err)
	}
	return strings.TrimSpace(string(out)), nil
}

// An aptVendor is a distribution that mmdebstrap knows the mirrors of.
type aptVendor struct {
	name     string
	series   string   // file of distro-info with the names of its suites
	keyrings []string // files that hold its keys, any of them will do
	pkg      string   // the Debian package of the keyring
}

var aptVendors = []aptVendor{
	{"Debian", "/usr/share/distro-info/debian.csv", []string{
		"/usr/share/keyrings/debian-archive-keyring.gpg",
		"/usr/share/keyrings/debian-archive-keyring.pgp",
	}, "debian-archive-keyring"},
	{"Ubuntu", "/usr/share/distro-info/ubuntu.csv", []string{
		"/usr/share/keyrings/ubuntu-archive-keyring.gpg",
	}, "ubuntu-keyring"},
}

// vendorOf finds the distribution that has the suite; nil where it is not known.
func vendorOf(suite string) *aptVendor {
	for i, v := range aptVendors {
		data, err := os.ReadFile(v.series)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(data)) {
			// version,codename,series,created,release,eol,...
			if f := strings.Split(line, ","); len(f) > 2 && f[2] == suite {
				return &aptVendors[i]
			}
		}
	}
	return nil
}

// checkBootstrap finds what is missing before a minute is spent on it.
func checkBootstrap(o bootstrapOptions, stat func(string) (os.FileInfo, error)) error {
	if _, err := exec.LookPath("mmdebstrap"); err != nil {
		return errors.New("mmdebstrap is not installed; get it with: apt install mmdebstrap")
	}
	for _, k := range o.keyrings {
		if _, err := stat(k); err != nil {
			return fmt.Errorf("opening the keyring: %w", err)
		}
	}
	v := vendorOf(o.suite)
	if v == nil || len(o.keyrings) > 0 {
		return nil
	}
	// A mirror line may bring its own key, or say that none is needed.
	if slices.ContainsFunc(o.mirrors, func(m string) bool {
		return strings.Contains(m, "signed-by=") || strings.Contains(m, "trusted=yes") || m == "-"
	}) {
		return nil
	}
	for _, k := range v.keyrings {
		if _, err := stat(k); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s is a suite of %s and %s is missing; get it with apt install %s, or name the file of its keys with --keyring",
		o.suite, v.name, v.keyrings[0], v.pkg)
}
