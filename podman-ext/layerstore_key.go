package podmanext

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"path"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// A Key names a layer in a layer store, as podman asks for it.
type Key struct {
	// Ref is the image's reference, in full: "docker.io/library/debian:13".
	Ref string `json:"ref"`
	// Digest is "sha256:" and 64 hexadecimal digits: of the layer as the registry has
	// it, compressed or not (podman up to 5.0), or of its table of contents (5.1 and
	// newer).
	Digest string `json:"digest"`
}

// maxRef limits references in bytes: in base64 they are the name of one file.
const maxRef = 255 / 4 * 3

// path returns the layer's directory below the store: the reference in standard
// base64, and the digest (c/storage drivers/overlay/overlay.go,
// getAdditionalLayerPath). No reference has a slash in base64, for that needs a "?".
func (k Key) path() string { return path.Join(encodeRef(k.Ref), k.Digest) }

func (k Key) compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Ref, o.Ref), cmp.Compare(k.Digest, o.Digest))
}

func encodeRef(ref string) string { return base64.StdEncoding.EncodeToString([]byte(ref)) }

// decodeRef reads the name of a directory that stands for a reference. Only names
// that encodeRef gives are accepted, so that each reference has one.
func decodeRef(s string) (string, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(s)
	if err != nil {
		return "", fmt.Errorf("%w: %.300q: %v", ErrKey, s, err)
	}
	if err := checkRef(string(raw)); err != nil {
		return "", err
	}
	return string(raw), nil
}

// checkRef returns an error unless ref is a reference in full, as podman writes it:
// with host, and tag or digest.
func checkRef(ref string) error {
	if len(ref) > maxRef {
		return fmt.Errorf("%w: the reference has %d bytes, want at most %d", ErrKey, len(ref), maxRef)
	}
	r, err := name.ParseReference(ref, name.StrictValidation)
	if err != nil {
		return fmt.Errorf("%w: %v", ErrKey, err)
	}
	host, _, ok := strings.Cut(ref, "/")
	if !ok || host != "docker.io" && host != r.Context().RegistryStr() {
		return fmt.Errorf("%w: the reference %q has no host", ErrKey, ref)
	}
	return nil
}

// checkDigest returns an error unless s is a sha256.
func checkDigest(s string) error {
	hex, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("%w: %.100q is not the digest of a layer, want a sha256", ErrKey, s)
	}
	return nil
}

// IsReference reports whether a name is a reference that podman could ask a layer
// store for.
func IsReference(name string) bool { return checkRef(name) == nil }
