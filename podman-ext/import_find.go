package podmanext

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

var (
	// ErrNoPodman: there is no podman program.
	ErrNoPodman = errors.New("no podman program; install podman, or name another one in PARTICLE_PODMAN")
	// ErrNoImage: podman has no image of that name. It comes with ErrUnreadable.
	ErrNoImage = errors.New("podman has no such image")
)

// FindLocal finds the image of a name or ID in the storage of the podman program of
// this user, which resolves the name and knows where its storage lies. Errors wrap
// [ErrUnreadable] where only podman itself can read the image, which includes that
// there is none.
func FindLocal(ctx context.Context, name string) (*LocalImage, error) {
	info, err := storageInfo(ctx)
	if err != nil {
		return nil, err
	}
	out, err := runPodman(ctx, "image", "inspect", "--format", "{{.Id}}", name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w: %w", ErrUnreadable, ErrNoImage, err)
	}
	return OpenLocal(info.GraphRoot, strings.TrimPrefix(strings.TrimSpace(string(out)), "sha256:"))
}

// A storage is what podman tells of its own.
type storage struct {
	GraphRoot  string `json:"graphRoot"`
	Driver     string `json:"graphDriverName"`
	ConfigFile string `json:"configFile"`
}

// storageInfo asks podman for its storage, and refuses one that is not on this
// machine's disk or of another driver than overlay.
func storageInfo(ctx context.Context) (storage, error) {
	out, err := runPodman(ctx, "info", "--format", "json")
	if err != nil {
		return storage{}, err
	}
	return parseInfo(out, true)
}

// parseInfo reads what podman tells of itself. A service calls itself remote, wherever
// it is.
func parseInfo(out []byte, program bool) (storage, error) {
	var info struct {
		Store storage `json:"store"`
		Host  struct {
			Remote bool `json:"serviceIsRemote"`
		} `json:"host"`
	}
	if err := json.Unmarshal(out, &info); err != nil {
		return storage{}, fmt.Errorf("reading what podman info says: %w", err)
	}
	switch {
	case program && info.Host.Remote:
		return storage{}, fmt.Errorf("%w: podman's storage is on another machine", ErrUnreadable)
	case info.Store.Driver != "overlay":
		return storage{}, fmt.Errorf("%w: podman's storage has the driver %q, want overlay", ErrUnreadable, info.Store.Driver)
	}
	return info.Store, nil
}

// podmanProgram is the command: $PARTICLE_PODMAN, or podman, as in package registry.
func podmanProgram() string {
	if name := os.Getenv("PARTICLE_PODMAN"); name != "" {
		return name
	}
	return "podman"
}

// runPodman runs the command and returns its standard output.
func runPodman(ctx context.Context, args ...string) ([]byte, error) {
	cmd := podmanCommand(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	return stdout.Bytes(), podmanError(ctx, cmd, err, stderr.String())
}

func podmanCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, podmanProgram(), args...)
	// Killed at once, podman would leave a half-written layer in its storage.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 15 * time.Second
	return cmd
}

func podmanError(ctx context.Context, cmd *exec.Cmd, err error, stderr string) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return ErrNoPodman
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	if stderr = strings.TrimSpace(stderr); stderr != "" {
		stderr = ": " + stderr
	}
	return fmt.Errorf("running %s %s: %w%s", podmanProgram(), cmd.Args[1], err, stderr)
}
