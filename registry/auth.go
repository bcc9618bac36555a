package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Auth says where credentials come from. The zero value looks where podman and
// Docker keep theirs.
type Auth struct {
	// Anonymous sends no credentials at all.
	Anonymous bool
	// Username and Password, where a name is given, are used as they are.
	Username, Password string
	// File is an auth.json or config.json to look into instead of the usual ones. It
	// must exist.
	File string
}

func (a Auth) keychain() authn.Keychain { return keychain{a} }

// keychain looks credentials up as containers-auth.json(5) has it: in podman's
// files, then in Docker's; in each the longest key that leads to the repository
// (registry/namespace/repo, registry/namespace, registry), a credential helper for
// the registry before the file's own entries. It stands in for
// authn.DefaultKeychain, which knows two keys and reads one file only.
type keychain struct{ auth Auth }

// Resolve implements authn.Keychain.
func (k keychain) Resolve(res authn.Resource) (authn.Authenticator, error) {
	return k.ResolveContext(context.Background(), res)
}

// ResolveContext implements authn.ContextKeychain. No credentials anywhere is
// anonymous access; a file or helper that fails is an error, because going on without
// would end in a puzzling "not found".
func (k keychain) ResolveContext(ctx context.Context, res authn.Resource) (authn.Authenticator, error) {
	switch {
	case k.auth.Anonymous:
		return authn.Anonymous, nil
	case k.auth.Username != "":
		return &authn.Basic{Username: k.auth.Username, Password: k.auth.Password}, nil
	}
	files, must := authFiles(), false
	if k.auth.File != "" {
		files, must = []string{k.auth.File}, true
	} else if name := os.Getenv("REGISTRY_AUTH_FILE"); name != "" {
		files = []string{name}
	}
	for _, name := range files {
		raw, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) && !must {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading credentials: %w", err)
		}
		file, err := parseAuthFile(raw)
		if err != nil {
			return nil, fmt.Errorf("reading credentials: file %q: %w", name, err)
		}
		auth, err := file.find(ctx, res)
		if err != nil {
			return nil, fmt.Errorf("reading credentials for %s: file %q: %w", res, name, err)
		}
		if auth != nil {
			return auth, nil
		}
	}
	return authn.Anonymous, nil
}

// authFiles lists the files to look into, first to last.
func authFiles() []string {
	var files []string
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		files = append(files, filepath.Join(dir, "containers/auth.json"))
	} else {
		files = append(files, filepath.Join("/run/containers", strconv.Itoa(os.Getuid()), "auth.json"))
	}
	home, err := os.UserHomeDir()
	if dir := os.Getenv("XDG_CONFIG_HOME"); dir != "" {
		files = append(files, filepath.Join(dir, "containers/auth.json"))
	} else if err == nil {
		files = append(files, filepath.Join(home, ".config/containers/auth.json"))
	}
	if dir := os.Getenv("DOCKER_CONFIG"); dir != "" {
		files = append(files, filepath.Join(dir, "config.json"))
	} else if err == nil {
		files = append(files, filepath.Join(home, ".docker/config.json"))
	}
	return files
}

// An authFile is podman's auth.json and the part of Docker's config.json that is
// about credentials.
type authFile struct {
	Auths       map[string]authEntry `json:"auths"`
	CredHelpers map[string]string    `json:"credHelpers"`
	CredsStore  string               `json:"credsStore"`
}

