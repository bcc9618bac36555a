// Package podmanext gives podman the layers of a store without a second copy.
//
// podman has no plugins; this package speaks what its storage library offers instead.
// A LayerStore is an additional layer store: a directory tree in which podman finds
// layers that it would else pull, each shown by a composefs mount, with a FUSE front
// (Front) that fetches what is missing and counts who uses what. The protocol is that
// of c/storage drivers/overlay/overlay.go.
//
// Left out: podman's configuration (the command writes it), where images come from (a
// Source has them), and rootless podman, which cannot mount EROFS.
package podmanext
