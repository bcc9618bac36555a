package hostdeploy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
)

// An Origin says what a deployment was made of. Its file is an INI file with the
// sections and keys of bootc (crates/lib/src/bootc_composefs/state.rs) and a section of
// Particle's own; docs/boot.md shows one.
type Origin struct {
	// Reference is where the image came from and where updates come from, with its
	// transport: "docker://registry.example/server:13". "" for one that has no such
	// place.
	Reference string `json:"reference,omitempty"`
	// Manifest is the digest of the OCI manifest, "sha256:…".
	Manifest string `json:"manifest"`
	// BootDigest is the SHA-256 of kernel and initramfs, hexadecimal.
	BootDigest string          `json:"bootDigest"`
	ID         string          `json:"id"`
	Digest     fsverity.Digest `json:"digest"`
	// Version is the image's own, "" where it has none.
	Version string    `json:"version,omitempty"`
	Title   string    `json:"title"`
	Kernel  string    `json:"kernel"` // release, as uname -r
	Created time.Time `json:"created"`
	Pinned  bool      `json:"pinned"`
	KArgs   KArgs     `json:"kargs"`
}

// ostreePrefix begins references in origin files of bootc: an image whose signature
// nobody checked.
const ostreePrefix = "ostree-unverified-image:"

// digestText is a digest as the kernel command line has it: "v1-sha256-12:<hex>".
func digestText(d fsverity.Digest) string {
	return "v1-" + strings.TrimPrefix(d.Algorithm().Name(), "fsverity-") + ":" + d.String()
}

// parseDigestText is the inverse of digestText. A "?" in front says that the system may
// boot without fs-verity.
func parseDigestText(s string) (d fsverity.Digest, insecure bool, err error) {
	rest, insecure := strings.CutPrefix(s, "?")
	format, hex, ok := strings.Cut(rest, ":")
	if !ok || format != "v1-sha256-12" && format != "v1-sha512-12" {
		return d, false, fmt.Errorf("%w: digest %q: want v1-sha256-12:… or v1-sha512-12:…", ErrFormat, s)
	}
	if d, err = fsverity.Parse(hex); err != nil {
		return d, false, fmt.Errorf("%w: digest %q: %w", ErrFormat, s, err)
	}
	if digestText(d) != rest {
		return d, false, fmt.Errorf("%w: digest %q has the length of %s", ErrFormat, s, d.Algorithm().Name())
	}
	return d, insecure, nil
}

// marshal returns the origin's file.
func (o *Origin) marshal() ([]byte, error) {
	var b strings.Builder
	var bad error
	section := func(name string) {
		if b.Len() > 0 {
			b.WriteByte('\n')
		}
		fmt.Fprintf(&b, "[%s]\n", name)
	}
	put := func(key, value string) {
		if strings.ContainsAny(value, "\n\r\x00") {
			bad = fmt.Errorf("%w: %s must be one line, got %q", ErrFormat, key, value)
		}
		if value != "" {
			fmt.Fprintf(&b, "%s=%s\n", key, value)
		}
	}
	section("origin")
	if o.Reference != "" {
		put("container-image-reference", ostreePrefix+o.Reference)
	}
	section("boot")
	put("boot_type", "bls")
	put("digest", o.BootDigest)
	section("image")
	put("manifest_digest", o.Manifest)
	section("particle")
	put("id", o.ID)
	put("digest", digestText(o.Digest))
	put("version", o.Version)
	put("title", o.Title)
	put("kernel", o.Kernel)
	put("created", o.Created.UTC().Format(time.RFC3339))
	if o.Pinned {
		put("pinned", "true")
	}
	for _, k := range o.kargs() {
		put(k.key, k.args.String())
	}
	return []byte(b.String()), bad
}

type originArgs struct {
	key  string
	args *Args
}

func (o *Origin) kargs() []originArgs {
	return []originArgs{
		{"kargs-boot", &o.KArgs.Boot},
		{"kargs-machine", &o.KArgs.Machine},
		{"kargs-image", &o.KArgs.Image},
		{"kargs-user", &o.KArgs.User},
		{"kargs-deleted", &o.KArgs.Deleted},
	}
}

// parseOrigin reads an origin file. Sections and keys that are not known here are
// passed over, so that files of bootc and of later versions can be read.
func parseOrigin(data []byte) (*Origin, error) {
	o := &Origin{}
	section := ""
	for i, line := range strings.Split(string(data), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		if inner, ok := strings.CutPrefix(line, "["); ok {
			if section, ok = strings.CutSuffix(inner, "]"); !ok {
				return nil, fmt.Errorf("%w: line %d: a section's name is not closed: %q", ErrFormat, i+1, line)
			}
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("%w: line %d: want KEY=VALUE, got %q", ErrFormat, i+1, line)
		}
		if err := o.set(section, strings.TrimSpace(key), strings.TrimSpace(value)); err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
	}
	if o.Digest.IsZero() {
		return nil, fmt.Errorf("%w: the section [particle] names no digest", ErrFormat)
	}
	if err := checkID(o.ID); err != nil {
		return nil, err
	}
	return o, nil
}

func (o *Origin) set(section, key, value string) (err error) {
	switch section + "." + key {
	case "origin.container-image-reference":
		o.Reference = strings.TrimPrefix(value, ostreePrefix)
	case "boot.digest":
		o.BootDigest = value
	case "image.manifest_digest":
		o.Manifest = value
	case "particle.id":
		o.ID = value
	case "particle.digest":
		o.Digest, _, err = parseDigestText(value)
	case "particle.version":
		o.Version = value
	case "particle.title":
		o.Title = value
	case "particle.kernel":
		o.Kernel = value
	case "particle.created":
		if o.Created, err = time.Parse(time.RFC3339, value); err != nil {
			err = fmt.Errorf("%w: created: %w", ErrFormat, err)
		}
	case "particle.pinned":
		if o.Pinned, err = strconv.ParseBool(value); err != nil {
			err = fmt.Errorf("%w: pinned: got %q, want true or false", ErrFormat, value)
		}
	default:
		if section == "particle" {
			for _, k := range o.kargs() {
				if k.key == key {
					*k.args = ParseArgs(value)
				}
			}
		}
	}
	return err
}

// checkID refuses ids that are no name of a directory of deployments: hexadecimal
// digits, and perhaps a dot and a number.
func checkID(id string) error {
	hex, n, dotted := strings.Cut(id, ".")
	if len(hex) < 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("%w: id %q: want a digest of 64 or more hexadecimal digits", ErrFormat, id)
	}
	if dotted {
		if v, err := strconv.Atoi(n); err != nil || v < 1 || strconv.Itoa(v) != n {
			return fmt.Errorf("%w: id %q: want a number behind the dot", ErrFormat, id)
		}
	}
	return nil
}
