package snapshotter

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
)

// Stat returns the record of a snapshot, with the labels of this package.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.read(ctx, func(ctx context.Context) error {
		var id string
		if id, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		s.describe(id, &info)
		return nil
	})
	return info, err
}

// Update changes labels. Those of this package cannot be set, and the mapping of an
// active snapshot or view cannot be changed: its mounts follow from that.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	info.Labels = withoutOurs(info.Labels)
	if n := len(fieldpaths); n > 0 {
		fieldpaths = slices.DeleteFunc(slices.Clone(fieldpaths), func(path string) bool {
			return slices.Contains(ours, strings.TrimPrefix(path, "labels."))
		})
		if len(fieldpaths) == 0 {
			return s.Stat(ctx, info.Name) // none would mean all
		}
	}
	err = s.write(ctx, func(ctx context.Context) error {
		_, old, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		if info.Labels, err = keepLabels(old, info.Labels, fieldpaths); err != nil {
			return err
		}
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		updated.Labels = withoutOurs(updated.Labels)
		return err
	})
	return updated, err
}

// keepLabels returns the labels that an update of a snapshot gives, with those that it
// cannot take away: who replaces all labels may not know of the mapping. One that asks
// for another mapping is refused. Labels of committed snapshots mean nothing here, nor
// those of unpacked layers (see idsOf).
func keepLabels(old snapshots.Info, labels map[string]string, fieldpaths []string) (map[string]string, error) {
	kept := maps.Clone(labels)
	if kept == nil {
		kept = map[string]string{}
	}
	fixed := []string{labelStaged}
	if old.Kind != snapshots.KindCommitted && !isExtract(old.Name) {
		fixed = append(fixed, snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping)
	}
	all := len(fieldpaths) == 0 || slices.Contains(fieldpaths, "labels")
	for _, label := range fixed {
		want, given := labels[label]
		named := slices.Contains(fieldpaths, "labels."+label)
		if (named || all && given) && want != old.Labels[label] {
			return nil, fmt.Errorf("label %s of snapshot %q: got %q, it stays %q: %w", label, old.Name, want, old.Labels[label], errdefs.ErrInvalidArgument)
		}
		if has, ok := old.Labels[label]; ok {
			kept[label] = has
		}
	}
	return kept, nil
}

// Walk calls fn for each snapshot that passes the filters. The filters do not see the
// labels of this package. What fn sees is how it was when the walk began.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	var infos []snapshots.Info
	err := s.read(ctx, func(ctx context.Context) error {
		return walkAll(ctx, func(ctx context.Context, info snapshots.Info) error {
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			if err != nil {
				return err
			}
			s.describe(id, &info)
			infos = append(infos, info)
			return nil
		}, filters...)
	})
	if err != nil {
		return err
	}
	// Not within the transaction: a write of fn's, or of anybody while fn sends to a slow
	// client, may have to map the database anew, which waits for all that read it.
	for _, info := range infos {
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// walkAll is storage.WalkInfo, which fails before the first snapshot.
func walkAll(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	if _, err := storage.IDMap(ctx); errdefs.IsNotFound(err) {
		return nil
	}
	return storage.WalkInfo(ctx, fn, filters...)
}

// describe adds the labels of this package.
func (s *Snapshotter) describe(id string, info *snapshots.Info) {
	info.Labels = withoutOurs(info.Labels)
	m, ok := s.mounts.of(id)
	if !ok || m.image.IsZero() || info.Kind == snapshots.KindCommitted {
		return
	}
	if info.Labels == nil {
		info.Labels = map[string]string{}
	}
	info.Labels[LabelVerification] = string(m.verification)
	info.Labels[LabelImage] = m.image.String()
}

// labelStaged is on the record of an active snapshot whose layer is in the store: the
// layer's diffID. Nobody sees it.
const labelStaged = "io.particle-os.staged"

var ours = []string{LabelVerification, LabelImage, labelStaged}

// withoutOurs returns labels without those of this package, which is a copy if there
// were any.
func withoutOurs(labels map[string]string) map[string]string {
	isOurs := func(key, _ string) bool { return slices.Contains(ours, key) }
	for key := range labels {
		if isOurs(key, "") {
			labels = maps.Clone(labels)
			maps.DeleteFunc(labels, isOurs)
			break
		}
	}
	return labels
}

// dropOurs is an option that keeps clients from setting the labels of this package.
func dropOurs(info *snapshots.Info) error {
	info.Labels = withoutOurs(info.Labels)
	return nil
}

// Usage returns what a snapshot takes beyond its parent: of an active one the upper
// directory; of a committed one the sizes of the layer's files and their number. Files
// that other layers have too are counted in each: in the store they are once.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var (
		id   string
		info snapshots.Info
	)
	err = s.read(ctx, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil || info.Kind != snapshots.KindActive {
		return usage, err
	}
	if _, err := os.Lstat(s.taken(id)); err == nil {
		return usage, nil // what it had is the store's
	}
	du, err := fs.DiskUsage(ctx, s.upper(id))
	return snapshots.Usage(du), err
}

// chain returns the IDs of a committed snapshot and its ancestors, the lowest first.
// The context must have a transaction.
func chain(ctx context.Context, name string) (ids []string, err error) {
	for name != "" {
		id, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
		name = info.Parent
	}
	slices.Reverse(ids)
	return ids, nil
}

// scope returns what containerd's metadata store puts before a client's key: the
// namespace, a number, and slashes.
func scope(key string) string { return key[:strings.LastIndexByte(key, '/')+1] }
