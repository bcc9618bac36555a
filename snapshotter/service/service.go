// Package service offers a snapshotter to containerd: the gRPC services of snapshots
// and of diffs on a unix socket, as containerd's proxy plugins want them.
//
// The messages are those of containerd's API, whose snapshots service is the same in
// all releases since 1.6; the diff service is used since 1.7. Blobs are read from
// containerd's own content service, in the namespace of each request.
//
// A stop, or a crash, takes nothing away: mounts stay, containers go on, and what is
// missing is mounted again at the next start.
//
// Left out: who may connect, which the socket's permissions say; the HTTP server of
// the metrics; and containerd's configuration.
package service

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	ccontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/particle-os/particle/snapshotter"
)

// stopWait is how long a stop waits for requests that run.
const stopWait = 30 * time.Second

// Options are those of a Server. Snapshotter must be set.
type Options struct {
	Snapshotter *snapshotter.Snapshotter
	// Containerd is the path of containerd's socket, from which the diff service reads
	// blobs; without it there is no diff service. containerd need not be running yet.
	Containerd string
	// Log is where to tell what goes on; nil is slog.Default().
	Log *slog.Logger
}

// A Server serves one snapshotter.
type Server struct {
	rpc     *grpc.Server
	conn    *grpc.ClientConn // to containerd, nil for none
	log     *slog.Logger
	metrics *metrics
}

// New makes a server. It is closed by the end of Serve, or by Close.
func New(o Options) (*Server, error) {
	s := &Server{log: o.Log, metrics: newMetrics(o.Snapshotter)}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.rpc = grpc.NewServer(
		grpc.UnaryInterceptor(s.intercept),
		grpc.StreamInterceptor(s.interceptStream),
		grpc.MaxRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
		grpc.MaxSendMsgSize(defaults.DefaultMaxSendMsgSize),
	)
	snapshotsapi.RegisterSnapshotsServer(s.rpc, snapshotservice.FromSnapshotter(o.Snapshotter))
	if o.Containerd == "" {
		return s, nil
	}
	socket, err := filepath.Abs(o.Containerd)
	if err != nil {
		return nil, err
	}
	s.conn, err = grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(defaults.DefaultMaxRecvMsgSize),
			grpc.MaxCallSendMsgSize(defaults.DefaultMaxSendMsgSize),
		))
	if err != nil {
		return nil, fmt.Errorf("connecting to containerd at %q: %w", o.Containerd, err)
	}
	store := contentproxy.NewContentStore(content.NewContentClient(s.conn))
	differ := o.Snapshotter.Differ(blobs{store})
	diffapi.RegisterDiffServer(s.rpc, diffservice.FromApplierAndComparer(differ, differ))
	return s, nil
}

// Registry returns the registry of the server's Prometheus metrics, for a handler
// (promhttp.HandlerFor) or for more metrics.
func (s *Server) Registry() *prometheus.Registry { return s.metrics.registry }

// Serve answers requests until the context ends, then lets those that run finish. It
// tells systemd when it is ready and when it stops (sd_notify(3)), and pets systemd's
// watchdog if there is one. The listener is closed.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	defer s.Close()
	failed := make(chan error, 1)
	go func() { failed <- s.rpc.Serve(l) }()
	s.log.Info("serving", "address", l.Addr().String())
	s.notify(daemon.SdNotifyReady)
	stopPetting := s.petWatchdog()
	defer stopPetting()
	select {
	case err := <-failed:
		return fmt.Errorf("serving on %q: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	s.notify(daemon.SdNotifyStopping)
	s.log.Info("stopping", "why", context.Cause(ctx))
	force := time.AfterFunc(stopWait, func() {
		s.log.Warn("not waiting for requests any longer", "waited", stopWait)
		s.rpc.Stop()
	})
	defer force.Stop()
	s.rpc.GracefulStop()
	return <-failed
}

// Close ends all requests at once.
func (s *Server) Close() error {
	s.rpc.Stop()
	if s.conn == nil {
		return nil
	}
	if err := s.conn.Close(); status.Code(err) != codes.Canceled {
		return err
	}
	return nil // closed before
}

func (s *Server) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.log.Warn("notifying systemd", "state", state, "error", err)
	}
}

