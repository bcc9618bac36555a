package podmanext

import (
	"archive/tar"
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// buildDir makes a directory to build from.
func buildDir(t testing.TB, files map[string]string) string {
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestBuildBothWays: each option reaches podman either way.
func TestBuildBothWays(t *testing.T) {
	dir := buildDir(t, map[string]string{"Containerfile": "FROM scratch"})
	t.Setenv("PARTICLE_TEST_SECRET", "s")
	secretFile := filepath.Join(dir, "Containerfile")
	for name, c := range map[string]struct {
		o     BuildOptions
		args  []string // at least
		query url.Values
	}{
		"none": {BuildOptions{}, []string{"--layers", "--format=oci"}, url.Values{"layers": {"1"}, "outputformat": {ociManifest}, "pullpolicy": {"missing"}}},
		"all": {
			BuildOptions{
				Tags: []string{"a:1", "b:2"}, Args: []string{"K=V,W", "L=M=N"}, Target: "last", CacheFrom: "r/c", CacheTo: "r/d",
				NoCache: true, Pull: true, Platform: "linux/arm64", Insecure: true,
				Secrets: []string{"id=x,src=" + secretFile, "id=y,env=PARTICLE_TEST_SECRET"},
			},
			[]string{
				"--tag=a:1", "--tag=b:2", "--build-arg=K=V,W", "--build-arg=L=M=N", "--target=last", "--cache-from=r/c", "--cache-to=r/d",
				"--no-cache", "--pull=always", "--platform=linux/arm64", "--tls-verify=false",
				"--secret=id=x,src=" + secretFile, "--secret=id=y,type=env,env=PARTICLE_TEST_SECRET",
			},
			url.Values{
				"t": {"a:1", "b:2"}, "buildargs": {`{"K":"V,W","L":"M=N"}`}, "target": {"last"}, "cachefrom": {`["r/c"]`}, "cacheto": {`["r/d"]`},
				"nocache": {"1"}, "pullpolicy": {"always"}, "platform": {"linux/arm64"}, "tlsVerify": {"0"},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Context = dir
			secrets, err := parseSecrets(c.o.Secrets)
			if err != nil {
				t.Fatal(err)
			}
			if c.o.File, err = c.o.containerfile(); err != nil {
				t.Fatal(err)
			}
			args := programArgs(c.o, secrets, "/id")
			for _, want := range append(c.args, "build", "--iidfile=/id", "--file="+c.o.File, dir) {
				if !slices.Contains(args, want) {
					t.Errorf("program: got %q, want %q among them", args, want)
				}
			}
			if want := len(c.args) + 4; name == "all" && len(args) != want+2 || name == "none" && len(args) != want {
				t.Errorf("program: got %d arguments: %q", len(args), args)
			}
			bc, err := newBuildContext(c.o, secrets)
			if err != nil {
				t.Fatal(err)
			}
			query := apiQuery(c.o, bc, true)
			for key, want := range c.query {
				if got := query[key]; !slices.Equal(got, want) {
					t.Errorf("service: %s: got %q, want %q", key, got, want)
				}
			}
			if got := query.Get("dockerfile"); got != `["Containerfile"]` {
				t.Errorf("service: got dockerfile %q", got)
			}
			if len(secrets) > 0 {
				var sent []string
				if err := json.Unmarshal([]byte(query.Get("secrets")), &sent); err != nil || len(sent) != 2 ||
					sent[0] != "id=x,src="+bc.secrets[0].name || strings.ContainsAny(bc.secrets[0].name, "/,") {
					t.Errorf("service: got secrets %q, %v", query.Get("secrets"), err)
				}
			}
			if c.o.CacheFrom != "" {
				if got := apiQuery(c.o, bc, false).Get("cachefrom"); got != c.o.CacheFrom {
					t.Errorf("service before 4.4: got cachefrom %q, want %q", got, c.o.CacheFrom)
				}
			}
		})
	}
}

// TestBuildArgFromEnvironment: a variable that is not set leaves the ARG's default.
func TestBuildArgFromEnvironment(t *testing.T) {
	t.Setenv("PARTICLE_TEST_EMPTY", "")
	q := apiQuery(BuildOptions{Args: []string{"PARTICLE_TEST_EMPTY", "PARTICLE_TEST_UNSET"}}, &buildContext{}, true)
	if got, want := q.Get("buildargs"), `{"PARTICLE_TEST_EMPTY":""}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestParseSecrets(t *testing.T) {
	for _, bad := range []string{"", "id=x", "src=/etc/passwd", "id=x,src=/etc/passwd,env=HOME", "id=x,env=NO_SUCH_VARIABLE", "id=x,src=/no/such/file", "id=x,what=y"} {
		if got, err := parseSecrets([]string{bad}); err == nil {
			t.Errorf("%q: got %+v, want an error", bad, got)
		}
	}
}

// tarNames returns the content of a tar by name, and checks that nothing of its
// owners came along.
func tarNames(t *testing.T, raw []byte) map[string]string {
	t.Helper()
	all := map[string]string{}
	for r := tar.NewReader(bytes.NewReader(raw)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%s belongs to %d:%d %q", h.Name, h.Uid, h.Gid, h.Uname)
		}
		if h.Typeflag == tar.TypeSymlink {
			body = []byte("-> " + h.Linkname)
		}
		all[h.Name] = string(body)
	}
}

func TestBuildContext(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		file  string // of the Containerfile, "" for the default
		want  []string
	}{
		"everything": {map[string]string{"Containerfile": "", "a/b": "", "c": ""}, "", []string{"Containerfile", "a/", "a/b", "c", "link"}},
		"ignored": {map[string]string{"Containerfile": "", ".containerignore": "# x\n*.log\n\n a/ \n/d\nContainerfile\n", ".dockerignore": "c\n", "a/b": "", "c": "", "x.log": "", "d": "", "e/x.log": ""},
			"", []string{".containerignore", ".dockerignore", "Containerfile", "c", "e/", "e/x.log", "link"}},
		"exceptions": {map[string]string{"Dockerfile": "", ".dockerignore": "*\n!a/keep\n", "a/keep": "", "a/drop": ""},
			"", []string{".dockerignore", "Dockerfile", "a/keep"}},
		"a Containerfile below what is ignored": {map[string]string{"f/Containerfile": "", ".dockerignore": "f\n"}, "f/Containerfile", []string{".dockerignore", "f/Containerfile", "link"}},
		"an ignore file of its own": {map[string]string{"my": "", "my.containerignore": "c\n", ".containerignore": "d\n", "c": "", "d": ""}, "my",
			[]string{".containerignore", "d", "link", "my", "my.containerignore"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := buildDir(t, c.files)
			if err := os.Symlink("/etc", filepath.Join(dir, "link")); err != nil {
				t.Fatal(err)
			}
			o := BuildOptions{Context: dir, File: c.file}
			var err error
			if o.File, err = o.containerfile(); err != nil {
				t.Fatal(err)
			}
			bc, err := newBuildContext(o, nil)
			if err != nil {
				t.Fatal(err)
			}
			var b bytes.Buffer
			if err := bc.write(t.Context(), &b); err != nil {
				t.Fatal(err)
			}
			var got []string
			for name := range tarNames(t, b.Bytes()) {
				got = append(got, name)
			}
			slices.Sort(got)
			if !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

// TestBuildContextOutside: the Containerfile may lie elsewhere, and secrets come
// along under names that nobody can guess.
func TestBuildContextOutside(t *testing.T) {
	dir := buildDir(t, map[string]string{"a": "1"})
	out := buildDir(t, map[string]string{"Containerfile": "FROM scratch", "secret": "s3"})
	t.Setenv("PARTICLE_TEST_SECRET", "s4")
	secrets, err := parseSecrets([]string{"id=x,src=" + filepath.Join(out, "secret"), "id=y,env=PARTICLE_TEST_SECRET"})
	if err != nil {
		t.Fatal(err)
	}
	bc, err := newBuildContext(BuildOptions{Context: dir, File: filepath.Join(out, "Containerfile")}, secrets)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := bc.write(t.Context(), &b); err != nil {
		t.Fatal(err)
	}
	got := tarNames(t, b.Bytes())
	if len(got) != 4 || got["a"] != "1" || got[bc.file] != "FROM scratch" || got[bc.secrets[0].name] != "s3" || got[bc.secrets[1].name] != "s4" {
		t.Errorf("got %q", got)
	}
}

func TestFollowBuild(t *testing.T) {
	id := strings.Repeat("ab", 32)
	line := func(v any) string { return toJSON(v) + "\n" }
	stream := func(s string) string { return line(map[string]string{"stream": s}) }
	for name, c := range map[string]struct{ in, id, out, err string }{
		"built":         {stream("STEP 1\n") + stream("--> abc\n") + stream(id+"\n"), id, "STEP 1\n--> abc\n" + id + "\n", ""},
		"failed":        {stream("STEP 1\n") + line(map[string]any{"error": "no such step\n"}), "", "STEP 1\n", "no such step"},
		"failed, newer": {line(map[string]any{"errorDetail": map[string]string{"message": "bad"}}), "", "", "bad"},
		"cut off":       {stream("STEP 1\n") + `{"str`, "", "STEP 1\n", "without a word"},
		"silent":        {"", "", "", "without a word"},
		"not JSON":      {"<html>", "", "", "reading what podman says"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			got, err := followBuild(strings.NewReader(c.in), &out)
			if got != c.id || out.String() != c.out || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Errorf("got %q, %v and output %q; want %q, %q and %q", got, err, out.String(), c.id, c.err, c.out)
			}
		})
	}
}

