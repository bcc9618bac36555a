package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// BenchmarkCommit stores 12,000 small objects, as an operating system's tree has
// them, from four goroutines, and commits. The time of Commit alone is reported
// apart. Nothing is removed between the rounds: ext4 is slow to reuse inodes that
// were freed in the last half minute.
func BenchmarkCommit(b *testing.B) {
	const objects = 12000
	ctx := context.Background()
	data := randomBytes(1, 1<<20)
	var inCommit time.Duration
	round := 0
	for b.Loop() {
		b.StopTimer()
		s := newStore(b, 0)
		round++
		b.StartTimer()
		txn := begin(b, s)
		var g errgroup.Group
		for part := range 4 {
			g.Go(func() error {
				buf := make([]byte, 0, 16<<10)
				for i := part; i < objects; i += 4 {
					size := 100 + i*7919%9000
					buf = append(buf[:0], data[i:i+size]...)
					binary.LittleEndian.PutUint64(buf, uint64(round*objects+i))
					if _, err := txn.PutBytes(ctx, buf); err != nil {
						return err
					}
				}
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		commit(b, txn)
		inCommit += time.Since(start)
	}
	b.ReportMetric(float64(objects*b.N)/b.Elapsed().Seconds(), "objects/s")
	b.ReportMetric(inCommit.Seconds()/float64(b.N), "commit-s/op")
}

// BenchmarkAgain puts 12,000 objects that the store has.
func BenchmarkAgain(b *testing.B) {
	s := newStore(b, 0)
	ctx := context.Background()
	round := func() {
		txn := begin(b, s)
		for i := range 12000 {
			if _, err := txn.PutBytes(ctx, binary.LittleEndian.AppendUint64(nil, uint64(i))); err != nil {
				b.Fatal(err)
			}
		}
		commit(b, txn)
	}
	round()
	for b.Loop() {
		round()
	}
	b.ReportMetric(float64(12000*b.N)/b.Elapsed().Seconds(), "objects/s")
}

// BenchmarkPut stores one large object, without Commit.
func BenchmarkPut(b *testing.B) {
	for _, size := range []int64{256 << 10, 4 << 20, 256 << 20} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			s := newStore(b, 0)
			data := randomBytes(1, 1<<20)
			b.SetBytes(size)
			var n uint64
			for b.Loop() {
				txn := begin(b, s)
				n++
				binary.LittleEndian.PutUint64(data, n)
				r := &repeat{data: data}
				if _, err := txn.Put(context.Background(), r, size); err != nil {
					b.Fatal(err)
				}
				txn.Rollback()
			}
		})
	}
}

// A repeat gives the same bytes again and again.
type repeat struct {
	data []byte
	r    bytes.Reader
}

func (r *repeat) Read(p []byte) (int, error) {
	if r.r.Len() == 0 {
		r.r.Reset(r.data)
	}
	return r.r.Read(p)
}
