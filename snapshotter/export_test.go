package snapshotter

import (
	"maps"
	"slices"
)

// ForceLoop makes a snapshotter mount images from loop devices, as it does by itself
// on kernels that count an EROFS on a file as a stacked filesystem.
func ForceLoop(s *Snapshotter) { s.features.FileStacks.OK = false }

// EndRetiring does at once what comes some time after commits.
func EndRetiring(s *Snapshotter) {
	s.state.mu.Lock()
	ids := slices.Collect(maps.Keys(s.state.retiring))
	s.state.mu.Unlock()
	for _, id := range ids {
		s.retired(id)
	}
}
