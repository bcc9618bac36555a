package snapshotter

import (
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// FuzzIDMap parses mappings and checks that what they map comes back.
func FuzzIDMap(f *testing.F) {
	for _, s := range []string{"0:100000:65536", "0:1:1,1:100:5", "", "::", "0:0:0", "4294967295:0:1", "0:4294967295:2", "-1:0:1"} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, uids, gids string) {
		m, err := parseIDMap(map[string]string{snapshots.LabelSnapshotUIDMapping: uids, snapshots.LabelSnapshotGIDMapping: gids})
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("got %v, want ErrInvalidArgument", err)
			}
			return
		}
		if m == nil {
			if uids != "" || gids != "" {
				t.Error("no mapping and no error")
			}
			return
		}
		for _, r := range m.uids {
			for _, id := range []uint32{r.container, r.container + (r.size - 1)} {
				host, ok := toHost(m.uids, id)
				if !ok {
					t.Fatalf("%d is in %+v and has no host id", id, r)
				}
				if len(m.uids) > 1 {
					continue // ranges may overlap
				}
				if back, ok := toContainer(m.uids, host); !ok || back != id {
					t.Errorf("%d maps to %d, and that to %d", id, host, back)
				}
			}
		}
		if uid, _, err := m.root(); err == nil && uid < 0 {
			t.Errorf("root has uid %d", uid)
		}
	})
}
