package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter/store"
	"github.com/particle-os/particle/registry"
	"github.com/particle-os/particle/snapshotter"
	"github.com/particle-os/particle/snapshotter/service"
)

// Where the snapshotter works and listens. Units and documentation say the same.
const (
	snapshotterRoot   = "/var/lib/particle-snapshotter"
	snapshotterSocket = "/run/particle/snapshotter.sock"
	containerdSocket  = "/run/containerd/containerd.sock"
)

func newSnapshotterCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "snapshotter",
		Usage: "serve the store's layers to containerd",
		Description: "Runs until it is told to stop; containers go on without it, and what they need is\n" +
			"mounted again when it starts. It listens on --socket, or on the socket that systemd\n" +
			"passes. particle plugins enable containerd makes containerd use it.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Value: snapshotterRoot, Usage: "the `DIR`ectory of records and of what containers write"},
			&cli.StringFlag{Name: "socket", Value: snapshotterSocket, Usage: "listen on this `FILE`"},
			&cli.StringFlag{Name: "containerd", Value: containerdSocket, Usage: "read what containerd has fetched from its socket, this `FILE`"},
			&cli.BoolFlag{Name: "fetch", Usage: "fetch layers from registries straight into the store; containerd has no copy then to push or export"},
			&cli.BoolFlag{Name: "no-lookup", Usage: "have containerd fetch layers that the store has, so that it can push and export them"},
			&cli.StringFlag{Name: "authfile", EnvVars: []string{"REGISTRY_AUTH_FILE"}, Usage: "with --fetch: read credentials from this `FILE` only"},
			&cli.StringFlag{Name: "cert-dir", Usage: "with --fetch: take certificates for the registries from this `DIR`ectory"},
			&cli.BoolFlag{Name: "insecure", Usage: "with --fetch: allow plain HTTP and certificates that nobody vouches for"},
			&cli.StringFlag{Name: "metrics", Usage: "serve Prometheus metrics at this loopback `ADDRESS`, http://ADDRESS/metrics"},
			&cli.StringFlag{Name: "log-format", Value: "text", Usage: "write the log as `text|json`"},
			&cli.BoolFlag{Name: "debug", Usage: "log each request"},
			&cli.BoolFlag{Name: "unmount", Usage: "unmount what a snapshotter that is stopped left mounted, and exit"},
			&cli.BoolFlag{Name: "purge", Usage: "also remove its records, its containers' files and its names in the store, and exit; particle store gc then frees what only they used"},
		},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			if c.Bool("unmount") || c.Bool("purge") {
				return takeSnapshotterAway(c)
			}
			return serveSnapshotter(c.Context, t, c)
		},
	}
}

// takeSnapshotterAway removes what a snapshotter that was stopped left.
func takeSnapshotterAway(c *cli.Context) (err error) {
	root := c.String("root")
	if c.Bool("purge") {
		st, oerr := store.Open(c.String("store"))
		if oerr != nil && !errors.Is(oerr, store.ErrNotStore) {
			return oerr
		}
		if err = snapshotter.Purge(root, st); errors.Is(err, snapshotter.ErrStore) {
			err = fmt.Errorf("%w\nname it with --store; if it is gone for good, run particle snapshotter --unmount and remove %s", err, root)
		}
	} else {
		err = snapshotter.UnmountAll(root)
	}
	if errors.Is(err, snapshotter.ErrInUse) {
		err = fmt.Errorf("%w\nstop its containers, particle-snapshotter.socket and particle-snapshotter.service first", err)
	}
	return err
}

func serveSnapshotter(ctx context.Context, t *term, c *cli.Context) (err error) {
	log, err := daemonLog(t, c)
	if err != nil {
		return err
	}
	metrics, err := loopbackAddress(c.String("metrics"))
	if err != nil {
		return err
	}
	o := snapshotter.Options{Root: c.String("root"), NoLookup: c.Bool("no-lookup"), Log: log}
	if c.Bool("fetch") {
		ro, err := registryOptions(c)
		if err != nil {
			return err
		}
		o.Source = &layerSource{options: ro, images: map[string]*sourceImage{}}
	}
	if o.Store, err = store.Init(c.String("store"), store.Options{}); err != nil {
		return err
	}
	o.Store.Waiting = func(message string) { log.Info(message) }
	// First the socket: two daemons on one must not both work on the root.
	l, err := service.Listen(c.String("socket"))
	if err != nil {
		return err
	}
	defer l.Close()
	sn, err := snapshotter.New(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, sn.Close()) }()
	srv, err := service.New(service.Options{Snapshotter: sn, Containerd: c.String("containerd"), Log: log})
	if err != nil {
		return err
	}
	defer srv.Close()
	if metrics != "" {
		stop, err := serveMetrics(metrics, srv.Registry(), log)
		if err != nil {
			return err
		}
		defer stop()
	}
	return srv.Serve(ctx, l)
}

