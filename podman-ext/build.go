package podmanext

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// BuildOptions say what to build, for both ways to podman alike. Only Context must be
// set. Cache mounts (RUN --mount=type=cache) need no option: podman keeps them below
// its $TMPDIR, which a CI job may keep.
type BuildOptions struct {
	Context string   // directory
	File    string   // Containerfile; "" is Containerfile or Dockerfile of Context
	Tags    []string // names in podman's storage
	Args    []string // KEY=VALUE
	Secrets []string // id=ID,src=FILE or id=ID,env=VARIABLE
	Target  string   // stage to end with; "" is the last one
	// CacheFrom is the repository (HOST/REPO, no tag) of which layers are taken instead
	// of running their step, CacheTo the one that they are given to.
	CacheFrom, CacheTo string
	NoCache            bool   // run all steps
	Pull               bool   // fetch base images, although podman has them
	Platform           string // OS/ARCH; "" is podman's
	AuthFile           string // credentials for registries; "" are podman's own
	Insecure           bool   // registries without TLS, or with a certificate that nobody vouches for
	// Output takes what the build prints; nil drops it.
	Output io.Writer
}

// A Builder has podman build images: through the API socket, or by its program.
// Layers are cached either way (the API does so only when told).
type Builder struct {
	api context.Context // of a connection; nil for the program
	how string
}

