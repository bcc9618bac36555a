package scan

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/particle-os/particle/converter/fsverity"
)

// Hash returns Objects that compute digests and store nothing: for comparing
// trees, and for images whose objects are elsewhere.
func Hash(alg fsverity.Algorithm) Objects {
	return &hasher{alg: alg, pool: sync.Pool{New: func() any {
		return &hashState{fsverity.NewHasher(alg), make([]byte, 256<<10)}
	}}}
}

type hasher struct {
	alg  fsverity.Algorithm
	pool sync.Pool // of *hashState
}

type hashState struct {
	*fsverity.Hasher
	buf []byte
}

func (h *hasher) Algorithm() fsverity.Algorithm { return h.alg }

func (h *hasher) PutFile(ctx context.Context, f *os.File, size int64) (fsverity.Digest, error) {
	s := h.pool.Get().(*hashState)
	defer h.pool.Put(s)
	s.Reset()
	var total int64
	for {
		if err := ctx.Err(); err != nil {
			return fsverity.Digest{}, err
		}
		n, err := f.Read(s.buf)
		s.Write(s.buf[:n])
		total += int64(n)
		if err == io.EOF {
			break
		}
		if err != nil {
			return fsverity.Digest{}, err
		}
		if total > size {
			break
		}
	}
	if total != size {
		return fsverity.Digest{}, fmt.Errorf("%w: got %d bytes or more, want %d", ErrChanged, total, size)
	}
	return s.Sum(), nil
}
