package podmanext

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// Releases of podman that take layers of a layer store but forget them: their library
// c/storage, since 1.58, gives each layer record the file it is kept in, and
// PutAdditionalLayer gives it none (layers.go), so that the record is never written.
// podman pull then succeeds and the image cannot be used ("layer not known"). No
// release had this repaired when this was written: c/storage 1.65 has it still.
const (
	forgetsMajor = 5
	forgetsMinor = 5
)

// Older releases that take layers of a layer store can wait for each other for ever: to
// take a layer over, c/storage before 1.45 asks for the lock of the storage while it has
// that of the layers (store.go, PutAs), and whoever reads the storage anew has the one
// and asks for the other (LayerStore).
const (
	sharesMajor = 4
	sharesMinor = 4
)

// CheckPodman returns ErrForgets if the podman of this machine would lose what it gets
// from a layer store, and a warning if it is to be used with care. Where there is no
// podman it returns neither.
func CheckPodman(ctx context.Context) (warning string, err error) {
	out, err := runPodman(ctx, "--version")
	if errors.Is(err, ErrNoPodman) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return checkVersion(strings.TrimSpace(string(out)))
}

// checkVersion looks at what podman --version prints: "podman version 5.4.2".
func checkVersion(version string) (warning string, err error) {
	var major, minor int
	if _, err := fmt.Sscanf(version, "podman version %d.%d", &major, &minor); err != nil {
		return "", fmt.Errorf("podman --version prints %.100q, want \"podman version N.N\"", version)
	}
	since := func(a, b int) bool { return major > a || major == a && minor >= b }
	if since(forgetsMajor, forgetsMinor) {
		return "", fmt.Errorf("%w: got %s, want one older than %d.%d\nparticle export NAME podman-store:DIR gives this podman whole images without a copy",
			ErrForgets, version, forgetsMajor, forgetsMinor)
	}
	if !since(sharesMajor, sharesMinor) {
		return fmt.Sprintf("%s is older than %d.%d: several that pull at once may wait for each other for ever; pull one image after the other, and end one of the podmans where they hang",
			version, sharesMajor, sharesMinor), nil
	}
	return "", nil
}
