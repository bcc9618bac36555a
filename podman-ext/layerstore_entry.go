package podmanext

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
)

// The files in a layer's directory. The first four are podman's.
const (
	diffName = "diff" // -> the mount of the layer
	infoName = "info" // a LayerInfo in JSON
	blobName = "blob" // the uncompressed layer, or a socket where the tree has no blobs
	useName  = "use"  // -> nowhere, so that creat(2) answers ENOENT
	usesName = "uses" // ours: how many users podman has told of, in decimal
)

// tempPrefix begins the names of what is not finished.
const tempPrefix = ".new-"

// LayerInfo is what podman takes over into its own record of the layer: the keys are those
// of Layer in c/storage layers.go.
type LayerInfo struct {
	CompressedDigest string `json:"compressed-diff-digest,omitempty"`
	CompressedSize   int64  `json:"compressed-size,omitempty"`
	DiffID           string `json:"diff-digest"`
	Size             int64  `json:"diff-size"` // uncompressed bytes
	TOCDigest        string `json:"toc-digest,omitempty"`
	// Compression of the file "blob", by c/storage's numbers: 0 is none.
	Compression int      `json:"compression"`
	UIDs        []uint32 `json:"uidset,omitempty"`
	GIDs        []uint32 `json:"gidset,omitempty"`
	// Chain is ours: the layers that the mount was made for, "" where it depends on
	// this layer alone.
	Chain string `json:"particle-chain,omitempty"`
}

// An entry is a layer of the tree. All but uses and verification stays as it is made.
type entry struct {
	key   Key
	info  LayerInfo
	image fsverity.Digest

	uses         int
	verification mount.Verification
}

// layer returns what is known of an entry. LayerStore.mu is held.
func (e *entry) layer() Layer {
	return Layer{
		Key: e.key, DiffID: e.info.DiffID, Size: e.info.Size, Uses: e.uses,
		Image: e.image, Verification: e.verification,
	}
}

// parseLayerInfo reads what encodeLayerInfo wrote.
func parseLayerInfo(raw []byte) (LayerInfo, error) {
	var info LayerInfo
	if err := json.Unmarshal(raw, &info); err != nil {
		return info, err
	}
	if err := checkDigest(info.DiffID); err != nil {
		return info, err
	}
	if info.Size < 0 || info.CompressedSize < 0 {
		return info, fmt.Errorf("the layer has size %d, compressed %d", info.Size, info.CompressedSize)
	}
	return info, nil
}

func encodeLayerInfo(info LayerInfo) []byte {
	raw, err := json.Marshal(info)
	if err != nil {
		panic(err) // numbers and strings
	}
	return append(raw, '\n')
}

// readEntries reads the tree. What a crash left half made is removed; what is not a
// layer is told and left alone.
func (s *LayerStore) readEntries() error {
	refs, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return fmt.Errorf("reading the layer store: %w", err)
	}
	for _, r := range refs {
		if strings.HasPrefix(r.Name(), tempPrefix) {
			if err := s.root.RemoveAll(r.Name()); err != nil {
				return err
			}
			continue
		}
		ref, err := decodeRef(r.Name())
		if err != nil {
			s.log.Warn("not an image in the layer store", "error", err)
			continue
		}
		layers, err := fs.ReadDir(s.root.FS(), r.Name())
		if err != nil {
			s.log.Warn("reading an image of the layer store", "image", ref, "error", err)
			s.unread[Key{Ref: ref}] = true
			continue
		}
		for _, l := range layers {
			key := Key{ref, l.Name()}
			if err := checkDigest(key.Digest); err != nil {
				s.log.Warn("not a layer in the layer store", "image", ref, "error", err)
				continue
			}
			e, err := s.readEntry(key)
			if err != nil {
				s.log.Warn("reading a layer of the layer store", "image", ref, "layer", l.Name(), "error", err)
				s.unread[key] = true
				continue
			}
			s.entries[key] = e
		}
	}
	return nil
}

func (s *LayerStore) readEntry(key Key) (*entry, error) {
	raw, err := s.root.ReadFile(path.Join(key.path(), infoName))
	if err != nil {
		return nil, err
	}
	e := &entry{key: key, verification: mount.None}
	if e.info, err = parseLayerInfo(raw); err != nil {
		return nil, fmt.Errorf("reading %s: %w", infoName, err)
	}
	target, err := s.root.Readlink(path.Join(key.path(), diffName))
	if err != nil {
		return nil, err
	}
	if e.image, err = fsverity.Parse(filepath.Base(target)); err != nil {
		return nil, fmt.Errorf("reading %s: %w", diffName, err)
	}
	raw, err = s.root.ReadFile(path.Join(key.path(), usesName))
	if err == nil {
		e.uses, err = strconv.Atoi(strings.TrimSpace(string(raw)))
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("reading %s: %w", usesName, err)
	}
	return e, nil
}

