package registry_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/particle-os/particle/registry"
)

func basicHeader(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// demandBasic lets only user:secret in, and counts what comes without.
func demandBasic(user, password string) func(http.Handler) http.Handler {
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.Header.Get("Authorization") != basicHeader(user, password) {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"who are you"}]}`, http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, req)
		})
	}
}

// demandBearer is a registry with a token server on the same address. A token is good
// for lifetime requests.
func demandBearer(user, password string, lifetime int64) func(http.Handler) http.Handler {
	var issued, used atomic.Int64
	return func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.URL.Path == "/token" {
				if req.Header.Get("Authorization") != basicHeader(user, password) {
					http.Error(w, "{}", http.StatusUnauthorized)
					return
				}
				used.Store(0)
				json.NewEncoder(w).Encode(map[string]string{"token": fmt.Sprintf("t%d %s", issued.Add(1), req.URL.Query().Get("scope"))})
				return
			}
			want := fmt.Sprintf("Bearer t%d repository:private/x:pull", issued.Load())
			if !strings.HasPrefix(req.Header.Get("Authorization"), want) || used.Add(1) > lifetime {
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="test"`, req.Host))
				http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"token"}]}`, http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, req)
		})
	}
}

// noCredentials keeps the credentials of whoever runs the tests out of them, and
// returns an empty home.
func noCredentials(t *testing.T) string {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_RUNTIME_DIR", filepath.Join(home, "run"))
	for _, name := range []string{"XDG_CONFIG_HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE"} {
		t.Setenv(name, "")
	}
	return home
}

func writeFile(t *testing.T, name, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

func TestCredentials(t *testing.T) {
	entry := func(key, user, password string) string {
		return fmt.Sprintf(`%q:{"auth":%q}`, key, base64.StdEncoding.EncodeToString([]byte(user+":"+password)))
	}
	auths := func(entries ...string) string { return `{"auths":{` + strings.Join(entries, ",") + `}}` }
	// HOST stands for the server's address.
	for name, c := range map[string]struct {
		files map[string]string // below the home directory
		env   map[string]string // HOME stands for it
		auth  registry.Auth
		ok    bool
	}{
		"given":            {auth: registry.Auth{Username: "u", Password: "secret"}, ok: true},
		"given wrong":      {auth: registry.Auth{Username: "u", Password: "x"}},
		"none":             {},
		"anonymous":        {files: map[string]string{".docker/config.json": auths(entry("HOST", "u", "secret"))}, auth: registry.Auth{Anonymous: true}},
		"docker":           {files: map[string]string{".docker/config.json": auths(entry("HOST", "u", "secret"))}, ok: true},
		"docker URL":       {files: map[string]string{".docker/config.json": auths(entry("https://HOST/v1/", "u", "secret"))}, ok: true},
		"docker fields":    {files: map[string]string{".docker/config.json": `{"auths":{"HOST":{"username":"u","password":"secret"}}}`}, ok: true},
		"DOCKER_CONFIG":    {files: map[string]string{"d/config.json": auths(entry("HOST", "u", "secret"))}, env: map[string]string{"DOCKER_CONFIG": "HOME/d"}, ok: true},
		"podman run":       {files: map[string]string{"run/containers/auth.json": auths(entry("HOST", "u", "secret"))}, ok: true},
		"podman config":    {files: map[string]string{".config/containers/auth.json": auths(entry("HOST", "u", "secret"))}, ok: true},
		"XDG_CONFIG_HOME":  {files: map[string]string{"c/containers/auth.json": auths(entry("HOST", "u", "secret"))}, env: map[string]string{"XDG_CONFIG_HOME": "HOME/c"}, ok: true},
		"podman, Docker":   {files: map[string]string{"run/containers/auth.json": auths(entry("other.example", "u", "x")), ".docker/config.json": auths(entry("HOST", "u", "secret"))}, ok: true},
		"podman first":     {files: map[string]string{"run/containers/auth.json": auths(entry("HOST", "u", "secret")), ".docker/config.json": auths(entry("HOST", "u", "x"))}, ok: true},
		"REGISTRY_AUTH":    {files: map[string]string{"a.json": auths(entry("HOST", "u", "secret")), ".docker/config.json": auths(entry("HOST", "u", "x"))}, env: map[string]string{"REGISTRY_AUTH_FILE": "HOME/a.json"}, ok: true},
		"authfile":         {files: map[string]string{"a.json": auths(entry("HOST", "u", "secret")), "b.json": auths(entry("HOST", "u", "x"))}, env: map[string]string{"REGISTRY_AUTH_FILE": "HOME/b.json"}, auth: registry.Auth{File: "HOME/a.json"}, ok: true},
		"authfile missing": {auth: registry.Auth{File: "HOME/none.json"}},
		"repository":       {files: map[string]string{"run/containers/auth.json": auths(entry("HOST", "u", "x"), entry("HOST/private", "u", "y"), entry("HOST/private/x", "u", "secret"))}, ok: true},
		"namespace":        {files: map[string]string{"run/containers/auth.json": auths(entry("HOST", "u", "x"), entry("HOST/private", "u", "secret"), entry("HOST/private/xx", "u", "y"))}, ok: true},
		"other namespace":  {files: map[string]string{"run/containers/auth.json": auths(entry("HOST/priv", "u", "secret"))}},
		"broken file":      {files: map[string]string{".docker/config.json": `{"auths":`}},
		"broken auth":      {files: map[string]string{".docker/config.json": `{"auths":{"HOST":{"auth":"%%%"}}}`}},
		"helper":           {files: map[string]string{".docker/config.json": `{"credHelpers":{"HOST":"good"},"auths":{` + entry("HOST", "u", "x") + `}}`}, ok: true},
		"store":            {files: map[string]string{".docker/config.json": `{"credsStore":"good","auths":{"HOST":{}}}`}, ok: true},
		"store unknowing":  {files: map[string]string{".docker/config.json": `{"credsStore":"empty"}`}},
		"helper failing":   {files: map[string]string{".docker/config.json": `{"credHelpers":{"HOST":"bad"}}`}},
		"helper missing":   {files: map[string]string{".docker/config.json": `{"credHelpers":{"HOST":"none"}}`}},
		"helper with path": {files: map[string]string{".docker/config.json": `{"credHelpers":{"HOST":"../good"}}`}},
	} {
		for scheme, demand := range map[string]func(http.Handler) http.Handler{"basic": demandBasic("u", "secret"), "bearer": demandBearer("u", "secret", 1<<30)} {
			t.Run(name+"/"+scheme, func(t *testing.T) {
				home := noCredentials(t)
				s := serve(t, "", &registry.ServeOptions{Wrap: demand})
				bin := filepath.Join(home, "bin")
				t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
				writeFile(t, bin+"/docker-credential-good", fmt.Sprintf("#!/bin/sh\nread server\ntest \"$1 $server\" = 'get %s' && echo '{\"ServerURL\":\"x\",\"Username\":\"u\",\"Secret\":\"secret\"}'\n", s.Addr()), 0o755)
				writeFile(t, bin+"/docker-credential-empty", "#!/bin/sh\necho 'credentials not found in native keychain'\nexit 1\n", 0o755)
				writeFile(t, bin+"/docker-credential-bad", "#!/bin/sh\necho 'keyring is locked'\nexit 1\n", 0o755)
				for file, content := range c.files {
					writeFile(t, filepath.Join(home, file), strings.ReplaceAll(content, "HOST", s.Addr()), 0o600)
				}
				for k, v := range c.env {
					t.Setenv(k, strings.ReplaceAll(v, "HOME", home))
				}
				auth := c.auth
				auth.File = strings.ReplaceAll(auth.File, "HOME", home)
				opts := &registry.Options{Auth: auth}
				ref := mustRef(t, "docker://%s/private/x:1", s.Addr())
				m := ociImage(t)
				err := write(ref, m, opts)
				if !c.ok {
					if err == nil {
						t.Error("no error without the right credentials")
					} else if strings.Contains(err.Error(), "secret") {
						t.Errorf("error shows the password: %v", err)
					}
					if name == "none" && !errors.Is(err, registry.ErrUnauthorized) {
						t.Errorf("got %v, want ErrUnauthorized", err)
					}
					if name == "helper failing" && !strings.Contains(err.Error(), "keyring is locked") {
						t.Errorf("got %v, want the helper's words", err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				same(t, name, readImage(t, ref, opts), m)
			})
		}
	}
}

// TestTokenExpires: a token that ends between two requests is renewed, also in the
// middle of an upload, where the blob has to be opened again.
func TestTokenExpires(t *testing.T) {
	noCredentials(t)
	for lifetime := int64(1); lifetime < 6; lifetime++ {
		s := serve(t, "", &registry.ServeOptions{Wrap: demandBearer("u", "secret", lifetime)})
		opts := &registry.Options{Auth: registry.Auth{Username: "u", Password: "secret"}}
		ref := mustRef(t, "docker://%s/private/x:1", s.Addr())
		m := ociImage(t)
		mustWrite(t, ref, m, opts)
		same(t, fmt.Sprint(lifetime), readImage(t, ref, opts), m)
	}
}
