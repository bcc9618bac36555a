package podmanext

import (
	"errors"
	"testing"
)

func TestVersions(t *testing.T) {
	for version, want := range map[string]struct{ warns, forgets bool }{
		"podman version 3.4.4": {warns: true}, "podman version 4.3.1": {warns: true}, "podman version 4.4.0": {}, "podman version 5.4.2": {},
		"podman version 5.5.0": {forgets: true}, "podman version 5.8.6": {forgets: true}, "podman version 6.0.0-dev": {forgets: true},
		"podman version 5.10.1": {forgets: true},
	} {
		warning, err := checkVersion(version)
		if errors.Is(err, ErrForgets) != want.forgets || !want.forgets && err != nil || (warning != "") != want.warns {
			t.Errorf("%s: %q, %v", version, warning, err)
		}
	}
	if _, err := checkVersion("buildah 1"); err == nil || errors.Is(err, ErrForgets) {
		t.Errorf("of another program: %v", err)
	}
}
