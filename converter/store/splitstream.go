package store

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/klauspost/compress/zstd"
	"github.com/particle-os/particle/converter/fsverity"
)

// The split stream format keeps a file in two parts: small pieces inline,
// compressed, and the rest in objects, so that the file can be put together again
// byte for byte. Rules are those of composefs-rs: crates/composefs/src/
// splitstream_format.rs tells, splitstream.rs beside it decides. All numbers are
// little endian; all places are given as ranges from the file's start.
//
//	header (32 bytes)
//	info (80 bytes here; may grow)
//	stream refs    raw digests of other streams
//	object refs    raw digests of objects, each once, in order of first use
//	named refs     zstd of "<index in stream refs>:<name>\0"…, by name
//	stream         zstd of chunks
//
// A chunk is a signed 64-bit number: below zero it is the negated length of the
// inline bytes that follow; else it is an index in the object refs.
//
// Pieces between two objects are one chunk, however long: the readers of
// composefs-rs want each tar header, and each small file, whole in a chunk.

// Content types of the streams that composefs-rs makes of OCI images: ASCII read as
// a little-endian number (crates/composefs-oci/src/skopeo.rs).
const (
	LayerStream    uint64 = 'o' | 'c'<<8 | 'i'<<16 | 'l'<<24 | 'a'<<32 | 'y'<<40 | 'e'<<48 | 'r'<<56
	ConfigStream   uint64 = 'o' | 'c'<<8 | 'i'<<16 | 'c'<<24 | 'o'<<32 | 'n'<<40 | 'f'<<48 | 'i'<<56
	ManifestStream uint64 = 'o' | 'c'<<8 | 'i'<<16 | 'm'<<24 | 'a'<<32 | 'n'<<40 | 'i'<<48 | 'f'<<56
	BlobStream     uint64 = 'o' | 'c'<<8 | 'i'<<16 | '_'<<24 | 'b'<<32 | 'l'<<40 | 'o'<<48 | 'b'<<56
)

// Beginnings of the content ids of such streams; the OCI digest follows, as in
// "oci-layer-sha256:…". A layer goes by its diffID, the others by their own digest.
const (
	LayerPrefix    = "oci-layer-"
	ConfigPrefix   = "oci-config-"
	ManifestPrefix = "oci-manifest-"
	BlobPrefix     = "oci-blob-"
)

// TagPrefix begins the refs of tagged images; EncodeTag of the tag follows.
const TagPrefix = "oci/"

// Names of a config stream's references to the EROFS images made of the image
// (crates/composefs-oci/src/lib.rs). Those of format V1.
const (
	ImageRef     = "composefs.image.v1"
	BootImageRef = "composefs.image.boot.v1"
)

const (
	streamMagic   = "SplitStream"
	streamVersion = 0
	headerSize    = 32
	infoSize      = 4*16 + 8 + 8

	// Bounds for foreign streams. Those of real images are far below.
	maxInfoSize  = 1 << 16
	maxNamedRefs = 64 << 20 // bytes, not compressed
	maxWindow    = 8 << 20  // of zstd; RFC 8878 asks decoders for no more
	maxEmpty     = 1 << 16  // chunks in a stream that are empty objects
)

// A fileRange is a part of the file: bytes start to end, end not included.
type fileRange struct{ start, end uint64 }

func (r fileRange) size() uint64 { return r.end - r.start }

// streamHeader is the fixed beginning of the file:
//
//	0  magic      [11]byte
//	11 version    uint8
//	12 flags      uint16, ignored
//	14 algorithm  uint8, numbered as the kernel does
//	15 block size uint8, log2
//	16 info       range
//
// Programs built with composefs-rs before 2026 (bootc up to 1.15) wrote the fields
// as their compiler had sorted them; that is read, too:
//
//	0 info, 16 flags, 18 magic, 29 version, 30 algorithm, 31 block size
type streamHeader struct {
	alg  fsverity.Algorithm
	info fileRange
}

// streamInfo is the table of contents:
//
//	0  stream refs  range
//	16 object refs  range
//	32 stream       range
//	48 named refs   range
//	64 content type uint64
//	72 stream size  uint64, bytes of the whole file when put together
type streamInfo struct {
	streamRefs, objectRefs, stream, namedRefs fileRange
	contentType, size                         uint64
}

func (h streamHeader) append(b []byte) []byte {
	b = append(b, streamMagic...)
	b = append(b, streamVersion, 0, 0, byte(h.alg), fsverity.LogBlockSize)
	return h.info.append(b)
}

func (i streamInfo) append(b []byte) []byte {
	for _, r := range []fileRange{i.streamRefs, i.objectRefs, i.stream, i.namedRefs} {
		b = r.append(b)
	}
	b = binary.LittleEndian.AppendUint64(b, i.contentType)
	return binary.LittleEndian.AppendUint64(b, i.size)
}

func (r fileRange) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, r.start)
	return binary.LittleEndian.AppendUint64(b, r.end)
}

func readRange(b []byte) fileRange {
	return fileRange{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
}

func parseHeader(b *[headerSize]byte) (h streamHeader, err error) {
	var version, alg, log byte
	switch {
	case bytes.HasPrefix(b[:], []byte(streamMagic)):
		version, alg, log, h.info = b[11], b[14], b[15], readRange(b[16:])
	case bytes.HasPrefix(b[18:], []byte(streamMagic)):
		version, alg, log, h.info = b[29], b[30], b[31], readRange(b[0:])
	default:
		return h, fmt.Errorf("%w: not a split stream: it begins with %q", ErrCorrupt, b[:len(streamMagic)])
	}
	if version != streamVersion {
		return h, fmt.Errorf("%w: split stream of version %d, want %d", ErrCorrupt, version, streamVersion)
	}
	h.alg = fsverity.Algorithm(alg)
	if h.alg.Size() == 0 || log != fsverity.LogBlockSize {
		return h, fmt.Errorf("%w: split stream with %s and block size 2^%d", ErrCorrupt, h.alg, log)
	}
	return h, nil
}

func parseInfo(b []byte) (i streamInfo, err error) {
	if len(b) < infoSize {
		return i, fmt.Errorf("%w: info section of %d bytes, want at least %d", ErrCorrupt, len(b), infoSize)
	}
	i.streamRefs, i.objectRefs = readRange(b), readRange(b[16:])
	i.stream, i.namedRefs = readRange(b[32:]), readRange(b[48:])
	i.contentType = binary.LittleEndian.Uint64(b[64:])
	i.size = binary.LittleEndian.Uint64(b[72:])
	return i, nil
}

// newEncoder returns an encoder whose output depends on its input alone.
func newEncoder(w *spill) (*zstd.Encoder, error) {
	return zstd.NewWriter(w,
		zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderLevel(zstd.SpeedDefault),
		zstd.WithWindowSize(1<<20), // tar headers resemble their neighbours
		zstd.WithLowerEncoderMem(true),
		zstd.WithEncoderCRC(false), // the object's digest covers it
		zstd.WithZeroFrames(true),
	)
}
