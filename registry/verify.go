package registry

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"hash"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// verifier passes a blob on and compares it with its descriptor. The read that
// completes the size returns its bytes only after the digest was found right and
// the stream was seen to end: a caller that reads the size exactly and never asks
// for io.EOF cannot be handed a forged blob either.
type verifier struct {
	rc   io.ReadCloser
	want v1.Hash
	size int64
	n    int64
	h    hash.Hash
	err  error // sticky
}

func newVerifier(rc io.ReadCloser, desc v1.Descriptor) (*verifier, error) {
	h, err := v1.Hasher(desc.Digest.Algorithm)
	if err != nil {
		return nil, fmt.Errorf("%w: digest algorithm %q: want sha256 or sha512", ErrUnsupported, desc.Digest.Algorithm)
	}
	return &verifier{rc: rc, want: desc.Digest, size: desc.Size, h: h}, nil
}

func (v *verifier) Read(p []byte) (int, error) {
	if v.err != nil {
		return 0, v.err
	}
	if v.n == v.size {
		// Only an empty blob comes here before its end was seen.
		if v.err = v.finish(); v.err == nil {
			v.err = io.EOF
		}
		return 0, v.err
	}
	if len(p) == 0 {
		return 0, nil
	}
	if int64(len(p)) > v.size-v.n {
		p = p[:v.size-v.n]
	}
	n, err := v.rc.Read(p)
	v.h.Write(p[:n])
	v.n += int64(n)
	if v.n == v.size {
		if v.err = v.finish(); v.err != nil {
			return 0, v.err
		}
		v.err = io.EOF
		return n, nil
	}
	if err == io.EOF {
		err = v.fail(v.n)
	}
	v.err = err
	return n, err
}

// finish sees the stream end and compares digests, after size bytes.
func (v *verifier) finish() error {
	var one [1]byte
	switch n, err := io.ReadFull(v.rc, one[:]); {
	case n > 0:
		return &DigestError{Want: v.want, WantSize: v.size, GotSize: v.size + 1}
	case err != io.EOF:
		return err
	}
	if hex.EncodeToString(v.h.Sum(nil)) != v.want.Hex {
		return v.fail(v.n)
	}
	return nil
}

func (v *verifier) fail(n int64) error {
	got := v1.Hash{Algorithm: v.want.Algorithm, Hex: hex.EncodeToString(v.h.Sum(nil))}
	return &DigestError{Want: v.want, WantSize: v.size, Got: got, GotSize: n}
}

func (v *verifier) Close() error { return v.rc.Close() }

// readAll reads a blob of at most limit bytes through a verifier.
func readAll(rc io.ReadCloser, desc v1.Descriptor, limit int64) ([]byte, error) {
	defer rc.Close()
	if desc.Size > limit {
		return nil, fmt.Errorf("%w: %s of %d bytes, want at most %d", ErrInvalid, desc.Digest, desc.Size, limit)
	}
	v, err := newVerifier(rc, desc)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(v)
}

// checkBytes compares bytes in memory with a digest.
func checkBytes(raw []byte, want v1.Hash) error {
	_, err := readAll(io.NopCloser(bytes.NewReader(raw)), v1.Descriptor{Digest: want, Size: int64(len(raw))}, int64(len(raw)))
	return err
}

// checkDescriptor refuses descriptors that no blob can have.
func checkDescriptor(d v1.Descriptor) error {
	switch {
	case d.Digest.Hex == "":
		return fmt.Errorf("%w: descriptor of type %q has no digest", ErrInvalid, d.MediaType)
	case d.Size < 0:
		return fmt.Errorf("%w: %s has the size %d", ErrInvalid, d.Digest, d.Size)
	}
	return nil
}

// cappedReadCloser hands out a part of a stream and closes the whole.
type cappedReadCloser struct {
	io.Reader
	io.Closer
}
