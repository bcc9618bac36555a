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
	"github.com/google/go-containerregistry/pkg/v1/types"

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
		"416": func(w http.ResponseWriter, req *http.Request, _ http.Handler) { http.Error(w, "", 416) },
		"501": func(w http.ResponseWriter, req *http.Request, _ http.Handler) { http.Error(w, "", 501) },
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

// putManifest stores any manifest at all in a registry.
func putManifest(t *testing.T, addr, repo, id, mediaType string, raw []byte) v1.Descriptor {
	t.Helper()
	req, err := http.NewRequest(http.MethodPut, "http://"+addr+"/v2/"+repo+"/manifests/"+id, bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusCreated {
		t.Fatalf("putting manifest %s: %s", id, resp.Status)
	}
	return describe(raw, types.MediaType(mediaType))
}

func TestIndex(t *testing.T) {
	s := serve(t, "", nil)
	images := map[string]*image{}
	index := func(mediaType types.MediaType, list ...v1.Descriptor) []byte {
		return jsonOf(t, v1.IndexManifest{SchemaVersion: 2, MediaType: mediaType, Manifests: list})
	}
	entry := func(platform string) v1.Descriptor {
		m := newImage(t, false, map[string]types.MediaType{platform: types.OCILayer}, platform)
		images[platform] = m
		mustWrite(t, mustRef(t, "docker://%s/x@%s", s.Addr(), m.digest()), m, nil)
		d := describe(m.raw, m.mediaType)
		p, err := v1.ParsePlatform(platform)
		if err != nil {
			t.Fatal(err)
		}
		d.Platform = p
		return d
	}
	amd64, amd64v3, armv6, armv7, arm64, att := entry("linux/amd64"), entry("linux/amd64/v3"), entry("linux/arm/v6"), entry("linux/arm/v7"), entry("linux/arm64/v8"), entry("unknown/unknown")
	putManifest(t, s.Addr(), "x", "all", string(types.OCIImageIndex), index(types.OCIImageIndex, att, amd64v3, amd64, armv6, armv7, arm64))
	putManifest(t, s.Addr(), "x", "docker", string(types.DockerManifestList), index(types.DockerManifestList, amd64, arm64))
	inner := putManifest(t, s.Addr(), "x", "inner", string(types.OCIImageIndex), index(types.OCIImageIndex, amd64, arm64))
	putManifest(t, s.Addr(), "x", "nested", string(types.OCIImageIndex), index(types.OCIImageIndex, inner))
	inner.Platform = &v1.Platform{OS: "linux", Architecture: "riscv64"}
	putManifest(t, s.Addr(), "x", "nestedplatform", string(types.OCIImageIndex), index(types.OCIImageIndex, amd64, inner))
	deep := putManifest(t, s.Addr(), "x", "d0", string(types.OCIImageIndex), index(types.OCIImageIndex, amd64))
	for i := range 9 {
		deep = putManifest(t, s.Addr(), "x", fmt.Sprint("d", i+1), string(types.OCIImageIndex), index(types.OCIImageIndex, deep))
	}
	for _, c := range []struct{ tag, platform, want string }{
		{"all", "linux/amd64", "linux/amd64"},
		{"all", "linux/amd64/v2", "linux/amd64"},
		{"all", "linux/amd64/v3", "linux/amd64/v3"},
		{"all", "linux/amd64/v4", "linux/amd64/v3"},
		{"all", "linux/arm", "linux/arm/v7"},
		{"all", "linux/arm/v6", "linux/arm/v6"},
		{"all", "linux/arm/v8", "linux/arm/v7"},
		{"all", "linux/arm64", "linux/arm64/v8"},
		{"docker", "linux/arm64/v8", "linux/arm64/v8"},
		{"nested", "linux/amd64", "linux/amd64"},
		{"d5", "linux/amd64", "linux/amd64"},
	} {
		img := mustOpen(t, mustRef(t, "docker://%s/x:%s", s.Addr(), c.tag), &registry.Options{Platform: c.platform})
		if want := images[c.want].digest(); img.Digest() != want {
			t.Errorf("%s for %s: got %s, want %s", c.tag, c.platform, img.Digest(), want)
		}
	}
	for _, c := range []struct {
		tag, platform string
		want          error
		text          string
	}{
		{"all", "linux/s390x", registry.ErrPlatform, "linux/amd64/v3, linux/amd64, linux/arm/v6"},
		{"all", "linux/arm/v5", registry.ErrPlatform, "linux/arm/v7"},
		{"docker", "windows/amd64", registry.ErrPlatform, "there are linux/amd64, linux/arm64/v8;"},
		{"nestedplatform", "linux/riscv64", registry.ErrPlatform, "linux/arm64/v8"},
		{"all", "amd64", registry.ErrPlatform, "OS/ARCH"},
		{"all", "linux//v7", registry.ErrPlatform, "OS/ARCH"},
		{"d9", "linux/amd64", registry.ErrInvalid, "nested"},
		{"missing", "", registry.ErrNotFound, "missing"},
	} {
		_, err := registry.Open(t.Context(), mustRef(t, "docker://%s/x:%s", s.Addr(), c.tag), &registry.Options{Platform: c.platform})
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s for %s: got %v, want %v with %q", c.tag, c.platform, err, c.want, c.text)
		}
		if strings.Contains(fmt.Sprint(err), "unknown/unknown") {
			t.Errorf("%s: %v offers what is no image", c.tag, err)
		}
	}
}

