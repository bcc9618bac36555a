package etcmerge

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/tree"
)

// long makes contents that are objects, not inline.
func long(s string) string { return strings.Repeat(s+"\n", 100) }

func TestMerge(t *testing.T) {
	for _, tt := range []struct {
		name      string
		o, n, l   spec
		want      spec
		conflicts []string
	}{
		{"unchanged locally", spec{"/a": long("1"), "/b": "x"}, spec{"/a": long("2"), "/b": "x"}, spec{"/a": long("1"), "/b": "x"},
			spec{"/a": long("2"), "/b": "x"}, nil},
		{"changed locally only", spec{"/a": long("1")}, spec{"/a": long("1")}, spec{"/a": long("2")},
			spec{"/a": long("2")}, nil},
		{"removed locally", spec{"/a": "1", "/d/b": "1"}, spec{"/a": "1", "/d/b": "1"}, spec{}, spec{}, nil},
		{"directory removed locally, added to and changed by the image", spec{"/d/b": "1", "/d/e/c": "1", "/d/g/h": "1"}, spec{"/d/b": "2", "/d/e/c": "1", "/d/e/f": "2", "/d/g/h": "1"}, spec{},
			spec{"/d/e/f": "2"}, []string{"/etc/d/b: removed here, changed by the image"}},
		{"removed locally, changed by the image", spec{"/a": "1"}, spec{"/a": "2"}, spec{}, spec{}, []string{"/etc/a: removed here, changed by the image"}},
		{"added", spec{}, spec{"/n": "1", "/nd/x": "1"}, spec{"/l": "2", "/ld/x": "2"},
			spec{"/n": "1", "/nd/x": "1", "/l": "2", "/ld/x": "2"}, nil},
		{"removed by the image", spec{"/a": "1", "/d/b": "1"}, spec{}, spec{"/a": "1", "/d/b": "1"}, spec{}, nil},
		{"removed by the image, changed here", spec{"/a": "1", "/d/b": "1", "/d/c": "1"}, spec{}, spec{"/a": "2", "/d/b": "2", "/d/c": "1"},
			spec{"/a": "2", "/d/b": "2"}, []string{"/etc/a: removed by the image, changed here", "/etc/d/b: removed by the image, changed here"}},
		{"directory removed by the image, added to here", spec{"/d/b": "1"}, spec{}, spec{"/d/b": "1", "/d/mine": "2"}, spec{"/d/mine": "2"}, nil},
		{"both the same", spec{"/a": "1"}, spec{"/a": "2", "/new": "x"}, spec{"/a": "2", "/new": "x"}, spec{"/a": "2", "/new": "x"}, nil},
		{"both differently", spec{"/a": "1"}, spec{"/a": "2"}, spec{"/a": "3"}, spec{"/a": "3", "/a.dpkg-dist": "2"},
			[]string{"/etc/a: changed here and by the image; the image's is /etc/a.dpkg-dist"}},
		{"both added", spec{}, spec{"/a": "2"}, spec{"/a": "3"}, spec{"/a": "3", "/a.dpkg-dist": "2"},
			[]string{"/etc/a: changed here and by the image; the image's is /etc/a.dpkg-dist"}},
		{"links", spec{"/a": "-> 1"}, spec{"/a": "-> 2"}, spec{"/a": "-> 3"}, spec{"/a": "-> 3", "/a.dpkg-dist": "-> 2"},
			[]string{"/etc/a: changed here and by the image; the image's is /etc/a.dpkg-dist"}},
		{"the kept name is taken", spec{"/a": "1"}, spec{"/a": "2", "/a.1.dpkg-dist": "image"}, spec{"/a": "3", "/a.dpkg-dist": "mine"},
			spec{"/a": "3", "/a.dpkg-dist": "mine", "/a.1.dpkg-dist": "image", "/a.2.dpkg-dist": "2"},
			[]string{"/etc/a: changed here and by the image; the image's is /etc/a.2.dpkg-dist"}},
		{"kept by an earlier merge", spec{"/a": "1"}, spec{"/a": "2"}, spec{"/a": "3", "/a.dpkg-dist": "1"}, spec{"/a": "3", "/a.dpkg-dist": "2"},
			[]string{"/etc/a: changed here and by the image; the image's is /etc/a.dpkg-dist"}},
		{"kept already", spec{"/a": "1"}, spec{"/a": "2"}, spec{"/a": "3", "/a.dpkg-dist": "2"}, spec{"/a": "3", "/a.dpkg-dist": "2"},
			[]string{"/etc/a: changed here and by the image; the image's is /etc/a.dpkg-dist"}},
		{"image shipped the kept name, removed here", spec{"/a": "1", "/a.dpkg-dist": "0"}, spec{"/a": "2", "/a.dpkg-dist": "0"}, spec{"/a": "3"},
			spec{"/a": "3", "/a.dpkg-dist": "2"},
			[]string{"/etc/a: changed here and by the image; the image's is /etc/a.dpkg-dist"}},

		{"mode here, content there", spec{"/a": "1"}, spec{"/a": "2"}, spec{"/a": "mode=600 1"}, spec{"/a": "mode=600 2"}, nil},
		{"content here, mode there", spec{"/a": "1"}, spec{"/a": "mode=600 1"}, spec{"/a": "2"}, spec{"/a": "mode=600 2"}, nil},
		{"modes", spec{"/a": "1"}, spec{"/a": "mode=640 1"}, spec{"/a": "mode=600 1"}, spec{"/a": "mode=600 1"},
			[]string{"/etc/a: permissions changed here and by the image (mode here 0600, of the image 0640)"}},
		{"modes of a directory", spec{"/d": "dir"}, spec{"/d": "dir=750"}, spec{"/d": "dir=700", "/d/x": "1"}, spec{"/d": "dir=700", "/d/x": "1"},
			[]string{"/etc/d: permissions changed here and by the image (mode here 0700, of the image 0750)"}},
		{"mode of a directory that the image removed", spec{"/d": "dir"}, spec{}, spec{"/d": "dir=700"}, spec{"/d": "dir=700"},
			[]string{"/etc/d: removed by the image, changed here"}},

		{"file to directory", spec{"/a": "1"}, spec{"/a/b": "2"}, spec{"/a": "1"}, spec{"/a/b": "2"}, nil},
		{"file to directory, changed here", spec{"/a": "1"}, spec{"/a/b": "2"}, spec{"/a": "3"}, spec{"/a": "3", "/a.dpkg-dist/b": "2"},
			[]string{"/etc/a: changed here and by the image (here a file, in the image a directory); the image's is /etc/a.dpkg-dist"}},
		{"directory to link", spec{"/a/b": "1"}, spec{"/a": "-> b"}, spec{"/a/b": "1"}, spec{"/a": "-> b"}, nil},
		{"directory to link, files below", spec{"/a/b": "1"}, spec{"/a": "-> b"}, spec{"/a/b": "1", "/a/mine": "2"},
			spec{"/a/b": "1", "/a/mine": "2", "/a.dpkg-dist": "-> b"},
			[]string{"/etc/a: changed here and by the image (here a directory, in the image a symbolic link); the image's is /etc/a.dpkg-dist"}},
		{"directory to file here", spec{"/a/b": "1"}, spec{"/a/b": "1"}, spec{"/a": "mine"}, spec{"/a": "mine"}, nil},
		{"directory to file here, changed there", spec{"/a/b": "1"}, spec{"/a/b": "2"}, spec{"/a": "mine"}, spec{"/a": "mine", "/a.dpkg-dist/b": "2"},
			[]string{"/etc/a: changed here and by the image (here a file, in the image a directory); the image's is /etc/a.dpkg-dist"}},
		{"file to directory here, removed there", spec{"/a": "1"}, spec{}, spec{"/a/b": "1"}, spec{"/a/b": "1"},
			[]string{"/etc/a: removed by the image, changed here"}},
		{"file to directory on both sides", spec{"/a": "1"}, spec{"/a/n": "1"}, spec{"/a/l": "1"}, spec{"/a/n": "1", "/a/l": "1"}, nil},
		{"directory to file on both sides", spec{"/a/b": "1"}, spec{"/a": "1"}, spec{"/a": "2"}, spec{"/a": "2", "/a.dpkg-dist": "1"},
			[]string{"/etc/a: changed here and by the image; the image's is /etc/a.dpkg-dist"}},
		{"FIFO", spec{"/a": "fifo"}, spec{"/a": "1"}, spec{"/a": "fifo", "/b": "fifo"}, spec{"/a": "1", "/b": "fifo"}, nil},

		{"the stamp", spec{}, spec{"/.updated": "1", "/d/.updated": "1"}, spec{"/.updated": "2"}, spec{"/d/.updated": "1"}, nil},
		{"the cache of libraries", spec{"/ld.so.cache": "1"}, spec{"/ld.so.cache": "2"}, spec{"/ld.so.cache": "3"}, spec{"/ld.so.cache": "2"},
			[]string{"/etc/ld.so.cache: the image's list of libraries replaces the one made here; run ldconfig where /etc/ld.so.conf.d has local files"}},
		{"the cache of libraries, made here", spec{"/ld.so.cache": "1"}, spec{"/ld.so.cache": "1"}, spec{"/ld.so.cache": "3"}, spec{"/ld.so.cache": "3"}, nil},
		{"no old image", nil, spec{"/a": "1", "/b": "1"}, spec{"/a": "1", "/b": "2"}, spec{"/a": "1", "/b": "2", "/b.dpkg-dist": "1"},
			[]string{"/etc/b: changed here and by the image; the image's is /etc/b.dpkg-dist"}},
		{"a long name", spec{"/" + strings.Repeat("n", 255): "1"}, spec{"/" + strings.Repeat("n", 255): "2"}, spec{"/" + strings.Repeat("n", 255): "3"},
			spec{"/" + strings.Repeat("n", 255): "3", "/" + strings.Repeat("n", 245) + ".dpkg-dist": "2"},
			[]string{fmt.Sprintf("/etc/%s: changed here and by the image; the image's is /etc/%s.dpkg-dist", strings.Repeat("n", 255), strings.Repeat("n", 245))}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			var o *tree.Node
			if tt.o != nil {
				o = tt.o.tree(t, f.objects)
			}
			m, root := f.merge(o, tt.n.tree(t, f.objects), tt.l.tree(t, f.objects))
			if got := f.text(t, root); !maps.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			got := []string{}
			for _, c := range m.Conflicts {
				got = append(got, c.String())
			}
			if strings.Join(got, "\n") != strings.Join(tt.conflicts, "\n") {
				t.Errorf("conflicts: got %q, want %q", got, tt.conflicts)
			}
		})
	}
}