// FuzzFollowBuild: whatever a service says, an ID is only what looks like one.
func FuzzFollowBuild(f *testing.F) {
	f.Add(`{"stream":"STEP 1\n"}{"stream":"` + strings.Repeat("ab", 32) + `\n"}`)
	f.Add(`{"error":"x","errorDetail":{"message":"y"}}`)
	f.Fuzz(func(t *testing.T, in string) {
		id, err := followBuild(strings.NewReader(in), io.Discard)
		if err == nil && !isHex(id, 64) || err != nil && id != "" {
			t.Errorf("got %q, %v", id, err)
		}
	})
}

func TestRegistryConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "auth.json")
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"auths":{"r.example":{"auth":"` + base64.StdEncoding.EncodeToString([]byte("me:pass:word")) + `"}}}`)
	got, err := registryConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.URLEncoding.DecodeString(got)
	if err != nil || string(raw) != `{"r.example":{"username":"me","password":"pass:word"}}` {
		t.Errorf("got %s, %v", raw, err)
	}
	write(`{"auths":{"r.example":{}},"credsStore":"desktop"}`)
	if got, err := registryConfig(path); err != nil || got != base64.URLEncoding.EncodeToString([]byte("{}")) {
		t.Errorf("credentials that a helper has: got %q, %v, want none", got, err)
	}
	for _, bad := range []string{"{", `{"auths":{"r":{"auth":"!"}}}`, `{"auths":{"r":{"auth":"bm9jb2xvbg=="}}}`} {
		write(bad)
		if got, err := registryConfig(path); err == nil {
			t.Errorf("%s: got %q, want an error", bad, got)
		}
	}
}

// fakeService answers as podman's service, of some version, at a socket.
func fakeService(t *testing.T, version string, build http.HandlerFunc) {
	dir, err := os.MkdirTemp("", "ps") // socket paths are short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Libpod-API-Version", version)
		switch {
		case strings.HasSuffix(r.URL.Path, "/_ping"):
		case strings.HasSuffix(r.URL.Path, "/build"):
			build(w, r)
		default:
			http.NotFound(w, r)
		}
	})
	s := &http.Server{Handler: mux}
	go func() { _ = s.Serve(l) }()
	t.Cleanup(func() { s.Close() })
	t.Setenv("CONTAINER_HOST", "unix://"+path)
}

// TestBuildByService: the request is what the service wants, and its answer is heard.
func TestBuildByService(t *testing.T) {
	id := strings.Repeat("0f", 32)
	dir := buildDir(t, map[string]string{"Containerfile": "FROM scratch", "a": "1"})
	fakeService(t, "4.3.1", func(w http.ResponseWriter, r *http.Request) {
		raw, err := io.ReadAll(r.Body)
		if err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/x-tar" {
			t.Errorf("got %s, %v, %v", r.Method, r.Header, err)
		}
		if got := tarNames(t, raw); len(got) != 2 {
			t.Errorf("got the context %q", got)
		}
		if got := r.URL.Query().Get("cacheto"); got != "r/c" {
			t.Errorf("got cacheto %q, want a plain name for this version", got)
		}
		fmt.Fprintf(w, "{\"stream\":%q}\n", id+"\n")
	})
	b, err := NewBuilder(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := b.Build(t.Context(), BuildOptions{Context: dir, CacheTo: "r/c"}); err != nil || got != id {
		t.Errorf("got %q, %v, want %q", got, err, id)
	}
}

func TestBuildByServiceRefused(t *testing.T) {
	dir := buildDir(t, map[string]string{"Containerfile": "FROM scratch", "a": strings.Repeat("x", 1<<20)})
	fakeService(t, "5.4.2", func(w http.ResponseWriter, _ *http.Request) {
		// Without reading the context.
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"cause":"c","message":"no such option","response":400}`)
	})
	b, err := NewBuilder(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Build(t.Context(), BuildOptions{Context: dir}); err == nil || !strings.Contains(err.Error(), "no such option") {
		t.Errorf("got %v, want the service's words", err)
	}
	t.Setenv("CONTAINER_HOST", "unix:///no/such/socket")
	if _, err := NewBuilder(t.Context()); err == nil || !strings.Contains(err.Error(), "CONTAINER_HOST") {
		t.Errorf("no service: got %v, want an error that names CONTAINER_HOST", err)
	}
}

