package erofs

import "testing"

// TestXXH32 has vectors that implementations of the algorithm publish.
func TestXXH32(t *testing.T) {
	for _, c := range []struct {
		text string
		seed uint32
		want uint32
	}{
		{"", 0, 0x02cc5d05},
		{"abc", 0, 0x32d153ff},
		{"Nobody inspects the spammish repetition", 0, 0xe2293b2f},
	} {
		if got := xxh32(c.text, c.seed); got != c.want {
			t.Errorf("%q: got %#x, want %#x", c.text, got, c.want)
		}
	}
}
