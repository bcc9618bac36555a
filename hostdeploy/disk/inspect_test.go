package disk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestInspect needs no root.
func TestInspect(t *testing.T) {
	need(t, "wipefs", "partx", "blkid", "sgdisk", "mkfs.ext4")
	path := blank(t, 128<<20)
	c, err := Inspect(t.Context(), path)
	if err != nil || !c.Empty() || c.String() != "nothing" {
		t.Errorf("got %+v, %v, want nothing", *c, err)
	}
	name := `it's a "näme" \ $x`
	tool(t, "sgdisk", "-n", "3:2048:+50M", "-c", "3:"+name, "-A", "3:set:2", "-t", "3:8304", path)
	tool(t, "mkfs.ext4", "-q", "-F", "-L", `a "\b $ä`, "-E", "offset=1048576", path, "50M")
	if c, err = Inspect(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	p := c.Partitions[0]
	if len(c.Partitions) != 1 || p.Number != 3 || p.Name != name || p.Start != 1<<20 || p.Size != 50<<20 || !p.Active || p.Role != RoleRoot || p.FS != Ext4 || p.Label != `a "\b $ä` {
		t.Errorf("got %+v", p)
	}
	if want := `found gpt, PMBR with partitions 3: 50 MiB ext4 "a \"\\b $ä" "it's a \"näme\" \\ $x"`; c.String() != want {
		t.Errorf("got  %s\nwant %s", c, want)
	}
	b, err := json.Marshal(c)
	if err != nil || !bytes.Contains(b, []byte(`"role":"root"`)) {
		t.Errorf("got %s, %v", b, err)
	}
	for _, path := range []string{"/dev/null", t.TempDir()} {
		if _, err := Inspect(t.Context(), path); !errors.Is(err, ErrOptions) {
			t.Errorf("%s: got %v, want %v", path, err, ErrOptions)
		}
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(t.Context(), fifo); !errors.Is(err, ErrOptions) {
		t.Errorf("a FIFO: got %v, want %v", err, ErrOptions)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Inspect(ctx, blank(t, 1<<20)); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func TestParse(t *testing.T) {
	for line, want := range map[string]map[string]string{
		"":                          {},
		`A="b"`:                     {"A": "b"},
		`NR="1" NAME="a \x22b\x24"`: {"NR": "1", "NAME": `a "b$`},
		`NAME="u\xc3\xa4\x5c" X=""`: {"NAME": `uä\`, "X": ""},
		`A`:                         nil,
		`A=b`:                       nil,
		`="b"`:                      nil,
		`A="b`:                      nil,
		`A="\x2"`:                   nil,
		`A="\xzz"`:                  nil,
		`A="\n12"`:                  nil,
	} {
		got, err := parsePairs(line)
		if (err == nil) != (want != nil) || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("%s: got %q, %v, want %q", line, got, err, want)
		}
	}
	const good = `NR="1" START="2048" SECTORS="100" NAME="" UUID="u" TYPE="t" FLAGS="0x4" SCHEME="gpt"`
	p, scheme, err := parsePartition(good)
	if want := (Partition{Number: 1, Start: 1 << 20, Size: 51200, UUID: "u", Type: "t", Active: true}); err != nil || scheme != "gpt" || p != want {
		t.Errorf("got %+v, %q, %v", p, scheme, err)
	}
	for _, bad := range []string{"", strings.Replace(good, "2048", "-1", 1), strings.Replace(good, "2048", "36028797018963968", 1), strings.Replace(good, "0x4", "x", 1)} {
		if _, _, err := parsePartition(bad); err == nil {
			t.Errorf("%s: no error", bad)
		}
	}
	if _, err := parseWipefs([]byte(`{"signatures":[{"offset":"x"}]}`)); err == nil {
		t.Error("a bad offset: no error")
	}
	if s, err := parseWipefs([]byte(`{"signatures":[{"offset":"0x1fe","type":"dos","uuid":null,"label":null}]}`)); err != nil || len(s) != 1 || s[0] != (Signature{Offset: 510, Type: "dos"}) {
		t.Errorf("got %+v, %v", s, err)
	}
	if s, err := parseWipefs(nil); err != nil || s != nil {
		t.Errorf("got %+v, %v", s, err)
	}
}

func FuzzParsePartition(f *testing.F) {
	f.Add(`NR="1" START="2048" SECTORS="204800" NAME="a \x22b\x24" UUID="c84988c5-b11b-4c7d-975c-4a0650d5d644" TYPE="c12a7328-f81f-11d2-ba4b-00a0c93ec93b" FLAGS="0x0" SCHEME="gpt"`)
	f.Add(`NR="2" START="206848" SECTORS="102400" NAME="" UUID="d7390dda-02" TYPE="0x5" FLAGS="0x80" SCHEME="dos"`)
	f.Add(`NR="1" START="0" SECTORS="18446744073709551615" NAME="\xff\x00" FLAGS="" SCHEME=""`)
	f.Fuzz(func(t *testing.T, line string) {
		p, _, err := parsePartition(line)
		if err == nil && (p.Start < 0 || p.Size < 0) {
			t.Errorf("got %+v", p)
		}
		pairs, err := parsePairs(line)
		if err != nil {
			return
		}
		// Printed again, the pairs are the same.
		var b strings.Builder
		for k, v := range pairs {
			fmt.Fprintf(&b, "%s=\"", k)
			for i := range len(v) {
				fmt.Fprintf(&b, `\x%02x`, v[i])
			}
			b.WriteString("\" ")
		}
		again, err := parsePairs(b.String())
		if err != nil || fmt.Sprint(again) != fmt.Sprint(pairs) {
			t.Errorf("got %q, %v, want %q", again, err, pairs)
		}
	})
}

func FuzzParseWipefs(f *testing.F) {
	f.Add([]byte(`{"signatures":[{"device":"g.img","offset":"0x200","type":"gpt","uuid":null,"label":null}]}`))
	f.Fuzz(func(t *testing.T, out []byte) {
		signatures, err := parseWipefs(out)
		if err == nil && len(bytes.TrimSpace(out)) > 0 && !json.Valid(out) {
			t.Errorf("got %+v from %q", signatures, out)
		}
	})
}
