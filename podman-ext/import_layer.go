package podmanext

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	tarsplit "github.com/vbatts/tar-split/tar/storage"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/layer"
	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/converter/tree"
)

// Podman keeps an unpacked layer in two halves: the files under overlay/<id>/diff,
// and all other bytes of its tar (headers, padding) in overlay-layers/
// <id>.tar-split.gz, a gzip of JSON documents in the order of the tar: segments, and
// files by name and size (github.com/vbatts/tar-split/tar/storage/entry.go).

// maxSegment limits the bytes of one JSON document: the longest hold the headers of
// one entry with its xattrs, base64.
const maxSegment = 16 << 20

// A piece is a part of a layer's tar on its way to the recorder.
type piece struct {
	inline []byte
	file   string // name within the diff directory, "" for inline bytes
	size   int64

	done   chan struct{} // closed when the following are set
	digest fsverity.Digest
	err    error
}

// recordTarSplit gives a layer to rec, its files stored in txn.
//
// Files are stored by several workers and recorded in their order.
func recordTarSplit(ctx context.Context, splitFile, diff string, txn *store.Txn, rec layer.Recorder) error {
	f, err := os.Open(splitFile)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	defer f.Close()
	root, err := os.OpenRoot(diff)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	defer root.Close()

	ctx, cancel := context.WithCancel(ctx)
	workers := 2 * runtime.GOMAXPROCS(0)
	todo := make(chan *piece)
	inOrder := make(chan *piece, 8*workers)
	var group sync.WaitGroup
	// The workers end before root is closed and before the caller ends the transaction.
	defer group.Wait()
	defer cancel()
	for range workers {
		group.Go(func() {
			for p := range todo {
				p.digest, p.inline, p.err = storeBody(ctx, root, p.file, p.size, txn)
				close(p.done)
			}
		})
	}
	var parseErr error // read after inOrder is closed
	group.Go(func() {
		defer close(inOrder)
		defer close(todo)
		parseErr = parseTarSplit(f, func(p *piece) error {
			p.done = make(chan struct{})
			queues := []chan<- *piece{todo, inOrder}
			if p.file == "" {
				close(p.done)
				queues = queues[1:]
			}
			for _, q := range queues {
				select {
				case q <- p:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
			}
			return nil
		})
	})
	for p := range inOrder {
		select {
		case <-p.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		err := p.err
		switch {
		case err != nil:
		case p.digest.IsZero():
			err = rec.Inline(p.inline)
		default:
			err = rec.Object(p.digest, p.size)
		}
		if err != nil {
			return err
		}
	}
	return parseErr
}

// storeBody stores one file's content: as an object, or returned where it is small.
func storeBody(ctx context.Context, root *os.Root, name string, size int64, txn *store.Txn) (d fsverity.Digest, small []byte, err error) {
	// A FIFO of that name would block; names that lead out of the layer are refused.
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return d, nil, fmt.Errorf("%w: %w", ErrUnreadable, err)
	}
	defer f.Close()
	if size > tree.InlineSize {
		d, err = txn.PutFile(ctx, f, size)
		if errors.Is(err, store.ErrSize) {
			err = fmt.Errorf("%w: %w", ErrUnreadable, err)
		}
		return d, nil, err
	}
	small = make([]byte, size)
	if _, err := io.ReadFull(f, small); err != nil {
		return d, nil, fmt.Errorf("%w: reading %q: %w", ErrUnreadable, name, err)
	}
	return d, small, nil
}

// parseTarSplit calls fn for each part of a layer. A piece's bytes are its own.
func parseTarSplit(r io.Reader, fn func(*piece) error) error {
	z, err := gzip.NewReader(r)
	if err != nil {
		return fmt.Errorf("%w: the headers of its tar: %v", ErrUnreadable, err)
	}
	defer z.Close()
	limit := &documentLimit{r: z}
	dec := json.NewDecoder(limit)
	for {
		limit.left = maxSegment
		var e tarsplit.Entry
		err := dec.Decode(&e)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: the headers of its tar: %v", ErrUnreadable, err)
		}
		p := &piece{}
		switch {
		case e.Type == tarsplit.SegmentType:
			p.inline = e.Payload
		case e.Type != tarsplit.FileType:
			return fmt.Errorf("%w: the headers of its tar: entry of type %d", ErrUnreadable, e.Type)
		case e.Size == 0:
			continue
		default:
			name := strings.TrimLeft(path.Clean("/"+e.GetName()), "/")
			if e.Size < 0 || name == "" {
				return fmt.Errorf("%w: the headers of its tar: file %q of %d bytes", ErrUnreadable, e.GetName(), e.Size)
			}
			p.file, p.size = name, e.Size
		}
		if err := fn(p); err != nil {
			return err
		}
	}
}

// documentLimit ends a stream of which one document is too long for memory.
type documentLimit struct {
	r    io.Reader
	left int64
}

func (l *documentLimit) Read(p []byte) (int, error) {
	if l.left <= 0 {
		return 0, fmt.Errorf("a document of more than %d bytes", maxSegment)
	}
	n, err := l.r.Read(p[:min(int64(len(p)), l.left)])
	l.left -= int64(n)
	return n, err
}