// writeEntry makes a layer's directory, whole or not at all. podman may see it at
// once: its layer is mounted.
func (s *LayerStore) writeEntry(e *entry) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing layer %s into the layer store: %w", e.key.Digest, err)
		}
	}()
	temp := tempPrefix + encodeRef(e.key.Ref)[:8] + e.key.Digest[len("sha256:"):]
	if err := s.root.RemoveAll(temp); err != nil {
		return err
	}
	if err := s.root.Mkdir(temp, 0o755); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.root.RemoveAll(temp)
		}
	}()
	if err := s.root.Symlink(s.target(e.image), path.Join(temp, diffName)); err != nil {
		return err
	}
	// The kernel follows the link, finds no directory and answers ENOENT, which is what
	// podman takes for "counted".
	if err := s.root.Symlink("/nonexistent/use", path.Join(temp, useName)); err != nil {
		return err
	}
	dir, err := s.root.Open(temp)
	if err != nil {
		return err
	}
	defer dir.Close()
	// Opening a socket fails with ENXIO: nobody takes an empty file for a layer.
	if err := unix.Mknodat(int(dir.Fd()), blobName, unix.S_IFSOCK|0o600, 0); err != nil {
		return fmt.Errorf("making %s: %w", blobName, err)
	}
	if err := s.writeFile(path.Join(temp, infoName), encodeLayerInfo(e.info)); err != nil {
		return err
	}
	if err := s.writeFile(path.Join(temp, usesName), []byte(strconv.Itoa(e.uses)+"\n")); err != nil {
		return err
	}
	if err := dir.Sync(); err != nil {
		return err
	}
	parent := encodeRef(e.key.Ref)
	if err := s.root.MkdirAll(parent, 0o755); err != nil {
		return err
	}
	if err := s.moveOver(temp, e.key.path()); err != nil {
		return err
	}
	err = errors.Join(s.syncDir(parent), s.syncDir("."))
	return errors.Join(err, s.root.RemoveAll(temp)) // the old one, if there was one
}

// moveOver renames a directory. One that has the name already gets the other's: neither
// is missing in between.
func (s *LayerStore) moveOver(from, to string) error {
	if _, err := s.root.Lstat(to); errors.Is(err, os.ErrNotExist) {
		return s.root.Rename(from, to)
	}
	root, err := s.root.Open(".")
	if err != nil {
		return err
	}
	defer root.Close()
	fd := int(root.Fd())
	err = unix.Renameat2(fd, from, fd, to, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // not on this file system
		if err := s.root.RemoveAll(to); err != nil {
			return err
		}
		return s.root.Rename(from, to)
	}
	return err
}

// keepBlob writes the bytes of a layer into its directory.
func (s *LayerStore) keepBlob(key Key) (err error) {
	r, err := s.Blob(key)
	if err != nil {
		return err
	}
	defer r.Close()
	name := path.Join(key.path(), blobName)
	f, err := s.root.OpenFile(name+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("writing the bytes of layer %s: %w", key.Digest, err)
	}
	if err := s.root.Rename(name+".new", name); err != nil {
		return err
	}
	return s.syncDir(key.path())
}

// writeUses writes the number of a layer's users.
func (s *LayerStore) writeUses(key Key, uses int) error {
	name := path.Join(key.path(), usesName)
	if err := s.writeFile(name+".new", []byte(strconv.Itoa(uses)+"\n")); err != nil {
		return err
	}
	if err := s.root.Rename(name+".new", name); err != nil {
		return err
	}
	return s.syncDir(key.path())
}

// removeEntry removes a layer's directory, and its image's with the last one.
func (s *LayerStore) removeEntry(key Key) error {
	temp := tempPrefix + "gone-" + key.Digest[len("sha256:"):]
	if err := s.root.RemoveAll(temp); err != nil {
		return err
	}
	if err := s.root.Rename(key.path(), temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := s.root.RemoveAll(temp); err != nil {
		return err
	}
	if err := s.root.Remove(encodeRef(key.Ref)); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (s *LayerStore) writeFile(name string, data []byte) error {
	f, err := s.root.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Sync(), f.Close())
}

func (s *LayerStore) syncDir(name string) error {
	d, err := s.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
