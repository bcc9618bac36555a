package snapshotter_test

import (
	"bytes"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	gcr "github.com/google/go-containerregistry/pkg/registry"
)

// push uploads an image to a registry.
func (i *image) push(t testing.TB, url, repo string) {
	t.Helper()
	send := func(method, path, mediaType string, b []byte) {
		req, err := http.NewRequest(method, url+"/v2/"+repo+path, bytes.NewReader(b))
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
			t.Fatalf("%s %s: %s", method, path, resp.Status)
		}
	}
	for d, b := range i.blobs {
		if d != i.manifest.Digest {
			send("POST", "/blobs/uploads/?digest="+d.String(), "application/octet-stream", b)
		}
	}
	send("PUT", "/manifests/1", i.manifest.MediaType, i.blobs[i.manifest.Digest])
}

// A loggedRegistry counts what is fetched.
type loggedRegistry struct {
	*httptest.Server
	mu   sync.Mutex
	gets []string // digests of blobs
}

func newRegistry(t testing.TB) *loggedRegistry {
	r := &loggedRegistry{}
	h := gcr.New(gcr.Logger(log.New(io.Discard, "", 0)))
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if _, digest, ok := strings.Cut(req.URL.Path, "/blobs/"); ok && req.Method == http.MethodGet {
			r.mu.Lock()
			r.gets = append(r.gets, digest)
			r.mu.Unlock()
		}
		h.ServeHTTP(w, req)
	}))
	t.Cleanup(r.Close)
	return r
}

// layersGot returns how many layers of an image were fetched.
func (r *loggedRegistry) layersGot(i *image) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range i.layers {
		for _, got := range r.gets {
			if got == l.Digest.String() {
				n++
			}
		}
	}
	return n
}