// daemonLog returns the log of a verb that runs on.
func daemonLog(t *term, c *cli.Context) (*slog.Logger, error) {
	o := &slog.HandlerOptions{Level: slog.LevelInfo}
	switch {
	case c.Bool("debug"):
		o.Level = slog.LevelDebug
	case t.quiet:
		o.Level = slog.LevelError
	}
	switch format := c.String("log-format"); format {
	case "text":
		return slog.New(slog.NewTextHandler(t.err, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(t.err, o)), nil
	default:
		return nil, usagef("--log-format: got %q, want text or json", format)
	}
}

// loopbackAddress checks an address at which to serve what is for this machine only.
func loopbackAddress(addr string) (string, error) {
	if addr == "" {
		return "", nil
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return "", usageError{fmt.Errorf("--metrics: %w", err)}
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return "", usagef("--metrics: %q is no loopback address: want 127.0.0.1:PORT or the like", addr)
	}
	return addr, nil
}

func serveMetrics(addr string, reg *prometheus.Registry, log *slog.Logger) (stop func() error, err error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("serving metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{}))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("serving metrics", "error", err)
		}
	}()
	log.Info("serving metrics", "url", "http://"+l.Addr().String()+"/metrics")
	return srv.Close, nil
}

// A layerSource fetches layers from the registries of their images.
type layerSource struct {
	options *registry.Options
	mu      sync.Mutex
	images  map[string]*sourceImage // by reference
}

// A sourceImage is an image whose layers are being asked for.
type sourceImage struct {
	once   sync.Once
	image  *registry.Image
	layers map[string]v1.Descriptor // by digest
	err    error
	forget *time.Timer
}

// manifestLife is how long a manifest is remembered after the last question for a layer
// of it. An image is asked for layer by layer, and a tag may move.
const manifestLife = 30 * time.Second

// Layer opens a layer of an image, of the manifest that its reference leads to now.
func (s *layerSource) Layer(ctx context.Context, ref, digest string) (io.ReadCloser, error) {
	img := s.remember(ref)
	img.once.Do(func() { img.err = img.open(ctx, ref, s.options) })
	if img.err != nil {
		s.drop(ref, img)
		return nil, img.err
	}
	desc, ok := img.layers[digest]
	if !ok {
		return nil, fmt.Errorf("%w: %s has no layer %s", registry.ErrNotFound, ref, digest)
	}
	return img.image.Blob(ctx, desc)
}

func (s *layerSource) remember(ref string) *sourceImage {
	s.mu.Lock()
	defer s.mu.Unlock()
	img := s.images[ref]
	if img == nil {
		img = &sourceImage{layers: map[string]v1.Descriptor{}}
		img.forget = time.AfterFunc(manifestLife, func() { s.drop(ref, img) })
		s.images[ref] = img
	}
	img.forget.Reset(manifestLife)
	return img
}

// drop forgets an image. Who reads a layer of it goes on.
func (s *layerSource) drop(ref string, img *sourceImage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.images[ref] == img {
		delete(s.images, ref)
	}
	img.forget.Stop()
}

func (img *sourceImage) open(ctx context.Context, name string, o *registry.Options) error {
	ref, err := registry.ParseRef("docker://" + name)
	if err != nil {
		return err
	}
	if img.image, err = registry.Open(ctx, ref, o); err != nil {
		return err
	}
	raw, _, err := img.image.Manifest(ctx)
	if err != nil {
		return err
	}
	var m v1.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return fmt.Errorf("reading the manifest of %s: %w", name, err)
	}
	for _, l := range m.Layers {
		img.layers[l.Digest.String()] = l
	}
	return nil
}
