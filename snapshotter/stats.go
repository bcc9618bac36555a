package snapshotter

import "sync/atomic"

type counters struct {
	mounts, images, commits, found, fetched, applied, ingested, collected atomic.Int64
}

// Stats says what a snapshotter has done since New, and what is mounted now.
type Stats struct {
	Mounts      int // merged images that are mounted
	LoopMounts  int // those of them that are on a loop device
	MountsMade  int64
	ImagesMade  int64 // merged images written
	Commits     int64
	LayersFound int64 // layers that the store had, by the remote-snapshot protocol
	LayersGot   int64 // layers that the source fetched
	LayersRead  int64 // layers that our differ read
	BytesRead   int64 // of layers and upper directories that were taken into the store
	BytesFreed  int64 // by garbage collection
}

// Stats returns the counters.
func (s *Snapshotter) Stats() Stats {
	c := &s.counters
	mounts, loops := s.mounts.count()
	return Stats{
		Mounts: mounts, LoopMounts: loops,
		MountsMade: c.mounts.Load(), ImagesMade: c.images.Load(), Commits: c.commits.Load(),
		LayersFound: c.found.Load(), LayersGot: c.fetched.Load(), LayersRead: c.applied.Load(),
		BytesRead: c.ingested.Load(), BytesFreed: c.collected.Load(),
	}
}
