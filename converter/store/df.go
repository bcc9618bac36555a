package store

import (
	"context"
	"fmt"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

// An Amount is a number of objects and their sizes in bytes.
type Amount struct {
	Objects int   `json:"objects"`
	Bytes   int64 `json:"bytes"` // of content
	Disk    int64 `json:"disk"`  // allocated: less where there are holes, more where blocks are not full
}

func (a *Amount) add(st *unix.Stat_t) {
	a.Objects++
	a.Bytes += st.Size
	a.Disk += st.Blocks * 512
}

// A Usage tells what a store's disk space is used for.
type Usage struct {
	Total        Amount `json:"total"`
	Unreferenced Amount `json:"unreferenced"` // what GC would remove
	// Shared is what more than one image uses, counted once; SavedBytes is what it
	// would take more if each image had its own.
	Shared     Amount `json:"shared"`
	SavedBytes int64  `json:"savedBytes"`

	Streams    int `json:"streams"`
	Images     int `json:"images"`
	StreamRefs int `json:"streamRefs"`
	ImageRefs  int `json:"imageRefs"`
}

// DF returns the store's disk usage. list is needed when the store has images.
func (s *Store) DF(ctx context.Context, list ImageObjects) (Usage, error) {
	u, err := s.df(ctx, list)
	if err != nil {
		return u, fmt.Errorf("measuring store %q: %w", s.dir, err)
	}
	return u, nil
}

func (s *Store) df(ctx context.Context, list ImageObjects) (u Usage, err error) {
	release, err := s.Hold(ctx)
	if err != nil {
		return u, err
	}
	defer release()

	m := s.newMarker(list)
	if _, err := m.markRefs(ctx); err != nil {
		return u, err
	}
	streams, err := s.Streams()
	if err != nil {
		return u, err
	}
	images, err := s.Images()
	if err != nil {
		return u, err
	}
	u.Streams, u.Images = len(streams), len(images)
	for kind, n := range map[Kind]*int{Streams: &u.StreamRefs, Images: &u.ImageRefs} {
		refs, err := s.refs(kind, "")
		if err != nil {
			return u, err
		}
		*n = len(refs)
	}

	users := map[fsverity.Digest]int{}
	for _, e := range images {
		one := s.newMarker(list)
		if err := one.walk(ctx, pending{e.Digest, string(Images) + "/" + e.ID, Images}); err != nil {
			return u, err
		}
		for d := range one.live {
			users[d]++
		}
	}
	err = s.walkObjects(ctx, func(o foundObject) error {
		if o.problem != "" {
			return nil
		}
		u.Total.add(&o.stat)
		if _, ok := m.live[o.digest]; !ok {
			u.Unreferenced.add(&o.stat)
		}
		if n := users[o.digest]; n > 1 {
			u.Shared.add(&o.stat)
			u.SavedBytes += int64(n-1) * o.stat.Size
		}
		return nil
	}, func(string) error { return nil })
	return u, err
}
