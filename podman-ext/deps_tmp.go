package podmanext

import (
	_ "github.com/containers/podman/v5/pkg/bindings"
	_ "github.com/hanwen/go-fuse/v2/fs"
)
