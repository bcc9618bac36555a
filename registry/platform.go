package registry

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// parsePlatform reads os/arch[/variant]. Nothing means the host's, on Linux: no
// other system's images can become a composefs.
func parsePlatform(s string) (v1.Platform, error) {
	if s == "" {
		return v1.Platform{OS: "linux", Architecture: runtime.GOARCH}, nil
	}
	parts := strings.Split(s, "/")
	if len(parts) < 2 || len(parts) > 3 || slices.Contains(parts, "") {
		return v1.Platform{}, fmt.Errorf("%w: platform %q: want OS/ARCH[/VARIANT], like linux/arm64", ErrPlatform, s)
	}
	p := v1.Platform{OS: parts[0], Architecture: parts[1]}
	if len(parts) == 3 {
		p.Variant = parts[2]
	}
	return p, nil
}

// variants lists what a machine of the platform runs, best first. Values are those
// of Go's GOARM and GOAMD64, as the OCI image index specification has it; an absent
// variant is the lowest of amd64 and v8 of arm64, and stays a variant of its own
// for arm, where nobody agrees on it.
func variants(p v1.Platform) []string {
	var all []string
	switch p.Architecture {
	case "amd64":
		all = []string{"v4", "v3", "v2", "v1"}
	case "arm64":
		all = []string{"v9", "v8"}
	case "arm":
		all = []string{"v8", "v7", "v6", "v5"}
	default:
		return []string{p.Variant}
	}
	want := p.Variant
	if want == "" {
		want = map[string]string{"amd64": "v1", "arm64": "v8", "arm": "v7"}[p.Architecture]
	}
	i := slices.Index(all, want)
	if i < 0 {
		return []string{p.Variant}
	}
	out := slices.Clone(all[i:])
	if p.Variant == "" {
		return append([]string{""}, out...)
	}
	return append(out, "")
}

// choosePlatform returns the best manifest for a platform. Entries without a
// platform match nothing here.
func choosePlatform(list []v1.Descriptor, want v1.Platform) (v1.Descriptor, error) {
	for _, variant := range variants(want) {
		for _, d := range list {
			if p := d.Platform; p != nil && p.OS == want.OS && p.Architecture == want.Architecture && p.Variant == variant {
				return d, nil
			}
		}
	}
	var have []string
	for _, d := range list {
		// unknown/unknown marks what is no image: build attestations (BuildKit,
		// docs/attestations/attestation-storage.md).
		if d.Platform != nil && d.Platform.OS != "unknown" && !slices.Contains(have, d.Platform.String()) {
			have = append(have, d.Platform.String())
		}
	}
	if len(have) == 0 {
		return v1.Descriptor{}, fmt.Errorf("%w %s: the index names no platforms", ErrPlatform, want)
	}
	return v1.Descriptor{}, fmt.Errorf("%w %s: there are %s; choose one of them", ErrPlatform, want, strings.Join(have, ", "))
}
