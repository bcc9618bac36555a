package podman

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/particle-os/particle/tests/program"
)

// A layerStore is particle layer-store, or the place for it.
type layerStore struct {
	t                  testing.TB
	store, dir, mounts string
	flags              []string

	service *program.Process // nil while none runs
	log     *logBuffer
}

// newLayerStore makes the directories of a layer store; nothing runs yet.
func newLayerStore(t testing.TB, flags ...string) *layerStore {
	t.Helper()
	dir := sharedDir(t)
	l := &layerStore{
		t: t, store: filepath.Join(dir, "store"), dir: filepath.Join(dir, "layers"), mounts: filepath.Join(dir, "mounts"),
		flags: flags, log: &logBuffer{t: t},
	}
	for _, d := range []string{l.dir, l.mounts} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		l.stop()
		if _, errs, err := program.Run(l.particle("layer-store", "stop", "--dir", l.dir, "--mounts", l.mounts)); err != nil {
			t.Errorf("stopping the layer store: %v\n%s", err, errs)
		}
	})
	return l
}

// particle makes a command on the layer store's store.
func (l *layerStore) particle(args ...string) *exec.Cmd {
	return exec.Command(particle, append([]string{"--store", l.store}, args...)...)
}

// start runs the service until it is ready.
func (l *layerStore) start() {
	l.t.Helper()
	ready := l.log.wait("serving")
	cmd := l.particle(append([]string{"layer-store", "--dir", l.dir, "--mounts", l.mounts}, l.flags...)...)
	cmd.Stderr = l.log
	cmd.Env = append(os.Environ(), "REGISTRY_AUTH_FILE=", "XDG_RUNTIME_DIR="+l.store+"-none", "HOME="+l.store+"-none", "DOCKER_CONFIG=")
	l.service = program.StartCmd(l.t, cmd)
	select {
	case <-ready:
	case <-l.service.Done():
		l.t.Fatalf("the layer store ended: %s", cmd.ProcessState)
	case <-time.After(30 * time.Second):
		l.t.Fatal("the layer store is not ready after 30 s")
	}
}

// end sends the service a signal and waits until it is gone.
func (l *layerStore) end(sig syscall.Signal) {
	l.t.Helper()
	s := l.service
	l.service = nil
	if err := s.Stop(sig); err != nil {
		l.t.Fatalf("the layer store, sent %s: %v", sig, err)
	}
}

func (l *layerStore) stop() {
	if l.service != nil {
		l.end(syscall.SIGTERM)
	}
}

// mountedLayers returns the names of the layers that are mounted.
func (l *layerStore) mountedLayers() []string {
	l.t.Helper()
	entries, err := os.ReadDir(l.mounts)
	if err != nil {
		l.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

// A logBuffer shows what the service says when a test fails, and waits for words.
type logBuffer struct {
	t testing.TB

	mu    sync.Mutex
	text  bytes.Buffer
	word  string
	from  int // where in text to look for word
	heard chan struct{}
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.text.Write(p)
	b.t.Log(strings.TrimSpace(string(p)))
	if b.heard != nil && bytes.Contains(b.text.Bytes()[b.from:], []byte(b.word)) {
		close(b.heard)
		b.heard = nil
	}
	return len(p), nil
}

// wait returns a channel that is closed when a word is said from now on.
func (b *logBuffer) wait(word string) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.word, b.from, b.heard = word, b.text.Len(), make(chan struct{})
	return b.heard
}

func (b *logBuffer) contains(word string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Contains(b.text.Bytes(), []byte(word))
}
