package erofs_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/dump"
	"github.com/particle-os/particle/converter/erofs"
)

// oracle returns the directory of a Debian system that has composefs' own programs,
// or skips the test.
func oracle(tb testing.TB) string {
	tb.Helper()
	dir := os.Getenv("PARTICLE_ORACLE")
	if dir == "" {
		tb.Skip("PARTICLE_ORACLE names no directory with a Debian sid that has the packages composefs and erofs-utils")
	}
	if os.Geteuid() != 0 {
		tb.Skip("chroot needs root")
	}
	return dir
}

// cImage returns the image that the C mkcomposefs makes from a dump.
func cImage(tb testing.TB, dir, text string, args ...string) []byte {
	tb.Helper()
	args = append([]string{dir, "mkcomposefs", "--from-file"}, args...)
	cmd := exec.Command("chroot", append(args, "-", "-")...)
	cmd.Stdin = strings.NewReader(text)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	image, err := cmd.Output()
	if err != nil {
		tb.Fatalf("mkcomposefs: %v: %s", err, &stderr)
	}
	return image
}

// TestOracle writes trees that reach the corners of the format and compares each byte
// with libcomposefs.
func TestOracle(t *testing.T) {
	dir := oracle(t)
	trees := 150
	if testing.Short() {
		trees = 20
	}
	for seed := range uint64(trees) {
		tr := randomTree(seed)
		text := printDump(t, tr)
		for _, c := range []struct {
			format erofs.Format
			args   []string
		}{
			{erofs.Auto, nil},
			{erofs.V0, []string{"--min-version=0", "--max-version=0"}},
			{erofs.V1, []string{"--min-version=1", "--max-version=1"}},
		} {
			want := cImage(t, dir, text, c.args...)
			if got := write(t, tr, c.format); !bytes.Equal(got, want) {
				t.Fatalf("seed %d, %s: got %d bytes, want %d, first difference at %#x", seed, c.format, len(got), len(want), firstDiff(got, want))
			}
			parsed := parse(t, []byte(text), dump.Options{Strict: true})
			if !bytes.Equal(write(t, parsed, c.format), want) {
				t.Fatalf("seed %d, %s: the image of the dump differs", seed, c.format)
			}
		}
	}
}

func firstDiff(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// fsck runs fsck.erofs, the oracle's if there is one.
func fsck(tb testing.TB, image []byte) {
	tb.Helper()
	tmp, prefix := tb.TempDir(), []string(nil)
	if dir := os.Getenv("PARTICLE_ORACLE"); dir != "" && os.Geteuid() == 0 {
		t, err := os.MkdirTemp(filepath.Join(dir, "tmp"), "fsck")
		if err != nil {
			tb.Fatal(err)
		}
		defer os.RemoveAll(t)
		tmp, prefix = t, []string{"chroot", dir}
	} else if _, err := exec.LookPath("fsck.erofs"); err != nil {
		tb.Skip("no fsck.erofs here (Debian package erofs-utils)")
	}
	name := filepath.Join(tmp, "image")
	if err := os.WriteFile(name, image, 0o600); err != nil {
		tb.Fatal(err)
	}
	if prefix != nil {
		name = strings.TrimPrefix(name, filepath.Clean(prefix[1]))
	}
	args := slices.Concat(prefix, []string{"fsck.erofs", name})
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		tb.Errorf("fsck.erofs: %v\n%s", err, out)
	}
}

// TestFsck lets erofs-utils check what Write writes.
func TestFsck(t *testing.T) {
	for _, v := range vectors(t) {
		t.Run(v.name, func(t *testing.T) {
			fsck(t, write(t, parse(t, v.text, dump.Options{}), v.format))
		})
	}
	t.Run("random", func(t *testing.T) {
		for seed := range uint64(20) {
			fsck(t, write(t, randomTree(seed), erofs.V1))
		}
	})
}
