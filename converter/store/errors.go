package store

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// The errors of this package; test with errors.Is.
var (
	// ErrNotStore: the directory holds no store.
	ErrNotStore = errors.New("not a store")
	// ErrVersion: meta.json names a format version that is not known here.
	ErrVersion = errors.New("store of another format version")
	// ErrFeature: meta.json names a feature that is not known here and without
	// which the store may not be read.
	ErrFeature = errors.New("store with an unknown incompatible feature")
	// ErrAlgorithm: the store, or a digest, has another algorithm than is wanted.
	ErrAlgorithm = errors.New("other fs-verity algorithm than the store's")
	// ErrReadOnly: the store may be read but not written by this program.
	ErrReadOnly = errors.New("store may only be read")
	// ErrNotFound: no such object, stream, image or ref.
	ErrNotFound = errors.New("not in the store")
	// ErrCorrupt: something in the store is not what it should be.
	ErrCorrupt = errors.New("damaged store")
	// ErrVerity: an object lacks the fs-verity digest that the store promises.
	ErrVerity = errors.New("fs-verity does not vouch for the object")
	// ErrContentType: a stream is of another type than the caller expects.
	ErrContentType = errors.New("stream of another content type")
	// ErrBadName: a name that cannot be a stream's, an image's or a ref's.
	ErrBadName = errors.New("bad name")
	// ErrNoSpace: the store's disk, or the user's quota on it, is full.
	ErrNoSpace = errors.New("no space left for the store")
	// ErrSize: an object or file has another size than announced.
	ErrSize = errors.New("other size than announced")
	// ErrDone: the transaction or the stream was ended before.
	ErrDone = errors.New("already committed or rolled back")
	// ErrBusy: others use the store for longer than the caller wants to wait.
	ErrBusy = errors.New("store in use")
)

// diskFull gives an error of a full disk the name and the advice it deserves.
func diskFull(dir string, err error) error {
	if err == nil || errors.Is(err, ErrNoSpace) {
		return err
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w\nfree space on the filesystem of %q, or remove images and run \"particle store gc\"", ErrNoSpace, err, dir)
	}
	return err
}
