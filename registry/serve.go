package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// ServeOptions modify [Serve]. Nil is the zero value.
type ServeOptions struct {
	// OnRequest is told of each request after its answer. It may be called by several
	// goroutines at once.
	OnRequest func(Request)
	// Wrap, where not nil, puts a handler before the registry: tests demand
	// credentials or break connections with it. What it refuses is told to OnRequest too.
	Wrap func(http.Handler) http.Handler
}

// A Request is what a registry was asked and answered.
type Request struct {
	Method, Path, Query string
	Range               string // of the request, "" for the whole
	Status              int
	In, Out             int64 // bytes of the two bodies
}

// A Server is a registry in this process.
type Server struct {
	addr    string
	http    *http.Server
	uploads *uploads
	stop    func() bool // keeps the context from ending the server again
}

// Serve starts a registry on a loopback address; addr is HOST:PORT, empty for any
// free port of 127.0.0.1. Blobs are kept in the directory dir, which must exist, or
// in memory where dir is empty; manifests and tags always in memory, so they end with
// the server. It has referrers, mounts, chunked uploads and closed ranges, and no
// access control: only this machine can reach it. It ends with ctx or Close.
func Serve(ctx context.Context, dir, addr string, opts *ServeOptions) (*Server, error) {
	if opts == nil {
		opts = new(ServeOptions)
	}
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	if !isLoopback(addr) {
		return nil, fmt.Errorf("serving a registry: %w: address %q; it has no access control, so it must be a loopback one like 127.0.0.1:5000", ErrUnsupported, addr)
	}
	blobs := registry.NewInMemoryBlobHandler().(blobStore)
	if dir != "" {
		if fi, err := os.Stat(dir); err != nil {
			return nil, fmt.Errorf("serving a registry: %w", err)
		} else if !fi.IsDir() {
			return nil, fmt.Errorf("serving a registry: %w: %q is not a directory", ErrInvalid, dir)
		}
		blobs = diskBlobs(dir)
	}
	silent := log.New(io.Discard, "", 0)
	inner := registry.New(registry.WithBlobHandler(blobs), registry.WithReferrersSupport(true), registry.Logger(silent))
	up := &uploads{inner: inner, blobs: blobs, dir: dir, open: make(map[string]*upload)}
	var h http.Handler = up
	if opts.Wrap != nil {
		h = opts.Wrap(h)
	}
	if opts.OnRequest != nil {
		h = logged(h, opts.OnRequest)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("serving a registry: %w", err)
	}
	s := &Server{addr: l.Addr().String(), uploads: up, http: &http.Server{Handler: h, ErrorLog: silent, ReadHeaderTimeout: time.Minute}}
	s.stop = context.AfterFunc(ctx, func() { s.end() })
	go s.http.Serve(l) // ends with http.ErrServerClosed
	return s, nil
}

// Addr returns HOST:PORT.
func (s *Server) Addr() string { return s.addr }

// Ref returns the reference of a repository's tag in the server.
func (s *Server) Ref(repo, tag string) (Ref, error) {
	return ParseRef("docker://" + s.addr + "/" + repo + ":" + tag)
}

// Close ends the server and all connections.
func (s *Server) Close() error {
	s.stop()
	return s.end()
}

func (s *Server) end() error {
	err := s.http.Close()
	s.uploads.close()
	return err
}

// logged tells of requests.
func logged(inner http.Handler, tell func(Request)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r := Request{Method: req.Method, Path: req.URL.Path, Query: req.URL.RawQuery, Range: req.Header.Get("Range"), Status: http.StatusOK}
		in := &countingBody{ReadCloser: req.Body}
		req.Body = in
		defer func() {
			r.In = in.n
			tell(r)
		}()
		inner.ServeHTTP(&countingWriter{ResponseWriter: w, r: &r}, req)
	})
}

type countingBody struct {
	io.ReadCloser
	n int64
}

func (c *countingBody) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.n += int64(n)
	return n, err
}

type countingWriter struct {
	http.ResponseWriter
	r *Request
}

func (c *countingWriter) WriteHeader(status int) {
	c.r.Status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.r.Out += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (c *countingWriter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// diskBlobs keeps blobs as DIR/<algorithm>/<hex>. Unlike go-containerregistry's handler
// it does not read a blob whole to tell its size, and leaves nothing of a broken upload.
type diskBlobs string

func (d diskBlobs) path(h v1.Hash) string { return filepath.Join(string(d), h.Algorithm, h.Hex) }

func (d diskBlobs) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	fi, err := os.Stat(d.path(h))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, registry.ErrNotFound
	}
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (d diskBlobs) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	f, err := os.Open(d.path(h))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, registry.ErrNotFound
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Put gets a stream that checks its digest itself.
func (d diskBlobs) Put(_ context.Context, _ string, h v1.Hash, rc io.ReadCloser) error {
	defer rc.Close()
	name := d.path(h)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return writeFile(name, func(f *os.File) error {
		_, err := io.Copy(f, rc)
		return err
	})
}

func (d diskBlobs) Delete(_ context.Context, _ string, h v1.Hash) error { return os.Remove(d.path(h)) }
