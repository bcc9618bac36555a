package registry_test

import (
	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/registry"
)

// What converter asks of images and targets.
var (
	_ converter.Image  = (*registry.Image)(nil)
	_ converter.Ranger = (*registry.Image)(nil)
	_ converter.Target = registry.Target(nil)
)