// TestBadManifests: what is no manifest, or several things at once.
func TestBadManifests(t *testing.T) {
	s := serve(t, "", nil)
	m := ociImage(t)
	mustWrite(t, mustRef(t, "docker://%s/x:1", s.Addr()), m, nil)
	oci, index := string(types.OCIManifestSchema1), string(types.OCIImageIndex)
	config := string(jsonOf(t, m.manifest.Config))
	for name, c := range map[string]struct {
		mediaType, raw string
		want           error
	}{
		"schema 1":       {string(types.DockerManifestSchema1Signed), `{"schemaVersion":1,"fsLayers":[]}`, registry.ErrUnsupported},
		"schema 1 plain": {"text/plain", `{"schemaVersion":1,"name":"x","fsLayers":[{"blobSum":"x"}]}`, registry.ErrUnsupported},
		"no JSON":        {oci, `hello`, registry.ErrInvalid},
		"both":           {oci, `{"schemaVersion":2,"config":` + config + `,"layers":[],"manifests":[]}`, registry.ErrInvalid},
		"type differs":   {oci, `{"schemaVersion":2,"mediaType":"` + index + `","manifests":[]}`, registry.ErrInvalid},
		"no config":      {oci, `{"schemaVersion":2,"layers":[]}`, registry.ErrInvalid},
		"no digest":      {oci, `{"schemaVersion":2,"config":{"size":1},"layers":[]}`, registry.ErrInvalid},
		"negative size":  {oci, `{"schemaVersion":2,"config":` + strings.Replace(config, `"size":`, `"size":-`, 1) + `,"layers":[]}`, registry.ErrInvalid},
		"bad digest":     {oci, `{"schemaVersion":2,"config":{"size":1,"digest":"sha256:../../etc/passwd"},"layers":[]}`, registry.ErrInvalid},
		"empty index":    {index, `{"schemaVersion":2,"manifests":[]}`, registry.ErrPlatform},
		"artifact":       {"application/json", `{"schemaVersion":2,"mediaType":"application/vnd.example","layers":[]}`, registry.ErrUnsupported},
		"huge":           {oci, `{"schemaVersion":2,"x":"` + strings.Repeat("x", 5<<20) + `"}`, registry.ErrInvalid},
	} {
		putManifest(t, s.Addr(), "x", "bad", c.mediaType, []byte(c.raw))
		if _, err := registry.Open(t.Context(), mustRef(t, "docker://%s/x:bad", s.Addr()), nil); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	// Old registries do not say what it is.
	putManifest(t, s.Addr(), "x", "plain", "application/json; charset=utf-8", m.raw)
	if img := mustOpen(t, mustRef(t, "docker://%s/x:plain", s.Addr()), nil); img.Digest() != m.digest() {
		t.Errorf("got %s, want %s", img.Digest(), m.digest())
	}
}

// TestForgedManifest: the digest in a reference and the one that the registry says.
func TestForgedManifest(t *testing.T) {
	m, other := ociImage(t), dockerImage(t)
	s := serve(t, "", &registry.ServeOptions{Wrap: func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/manifests/") {
				w.Header().Set("Docker-Content-Digest", m.digest().String())
				w.Write(other.raw)
				return
			}
			h.ServeHTTP(w, req)
		})
	}})
	for _, id := range []string{":1", "@" + m.digest().String()} {
		if _, err := registry.Open(t.Context(), mustRef(t, "docker://%s/x%s", s.Addr(), id), nil); !errors.Is(err, registry.ErrDigest) {
			t.Errorf("%s: got %v, want ErrDigest", id, err)
		}
	}
	ref := mustRef(t, "docker://%s/x:1@%s", s.Addr(), m.digest())
	if err := write(ref, other, nil); !errors.Is(err, registry.ErrReference) {
		t.Errorf("pushing another manifest than the reference's digest: got %v, want ErrReference", err)
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
			http.Error(w, err.Error(), 502)
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