type authEntry struct {
	Auth          string `json:"auth"` // base64 of user:password
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

func parseAuthFile(raw []byte) (*authFile, error) {
	file := new(authFile)
	if err := json.Unmarshal(raw, file); err != nil {
		// json's errors show no values, which may be secret here.
		return nil, fmt.Errorf("%w: %v", ErrInvalid, err)
	}
	return file, nil
}

// find returns nil where the file has nothing for the repository.
func (f *authFile) find(ctx context.Context, res authn.Resource) (authn.Authenticator, error) {
	host := res.RegistryStr()
	for _, key := range hostKeys(host) {
		if helper := f.CredHelpers[key]; helper != "" {
			return askHelper(ctx, helper, key)
		}
	}
	for key := res.String(); ; {
		if e, ok := f.Auths[key]; ok && e != (authEntry{}) {
			return e.authenticator(key)
		}
		i := strings.LastIndexByte(key, '/')
		if i < 0 {
			break
		}
		key = key[:i]
	}
	// Docker's keys may be URLs, of which the host alone counts, and docker.io has
	// several names. They are looked through in order, so that the same one is found
	// every time.
	for _, key := range slices.Sorted(maps.Keys(f.Auths)) {
		name := key
		if scheme, rest, ok := strings.Cut(key, "://"); ok && (scheme == "https" || scheme == "http") {
			name, _, _ = strings.Cut(rest, "/")
		}
		if e := f.Auths[key]; slices.Contains(hostKeys(host), name) && e != (authEntry{}) {
			return e.authenticator(key)
		}
	}
	if f.CredsStore != "" {
		for _, key := range hostKeys(host) {
			if auth, err := askHelper(ctx, f.CredsStore, key); auth != nil || err != nil {
				return auth, err
			}
		}
	}
	return nil, nil
}

// hostKeys returns the names that a registry has in credential files.
func hostKeys(host string) []string {
	if host == "docker.io" {
		return []string{"docker.io", "index.docker.io", "https://index.docker.io/v1/", "registry-1.docker.io"}
	}
	return []string{host}
}

func (e authEntry) authenticator(key string) (authn.Authenticator, error) {
	config := authn.AuthConfig{Username: e.Username, Password: e.Password, IdentityToken: e.IdentityToken, RegistryToken: e.RegistryToken}
	if e.Auth != "" {
		raw, err := base64.StdEncoding.DecodeString(e.Auth)
		user, password, ok := strings.Cut(string(raw), ":")
		if err != nil || !ok {
			return nil, fmt.Errorf("%w: auth of %q is not base64 of USER:PASSWORD; log in again", ErrInvalid, key)
		}
		config.Username, config.Password = user, strings.Trim(password, "\x00")
	}
	return authn.FromConfig(config), nil
}

// askHelper runs a credential helper: docker-credential-NAME get, with the server
// on its standard input and a JSON object on its output. No credentials is nil.
func askHelper(ctx context.Context, name, server string) (authn.Authenticator, error) {
	if strings.ContainsRune(name, filepath.Separator) {
		return nil, fmt.Errorf("%w: credential helper %q has a path, want the X of docker-credential-X", ErrInvalid, name)
	}
	prog := "docker-credential-" + name
	cmd := exec.CommandContext(ctx, prog, "get")
	cmd.Stdin = strings.NewReader(server)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		// Helpers print why on standard output. This is the text of the reference
		// implementation for a server that it does not know.
		why := strings.TrimSpace(stdout.String() + stderr.String())
		if strings.Contains(why, "credentials not found in native keychain") {
			return nil, nil
		}
		if errors.Is(err, exec.ErrNotFound) {
			return nil, fmt.Errorf("%w: credential helper %s; install it or log in without", ErrNotFound, prog)
		}
		return nil, fmt.Errorf("%w: %s: %v: %s", ErrUnauthorized, prog, err, why)
	}
	var answer struct{ Username, Secret string }
	if err := json.Unmarshal(stdout.Bytes(), &answer); err != nil {
		return nil, fmt.Errorf("%w: reading the answer of %s: %v", ErrInvalid, prog, err)
	}
	switch {
	case answer.Secret == "":
		return nil, nil
	case answer.Username == "<token>": // the marker for an identity token
		return authn.FromConfig(authn.AuthConfig{Username: answer.Username, IdentityToken: answer.Secret}), nil
	}
	return &authn.Basic{Username: answer.Username, Password: answer.Secret}, nil
}
