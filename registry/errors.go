package registry

import (
	"errors"
	"fmt"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// The errors of this package. Those that it returns wrap one of these, name the
// reference or blob that they are about, and end with what to do next where a
// person can do something.
var (
	// ErrReference: the text is no reference to an image.
	ErrReference = errors.New("not an image reference")
	// ErrNotFound: there is no such image, blob, file or program.
	ErrNotFound = errors.New("not found")
	// ErrAmbiguous: several images are there and the reference does not say which.
	ErrAmbiguous = errors.New("more than one image")
	// ErrUnauthorized: the registry wants other credentials than it was given.
	ErrUnauthorized = errors.New("access denied")
	// ErrDigest: bytes have another digest or size than their descriptor says. The
	// error is a *DigestError.
	ErrDigest = errors.New("content does not match its descriptor")
	// ErrPlatform: an index has no image for the wanted platform.
	ErrPlatform = errors.New("no image for the platform")
	// ErrNoRanges: the registry answers requests for a part with the whole blob.
	ErrNoRanges = errors.New("ranges not supported")
	// ErrUnsupported: the image is of a kind that is left out on purpose.
	ErrUnsupported = errors.New("not supported")
	// ErrInvalid: a manifest, index, layout or archive breaks the rules of its format.
	ErrInvalid = errors.New("invalid image")
)

// A DigestError says that bytes are not those that a descriptor describes.
type DigestError struct {
	Want, Got         v1.Hash // Got is zero where the stream was cut off at its size
	WantSize, GotSize int64   // bytes; GotSize is WantSize+1 for any longer stream
}

func (e *DigestError) Error() string {
	switch {
	case e.GotSize < e.WantSize:
		return fmt.Sprintf("%v: %s: got %d bytes, want %d; the copy is cut short, fetch or save it again", ErrDigest, e.Want, e.GotSize, e.WantSize)
	case e.GotSize > e.WantSize:
		return fmt.Sprintf("%v: %s: got more than %d bytes", ErrDigest, e.Want, e.WantSize)
	}
	return fmt.Sprintf("%v: got %s, want %s of %d bytes; the copy is damaged, fetch or save it again", ErrDigest, e.Got, e.Want, e.WantSize)
}

// Is makes errors.Is(err, ErrDigest) true.
func (e *DigestError) Is(target error) bool { return target == ErrDigest }
