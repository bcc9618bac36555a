package registry_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/particle-os/particle/registry"
)

// requests collects what a registry was asked.
type requests struct {
	mu   sync.Mutex
	list []registry.Request
}

func (r *requests) tell(req registry.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, req)
}

// take returns the requests of a method since the last call whose paths contain part.
func (r *requests) take(method, part string) []registry.Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []registry.Request
	for _, req := range r.list {
		if req.Method == method && strings.Contains(req.Path, part) {
			found = append(found, req)
		}
	}
	return found
}

func (r *requests) reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = nil
}

// TestPushSkips: what is there is not sent again, and what lies in another
// repository is mounted from there.
func TestPushSkips(t *testing.T) {
	var log requests
	// Blobs of the server are visible in all repositories; hide those of one.
	hide := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodHead && strings.Contains(req.URL.Path, "/second/") {
				http.NotFound(w, req)
				return
			}
			h.ServeHTTP(w, req)
		})
	}
	s := serve(t, t.TempDir(), &registry.ServeOptions{OnRequest: log.tell, Wrap: hide})
	m := ociImage(t)
	first := mustRef(t, "docker://%s/first/x:1", s.Addr())
	mustWrite(t, first, m, nil)
	if puts := log.take("PUT", "/blobs/"); len(puts) != len(m.blobs) {
		t.Errorf("first push: %d blobs sent, want %d", len(puts), len(m.blobs))
	}
	log.reset()
	mustWrite(t, first, m, nil)
	if puts := log.take("PUT", "/blobs/"); len(puts) != 0 {
		t.Errorf("second push: %d blobs sent, want none", len(puts))
	}
	log.reset()
	second := mustRef(t, "docker://%s/second/x:1", s.Addr())
	mustWrite(t, second, m, &registry.Options{MountFrom: []registry.Ref{first, second}})
	if puts := log.take("PUT", "/blobs/"); len(puts) != 0 {
		t.Errorf("push with mount: %d blobs sent, want none", len(puts))
	}
	if posts := log.take("POST", "/second/x/blobs/uploads/"); len(posts) != len(m.blobs) || !strings.Contains(posts[0].Query, "from=first%2Fx") {
		t.Errorf("push with mount: asked %+v", posts)
	}
	log.reset()
	mustWrite(t, second, m, nil)
	if puts := log.take("PUT", "/blobs/"); len(puts) != len(m.blobs) {
		t.Errorf("push without mount: %d blobs sent, want %d", len(puts), len(m.blobs))
	}
	same(t, "mounted", readImage(t, second, nil), m)
}

// TestRange looks at what goes over the wire.
func TestRange(t *testing.T) {
	var log requests
	s := serve(t, "", &registry.ServeOptions{OnRequest: log.tell})
	m := ociImage(t)
	ref := mustRef(t, "docker://%s/x:1", s.Addr())
	mustWrite(t, ref, m, nil)
	img := mustOpen(t, ref, nil)
	layer := m.manifest.Layers[0]
	log.reset()
	rc, err := img.BlobRange(t.Context(), layer, layer.Size-10, 10)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	got, err := io.ReadAll(rc)
	if want := m.blobs[layer.Digest][layer.Size-10:]; err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	if reqs := log.take("GET", "/blobs/"); len(reqs) != 1 || reqs[0].Range != fmt.Sprintf("bytes=%d-%d", layer.Size-10, layer.Size-1) || reqs[0].Out != 10 {
		t.Errorf("asked %+v, want one closed range", reqs)
	}
	for _, bad := range [][2]int64{{-1, 5}, {0, 0}, {0, -1}, {layer.Size, 1}, {1, layer.Size}, {1 << 62, 1 << 62}} {
		if _, err := img.BlobRange(t.Context(), layer, bad[0], bad[1]); !errors.Is(err, registry.ErrInvalid) {
			t.Errorf("range of %d bytes from %d: got %v, want ErrInvalid", bad[1], bad[0], err)
		}
	}
}

