package podmanext

import "errors"

// The errors of the layer store; test with errors.Is.
var (
	// ErrNoLayer: neither the store nor the registry's image has such a layer.
	ErrNoLayer = errors.New("no such layer")
	// ErrBusy: another process serves the layer store.
	ErrBusy = errors.New("layer store in use")
	// ErrKey: a name in the layer store that podman does not ask for.
	ErrKey = errors.New("not the name of a layer")
	// ErrWhiteouts: this kernel cannot show what a layer deletes (it is older than
	// Linux 6.8, which brought escaped whiteouts).
	ErrWhiteouts = errors.New("the kernel cannot show the deletions of a layer")
	// ErrForgets: this podman forgets layers that it gets from a layer store.
	ErrForgets = errors.New("this podman loses the layers of a layer store")
	// ErrStalled: a registry has stopped sending.
	ErrStalled = errors.New("the registry sends nothing")
)