// NewBuilder connects to podman: to the service that $CONTAINER_HOST names, to the one
// at its usual socket, or to none, and then the program is used. What $CONTAINER_HOST
// names must answer.
func NewBuilder(ctx context.Context) (*Builder, error) {
	if host := os.Getenv("CONTAINER_HOST"); host != "" {
		api, err := connect(ctx, host)
		if err != nil {
			return nil, fmt.Errorf("connecting to podman at CONTAINER_HOST=%s: %w", host, err)
		}
		return &Builder{api: api, how: host}, nil
	}
	for _, path := range sockets() {
		if fi, err := os.Stat(path); err != nil || fi.Mode()&fs.ModeSocket == 0 {
			continue
		}
		// A socket that nobody listens at was left behind; the program does as well.
		if api, err := connect(ctx, "unix://"+path); err == nil {
			return &Builder{api: api, how: "unix://" + path}, nil
		} else if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return &Builder{how: podmanProgram()}, nil
}

// String names the service or program that builds.
func (b *Builder) String() string { return b.how }

// sockets lists where podman's service listens: root's, or the user's own.
func sockets() []string {
	if os.Geteuid() == 0 {
		return []string{"/run/podman/podman.sock"}
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return []string{filepath.Join(dir, "podman", "podman.sock")}
	}
	return nil
}

// Build builds an image and returns its ID, 64 hexadecimal digits.
func (b *Builder) Build(ctx context.Context, o BuildOptions) (string, error) {
	if o.Output == nil {
		o.Output = io.Discard
	}
	if fi, err := os.Stat(o.Context); err != nil {
		return "", fmt.Errorf("looking for the build's directory: %w", err)
	} else if !fi.IsDir() {
		return "", fmt.Errorf("%q is no directory to build from", o.Context)
	}
	secrets, err := parseSecrets(o.Secrets)
	if err != nil {
		return "", err
	}
	if o.File, err = o.containerfile(); err != nil {
		return "", err
	}
	if b.api != nil {
		return b.buildByAPI(ctx, o, secrets)
	}
	return buildByProgram(ctx, o, secrets)
}

// containerfile returns the path of the Containerfile, which exists. As in podman, one
// that is given is looked for from here, then in the context.
func (o *BuildOptions) containerfile() (string, error) {
	candidates := []string{filepath.Join(o.Context, "Containerfile"), filepath.Join(o.Context, "Dockerfile")}
	if o.File != "" {
		candidates = []string{o.File}
		if !filepath.IsAbs(o.File) {
			candidates = append(candidates, filepath.Join(o.Context, o.File))
		}
	}
	for _, path := range candidates {
		if fi, err := os.Stat(path); err == nil && !fi.IsDir() {
			return path, nil
		} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("there is no %s", strings.Join(candidates, " and no "))
}

// A secret is something that a build may read and that no layer gets. One of src and
// env is set.
type secret struct{ id, src, env string }

// parseSecrets reads secrets as podman takes them, but for secrets whose source
// podman would guess.
func parseSecrets(list []string) ([]secret, error) {
	var all []secret
	for _, text := range list {
		var s secret
		for _, field := range strings.Split(text, ",") {
			key, value, _ := strings.Cut(field, "=")
			switch key {
			case "id":
				s.id = value
			case "src", "source":
				s.src = value
			case "env":
				s.env = value
			case "type":
			default:
				return nil, fmt.Errorf("secret %q: unknown field %q", text, key)
			}
		}
		if s.id == "" || (s.src == "") == (s.env == "") {
			return nil, fmt.Errorf("secret %q: want id=ID,src=FILE or id=ID,env=VARIABLE", text)
		}
		if s.env != "" {
			if _, ok := os.LookupEnv(s.env); !ok {
				return nil, fmt.Errorf("secret %q: there is no variable %s", text, s.env)
			}
		} else if _, err := os.Stat(s.src); err != nil {
			return nil, fmt.Errorf("secret %q: %w", text, err)
		}
		all = append(all, s)
	}
	return all, nil
}

// buildByProgram runs podman build.
func buildByProgram(ctx context.Context, o BuildOptions, secrets []secret) (string, error) {
	dir, err := os.MkdirTemp("", "particle-build-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	idFile := filepath.Join(dir, "id")
	cmd := podmanCommand(ctx, programArgs(o, secrets, idFile)...)
	var said lastBytes // where nobody sees it, the error has to say it
	cmd.Stdout, cmd.Stderr = o.Output, o.Output
	if o.Output == io.Discard {
		cmd.Stdout, cmd.Stderr = &said, &said
	}
	err = cmd.Run()
	if err := podmanError(ctx, cmd, err, string(said)); err != nil {
		return "", err
	}
	raw, err := os.ReadFile(idFile)
	if err != nil {
		return "", err
	}
	return imageID(string(raw))
}

// lastBytes keeps the last of what is written to it.
type lastBytes []byte

func (l *lastBytes) Write(p []byte) (int, error) {
	const most = 4 << 10
	*l = append(*l, p...)
	*l = (*l)[max(0, len(*l)-most):]
	return len(p), nil
}

// programArgs are the arguments of podman.
func programArgs(o BuildOptions, secrets []secret, idFile string) []string {
	args := []string{"build", "--layers", "--format=oci", "--iidfile=" + idFile, "--file=" + o.File}
	each := func(flag string, values ...string) {
		for _, v := range values {
			if v != "" {
				args = append(args, flag+"="+v)
			}
		}
	}
	each("--tag", o.Tags...)
	each("--build-arg", o.Args...)
	for _, s := range secrets {
		if s.env != "" {
			each("--secret", "id="+s.id+",type=env,env="+s.env)
		} else {
			each("--secret", "id="+s.id+",src="+s.src)
		}
	}
	each("--target", o.Target)
	each("--cache-from", o.CacheFrom)
	each("--cache-to", o.CacheTo)
	each("--platform", o.Platform)
	each("--authfile", o.AuthFile)
	for _, f := range []struct {
		on   bool
		flag string
	}{{o.NoCache, "--no-cache"}, {o.Pull, "--pull=always"}, {o.Insecure, "--tls-verify=false"}} {
		if f.on {
			args = append(args, f.flag)
		}
	}
	return append(args, o.Context)
}

// imageID checks what podman calls an image's ID.
func imageID(s string) (string, error) {
	id := strings.TrimPrefix(strings.TrimSpace(s), "sha256:")
	if !isHex(id, 64) {
		return "", fmt.Errorf("podman calls the image %.80q, which is no ID", s)
	}
	return id, nil
}
