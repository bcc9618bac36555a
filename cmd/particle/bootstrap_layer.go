package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/converter/layer"
)

// A packedLayer is a layer blob in a file.
type packedLayer struct {
	file      string
	digest    v1.Hash // of the file
	diffID    v1.Hash // of the tar in it
	blobBytes int64
	tarBytes  int64
	entries   int

	osRelease map[string]string // of the system in it
	debian    string            // point release of Debian, from etc/debian_version
}

// title is the system's name for people.
func (l *packedLayer) title() string {
	return cmp.Or(l.osRelease["PRETTY_NAME"], l.osRelease["NAME"], "a system without os-release")
}

// version is the system's version: Debian keeps its point release elsewhere, and
// testing and unstable have none.
func (l *packedLayer) version() string {
	if l.osRelease["ID"] == "debian" && l.debian != "" {
		return l.debian
	}
	return cmp.Or(l.osRelease["VERSION_ID"], l.osRelease["VERSION_CODENAME"])
}

// packLayer writes the tar of a system as a layer blob to the file name. The bytes
// of the layer depend on the system, the epoch and the compression only: tar
// programs differ in their headers, so all headers are written anew.
func packLayer(ctx context.Context, root *installedRoot, epoch int64, compression, name string) (_ *packedLayer, err error) {
	c, err := layer.ParseCompression(compression)
	if err != nil {
		return nil, err
	}
	in, err := os.Open(root.tar)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	out, err := os.Create(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()

	blob, plain := &digester{h: sha256.New()}, &digester{h: sha256.New()}
	zw, err := layer.NewCompressor(io.MultiWriter(out, blob), c, layer.CompressorOptions{})
	if err != nil {
		return nil, err
	}
	l := &packedLayer{file: name}
	if err := normalize(ctx, tar.NewReader(in), tar.NewWriter(io.MultiWriter(zw, plain)), root, epoch, l); err != nil {
		return nil, errors.Join(fmt.Errorf("packing the layer: %w", err), zw.Close())
	}
	if err := zw.Close(); err != nil {
		return nil, fmt.Errorf("packing the layer: %w", err)
	}
	l.digest, l.blobBytes = blob.sum()
	l.diffID, l.tarBytes = plain.sum()
	return l, nil
}

// normalize copies a tar and drops from it what differs between two installations of
// the same packages. It notes in l what the image's config tells about the system.
func normalize(ctx context.Context, r *tar.Reader, w *tar.Writer, root *installedRoot, epoch int64, l *packedLayer) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := r.Next()
		if err == io.EOF {
			// Some releases of mmdebstrap leave /dev out, others its contents only. It is
			// a mount point, so it must be there.
			l.entries++
			if err := w.WriteHeader(devHeader(epoch)); err != nil {
				return err
			}
			return w.Close()
		}
		if err != nil {
			return err
		}
		// "./usr/" and "usr" are the same file; the root is "".
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		if strings.HasPrefix(path.Base(name), ".wh.") {
			return fmt.Errorf("file %q cannot be in an image: its name marks a deleted file there", name)
		}
		if scrubbed(name, h) || name == "dev" || strings.HasPrefix(name, "dev/") {
			continue
		}
		out := normalHeader(h, name, root, epoch)
		if err := w.WriteHeader(out); err != nil {
			return fmt.Errorf("writing %q: %w", name, err)
		}
		l.entries++
		var body io.Reader = r
		var text bytes.Buffer
		switch name {
		case "usr/lib/os-release", "etc/debian_version":
			body = io.TeeReader(io.LimitReader(r, 64<<10), &text)
		}
		if _, err := io.Copy(w, body); err != nil {
			return fmt.Errorf("writing %q: %w", name, err)
		}
		switch name {
		case "usr/lib/os-release":
			l.osRelease = parseOSRelease(text.String())
		case "etc/debian_version":
			l.debian = strings.TrimSpace(text.String())
		}
	}
}

// devHeader is the header of an empty /dev.
func devHeader(epoch int64) *tar.Header {
	return &tar.Header{Typeflag: tar.TypeDir, Name: "dev/", Mode: 0o755, ModTime: time.Unix(epoch, 0)}
}

