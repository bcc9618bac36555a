package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"golang.org/x/sys/unix"
)

const (
	metaName    = "meta.json"
	metaTemp    = ".meta.json-"
	maxMetaSize = 1 << 20

	// metaVersion is the one format version there is.
	metaVersion = 1

	// featureV1 marks stores whose images are EROFS format V1, for versions of
	// composefs-rs that do not know the field erofs_formats.
	featureV1 = "v1_erofs"
)

// meta is meta.json, as RepoMetadata in crates/composefs/src/repository.rs of
// composefs-rs has it.
type meta struct {
	Version   int      `json:"version"`   // metaVersion; greater ones must be refused
	Algorithm string   `json:"algorithm"` // "fsverity-sha256-12" or "fsverity-sha512-12"
	Features  features `json:"features"`
	// ErofsFormats says which formats of EROFS images the store gets. Without it
	// (stores made earlier) featureV1 decides between V1 and V2.
	ErofsFormats *erofsFormats `json:"erofs_formats,omitempty"`
}

// features follow ext4's model: an unknown feature may be ignored, forbids writing,
// or forbids opening.
type features struct {
	Compatible         []string `json:"compatible"`
	ReadOnlyCompatible []string `json:"read-only-compatible"`
	Incompatible       []string `json:"incompatible"`
}

type erofsFormats struct {
	Default int   `json:"default"`
	Extra   []int `json:"extra,omitempty"`
}

func newMeta(alg fsverity.Algorithm) meta {
	return meta{
		Version:   metaVersion,
		Algorithm: alg.Name(),
		Features: features{
			Compatible:         []string{},
			ReadOnlyCompatible: []string{featureV1},
			Incompatible:       []string{},
		},
		ErofsFormats: &erofsFormats{Default: 1},
	}
}

// v1 reports whether images of format V1 belong into the store.
func (m *meta) v1() bool {
	// {"default": 2} is also what composefs-rs takes a missing field for.
	if f := m.ErofsFormats; f != nil && (f.Default != 2 || len(f.Extra) > 0) {
		return f.Default == 1 || slices.Contains(f.Extra, 1)
	}
	return slices.Contains(m.Features.ReadOnlyCompatible, featureV1)
}

// parseMeta reads meta.json. The returned reason says why the store must not be
// written, "" when it may.
func parseMeta(data []byte) (m meta, alg fsverity.Algorithm, readOnly string, err error) {
	// The version first: what else a later version holds is not for us to judge.
	var v struct {
		Version *int `json:"version"`
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return m, 0, "", fmt.Errorf("%w: reading %s: %w", ErrCorrupt, metaName, err)
	}
	if v.Version == nil {
		return m, 0, "", fmt.Errorf("%w: %s names no version", ErrCorrupt, metaName)
	}
	if *v.Version != metaVersion {
		return m, 0, "", fmt.Errorf("%w: got version %d, want %d; use the program that made the store, or choose another directory",
			ErrVersion, *v.Version, metaVersion)
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return m, 0, "", fmt.Errorf("%w: reading %s: %w", ErrCorrupt, metaName, err)
	}
	if len(m.Features.Incompatible) > 0 {
		return m, 0, "", fmt.Errorf("%w: %q; use the program that made the store, or choose another directory",
			ErrFeature, m.Features.Incompatible)
	}
	if !strings.HasPrefix(m.Algorithm, "fsverity-") {
		return m, 0, "", fmt.Errorf("%w: %s names algorithm %q, want fsverity-sha256-12 or fsverity-sha512-12", ErrAlgorithm, metaName, m.Algorithm)
	}
	if alg, err = fsverity.ParseAlgorithm(m.Algorithm); err != nil || alg.Name() != m.Algorithm {
		return m, 0, "", fmt.Errorf("%w: %s names algorithm %q, want fsverity-sha256-12 or fsverity-sha512-12", ErrAlgorithm, metaName, m.Algorithm)
	}
	for _, f := range m.Features.ReadOnlyCompatible {
		if f != featureV1 {
			return m, alg, fmt.Sprintf("it has the unknown feature %q", f), nil
		}
	}
	if !m.v1() {
		return m, alg, "its images are not of EROFS format V1", nil
	}
	return m, alg, "", nil
}

// readMeta fills in what meta.json says.
func (s *Store) readMeta() error {
	f, err := os.Open(s.path(metaName))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(s.path(objectsDir)); err == nil {
			return fmt.Errorf("%w: there are objects but no %s", ErrNotStore, metaName)
		}
		return fmt.Errorf("%w: there is no %s", ErrNotStore, metaName)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("%w: it is no directory", ErrNotStore)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxMetaSize))
	if err != nil {
		return err
	}
	if s.meta, s.alg, s.readOnly, err = parseMeta(data); err != nil {
		return err
	}
	switch _, err := fsverity.Measure(f); {
	case err == nil:
		s.verity = true
	case errors.Is(err, fsverity.ErrNotEnabled), errors.Is(err, fsverity.ErrUnsupported):
	default:
		return err
	}
	return nil
}

func isMetaTemp(name string) bool { return strings.HasPrefix(name, metaTemp) }

// writeMeta makes meta.json, complete and durable or not at all; one that is there
// already stays. Where the filesystem has fs-verity, meta.json gets it, which is
// composefs-rs' sign that all objects must have it.
func writeMeta(dir string, m meta) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, metaTemp+"*")
	if err != nil {
		return err
	}
	temp := f.Name()
	defer os.Remove(temp)
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err != nil {
		return err
	}
	alg, err := fsverity.ParseAlgorithm(m.Algorithm)
	if err != nil {
		return err
	}
	if f, err = os.Open(temp); err != nil {
		return err
	}
	defer f.Close()
	if err := enableVerity(f, alg); err != nil && !errors.Is(err, fsverity.ErrUnsupported) {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := unix.Link(temp, filepath.Join(dir, metaName)); err != nil && err != unix.EEXIST {
		return fmt.Errorf("linking %s: %w", metaName, err)
	}
	return errors.Join(syncDir(dir), syncDir(filepath.Dir(dir)))
}
