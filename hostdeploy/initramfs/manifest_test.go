package initramfs

import (
	"errors"
	"reflect"
	"strings"
	"testing"
)

func TestParseManifest(t *testing.T) {
	for text, want := range map[string][]Layer{
		`["base.squashfs","/other/app.squashfs"]`:                            {{"/os/base.squashfs", ""}, {"/other/app.squashfs", ""}},
		` {"layers":[{"file":"a","digest":"sha256:` + hexA + `"}]}`:          {{"/os/a", hexA}},
		`{"version":3,"layers":[{"path":"a","digest":"` + hexB + `"}, "b"]}`: {{"/os/a", hexB}, {"/os/b", ""}},
		`["../../../etc/shadow"]`:                                            {{"/etc/shadow", ""}},
		`{"layers":[{"file":"a","size":7}]}`:                                 {{"/os/a", ""}},
	} {
		got, err := ParseManifest([]byte(text), "/os")
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %v, %v, want %v", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		``:                                   "unexpected end",
		`[]`:                                 "got 0 layers",
		`{}`:                                 `want a list, or an object with the list "layers"`,
		`{"layers":[]}`:                      "got 0 layers",
		`{"layers":"a"}`:                     "cannot unmarshal",
		`[1]`:                                "layer 1",
		`[""]`:                               `got the path ""`,
		`["a/"]`:                             "want that of a squashfs file",
		"[\"a\\u0000b\"]":                    "want that of a squashfs file",
		`[{"file":"a","path":"b"}]`:          `got both "file"`,
		`["a",{"file":"b","digest":"md5:"}]`: "layer 2: got the digest",
		`[{"file":"b","digest":"sha256:` + strings.ToUpper(hexA) + `"}]`: "want sha256: and 64",
		`["a"] ["b"]`: "after top-level value",
		"[" + strings.Repeat(`"a",`, 128) + `"a"]`: "got 129 layers, want 1 to 128",
	} {
		_, err := ParseManifest([]byte(text), "/os")
		if !errors.Is(err, ErrManifest) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: got %v, want ErrManifest with %q", text, err, want)
		}
	}
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`["base.squashfs","/x/app.squashfs"]`), "/os")
	f.Add([]byte(`{"layers":[{"file":"a","digest":"sha256:`+hexA+`"},{"path":"../b"}]}`), "")
	f.Fuzz(func(t *testing.T, data []byte, dir string) {
		if strings.ContainsRune(dir, 0) {
			return // not the directory of any file
		}
		layers, err := ParseManifest(data, dir)
		if err != nil {
			if !errors.Is(err, ErrManifest) {
				t.Errorf("got %v, want ErrManifest", err)
			}
			return
		}
		if len(layers) == 0 || len(layers) > maxLayers {
			t.Errorf("got %d layers", len(layers))
		}
		for _, l := range layers {
			if l.Path == "" || l.Path[0] != '/' || strings.Contains(l.Path+"/", "/../") || strings.ContainsRune(l.Path, 0) {
				t.Errorf("path %q", l.Path)
			}
			if l.SHA256 != "" && (len(l.SHA256) != 64 || strings.Trim(l.SHA256, "0123456789abcdef") != "") {
				t.Errorf("digest %q", l.SHA256)
			}
		}
	})
}