// normalHeader is the header of an entry in a layer: no names of owners, which other
// systems map otherwise, whole seconds, and the epoch for what was written by the
// installation and not unpacked from a package.
func normalHeader(h *tar.Header, name string, root *installedRoot, epoch int64) *tar.Header {
	out := &tar.Header{
		Typeflag: h.Typeflag,
		Name:     name,
		Linkname: h.Linkname,
		Size:     h.Size,
		Mode:     h.Mode & 0o7777,
		Uid:      h.Uid,
		Gid:      h.Gid,
		Devmajor: h.Devmajor,
		Devminor: h.Devminor,
	}
	switch h.Typeflag {
	case tar.TypeDir:
		out.Name = cmp.Or(name, ".") + "/"
	case tar.TypeLink:
		out.Linkname = strings.TrimPrefix(path.Clean("/"+h.Linkname), "/")
	}
	if aptPartial[name] {
		out.Uid, out.Gid = 0, 0
	}
	mtime := h.ModTime.Unix()
	if packaged, ok := root.times[name]; ok {
		mtime = packaged
	} else if mtime > epoch || mtime > root.start {
		mtime = epoch
	}
	out.ModTime = time.Unix(mtime, 0)
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, "SCHILY.xattr.") {
			if out.PAXRecords == nil {
				out.PAXRecords = map[string]string{}
			}
			out.PAXRecords[k] = v
		}
	}
	return out
}

// aptPartial are directories that belong to root in the package apt. apt gives them
// to its user _apt when it downloads as that user, which it cannot where TMPDIR lies
// below a directory of root's alone: who owns them would tell where the system was
// installed. The next apt gives them away again.
var aptPartial = map[string]bool{
	"var/cache/apt/archives/partial": true,
	"var/lib/apt/lists/partial":      true,
}

// scrubRules name what an image must not carry, by path patterns of [path.Match].
// Directories stay.
var scrubRules = []struct {
	pattern string
	why     string
}{
	{"etc/resolv.conf", "this machine's resolver, copied by mmdebstrap"},
	{"etc/hostname", "this machine's name, copied by mmdebstrap"},
	{"etc/.pwd.lock", "a lock"},
	{"etc/apt/apt.conf.d/99mmdebstrap", "options of this installation, such as a proxy"},
	{"etc/dpkg/dpkg.cfg.d/99mmdebstrap", "options of this installation"},
	{"etc/passwd-", "a backup of an editing tool"},
	{"etc/group-", "a backup of an editing tool"},
	{"etc/shadow-", "a backup of an editing tool"},
	{"etc/gshadow-", "a backup of an editing tool"},
	{"etc/subuid-", "a backup of an editing tool"},
	{"etc/subgid-", "a backup of an editing tool"},
	{"etc/ssh/ssh_host_*", "a host key that all hosts would share"},
	{"etc/ssl/private/ssl-cert-snakeoil.key", "a private key that all hosts would share"},
	{"etc/ssl/certs/ssl-cert-snakeoil.pem", "the certificate of a private key that all hosts would share"},
	{"var/cache/apt/*.bin", "a cache with times of access"},
	{"var/cache/apt/archives/*.deb", "a package that is installed"},
	{"var/cache/debconf/*-old", "a backup of debconf"},
	{"var/cache/ldconfig/aux-cache", "a cache with inode numbers"},
	{"var/lib/apt/lists/*", "a package index, old by tomorrow"},
	{"var/lib/apt/lists/*/*", "a package index, old by tomorrow"},
	{"var/lib/dbus/machine-id", "the id of a machine"},
	{"var/lib/dpkg/*-old", "a backup of dpkg"},
	{"var/lib/systemd/random-seed", "randomness that all hosts would share"},
	{"var/lib/systemd/credential.secret", "a secret that all hosts would share"},
}

// scrubbed tells whether an entry stays out of the image.
func scrubbed(name string, h *tar.Header) bool {
	if h.Typeflag == tar.TypeDir {
		return false
	}
	for _, r := range scrubRules {
		if ok, err := path.Match(r.pattern, name); ok && err == nil {
			return true
		}
	}
	switch {
	case strings.HasPrefix(name, "var/log/"):
		return h.Size > 0 // empty ones, such as btmp, are there for their mode
	case strings.HasPrefix(name, "var/cache/man/"):
		return true // a database with times
	case strings.HasPrefix(name, "tmp/"), strings.HasPrefix(name, "var/tmp/"):
		return true
	case strings.HasPrefix(name, "run/"):
		return h.Typeflag == tar.TypeReg
	}
	return false
}

// parseOSRelease reads NAME=value lines, values in quotes or not (os-release(5)).
func parseOSRelease(text string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if !ok || strings.HasPrefix(key, "#") {
			continue
		}
		if n := len(value); n >= 2 && (value[0] == '"' || value[0] == '\'') && value[n-1] == value[0] {
			value = value[1 : n-1]
		}
		m[key] = value
	}
	return m
}

// A digester hashes and counts what is written to it.
type digester struct {
	h interface {
		io.Writer
		Sum([]byte) []byte
	}
	n int64
}

func (d *digester) Write(p []byte) (int, error) {
	n, err := d.h.Write(p)
	d.n += int64(n)
	return n, err
}

func (d *digester) sum() (v1.Hash, int64) {
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(d.h.Sum(nil))}, d.n
}
