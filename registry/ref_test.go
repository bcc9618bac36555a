package registry_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/particle-os/particle/registry"
)

const someDigest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestParseRef(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"docker://debian", "docker://docker.io/library/debian:latest"},
		{"docker://debian:12", "docker://docker.io/library/debian:12"},
		{"docker://index.docker.io/debian:12", "docker://docker.io/library/debian:12"},
		{"docker://a/b", "docker://docker.io/a/b:latest"},
		{"docker://quay.io/a/b/c:d@" + someDigest, "docker://quay.io/a/b/c:d@" + someDigest},
		{"docker://quay.io/a@" + someDigest, "docker://quay.io/a@" + someDigest},
		{"docker://localhost/x", "docker://localhost/x:latest"},
		{"docker://[::1]:5000/x:y", "docker://[::1]:5000/x:y"},
		{"localhost:5000/x:y", "docker://localhost:5000/x:y"},
		{"localhost/x:y", "docker://localhost/x:y"},
		{"quay.io/a/b", "docker://quay.io/a/b:latest"},
		{"oci:dir", "oci:dir"},
		{"oci:/a b/ö:v1.0", "oci:/a b/ö:v1.0"},
		{"oci:dir:docker.io/library/x:1", "oci:dir:docker.io/library/x:1"},
		{"oci:dir:@12", "oci:dir:@12"},
		{"oci-archive:a.tar:t", "oci-archive:a.tar:t"},
		{"docker-archive:a.tar", "docker-archive:a.tar"},
		{"docker-archive:a.tar:debian", "docker-archive:a.tar:docker.io/library/debian:latest"},
		{"docker-archive:a.tar:localhost/x/y:1", "docker-archive:a.tar:localhost/x/y:1"},
		{"docker-archive:a.tar:@0", "docker-archive:a.tar:@0"},
		{"containers-storage:localhost/x:1", "containers-storage:localhost/x:1"},
		{"podman:debian", "containers-storage:debian"},
		{"containers-storage:0123abc", "containers-storage:0123abc"},
	} {
		r, err := registry.ParseRef(c.in)
		if err != nil {
			t.Errorf("ParseRef(%q): %v", c.in, err)
			continue
		}
		if r.String() != c.want {
			t.Errorf("ParseRef(%q) = %s, want %s", c.in, r, c.want)
		}
		if again, err := registry.ParseRef(r.String()); err != nil || again != r {
			t.Errorf("ParseRef(%q) = %+v, %v, want %+v", r.String(), again, err, r)
		}
	}
}

func TestParseRefRefuses(t *testing.T) {
	for _, bad := range []string{
		"", "debian", "debian:12", "a/b", "./a.b/c", "../x:5/y", "/abs/path", "dir:/x", "http://x/y",
		"docker:x/y", "docker://", "docker:///x", "docker://x:5000/", "docker://UPPER", "docker://a/Upper",
		"docker://localhost:5000/../x", "docker://localhost:5000/a//b", "docker://localhost:5000/a/./b", "docker://a.b/c:",
		"docker://a.b/c:" + strings.Repeat("t", 129), "docker://a.b/" + strings.Repeat("r", 256), "docker://a.b/c:d e",
		"docker://a.b/c@sha256:00", "docker://a.b/c@md5:" + strings.Repeat("0", 32), "docker://a.b/c@" + someDigest + "@" + someDigest,
		"docker://user@a.b/c", "docker://a.b?x/c", "docker://a.b#x/c", "docker://a.b%2f/c", "docker://[::1/c", "docker://a.b:port/c", "docker://-a.b/c",
		"oci:", "oci::tag", "oci:dir:", "oci:dir:-", "oci:dir:a b", "oci:dir:@x", "oci:dir:@-1", "oci:a\x00b",
		"docker-archive:f:UPPER", "docker-archive:f:x@" + someDigest,
		"containers-storage:", "podman:", "containers-storage:[vfs@/x]y", "containers-storage:--root=/x", "containers-storage:a b",
	} {
		r, err := registry.ParseRef(bad)
		if !errors.Is(err, registry.ErrReference) {
			t.Errorf("ParseRef(%q) = %v, %v, want ErrReference", bad, r, err)
		} else if !strings.Contains(err.Error(), "docker-archive:FILE") {
			t.Errorf("ParseRef(%q): %q does not tell the accepted forms", bad, err)
		}
	}
}

func FuzzParseRef(f *testing.F) {
	for _, s := range []string{"docker://a.b:5/c/d:e@" + someDigest, "oci:a:b", "docker-archive:a:b/c", "podman:x", "localhost:5000/x:y", "oci-archive:a:@1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := registry.ParseRef(s)
		if err != nil {
			if !errors.Is(err, registry.ErrReference) {
				t.Errorf("ParseRef(%q): %v is not ErrReference", s, err)
			}
			return
		}
		again, err := registry.ParseRef(r.String())
		if err != nil || again != r {
			t.Errorf("ParseRef(%q) = %+v, but its text %q is %+v, %v", s, r, r, again, err)
		}
		if strings.Contains(r.Repo, "..") || strings.ContainsAny(r.Host, "/@?#%\\") {
			t.Errorf("ParseRef(%q) = %+v: host or repository could change a URL", s, r)
		}
	})
}
