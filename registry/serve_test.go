package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/registry"
)

// do sends a request to a server under test.
func do(t *testing.T, method, url string, body []byte, header ...string) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, b
}

// TestUploads sends a blob in the ways that clients have: one POST, POST and PUT,
// chunks, and chunks with the last in the PUT.
func TestUploads(t *testing.T) {
	blob := bytes.Repeat([]byte("particle"), 10_000)
	digest := describe(blob, "").Digest.String()
	for _, dir := range []string{"", t.TempDir()} {
		for name, chunks := range map[string][]int{"put": nil, "patch": {len(blob)}, "chunks": {10, 20_000, len(blob) - 20_010}, "chunks and put": {10, 10}} {
			s := serve(t, dir, nil)
			base := "http://" + s.Addr()
			resp, _ := do(t, "POST", base+"/v2/x/blobs/uploads/", nil)
			if resp.StatusCode != 202 {
				t.Fatalf("POST: %s", resp.Status)
			}
			at := base + resp.Header.Get("Location")
			rest := blob
			for _, n := range chunks {
				resp, _ = do(t, "PATCH", at, rest[:n])
				if rest = rest[n:]; resp.StatusCode != 202 {
					t.Fatalf("%s: PATCH: %s", name, resp.Status)
				}
			}
			if len(chunks) > 0 {
				if resp, _ := do(t, "PATCH", at, []byte("x"), "Content-Range", "5-5"); resp.StatusCode != 416 {
					t.Errorf("%s: a chunk out of order: %s, want 416", name, resp.Status)
				}
				if resp, _ := do(t, "GET", at, nil); resp.StatusCode != 204 || resp.Header.Get("Range") == "" {
					t.Errorf("%s: status of an upload: %s, range %q", name, resp.Status, resp.Header.Get("Range"))
				}
			}
			if resp, b := do(t, "PUT", at+"?digest="+digest, rest); resp.StatusCode != 201 {
				t.Fatalf("%s: PUT: %s %s", name, resp.Status, b)
			}
			if _, b := do(t, "GET", base+"/v2/x/blobs/"+digest, nil); !bytes.Equal(b, blob) {
				t.Errorf("%s: the blob came back with %d bytes, want %d", name, len(b), len(blob))
			}
			if resp, _ := do(t, "PUT", at+"?digest="+digest, rest); resp.StatusCode != 404 {
				t.Errorf("%s: an upload that has ended: %s, want 404", name, resp.Status)
			}
			// Bytes of another digest are not kept.
			resp, _ = do(t, "POST", base+"/v2/x/blobs/uploads/", nil)
			other := describe([]byte("other"), "").Digest.String()
			if resp, _ := do(t, "PUT", base+resp.Header.Get("Location")+"?digest="+other, blob); resp.StatusCode/100 != 4 {
				t.Errorf("%s: a wrong digest: %s, want 4xx", name, resp.Status)
			}
			if resp, _ := do(t, "HEAD", base+"/v2/x/blobs/"+other, nil); resp.StatusCode != 404 {
				t.Errorf("%s: a blob of a wrong digest: %s, want 404", name, resp.Status)
			}
			resp, _ = do(t, "POST", base+"/v2/x/blobs/uploads/", nil)
			if resp, _ := do(t, "DELETE", base+resp.Header.Get("Location"), nil); resp.StatusCode != 204 {
				t.Errorf("%s: DELETE: %s", name, resp.Status)
			}
			if ref, err := s.Ref("a/b", "c"); err != nil || ref.String() != "docker://"+s.Addr()+"/a/b:c" {
				t.Errorf("Ref is %v, %v", ref, err)
			}
			if dir != "" {
				if got := strings.Join(listing(t, dir), " "); got != "sha256 "+filepath.Join("sha256", digest[7:]) {
					t.Errorf("%s: the directory holds %q", name, got)
				}
			}
			if resp, _ := do(t, "DELETE", base+"/v2/x/blobs/"+digest, nil); resp.StatusCode != 202 {
				t.Errorf("%s: deleting the blob: %s", name, resp.Status)
			}
			if resp, _ := do(t, "GET", base+"/v2/x/blobs/"+digest, nil); resp.StatusCode != 404 {
				t.Errorf("%s: the deleted blob: %s, want 404", name, resp.Status)
			}
		}
	}
}

// TestReferrers: the server lists what refers to an image.
func TestReferrers(t *testing.T) {
	s := serve(t, "", nil)
	m := ociImage(t)
	mustWrite(t, mustRef(t, "docker://%s/x:1", s.Addr()), m, nil)
	subject := describe(m.raw, m.mediaType)
	attached := ociImage(t)
	attached.manifest.Subject = &subject
	attached.manifest.ArtifactType = "application/vnd.example"
	attached.raw = jsonOf(t, attached.manifest)
	mustWrite(t, mustRef(t, "docker://%s/x@%s", s.Addr(), attached.digest()), attached, nil)
	_, b := do(t, "GET", "http://"+s.Addr()+"/v2/x/referrers/"+m.digest().String(), nil)
	if !bytes.Contains(b, []byte(attached.digest().String())) {
		t.Errorf("referrers are %s, want %s in it", b, attached.digest())
	}
}

func TestServePlaces(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	writeFile(t, file, "", 0o600)
	for _, c := range []struct {
		dir, addr string
		want      error
	}{
		{"", "0.0.0.0:0", registry.ErrUnsupported},
		{"", ":5000", registry.ErrUnsupported},
		{"", "192.0.2.1:5000", registry.ErrUnsupported},
		{file + "/none", "", nil},
		{file + "x", "", os.ErrNotExist},
		{file, "", registry.ErrInvalid},
	} {
		s, err := registry.Serve(t.Context(), c.dir, c.addr, nil)
		if err == nil {
			s.Close()
			t.Errorf("Serve(%q, %q): no error", c.dir, c.addr)
		} else if c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("Serve(%q, %q): got %v, want %v", c.dir, c.addr, err, c.want)
		}
	}
}

// TestServeEnds with its context.
func TestServeEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s, err := registry.Serve(ctx, "", "localhost:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	do(t, "GET", "http://"+s.Addr()+"/v2/", nil)
	cancel()
	for range 100 {
		resp, err := http.Get("http://" + s.Addr() + "/v2/")
		if err != nil {
			return
		}
		resp.Body.Close()
		time.Sleep(20 * time.Millisecond)
	}
	t.Error("the server still answers")
}