// TestBuildByProgram: without a service the program builds; its failure is told.
func TestBuildByProgram(t *testing.T) {
	dir := buildDir(t, map[string]string{"Containerfile": "FROM scratch"})
	bin := t.TempDir()
	t.Setenv("CONTAINER_HOST", "")
	t.Setenv("XDG_RUNTIME_DIR", bin) // where no service listens
	t.Setenv("PARTICLE_PODMAN", filepath.Join(bin, "podman"))
	script := func(text string) {
		if err := os.WriteFile(filepath.Join(bin, "podman"), []byte("#!/bin/sh\n"+text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	id := strings.Repeat("0f", 32)
	b := &Builder{how: "podman"}
	var out bytes.Buffer
	script("for a; do case $a in --iidfile=*) echo sha256:" + id + " > ${a#*=};; esac; done; echo built; echo told >&2")
	if got, err := b.Build(t.Context(), BuildOptions{Context: dir, Output: &out}); err != nil || got != id || out.String() != "built\ntold\n" {
		t.Errorf("got %q, %v, and output %q", got, err, out.String())
	}
	script("seq 10000; echo no such stage >&2; exit 3")
	if _, err := b.Build(t.Context(), BuildOptions{Context: dir}); err == nil || !strings.Contains(err.Error(), "exit status 3") || !strings.Contains(err.Error(), "no such stage") || len(err.Error()) > 5000 {
		t.Errorf("failed: got %v", err)
	}
	for _, o := range []BuildOptions{{Context: "/no/such/dir"}, {Context: bin}, {Context: dir, File: "none"}, {Context: filepath.Join(dir, "Containerfile")}} {
		if _, err := b.Build(t.Context(), o); err == nil {
			t.Errorf("%+v was built", o)
		}
	}
}
