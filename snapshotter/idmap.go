package snapshotter

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/particle-os/particle/converter/tree"
)

// An idMap is the mapping of a user namespace: files of a container have the ids on
// disk that the mapping gives those in the image.
type idMap struct {
	uid, gid   string // as in the labels
	uids, gids []idRange
}

// An idRange maps size ids from container on to those from host on.
type idRange struct{ container, host, size uint32 }

// idsOf returns the mapping that the labels of a snapshot ask for, nil for none. A layer
// that is being unpacked has none: before 2.4 its labels are also annotations of the
// manifest, whose author must not decide who owns the files of everybody's layer.
func idsOf(key string, labels map[string]string) (*idMap, error) {
	if isExtract(key) {
		return nil, nil
	}
	return parseIDMap(labels)
}

// parseIDMap returns the mapping that labels ask for, nil for none.
func parseIDMap(labels map[string]string) (*idMap, error) {
	m := &idMap{uid: labels[snapshots.LabelSnapshotUIDMapping], gid: labels[snapshots.LabelSnapshotGIDMapping]}
	if m.uid == "" && m.gid == "" {
		return nil, nil
	}
	var err error
	if m.uids, err = parseIDRanges(m.uid); err != nil {
		return nil, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotUIDMapping, err)
	}
	if m.gids, err = parseIDRanges(m.gid); err != nil {
		return nil, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotGIDMapping, err)
	}
	return m, nil
}

// parseIDRanges reads CONTAINER:HOST:SIZE[,…], as containerd's clients write it.
func parseIDRanges(s string) ([]idRange, error) {
	var all []idRange
	for part := range strings.SplitSeq(s, ",") {
		fields := strings.Split(part, ":")
		if len(fields) != 3 {
			return nil, fmt.Errorf("mapping %q: want CONTAINER-ID:HOST-ID:SIZE: %w", part, errdefs.ErrInvalidArgument)
		}
		var n [3]uint32
		for i, f := range fields {
			v, err := strconv.ParseUint(f, 10, 32)
			if err != nil {
				return nil, fmt.Errorf("mapping %q: %w: %w", part, err, errdefs.ErrInvalidArgument)
			}
			n[i] = uint32(v)
		}
		r := idRange{n[0], n[1], n[2]}
		if r.size == 0 || r.container+(r.size-1) < r.container || r.host+(r.size-1) < r.host {
			return nil, fmt.Errorf("mapping %q: size %d is out of range: %w", part, r.size, errdefs.ErrInvalidArgument)
		}
		all = append(all, r)
	}
	return all, nil
}

// name returns a short name for a mapping.
func (m *idMap) name() string {
	sum := sha256.Sum256([]byte(m.uid + "\x00" + m.gid))
	return hex.EncodeToString(sum[:8])
}

// root returns the ids on the host of the container's root.
func (m *idMap) root() (uid, gid int, err error) {
	u, ok := toHost(m.uids, 0)
	g, ok2 := toHost(m.gids, 0)
	if !ok || !ok2 {
		return 0, 0, fmt.Errorf("mapping of uids %q and gids %q: it has no root: %w", m.uid, m.gid, errdefs.ErrInvalidArgument)
	}
	return int(u), int(g), nil
}

func toHost(ranges []idRange, id uint32) (uint32, bool) {
	for _, r := range ranges {
		if id >= r.container && id-r.container < r.size {
			return r.host + (id - r.container), true
		}
	}
	return 0, false
}

func toContainer(ranges []idRange, id uint32) (uint32, bool) {
	for _, r := range ranges {
		if id >= r.host && id-r.host < r.size {
			return r.container + (id - r.host), true
		}
	}
	return 0, false
}

// unmap gives the files of an upper directory the ids that they have in the
// container: a layer must not depend on the mapping of one that wrote to it. Ids that
// the mapping does not have stay (files that the host put there). The tree must be
// the caller's own.
func (m *idMap) unmap(t *tree.Tree) (kept int) {
	done := map[*tree.Node]bool{}
	_ = t.Walk(func(_ string, n *tree.Node) error {
		if done[n] || n.IsWhiteout() {
			return nil
		}
		done[n] = true
		uid, ok := toContainer(m.uids, n.UID)
		if ok {
			n.UID = uid
		}
		gid, ok2 := toContainer(m.gids, n.GID)
		if ok2 {
			n.GID = gid
		}
		if !ok || !ok2 {
			kept++
		}
		return nil
	})
	return kept
}