// TestRangeRefused: registries that do not serve the very range asked for.
func TestRangeRefused(t *testing.T) {
	for name, answer := range map[string]func(w http.ResponseWriter, req *http.Request, h http.Handler){
		"whole": func(w http.ResponseWriter, req *http.Request, h http.Handler) {
			req.Header.Del("Range")
			h.ServeHTTP(w, req)
		},
		"416": func(w http.ResponseWriter, req *http.Request, _ http.Handler) {
			http.Error(w, "", http.StatusRequestedRangeNotSatisfiable)
		},
		"501": func(w http.ResponseWriter, req *http.Request, _ http.Handler) {
			http.Error(w, "", http.StatusNotImplemented)
		},
		"other": func(w http.ResponseWriter, req *http.Request, h http.Handler) {
			req.Header.Set("Range", "bytes=0-9")
			h.ServeHTTP(w, req)
		},
		"no header": func(w http.ResponseWriter, req *http.Request, _ http.Handler) {
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, "0123456789")
		},
	} {
		s := serve(t, "", &registry.ServeOptions{Wrap: func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if req.Header.Get("Range") != "" {
					answer(w, req, h)
					return
				}
				h.ServeHTTP(w, req)
			})
		}})
		m := ociImage(t)
		ref := mustRef(t, "docker://%s/x:1", s.Addr())
		mustWrite(t, ref, m, nil)
		img := mustOpen(t, ref, nil)
		if _, err := img.BlobRange(t.Context(), m.manifest.Layers[0], 10, 10); !errors.Is(err, registry.ErrNoRanges) {
			t.Errorf("%s: got %v, want ErrNoRanges", name, err)
		}
		readBlob(t, img, m.manifest.Layers[0])
	}
}

// cut ends answers for blobs after n bytes, the first times it is asked.
func cut(n int64, times int64, ranges bool) func(http.Handler) http.Handler {
	var asked atomic.Int64
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method != http.MethodGet || !strings.Contains(req.URL.Path, "/blobs/") {
				h.ServeHTTP(w, req)
				return
			}
			if !ranges {
				req.Header.Del("Range")
			}
			if asked.Add(1) <= times {
				w = &cutWriter{w, n}
			}
			h.ServeHTTP(w, req)
		})
	}
}

type cutWriter struct {
	http.ResponseWriter
	left int64
}

func (c *cutWriter) Write(p []byte) (int, error) {
	if int64(len(p)) < c.left {
		c.left -= int64(len(p))
		return c.ResponseWriter.Write(p)
	}
	c.ResponseWriter.Write(p[:c.left])
	http.NewResponseController(c.ResponseWriter).Flush()
	panic(http.ErrAbortHandler)
}

// TestResume: a download that breaks off goes on where it was.
func TestResume(t *testing.T) {
	m := ociImage(t)
	layer := m.manifest.Layers[1]
	for _, ranges := range []bool{true, false} {
		var log requests
		s := serve(t, "", &registry.ServeOptions{OnRequest: log.tell, Wrap: cut(50_000, 2, ranges)})
		ref := mustRef(t, "docker://%s/x:1", s.Addr())
		mustWrite(t, ref, m, nil)
		img := mustOpen(t, ref, nil)
		log.reset()
		if got := readBlob(t, img, layer); !bytes.Equal(got, m.blobs[layer.Digest]) {
			t.Error("the blob differs")
		}
		var out int64
		for _, r := range log.take("GET", "/blobs/") {
			out += r.Out
		}
		if ranges && out > layer.Size {
			t.Errorf("%d bytes were sent of a blob of %d", out, layer.Size)
		}
	}
	s := serve(t, "", &registry.ServeOptions{Wrap: cut(50_000, 1<<30, false)})
	ref := mustRef(t, "docker://%s/x:1", s.Addr())
	mustWrite(t, ref, m, nil)
	img := mustOpen(t, ref, &registry.Options{Retries: 1})
	rc, err := img.Blob(t.Context(), layer)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if n, err := io.Copy(io.Discard, rc); err == nil || n >= layer.Size {
		t.Errorf("read %d bytes and %v of a blob that always breaks off", n, err)
	}
}

