package registry

import (
	"fmt"
	"net/url"
	"regexp"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// A Transport is a kind of place where images lie.
type Transport uint8

// The transports, named as skopeo names them (containers-transports(5)).
const (
	Docker            Transport = iota + 1 // docker://HOST/REPO[:TAG][@DIGEST], a registry
	OCILayout                              // oci:DIR[:TAG], an OCI image layout
	OCIArchive                             // oci-archive:FILE[:TAG], a tar of an OCI image layout
	DockerArchive                          // docker-archive:FILE[:REPO:TAG], what docker save writes
	ContainersStorage                      // containers-storage:NAME, podman's images; podman:NAME is the same
)

var transportNames = [...]string{Docker: "docker", OCILayout: "oci", OCIArchive: "oci-archive", DockerArchive: "docker-archive", ContainersStorage: "containers-storage"}

// String returns the prefix of the transport without its colon.
func (t Transport) String() string {
	if int(t) < len(transportNames) && t > 0 {
		return transportNames[t]
	}
	return fmt.Sprintf("unknown transport %d", uint8(t))
}

// Forms lists the references that [ParseRef] accepts, for help texts and errors.
const Forms = "docker://HOST/REPO[:TAG][@DIGEST], oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:REPO:TAG] or containers-storage:NAME"

// A Ref says where an image lies. Refs are comparable; two with the same meaning
// are equal, except for paths, which are kept as given.
type Ref struct {
	Transport Transport
	// Host and Repo are the registry ("docker.io", "localhost:5000") and the
	// repository in it ("library/debian"), of docker:// only.
	Host, Repo string
	// Path is the directory or file of a layout or archive.
	Path string
	// Name is the name or ID of an image in podman's storage.
	Name string
	// Tag is the tag in a registry, the reference name in a layout or OCI archive
	// (annotation org.opencontainers.image.ref.name), REPO:TAG in a Docker archive, or
	// "@N" for the image number N, from 0, of a layout or archive. It may be empty.
	Tag string
	// Digest, where not empty, is the digest that the manifest or index in a
	// registry must have.
	Digest string
}

// The grammar of names, from the OCI distribution specification 1.1, "Pulling
// manifests". The host may also be an IPv6 address in brackets.
var (
	repoRE = regexp.MustCompile(`^[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagRE  = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	hostRE = regexp.MustCompile(`^(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[a-fA-F0-9:]+\])(?::[0-9]{1,5})?$`)
	// refNameRE is the grammar of org.opencontainers.image.ref.name in the OCI image
	// specification, annotations.md, with '@' left to "@N".
	refNameRE = regexp.MustCompile(`^[A-Za-z0-9]+(?:[-._:@/+]+[A-Za-z0-9]+|--[A-Za-z0-9]+)*$`)
	indexRE   = regexp.MustCompile(`^@(?:0|[1-9][0-9]{0,5})$`)
)

const maxRepo = 255 // bytes of a repository's name, as registries have it

// ParseRef reads a reference in skopeo's syntax ([Forms]). Registry names follow
// Docker's rules: no host means docker.io, docker.io/x is docker.io/library/x, and
// neither tag nor digest means the tag latest. With both, the digest decides what
// is read and the tag is kept for display and for pushing.
//
// Without a prefix, only a name that starts with a host is taken as docker://: the
// part before the first slash is localhost or has a dot or a port, as in
// localhost:5000/x:y. Callers that also take directories look for these first.
func ParseRef(s string) (Ref, error) {
	prefix, rest, ok := strings.Cut(s, ":")
	var r Ref
	var err error
	switch {
	case ok && prefix == "docker":
		name, found := strings.CutPrefix(rest, "//")
		if !found {
			return Ref{}, refError(s, "docker: must be followed by //")
		}
		r, err = parseDocker(name)
	case ok && prefix == "oci":
		r, err = parsePath(OCILayout, rest)
	case ok && prefix == "oci-archive":
		r, err = parsePath(OCIArchive, rest)
	case ok && prefix == "docker-archive":
		r, err = parsePath(DockerArchive, rest)
	case ok && (prefix == "containers-storage" || prefix == "podman"):
		r, err = parseStorage(rest)
	default:
		host, _, slash := strings.Cut(s, "/")
		if !slash || host == "" || host[0] == '.' || !isHost(host) {
			return Ref{}, refError(s, "no transport")
		}
		r, err = parseDocker(s)
	}
	if err != nil {
		return Ref{}, refError(s, err.Error())
	}
	return r, nil
}

func refError(s, why string) error {
	return fmt.Errorf("%w: %q: %s; want %s", ErrReference, s, why, Forms)
}

// isHost tells whether the first component of a name is a host and no part of a
// repository on docker.io.
func isHost(s string) bool { return s == "localhost" || strings.ContainsAny(s, ".:") }

func parseDocker(s string) (Ref, error) {
	r := Ref{Transport: Docker, Host: "docker.io"}
	name, digest, hasDigest := strings.Cut(s, "@")
	if hasDigest {
		if _, err := v1.NewHash(digest); err != nil {
			return Ref{}, fmt.Errorf("digest %q is not of the form sha256:<64 hexadecimal digits>", digest)
		}
		r.Digest = digest
	}
	r.Repo = name
	if host, repo, ok := strings.Cut(name, "/"); ok && isHost(host) {
		r.Host, r.Repo = host, repo
	}
	if repo, tag, ok := strings.Cut(r.Repo, ":"); ok {
		r.Repo, r.Tag = repo, tag
		if !tagRE.MatchString(tag) {
			return Ref{}, fmt.Errorf("tag %q has other characters than letters, digits, '_', '.' and '-', or more than 128", tag)
		}
	} else if !hasDigest {
		r.Tag = "latest"
	}
	if r.Host == "index.docker.io" || r.Host == "registry-1.docker.io" {
		r.Host = "docker.io"
	}
	if r.Host == "docker.io" && !strings.Contains(r.Repo, "/") {
		r.Repo = "library/" + r.Repo
	}
	// What a URL cannot carry as a host would be read as something else by the client.
	if u, err := url.Parse("//" + r.Host); !hostRE.MatchString(r.Host) || err != nil || u.Host != r.Host {
		return Ref{}, fmt.Errorf("host %q is not of the form NAME[:PORT]", r.Host)
	}
	if !repoRE.MatchString(r.Repo) || len(r.Repo) > maxRepo {
		return Ref{}, fmt.Errorf("repository %q is not lower-case words of letters and digits, joined by '/', '.', '_' or '-'", r.Repo)
	}
	return r, nil
}

// parsePath reads PATH[:TAG]. As with skopeo, the first colon ends the path.
func parsePath(t Transport, s string) (Ref, error) {
	r := Ref{Transport: t}
	var ok bool
	r.Path, r.Tag, ok = strings.Cut(s, ":")
	switch {
	case r.Path == "":
		return Ref{}, fmt.Errorf("%s: needs a path", t)
	case strings.ContainsRune(r.Path, 0):
		return Ref{}, fmt.Errorf("path %q has a zero byte", r.Path)
	case !ok || indexRE.MatchString(r.Tag):
		return r, nil
	case t == DockerArchive:
		name, err := parseDocker(r.Tag)
		if err != nil {
			return Ref{}, err
		}
		if name.Digest != "" {
			return Ref{}, fmt.Errorf("a Docker archive knows tags only, not the digest in %q", r.Tag)
		}
		r.Tag = name.familiar()
	case !refNameRE.MatchString(r.Tag):
		return Ref{}, fmt.Errorf("tag %q is not words of letters and digits joined by '-', '.', '_', ':', '@', '/' or '+'", r.Tag)
	}
	return r, nil
}

// parseStorage takes a name as podman does; podman itself resolves short names and
// IDs. A leading '-' would be an option to it, '[' starts skopeo's notation for
// another storage than the configured one.
func parseStorage(s string) (Ref, error) {
	switch {
	case s == "":
		return Ref{}, fmt.Errorf("containers-storage: needs the name or ID of an image")
	case s[0] == '[':
		return Ref{}, fmt.Errorf("another storage is chosen in storage.conf, not in the reference")
	case s[0] == '-' || strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' }):
		return Ref{}, fmt.Errorf("%q is no image name", s)
	}
	return Ref{Transport: ContainersStorage, Name: s}, nil
}

// familiar returns host/repo:tag with the host of Docker's own registry written out.
func (r Ref) familiar() string {
	s := r.Host + "/" + r.Repo
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	return s
}

// String returns the canonical form, which ParseRef reads back to the same Ref.
func (r Ref) String() string {
	switch r.Transport {
	case Docker:
		s := "docker://" + r.familiar()
		if r.Digest != "" {
			s += "@" + r.Digest
		}
		return s
	case ContainersStorage:
		return "containers-storage:" + r.Name
	}
	s := r.Transport.String() + ":" + r.Path
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	return s
}

// repository returns host/repo, which is what credentials are looked up by. It is
// an authn.Resource.
type repository struct{ host, repo string }

func (r repository) String() string      { return r.host + "/" + r.repo }
func (r repository) RegistryStr() string { return r.host }
