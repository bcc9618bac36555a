package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// Ask asks the server at a socket for a snapshot that no client has, and returns nil if
// it says so. That somebody listens is not enough: systemd does, also for a server that
// fails to start.
func Ask(ctx context.Context, socket string, wait time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("no answer in %v", wait))
	defer cancel()
	// First by itself, for an error that tells what is wrong with the socket.
	first, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	first.Close()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = snapshotsapi.NewSnapshotsClient(conn).Stat(ctx, &snapshotsapi.StatSnapshotRequest{Key: "particle: are you there?"})
	switch {
	case status.Code(err) == codes.NotFound:
		return nil
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	case err == nil:
		err = errors.New("it has every snapshot")
	}
	return fmt.Errorf("asking at %s: %w", socket, err)
}