// petWatchdog tells systemd twice an interval that the process lives.
func (s *Server) petWatchdog() (stop func()) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil || interval == 0 {
		return func() {}
	}
	tick := time.NewTicker(interval / 2)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-tick.C:
				s.notify(daemon.SdNotifyWatchdog)
			case <-done:
				return
			}
		}
	}()
	return func() { tick.Stop(); close(done) }
}

// intercept measures and logs requests, and passes the caller's namespace on to
// containerd's services.
func (s *Server) intercept(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if ns, ok := namespaces.Namespace(ctx); ok {
		ctx = namespaces.WithNamespace(ctx, ns)
	}
	began := time.Now()
	resp, err := handler(ctx, req)
	var attrs []slog.Attr
	if k, ok := req.(interface{ GetKey() string }); ok {
		attrs = append(attrs, slog.String("key", k.GetKey()))
	}
	if n, ok := req.(interface{ GetName() string }); ok {
		attrs = append(attrs, slog.String("name", n.GetName()))
	}
	s.ended(ctx, info.FullMethod, began, err, attrs...)
	return resp, err
}

// interceptStream measures and logs requests with more than one answer (List).
func (s *Server) interceptStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	began := time.Now()
	err := handler(srv, stream)
	s.ended(stream.Context(), info.FullMethod, began, err)
	return err
}

// ended measures and logs a request.
func (s *Server) ended(ctx context.Context, fullMethod string, began time.Time, err error, attrs ...slog.Attr) {
	took := time.Since(began)
	code := status.Code(err)
	method := path.Base(fullMethod)
	s.metrics.requests.WithLabelValues(method, code.String()).Observe(took.Seconds())
	level := slog.LevelDebug
	switch code {
	case codes.Unknown, codes.Internal, codes.DataLoss, codes.ResourceExhausted:
		level = slog.LevelError
	}
	attrs = append([]slog.Attr{slog.String("method", method), slog.Duration("took", took), slog.String("code", code.String())}, attrs...)
	if err != nil {
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	s.log.LogAttrs(ctx, level, "request", attrs...)
}

// blobs reads containerd's content.
type blobs struct{ store ccontent.Provider }

// readAhead is the size in bytes of the pieces in which blobs are read: each piece is
// a request.
const readAhead = 4 << 20

func (b blobs) Blob(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	at, err := b.store.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{bufio.NewReaderSize(ccontent.NewReader(at), readAhead), at}, nil
}

// Listen returns the socket that systemd passes (sd_listen_fds(3)), or else a new unix
// socket at path that only its owner can connect to. A socket that nobody listens on
// is replaced.
func Listen(path string) (net.Listener, error) {
	passed, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("taking systemd's sockets: %w", err)
	}
	switch len(passed) {
	case 0:
	case 1:
		if passed[0] == nil {
			return nil, errors.New("taking systemd's sockets: got one that is not a stream socket: want ListenStream=")
		}
		return passed[0], nil
	default:
		return nil, fmt.Errorf("taking systemd's sockets: got %d, want 1", len(passed))
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	conn, err := net.Dial("unix", path)
	switch {
	case err == nil:
		conn.Close()
		return nil, fmt.Errorf("listening on %q: %w: another process answers there", path, syscall.EADDRINUSE)
	case errors.Is(err, syscall.ECONNREFUSED): // also said of a plain file
		fi, err := os.Lstat(path)
		if err == nil && fi.Mode().Type() != os.ModeSocket {
			err = fmt.Errorf("listening on %q: it is no socket: %w", path, os.ErrExist)
		}
		if err == nil {
			err = os.Remove(path)
		}
		if err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