// TestRetries: faults that pass are not seen, and no more than Retries of them.
func TestRetries(t *testing.T) {
	var left atomic.Int64
	flaky := func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if left.Add(-1) >= 0 {
				w.Header().Set("Retry-After", "0")
				http.Error(w, "not now", http.StatusServiceUnavailable)
				return
			}
			h.ServeHTTP(w, req)
		})
	}
	s := serve(t, "", &registry.ServeOptions{Wrap: flaky})
	m := ociImage(t)
	ref := mustRef(t, "docker://%s/x:1", s.Addr())
	ctx := t.Context()
	left.Store(2)
	target, err := registry.Create(ctx, ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	for _, d := range append([]v1.Descriptor{m.manifest.Config}, m.manifest.Layers...) {
		left.Store(2)
		opened := 0
		err := target.PutBlob(ctx, d, func() (io.ReadCloser, error) {
			// The upload itself meets the fault, so that it has to be opened again.
			if opened++; opened == 1 {
				left.Store(1)
			}
			return io.NopCloser(bytes.NewReader(m.blobs[d.Digest])), nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if opened != 2 {
			t.Errorf("the blob was opened %d times, want 2", opened)
		}
	}
	left.Store(2)
	if err := target.PutManifest(ctx, m.raw, string(m.mediaType)); err != nil {
		t.Fatal(err)
	}
	left.Store(3)
	same(t, "flaky", readImage(t, ref, nil), m)
	left.Store(1)
	if _, err := registry.Open(ctx, ref, &registry.Options{Retries: -1}); err == nil {
		t.Error("Retries: -1 repeated a request")
	}
}

// TestPushBadSource: a blob that is not what it is said to be is not sent twice, and
// nothing becomes visible.
func TestPushBadSource(t *testing.T) {
	s := serve(t, t.TempDir(), nil)
	ref := mustRef(t, "docker://%s/x:1", s.Addr())
	m := ociImage(t)
	layer := m.manifest.Layers[0]
	target, err := registry.Create(t.Context(), ref, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	for name, b := range map[string][]byte{
		"short":   m.blobs[layer.Digest][1:],
		"long":    append(bytes.Clone(m.blobs[layer.Digest]), 0),
		"changed": append(bytes.Clone(m.blobs[layer.Digest][1:]), 0),
		"empty":   nil,
	} {
		opened := 0
		err := target.PutBlob(t.Context(), layer, func() (io.ReadCloser, error) {
			opened++
			return io.NopCloser(bytes.NewReader(b)), nil
		})
		if !errors.Is(err, registry.ErrDigest) || opened != 1 {
			t.Errorf("%s: got %v after opening %d times, want ErrDigest after one", name, err, opened)
		}
	}
	wrong := errors.New("disk on fire")
	err = target.PutBlob(t.Context(), layer, func() (io.ReadCloser, error) { return nil, wrong })
	if !errors.Is(err, wrong) {
		t.Errorf("got %v, want the source's own error", err)
	}
}

// TestForgedBlob: a registry that serves other bytes is found out before io.EOF, even
// by a reader that never asks for io.EOF.
func TestForgedBlob(t *testing.T) {
	m := ociImage(t)
	layer := m.manifest.Layers[0]
	good := m.blobs[layer.Digest]
	for name, forged := range map[string][]byte{
		"changed": append(bytes.Clone(good[:len(good)-1]), good[len(good)-1]^1),
		"short":   good[:len(good)-1],
		"long":    append(bytes.Clone(good), 0),
	} {
		for _, sized := range []bool{true, false} {
			s := serve(t, "", &registry.ServeOptions{Wrap: func(h http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
					if req.Method != http.MethodGet || !strings.HasSuffix(req.URL.Path, layer.Digest.String()) {
						h.ServeHTTP(w, req)
						return
					}
					if sized {
						w.Header().Set("Content-Length", fmt.Sprint(len(forged)))
					} else {
						http.NewResponseController(w).Flush()
					}
					w.Write(forged)
				})
			}})
			ref := mustRef(t, "docker://%s/x:1", s.Addr())
			mustWrite(t, ref, m, nil)
			img := mustOpen(t, ref, nil)
			for _, read := range []func(io.Reader) error{
				func(r io.Reader) error { _, err := io.Copy(io.Discard, r); return err },
				func(r io.Reader) error { _, err := io.ReadFull(r, make([]byte, layer.Size)); return err },
			} {
				rc, err := img.Blob(t.Context(), layer)
				if err == nil {
					err = read(rc)
					rc.Close()
				}
				var typed *registry.DigestError
				if !errors.Is(err, registry.ErrDigest) || !errors.As(err, &typed) {
					t.Errorf("%s, length told %v: got %v, want a DigestError", name, sized, err)
				}
			}
		}
	}
}

// TestTLS: a registry with a certificate that only CertDir vouches for, and no plain
// HTTP without permission.
func TestTLS(t *testing.T) {
	inner := serve(t, "", nil)
	proxy := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		out := req.Clone(req.Context())
		out.URL.Scheme, out.URL.Host, out.RequestURI = "http", inner.Addr(), ""
		resp, err := http.DefaultTransport.RoundTrip(out)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		for k, v := range resp.Header {
			w.Header()[k] = v
		}
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	})
	secure := httptest.NewUnstartedServer(proxy)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	secure.StartTLS()
	defer secure.Close()
	ref := mustRef(t, "docker://%s/x:1", strings.TrimPrefix(secure.URL, "https://"))
	m := ociImage(t)
	if err := write(ref, m, &registry.Options{Retries: -1}); err == nil {
		t.Error("a certificate that nobody vouches for was taken")
	}
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "ca.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secure.Certificate().Raw})), 0o600)
	mustWrite(t, ref, m, &registry.Options{CertDir: dir})
	same(t, "CertDir", readImage(t, ref, &registry.Options{CertDir: dir}), m)
	same(t, "Insecure", readImage(t, ref, &registry.Options{Insecure: true}), m)

	writeFile(t, filepath.Join(dir, "bad.crt"), "no certificate", 0o600)
	if _, err := registry.Open(t.Context(), ref, &registry.Options{CertDir: dir}); !errors.Is(err, registry.ErrInvalid) {
		t.Errorf("broken certificate: got %v, want ErrInvalid", err)
	}
	if _, err := registry.Open(t.Context(), ref, &registry.Options{CertDir: filepath.Join(dir, "none")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no certificate directory: got %v, want os.ErrNotExist", err)
	}
}

