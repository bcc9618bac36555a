package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// uploads takes the parts of a blob's upload (OCI distribution specification 1.1,
// "Pushing blobs") in place of go-containerregistry, which keeps all of an upload in
// memory and takes one upload at a time: parts are kept in files here, and a blob that
// comes in one piece nowhere. Everything else goes on to the registry behind it.
type uploads struct {
	inner http.Handler
	blobs blobStore
	dir   string // for the files, "" for memory

	mu   sync.Mutex
	last int
	open map[string]*upload
}

// A blobStore keeps blobs; both of go-containerregistry's interfaces are in it.
type blobStore interface {
	registry.BlobHandler
	registry.BlobStatHandler
	registry.BlobPutHandler
}

// An upload is the parts so far.
type upload struct {
	mu   sync.Mutex
	data io.ReadWriter
	n    int64
	drop func()
}

const uploadsPath = "/blobs/uploads/"

func (u *uploads) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	i := strings.LastIndex(req.URL.Path, uploadsPath)
	if i < 0 || !strings.HasPrefix(req.URL.Path, "/v2/") || i < len("/v2/") {
		u.inner.ServeHTTP(w, req)
		return
	}
	repo, id := req.URL.Path[len("/v2/"):i], req.URL.Path[i+len(uploadsPath):]
	if req.Method == http.MethodPost && id == "" {
		u.start(w, req, repo)
		return
	}
	u.mu.Lock()
	up := u.open[id]
	u.mu.Unlock()
	if up == nil {
		refuse(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", "no such upload")
		return
	}
	up.mu.Lock()
	defer up.mu.Unlock()
	switch req.Method {
	case http.MethodGet:
		up.answer(w, repo, id, http.StatusNoContent)
	case http.MethodPatch:
		if r := req.Header.Get("Content-Range"); r != "" && !strings.HasPrefix(r, strconv.FormatInt(up.n, 10)+"-") {
			up.answer(w, repo, id, http.StatusRequestedRangeNotSatisfiable)
			return
		}
		n, err := io.Copy(up.data, req.Body)
		if up.n += n; err != nil {
			refuse(w, http.StatusInternalServerError, "BLOB_UPLOAD_INVALID", err.Error())
			return
		}
		up.answer(w, repo, id, http.StatusAccepted)
	case http.MethodPut:
		u.finish(w, req, repo, up)
		u.forget(id, up)
	case http.MethodDelete:
		u.forget(id, up)
		w.WriteHeader(http.StatusNoContent)
	default:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "method "+req.Method)
	}
}

// start begins an upload, or ends it at once with a blob that is there already. Blobs
// are not kept by repository, so any can be mounted.
func (u *uploads) start(w http.ResponseWriter, req *http.Request, repo string) {
	query := req.URL.Query()
	if query.Has("digest") {
		u.finish(w, req, repo, &upload{data: new(bytes.Buffer)})
		return
	}
	if h, err := v1.NewHash(query.Get("mount")); err == nil {
		if _, err := u.blobs.Stat(req.Context(), repo, h); err == nil {
			created(w, repo, h)
			return
		}
	}
	up := &upload{data: new(bytes.Buffer), drop: func() {}}
	if u.dir != "" {
		f, err := os.CreateTemp(u.dir, "upload-")
		if err != nil {
			refuse(w, http.StatusInternalServerError, "BLOB_UPLOAD_INVALID", err.Error())
			return
		}
		os.Remove(f.Name()) // it lives as long as it is open
		up.data, up.drop = f, func() { f.Close() }
	}
	u.mu.Lock()
	u.last++
	id := strconv.Itoa(u.last)
	u.open[id] = up
	u.mu.Unlock()
	up.answer(w, repo, id, http.StatusAccepted)
}

// finish stores the parts and the last body as one blob.
func (u *uploads) finish(w http.ResponseWriter, req *http.Request, repo string, up *upload) {
	h, err := v1.NewHash(req.URL.Query().Get("digest"))
	if err != nil {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", err.Error())
		return
	}
	body, size := io.Reader(req.Body), up.n+req.ContentLength
	if req.ContentLength < 0 {
		n, err := io.Copy(up.data, req.Body)
		if err != nil {
			refuse(w, http.StatusBadRequest, "SIZE_INVALID", err.Error())
			return
		}
		body, size = http.NoBody, up.n+n
	}
	if f, ok := up.data.(io.Seeker); ok {
		_, err = f.Seek(0, io.SeekStart)
	}
	var whole *verifier
	if err == nil {
		rc := &cappedReadCloser{io.MultiReader(up.data, body), req.Body}
		whole, err = newVerifier(rc, v1.Descriptor{Digest: h, Size: size})
	}
	if err == nil {
		err = u.blobs.Put(req.Context(), repo, h, whole)
	}
	switch {
	case errors.Is(err, ErrDigest):
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", err.Error())
	case err != nil:
		refuse(w, http.StatusInternalServerError, "BLOB_UPLOAD_INVALID", err.Error())
	default:
		created(w, repo, h)
	}
}

func created(w http.ResponseWriter, repo string, h v1.Hash) {
	w.Header().Set("Location", "/v2/"+repo+"/blobs/"+h.String())
	w.Header().Set("Docker-Content-Digest", h.String())
	w.WriteHeader(http.StatusCreated)
}

func (u *uploads) forget(id string, up *upload) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.open, id)
	up.drop()
}

func (up *upload) answer(w http.ResponseWriter, repo, id string, status int) {
	w.Header().Set("Location", "/v2/"+repo+uploadsPath+id)
	w.Header().Set("Docker-Upload-UUID", id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(up.n-1, 0)))
	w.WriteHeader(status)
}

// refuse answers with an error in the form of the distribution specification.
func refuse(w http.ResponseWriter, status int, code, message string) {
	var body struct {
		Errors [1]struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	body.Errors[0].Code, body.Errors[0].Message = code, message
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body) // the client may have gone
}

// close drops the uploads that nobody finished.
func (u *uploads) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, up := range u.open {
		delete(u.open, id)
		up.drop()
	}
}
