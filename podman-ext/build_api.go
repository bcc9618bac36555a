package podmanext

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/containers/podman/v5/pkg/bindings"
)

// ociManifest is what the images get that podman builds here.
const ociManifest = "application/vnd.oci.image.manifest.v1+json"

func connect(ctx context.Context, uri string) (context.Context, error) {
	return bindings.NewConnection(ctx, uri)
}

// request sends a request to the service; the caller closes the answer, whose status
// is one of success. values stand for the %s of the path.
func (b *Builder) request(ctx context.Context, body io.Reader, method, path string, query url.Values, header http.Header, values ...string) (*bindings.APIResponse, error) {
	conn, err := bindings.GetClient(b.api)
	if err != nil {
		return nil, err
	}
	res, err := conn.DoRequest(ctx, body, method, path, query, header, values...)
	if err != nil {
		return nil, err
	}
	if !res.IsSuccess() {
		defer res.Body.Close()
		return nil, fmt.Errorf("podman at %s: %w", b.how, res.Process(nil))
	}
	return res, nil
}

// buildByAPI sends the context to the service and follows the build.
func (b *Builder) buildByAPI(ctx context.Context, o BuildOptions, secrets []secret) (string, error) {
	bc, err := newBuildContext(o, secrets)
	if err != nil {
		return "", err
	}
	header := http.Header{"Content-Type": {"application/x-tar"}}
	if o.AuthFile != "" {
		config, err := registryConfig(o.AuthFile)
		if err != nil {
			return "", err
		}
		header.Set("X-Registry-Config", config)
	}
	pr, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := bc.write(ctx, pw)
		pw.CloseWithError(err)
		done <- err
	}()
	res, err := b.request(ctx, pr, http.MethodPost, "/build", apiQuery(o, bc, b.cacheLists()), header)
	if err != nil {
		// Where the context is at fault, that says more than what became of the request.
		pr.Close()
		if sent := <-done; sent != nil && !errors.Is(sent, io.ErrClosedPipe) {
			return "", fmt.Errorf("sending %q: %w", o.Context, sent)
		}
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		return "", err
	}
	defer res.Body.Close()
	id, err := followBuild(res.Body, o.Output)
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	return id, err
}

// apiQuery are the parameters of POST /libpod/build
// (https://docs.podman.io/en/latest/_static/api.html, ImageBuildLibpod). Lists are
// JSON but for tags.
//
// cacheLists says that repositories of caches come as lists, as since podman 4.4.
func apiQuery(o BuildOptions, bc *buildContext, cacheLists bool) url.Values {
	q := url.Values{}
	q.Set("layers", "1") // else nothing is cached: the default is the zero value
	q.Set("rm", "1")
	q.Set("forcerm", "1")
	q.Set("outputformat", ociManifest)
	q.Set("dockerfile", toJSON([]string{bc.file}))
	for _, t := range o.Tags {
		q.Add("t", t)
	}
	if len(o.Args) > 0 {
		args := map[string]string{}
		for _, a := range o.Args {
			key, value, given := strings.Cut(a, "=")
			if !given {
				// As podman build takes it: "" would override the ARG's default.
				if value, given = os.LookupEnv(key); !given {
					continue
				}
			}
			args[key] = value
		}
		q.Set("buildargs", toJSON(args))
	}
	var secrets []string
	for _, s := range bc.secrets {
		secrets = append(secrets, "id="+s.id+",src="+s.name)
	}
	if len(secrets) > 0 {
		q.Set("secrets", toJSON(secrets))
	}
	for key, repo := range map[string]string{"cachefrom": o.CacheFrom, "cacheto": o.CacheTo} {
		switch {
		case repo == "":
		case cacheLists:
			q.Set(key, toJSON([]string{repo}))
		default:
			q.Set(key, repo)
		}
	}
	for key, value := range map[string]string{"target": o.Target, "platform": o.Platform} {
		if value != "" {
			q.Set(key, value)
		}
	}
	if o.NoCache {
		q.Set("nocache", "1")
	}
	q.Set("pullpolicy", "missing")
	if o.Pull {
		q.Set("pullpolicy", "always")
	}
	if o.Insecure {
		q.Set("tlsVerify", "0")
	}
	return q
}

func (b *Builder) cacheLists() bool {
	v := bindings.ServiceVersion(b.api)
	return v.Major > 4 || v.Major == 4 && v.Minor >= 4
}

func toJSON(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // strings always can
	}
	return string(raw)
}

// followBuild copies what a build prints and returns the image's ID, which is the last
// line on its own. The stream is one of JSON documents.
func followBuild(r io.Reader, out io.Writer) (string, error) {
	dec := json.NewDecoder(r)
	id := ""
	for {
		var m struct {
			Stream string `json:"stream"`
			Error  string `json:"error"`
			Detail struct {
				Message string `json:"message"`
			} `json:"errorDetail"`
		}
		err := dec.Decode(&m)
		switch {
		case errors.Is(err, io.EOF) && id != "":
			return id, nil
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return "", errors.New("podman ended the build without a word: see its log")
		case err != nil:
			return "", fmt.Errorf("reading what podman says of the build: %w", err)
		case m.Detail.Message != "":
			return "", fmt.Errorf("podman: %s", strings.TrimSpace(m.Detail.Message))
		case m.Error != "":
			return "", fmt.Errorf("podman: %s", strings.TrimSpace(m.Error))
		}
		if found, err := imageID(m.Stream); err == nil {
			id = found
		}
		if _, err := io.WriteString(out, m.Stream); err != nil {
			return "", err
		}
	}
}

// registryConfig makes the header X-Registry-Config of an auth.json
// (containers-auth.json(5)): base64url of a JSON object of credentials by registry.
func registryConfig(path string) (string, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var file struct {
		Auths map[string]struct {
			Auth string `json:"auth"`
		} `json:"auths"`
	}
	if err := json.Unmarshal(raw, &file); err != nil {
		return "", fmt.Errorf("reading credentials from %q: %w", path, err)
	}
	type credentials struct {
		Username string `json:"username"`
		Password string `json:"password"`
	}
	all := map[string]credentials{}
	for host, a := range file.Auths {
		if a.Auth == "" {
			continue // docker's, where a helper has the credentials
		}
		text, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, ok := strings.Cut(string(text), ":")
		if err != nil || !ok {
			return "", fmt.Errorf("credentials for %q in %q: want base64 of USER:PASSWORD", host, path)
		}
		all[host] = credentials{user, strings.TrimRight(password, "\x00")}
	}
	return base64.URLEncoding.EncodeToString([]byte(toJSON(all))), nil
}

// Local finds a built image in the builder's storage. The error wraps
// [ErrUnreadable] where that is not on this machine, or only podman reads it; then
// there is Save.
func (b *Builder) Local(ctx context.Context, id string) (*LocalImage, error) {
	if b.api == nil {
		return FindLocal(ctx, id)
	}
	res, err := b.request(ctx, nil, http.MethodGet, "/info", nil, nil)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	info, err := parseInfo(raw, false)
	if err != nil {
		return nil, err
	}
	return OpenLocal(info.GraphRoot, id)
}

// Save writes a built image to a new file as an oci-archive.
func (b *Builder) Save(ctx context.Context, id, path string) error {
	if b.api == nil {
		_, err := runPodman(ctx, "save", "--quiet", "--format=oci-archive", "--output="+path, id)
		return err
	}
	res, err := b.request(ctx, nil, http.MethodGet, "/images/%s/get", url.Values{"format": {"oci-archive"}}, nil, id)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, res.Body)
	return errors.Join(err, f.Close())
}
