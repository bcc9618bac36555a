package erofs

import "math/bits"

// xxh32 is XXH32 (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md).
func xxh32(s string, seed uint32) uint32 {
	const (
		prime1 = 0x9e3779b1
		prime2 = 0x85ebca77
		prime3 = 0xc2b2ae3d
		prime4 = 0x27d4eb2f
		prime5 = 0x165667b1
	)
	lane := func(i int) uint32 {
		return uint32(s[i]) | uint32(s[i+1])<<8 | uint32(s[i+2])<<16 | uint32(s[i+3])<<24
	}
	h := seed + prime5
	i := 0
	if len(s) >= 16 {
		acc := [4]uint32{seed, seed, seed, seed}
		acc[0] += prime1
		acc[0] += prime2
		acc[1] += prime2
		acc[3] -= prime1
		for ; i+16 <= len(s); i += 16 {
			for j := range acc {
				acc[j] = bits.RotateLeft32(acc[j]+lane(i+4*j)*prime2, 13) * prime1
			}
		}
		h = bits.RotateLeft32(acc[0], 1) + bits.RotateLeft32(acc[1], 7) +
			bits.RotateLeft32(acc[2], 12) + bits.RotateLeft32(acc[3], 18)
	}
	h += uint32(len(s))
	for ; i+4 <= len(s); i += 4 {
		h = bits.RotateLeft32(h+lane(i)*prime3, 17) * prime4
	}
	for ; i < len(s); i++ {
		h = bits.RotateLeft32(h+uint32(s[i])*prime5, 11) * prime1
	}
	h = (h ^ h>>15) * prime2
	h = (h ^ h>>13) * prime3
	return h ^ h>>16
}
