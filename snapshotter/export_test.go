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

// Limit returns the project of a directory, and the limit of that in bytes.
func Limit(dir string) (project uint32, limit uint64, err error) {
	if project, err = projectOf(dir); err != nil {
		return 0, 0, err
	}
	limit, err = LimitOf(dir, project)
	return project, limit, err
}

// LimitOf returns the limit of a project on the filesystem of dir, in bytes.
func LimitOf(dir string, project uint32) (uint64, error) {
	q, err := getQuota(dir, project)
	return q.blockHard << 10, err
}

// SetProject makes a directory belong to a project.
func SetProject(dir string, project uint32) error { return setProject(dir, project) }
