package registry

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
)

// TestDockerHub: the keys under which credentials for docker.io are found. No such
// registry can be played in-process.
func TestDockerHub(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.json")
	for key, found := range map[string]bool{
		"https://index.docker.io/v1/": true, "index.docker.io": true, "docker.io": true, "docker.io/library": true, "docker.io/library/x": true, "https://registry-1.docker.io": true,
		"https://index.docker.io.example/v1/": false, "docker.io/x": false, "library/x": false, "https://example.com/docker.io": false,
	} {
		raw := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, key, base64.StdEncoding.EncodeToString([]byte("u:p:q")))
		if err := os.WriteFile(file, []byte(raw), 0o600); err != nil {
			t.Fatal(err)
		}
		auth, err := Auth{File: file}.keychain().Resolve(repository{"docker.io", "library/x"})
		if err != nil {
			t.Fatal(err)
		}
		if found == (auth == authn.Anonymous) {
			t.Errorf("key %q: found is %v, want %v", key, !found, found)
		}
		if !found {
			continue
		}
		if c, err := auth.Authorization(); err != nil || c.Username != "u" || c.Password != "p:q" {
			t.Errorf("key %q: got %+v, %v, want u and p:q", key, c, err)
		}
	}
}
