// Package podmanext gives podman the layers of a store without a second copy.
package podmanext