// TestRedirects: blobs come from elsewhere, but not from plain HTTP hosts that nobody
// allowed, and credentials stay behind.
func TestRedirects(t *testing.T) {
	m := ociImage(t)
	layer := m.manifest.Layers[0]
	var seen atomic.Value
	store := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		seen.Store(req.Header.Get("Authorization"))
		http.ServeContent(w, req, "", modTime, bytes.NewReader(m.blobs[layer.Digest]))
	}))
	defer store.Close()
	s := serve(t, "", &registry.ServeOptions{Wrap: func(h http.Handler) http.Handler {
		return demandBasic("u", "secret")(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodGet && strings.HasSuffix(req.URL.Path, layer.Digest.String()) {
				http.Redirect(w, req, store.URL+"/bucket", http.StatusTemporaryRedirect)
				return
			}
			h.ServeHTTP(w, req)
		}))
	}})
	opts := &registry.Options{Auth: registry.Auth{Username: "u", Password: "secret"}}
	ref := mustRef(t, "docker://%s/x:1", s.Addr())
	mustWrite(t, ref, m, opts)
	same(t, "redirected", readImage(t, ref, opts), m)
	if got := seen.Load(); got != "" {
		t.Errorf("the other host was sent credentials: %q", got)
	}
}

// TestCancel: a context that ends stops a transfer and is the error.
func TestCancel(t *testing.T) {
	s := serve(t, "", nil)
	m := ociImage(t)
	ref := mustRef(t, "docker://%s/x:1", s.Addr())
	mustWrite(t, ref, m, nil)
	img := mustOpen(t, ref, nil)
	ctx, cancel := context.WithCancel(t.Context())
	rc, err := img.Blob(ctx, m.manifest.Layers[1])
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	cancel()
	if _, err := io.Copy(io.Discard, rc); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	if _, err := registry.Open(ctx, ref, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Open: got %v, want context.Canceled", err)
	}
}
