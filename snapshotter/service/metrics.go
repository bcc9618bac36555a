package service

import (
	"context"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/particle-os/particle/snapshotter"
)

type metrics struct {
	registry *prometheus.Registry
	requests *prometheus.HistogramVec
}

func newMetrics(sn *snapshotter.Snapshotter) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "particle_snapshotter_request_duration_seconds",
			Help:    "Time that requests took, by method and gRPC status.",
			Buckets: prometheus.ExponentialBuckets(0.001, 4, 8), // 1 ms to 16 s
		}, []string{"method", "code"}),
	}
	m.registry.MustRegister(m.requests, collector{sn},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// A collector reads the counters of a snapshotter when it is asked.
type collector struct{ sn *snapshotter.Snapshotter }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("particle_snapshotter_"+name, help, labels, nil)
}

var (
	descSnapshots = desc("snapshots", "Snapshots, by kind.", "kind")
	descMounts    = desc("mounts", "Merged images that are mounted.")
	descLoops     = desc("loop_mounts", "Merged images that are mounted from a loop device.")
	descMade      = desc("mounts_made_total", "Mounts of merged images that were made.")
	descImages    = desc("images_made_total", "Merged images that were written.")
	descCommits   = desc("commits_total", "Snapshots that were committed by request.")
	descLayers    = desc("layers_total", "Layers that came by another way than an upper directory: found in the store, fetched from a registry, or applied by the differ.", "way")
	descRead      = desc("read_bytes_total", "Bytes of layers and upper directories that were taken into the store.")
	descFreed     = desc("freed_bytes_total", "Bytes that garbage collection removed.")
)

func (c collector) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(c, ch) }

func (c collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v int, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(v), labels...)
	}
	counter := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	st := c.sn.Stats()
	gauge(descMounts, st.Mounts)
	gauge(descLoops, st.LoopMounts)
	counter(descMade, st.MountsMade)
	counter(descImages, st.ImagesMade)
	counter(descCommits, st.Commits)
	counter(descLayers, st.LayersFound, "found")
	counter(descLayers, st.LayersGot, "fetched")
	counter(descLayers, st.LayersRead, "applied")
	counter(descRead, st.BytesRead)
	counter(descFreed, st.BytesFreed)

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	kinds := map[snapshots.Kind]int{snapshots.KindActive: 0, snapshots.KindView: 0, snapshots.KindCommitted: 0}
	err := c.sn.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		kinds[info.Kind]++
		return ctx.Err()
	})
	if err != nil {
		ch <- prometheus.NewInvalidMetric(descSnapshots, err)
		return
	}
	for kind, n := range kinds {
		gauge(descSnapshots, n, map[snapshots.Kind]string{
			snapshots.KindActive: "active", snapshots.KindView: "view", snapshots.KindCommitted: "committed",
		}[kind])
	}
}
