package fsverity

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"hash"
	"io"
)

// A Hasher computes the fs-verity digest of what is written to it. Memory is one
// block a level of the Merkle tree, whatever the length.
type Hasher struct {
	alg    Algorithm
	size   uint64
	levels []level // levels[0] collects data, levels[n+1] the hashes of levels[n]'s blocks
	h512   hash.Hash
}

// A level is the block of one level of the tree that is being filled.
type level struct {
	block [BlockSize]byte
	n     int
	full  bool // a block of this level was hashed into the next one
}

// NewHasher returns an empty Hasher. It panics if alg is no algorithm.
func NewHasher(alg Algorithm) *Hasher {
	if alg.Size() == 0 {
		panic("fsverity: NewHasher without an algorithm")
	}
	h := &Hasher{alg: alg, levels: make([]level, 1, 4)}
	if alg == SHA512 {
		h.h512 = sha512.New()
	}
	return h
}

// Reset makes the Hasher as new.
func (h *Hasher) Reset() {
	h.size = 0
	h.levels = h.levels[:1]
	h.levels[0].n, h.levels[0].full = 0, false
}

func (h *Hasher) appendHash(dst, block []byte) []byte {
	if h.alg == SHA256 {
		s := sha256.Sum256(block)
		return append(dst, s[:]...)
	}
	h.h512.Reset()
	h.h512.Write(block)
	return h.h512.Sum(dst)
}

// Write adds p to the file whose digest is computed. It never fails.
func (h *Hasher) Write(p []byte) (int, error) {
	total := len(p)
	h.size += uint64(total)
	for len(p) > 0 {
		l := &h.levels[0]
		if l.n == BlockSize {
			// The full block is hashed only when more follows: a file of exactly
			// one block has that block's hash as its root.
			h.flush(0)
			l = &h.levels[0]
		}
		if l.n == 0 {
			// Whole blocks go straight from the caller's buffer.
			for len(p) > BlockSize {
				h.push(0, p[:BlockSize])
				p = p[BlockSize:]
			}
			l = &h.levels[0]
		}
		n := copy(l.block[l.n:], p)
		l.n += n
		p = p[n:]
	}
	return total, nil
}

// push adds the hash of a full block of level i to level i+1.
func (h *Hasher) push(i int, block []byte) {
	var buf [maxSize]byte
	sum := h.appendHash(buf[:0], block)
	h.levels[i].full = true
	if i+1 == len(h.levels) {
		h.levels = append(h.levels, level{})
	}
	if h.levels[i+1].n == BlockSize {
		h.flush(i + 1)
	}
	up := &h.levels[i+1]
	up.n += copy(up.block[up.n:], sum)
}

// flush hashes the block of level i, zero-padded, into level i+1.
func (h *Hasher) flush(i int) {
	l := &h.levels[i]
	clear(l.block[l.n:])
	block := l.block
	l.n = 0
	h.push(i, block[:])
}

// Sum returns the digest of what was written so far. Writing may not go on
// afterwards without a Reset.
func (h *Hasher) Sum() Digest {
	var root []byte
	if h.size > 0 {
		i := 0
		for h.levels[i].full {
			if h.levels[i].n > 0 {
				h.flush(i)
			}
			i++
		}
		l := &h.levels[i]
		clear(l.block[l.n:])
		root = h.appendHash(nil, l.block[:])
	}

	// struct fsverity_descriptor, Linux Documentation/filesystems/fsverity.rst
	var desc [256]byte
	desc[0] = 1 // version
	desc[1] = byte(h.alg)
	desc[2] = LogBlockSize
	desc[3] = 0 // salt_size
	binary.LittleEndian.PutUint64(desc[8:], h.size)
	copy(desc[16:80], root) // zero for an empty file

	d := Digest{alg: h.alg}
	copy(d.sum[:], h.appendHash(nil, desc[:]))
	return d
}

// Sum returns the fs-verity digest of data.
func Sum(alg Algorithm, data []byte) Digest {
	h := NewHasher(alg)
	h.Write(data)
	return h.Sum()
}

// Read returns the digest and the length in bytes of all that r gives.
func Read(alg Algorithm, r io.Reader) (Digest, int64, error) {
	h := NewHasher(alg)
	n, err := io.CopyBuffer(h, struct{ io.Reader }{r}, make([]byte, 128<<10))
	if err != nil {
		return Digest{}, n, err
	}
	return h.Sum(), n, nil
}
