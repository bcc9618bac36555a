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

// CheckPodman returns ErrForgets if the podman of this machine would lose what it gets
// from a layer store, and nil where there is none.
func CheckPodman(ctx context.Context) error {
	out, err := runPodman(ctx, "--version")
	if errors.Is(err, ErrNoPodman) {
		return nil
	}
	if err != nil {
		return err
	}
	return checkVersion(strings.TrimSpace(string(out)))
}

// checkVersion looks at what podman --version prints: "podman version 5.4.2".
func checkVersion(version string) error {
	var major, minor int
	if _, err := fmt.Sscanf(version, "podman version %d.%d", &major, &minor); err != nil {
		return fmt.Errorf("podman --version prints %.100q, want \"podman version N.N\"", version)
	}
	if major > forgetsMajor || major == forgetsMajor && minor >= forgetsMinor {
		return fmt.Errorf("%w: got %s, want one older than %d.%d\nparticle export NAME podman-store:DIR gives this podman whole images without a copy",
			ErrForgets, version, forgetsMajor, forgetsMinor)
	}
	return nil
}
