// Package fsverity computes and carries fs-verity file digests, the names that
// objects have in a composefs store.
//
// The digest of a file is the hash of its fs-verity descriptor, which holds the
// root of a Merkle tree over the file's 4096-byte blocks, without salt
// (Linux Documentation/filesystems/fsverity.rst, "File digest computation").
// [Hasher] computes it in user space on any filesystem; [Enable] and [Measure]
// talk to kernels and filesystems that have fs-verity.
//
// Left out: block sizes other than 4096 bytes, salts, and the built-in
// signatures of the kernel (PKCS#7 signatures are checked in user space by those
// who need them).
package fsverity

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// An Algorithm is a hash algorithm of fs-verity, numbered as in
// struct fsverity_enable_arg (Linux include/uapi/linux/fsverity.h).
// The zero value is no algorithm.
type Algorithm uint8

const (
	SHA256 Algorithm = 1
	SHA512 Algorithm = 2
)

// BlockSize is the Merkle tree block size in bytes; LogBlockSize its log2.
const (
	LogBlockSize = 12
	BlockSize    = 1 << LogBlockSize
)

// maxSize is the size in bytes of the largest digest.
const maxSize = 64

// ErrBadDigest is returned (wrapped) for text or bytes that are not a digest.
var ErrBadDigest = errors.New("not an fs-verity digest")

// Size returns the size of a digest in bytes: 32 or 64, and 0 for no algorithm.
func (a Algorithm) Size() int {
	switch a {
	case SHA256:
		return 32
	case SHA512:
		return 64
	}
	return 0
}

// String returns "sha256" or "sha512".
func (a Algorithm) String() string {
	switch a {
	case SHA256:
		return "sha256"
	case SHA512:
		return "sha512"
	}
	return fmt.Sprintf("unknown algorithm %d", uint8(a))
}

// Name returns the identifier that repositories and boot parameters use, which
// names the block size too: "fsverity-sha256-12" or "fsverity-sha512-12".
func (a Algorithm) Name() string { return fmt.Sprintf("fsverity-%s-%d", a, LogBlockSize) }

// ParseAlgorithm accepts "sha256", "sha256-12" and "fsverity-sha256-12", and the
// same of sha512.
func ParseAlgorithm(s string) (Algorithm, error) {
	switch strings.TrimSuffix(strings.TrimPrefix(s, "fsverity-"), "-12") {
	case "sha256":
		return SHA256, nil
	case "sha512":
		return SHA512, nil
	}
	return 0, fmt.Errorf("unknown fs-verity algorithm %q: want fsverity-sha256-12 or fsverity-sha512-12", s)
}

// A Digest is an fs-verity file digest together with its algorithm. Digests are
// comparable and usable as map keys; the zero Digest means "none".
type Digest struct {
	alg Algorithm
	sum [maxSize]byte // bytes beyond alg.Size() are zero
}

// New returns the digest with the given raw bytes, whose number must fit alg.
func New(alg Algorithm, sum []byte) (Digest, error) {
	if alg.Size() == 0 || len(sum) != alg.Size() {
		return Digest{}, fmt.Errorf("%w: got %d bytes, want %d for %s", ErrBadDigest, len(sum), alg.Size(), alg)
	}
	d := Digest{alg: alg}
	copy(d.sum[:], sum)
	return d, nil
}

// Parse reads a digest in lower-case hexadecimal. Its length decides the
// algorithm: 64 digits are SHA-256, 128 are SHA-512.
func Parse(s string) (Digest, error) {
	var d Digest
	switch len(s) {
	case 64:
		d.alg = SHA256
	case 128:
		d.alg = SHA512
	default:
		return Digest{}, fmt.Errorf("%w: %q has %d characters, want 64 or 128 hexadecimal digits", ErrBadDigest, s, len(s))
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return Digest{}, fmt.Errorf("%w: %q has a character that is not a lower-case hexadecimal digit", ErrBadDigest, s)
		}
	}
	if _, err := hex.Decode(d.sum[:], []byte(s)); err != nil {
		return Digest{}, fmt.Errorf("%w: %q: %v", ErrBadDigest, s, err)
	}
	return d, nil
}

// ParsePath reads a digest in the form that [Digest.Path] returns.
func ParsePath(p string) (Digest, error) {
	if len(p) < 3 || p[2] != '/' {
		return Digest{}, fmt.Errorf("%w: %q is not of the form xx/rest", ErrBadDigest, p)
	}
	return Parse(p[:2] + p[3:])
}

// IsZero reports whether d is no digest.
func (d Digest) IsZero() bool { return d.alg == 0 }

// Algorithm returns the algorithm of d, 0 for the zero Digest.
func (d Digest) Algorithm() Algorithm { return d.alg }

// Bytes returns the raw digest, of d.Algorithm().Size() bytes.
func (d Digest) Bytes() []byte { return append([]byte(nil), d.sum[:d.alg.Size()]...) }

// AppendTo appends the raw digest to b.
func (d Digest) AppendTo(b []byte) []byte { return append(b, d.sum[:d.alg.Size()]...) }

// String returns the digest in lower-case hexadecimal, "" for the zero Digest.
func (d Digest) String() string { return hex.EncodeToString(d.sum[:d.alg.Size()]) }

// Path returns the name of the object below a store's objects directory: the
// first byte in hexadecimal, a slash, the rest ("" for the zero Digest).
func (d Digest) Path() string {
	if d.IsZero() {
		return ""
	}
	var buf [2*maxSize + 1]byte
	n := hex.Encode(buf[1:], d.sum[:d.alg.Size()])
	buf[0], buf[1], buf[2] = buf[1], buf[2], '/'
	return string(buf[:n+1])
}

// MarshalText makes digests print as hexadecimal in JSON.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is the inverse of MarshalText; empty text is the zero Digest.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*d = Digest{}
		return nil
	}
	p, err := Parse(string(b))
	if err != nil {
		return err
	}
	*d = p
	return nil
}
