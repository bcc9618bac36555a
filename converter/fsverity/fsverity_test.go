package fsverity

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestVectors holds digests published elsewhere: tests/test-units.sh of composefs
// and the output of the fsverity program.
func TestVectors(t *testing.T) {
	for _, c := range []struct {
		alg        Algorithm
		data, want string
	}{
		{SHA256, "hello world\n", "37061ef2ac4c21bec68489b56138c5780306a4ad7fe6676236ecdf2c9027cd92"},
		{SHA256, "foo bar baz\n", "91e7d88cb7bc9cf6d8db3b0ecf89af4abf204bef5b3ade5113d5b62ef374e70b"},
		{SHA256, "", "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95"},
		{SHA512, "", "ccf9e5aea1c2a64efa2f2354a6024b90dffde6bbc017825045dce374474e13d10adb9dadcc6ca8e17a3c075fbd31336e8f266ae6fa93a6c3bed66f9e784e5abf"},
	} {
		if got := Sum(c.alg, []byte(c.data)).String(); got != c.want {
			t.Errorf("%s of %q: got %s, want %s", c.alg, c.data, got, c.want)
		}
	}
	if got := Sum(SHA512, []byte("hello world\n")).String(); !strings.HasPrefix(got, "4098b052") {
		t.Errorf("sha512 of hello world: got %s, want 4098b052…", got)
	}
}

// reference computes the digest as the kernel's documentation words it, level by
// level over the whole file.
func reference(data []byte) string {
	level := data
	var root [64]byte
	for len(data) > 0 {
		var next []byte
		for off := 0; off < len(level); off += BlockSize {
			var block [BlockSize]byte
			copy(block[:], level[off:])
			sum := sha256.Sum256(block[:])
			next = append(next, sum[:]...)
		}
		if level = next; len(level) == sha256.Size {
			copy(root[:], level)
			break
		}
	}
	desc := make([]byte, 256)
	desc[0], desc[1], desc[2] = 1, 1, 12
	binary.LittleEndian.PutUint64(desc[8:], uint64(len(data)))
	copy(desc[16:], root[:])
	sum := sha256.Sum256(desc)
	d, _ := New(SHA256, sum[:])
	return d.String()
}

func TestHasherAgainstReference(t *testing.T) {
	rnd := rand.New(rand.NewSource(1))
	h := NewHasher(SHA256)
	for _, size := range []int{1, 64, 4095, 4096, 4097, 8192, 128 * 4096, 128*4096 + 1, 128*128*4096 - 1, 128 * 128 * 4096, 128*128*4096 + 1} {
		data := make([]byte, size)
		rnd.Read(data)
		want := reference(data)
		for _, step := range []int{size, 1000, 4096, 65536 + 17} {
			h.Reset()
			for rest := data; len(rest) > 0; {
				n := min(step, len(rest))
				h.Write(rest[:n])
				rest = rest[n:]
			}
			if got := h.Sum().String(); got != want {
				t.Errorf("%d bytes in steps of %d: got %s, want %s", size, step, got, want)
			}
		}
	}
}

// TestAgainstProgram asks the fsverity program of Debian's package of that name.
func TestAgainstProgram(t *testing.T) {
	prog, err := exec.LookPath("fsverity")
	if err != nil {
		t.Skip("no fsverity program here (Debian package fsverity)")
	}
	data := make([]byte, 1<<20+5)
	rand.New(rand.NewSource(2)).Read(data)
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, alg := range []Algorithm{SHA256, SHA512} {
		out, err := exec.Command(prog, "digest", "--compact", "--hash-alg="+alg.String(), name).Output()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := Sum(alg, data).String(), strings.TrimSpace(string(out)); got != want {
			t.Errorf("%s: got %s, want %s", alg, got, want)
		}
	}
}

func TestDigestText(t *testing.T) {
	for _, alg := range []Algorithm{SHA256, SHA512} {
		d := Sum(alg, []byte("x"))
		if p, err := Parse(d.String()); err != nil || p != d {
			t.Errorf("Parse(%s) = %v, %v", d, p, err)
		}
		if p, err := ParsePath(d.Path()); err != nil || p != d {
			t.Errorf("ParsePath(%s) = %v, %v", d.Path(), p, err)
		}
		js, err := json.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		var back Digest
		if err := json.Unmarshal(js, &back); err != nil || back != d {
			t.Errorf("JSON %s: got %v, %v", js, back, err)
		}
		if a, err := ParseAlgorithm(alg.Name()); err != nil || a != alg {
			t.Errorf("ParseAlgorithm(%s) = %v, %v", alg.Name(), a, err)
		}
		if !bytes.Equal(d.AppendTo(nil), d.Bytes()) {
			t.Error("AppendTo and Bytes differ")
		}
	}
	for _, bad := range []string{"", "00", strings.Repeat("G", 64), strings.Repeat("A", 64), strings.Repeat("0", 63)} {
		if _, err := Parse(bad); !errors.Is(err, ErrBadDigest) {
			t.Errorf("Parse(%q): got %v, want ErrBadDigest", bad, err)
		}
	}
	for _, bad := range []string{"", "ab", "ab/", strings.Repeat("0", 65)} {
		if _, err := ParsePath(bad); !errors.Is(err, ErrBadDigest) {
			t.Errorf("ParsePath(%q): got %v, want ErrBadDigest", bad, err)
		}
	}
}

// TestKernel runs where the temporary directory's filesystem has fs-verity; where
// it has not, both calls must say so with ErrUnsupported.
func TestKernel(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(name, []byte("hello world\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = Enable(f, SHA256)
	if errors.Is(err, ErrUnsupported) {
		if _, err := Measure(f); !errors.Is(err, ErrUnsupported) && !errors.Is(err, ErrNotEnabled) {
			t.Errorf("Measure: got %v, want ErrUnsupported or ErrNotEnabled", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if d, err := Measure(f); err != nil || d != Sum(SHA256, []byte("hello world\n")) {
		t.Errorf("Measure = %v, %v", d, err)
	}
}

func BenchmarkHasher(b *testing.B) {
	data := make([]byte, 1<<20)
	h := NewHasher(SHA256)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		h.Reset()
		h.Write(data)
		h.Sum()
	}
}
