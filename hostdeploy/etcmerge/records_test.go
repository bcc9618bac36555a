package etcmerge

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	root   = "root:x:0:0:root:/root:/bin/bash\n"
	daemon = "daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"
	nobody = "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
	sshd   = "sshd:x:998:65534:sshd:/run/sshd:/usr/sbin/nologin\n"
	alice  = "alice:x:1000:1000::/home/alice:/bin/bash\n"
)

func TestRecords(t *testing.T) {
	for _, tt := range []struct {
		name, file string
		o, n, l    string
		want       string
		conflicts  []string
	}{
		{"a user on each side", "passwd", root + daemon + nobody, root + daemon + nobody + sshd, root + daemon + nobody + alice,
			root + daemon + nobody + sshd + alice, nil},
		{"the image's order, where it says one", "passwd", root + nobody, sshd + root + daemon + nobody, alice + root + nobody,
			sshd + alice + root + daemon + nobody, nil},
		{"before compatibility lines", "passwd", root + nobody, root + nobody + sshd, root + nobody + alice + "+::::::\n",
			root + nobody + sshd + alice + "+::::::\n", nil},
		{"removed on both sides", "passwd", root + daemon + sshd, root + sshd, root + daemon,
			root, nil},
		{"shells", "passwd", root + daemon + sshd, root + strings.Replace(daemon, "nologin", "false", 1) + sshd, strings.Replace(root, "bash", "zsh", 1) + daemon + sshd,
			strings.Replace(root, "bash", "zsh", 1) + strings.Replace(daemon, "nologin", "false", 1) + sshd, nil},
		{"one record differently", "passwd", root, strings.Replace(root, "bash", "sh", 1), strings.Replace(root, "bash", "zsh", 1),
			strings.Replace(root, "bash", "zsh", 1), []string{`"root": changed here and by the image, the local line is kept`}},
		{"removed there, changed here", "passwd", root + daemon + sshd, root + sshd + nobody, root + strings.Replace(daemon, "nologin", "false", 1) + sshd,
			root + strings.Replace(daemon, "nologin", "false", 1) + sshd + nobody, []string{`"daemon": removed by the image, changed here and kept`}},
		{"removed here, changed there", "passwd", root + daemon, root + strings.Replace(daemon, "nologin", "false", 1), root + alice,
			root + alice, []string{`"daemon": removed here, changed by the image`}},
		{"one number for two", "passwd", root, root + sshd, root + "bob:x:998:998::/home/bob:/bin/sh\n",
			root + sshd + "bob:x:998:998::/home/bob:/bin/sh\n", []string{`number 998 of "sshd", which came with the image, is that of "bob", too`}},
		{"a number that was there twice", "passwd", root + "toor:x:0:0::/:/bin/sh\n", root + "toor:x:0:0::/:/bin/sh\n" + sshd, root + "toor:x:0:0::/:/bin/sh\n" + alice,
			root + "toor:x:0:0::/:/bin/sh\n" + sshd + alice, nil},
		{"no newline at the end", "passwd", root, root + strings.TrimSuffix(sshd, "\n"), root + strings.TrimSuffix(alice, "\n"),
			root + sshd + alice, nil},
		{"members", "group", "sudo:x:27:\nvideo:x:44:\n", "sudo:x:27:\nvideo:x:44:sddm\nnew:x:997:\n", "sudo:x:27:alice\nvideo:x:44:alice,bob\nalice:x:1000:\n",
			"sudo:x:27:alice\nvideo:x:44:alice,bob,sddm\nnew:x:997:\nalice:x:1000:\n", nil},
		{"members removed", "group", "a:x:1:x,y,z\n", "a:x:1:y,z,n\nb:x:2:\n", "a:x:1:x,y,l\n",
			"a:x:1:y,l,n\nb:x:2:\n", nil},
		{"group numbers", "group", "a:x:1:\n", "a:x:2:\n", "a:x:1:alice\n", "a:x:2:alice\n", nil},
		{"group numbers differently", "group", "a:x:1:\n", "a:x:2:\n", "a:x:3:alice\n", "a:x:3:alice\n", []string{`"a": changed here and by the image, the local line is kept`}},
		{"group numbers collide", "group", "a:x:1:\n", "a:x:5:\n", "a:x:1:alice\nb:x:5:\n", "a:x:5:alice\nb:x:5:\n",
			[]string{`number 5 of "a", which came with the image, is that of "b", too`}},
		{"administrators of groups", "gshadow", "a:!::\n", "a:!:adm:x\n", "a:!::y\n", "a:!:adm:y,x\n", nil},
		{"a password", "shadow", "root:*:1:0:99999:7:::\n", "root:*:2:0:99999:7:::\nsshd:!:2::::::\n", "root:$y$secret:3:0:99999:7:::\n",
			"root:$y$secret:3:0:99999:7:::\nsshd:!:2::::::\n", []string{`"root": changed here and by the image, the local line is kept`}},
		{"what is no record of shadow is not shown", "shadow", "a:*:1\n", "$y$image\n", "a:*:2\n$y$local\n", "$y$image\na:*:2\n$y$local\n",
			[]string{`"a": removed by the image, changed here and kept`}},
		{"ranges", "subuid", "a:100000:65536\n", "a:100000:65536\nimage:165536:65536\n", "a:100000:65536\nlocal:231072:65536\n",
			"a:100000:65536\nimage:165536:65536\nlocal:231072:65536\n", nil},
		{"ranges that overlap", "subgid", "", "image:165536:65536\n", "local:100000:65537\n", "image:165536:65536\nlocal:100000:65537\n",
			[]string{`number 165536 of "image", which came with the image, is that of "local", too`}},
		{"several ranges of a user", "subuid", "a:1:10\n", "a:1:10\nb:100:10\n", "a:1:10\na:50:10\n", "a:1:10\na:50:10\nb:100:10\n", nil},
		{"comments and blanks", "passwd", "# one\n\n" + root, "# one\n\n" + root + "# two\n" + sshd, "# one\n\n" + root + "# mine\n" + alice,
			"# one\n\n" + root + "# two\n" + sshd + "# mine\n" + alice, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			p := "/" + tt.file
			m, out := f.merge(spec{p: tt.o}.tree(t, f.objects), spec{p: "mode=640 " + tt.n}.tree(t, f.objects), spec{p: tt.l}.tree(t, f.objects))
			if got, want := f.text(t, out), (spec{p: "mode=640 " + tt.want}); !maps.Equal(got, want) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
			var got []string
			for _, c := range m.Conflicts {
				if c.Path != "/etc"+p || c.Kept != "" {
					t.Errorf("got %+v", c)
				}
				got = append(got, c.Detail)
			}
			if !slices.Equal(got, tt.conflicts) {
				t.Errorf("conflicts: got %q, want %q", got, tt.conflicts)
			}
		})
	}
}

// TestNoRecords has files of those names that cannot be merged by line, or are elsewhere.
func TestNoRecords(t *testing.T) {
	f := newFixture(t)
	o := spec{"/passwd": "a:1\n", "/group": "a:x:1:\n", "/d/passwd": "a:1\n", "/shadow": "-> x"}
	n := spec{"/passwd": "a:2\x00\n", "/group": "-> elsewhere", "/d/passwd": "a:2\n", "/shadow": "-> y"}
	l := spec{"/passwd": "b:1\n", "/group": "a:x:2:\n", "/d/passwd": "b:1\n", "/shadow": "-> z"}
	m, out := f.merge(o.tree(t, f.objects), n.tree(t, f.objects), l.tree(t, f.objects))
	want := spec{}
	for p := range o {
		want[p], want[p+Suffix] = l[p], n[p]
	}
	if got := f.text(t, out); !maps.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if len(m.Conflicts) != len(o) {
		t.Errorf("conflicts: got %v, want %d", m.Conflicts, len(o))
	}
}

// TestDamagedRecords has an image whose passwd is not what the image says.
func TestDamagedRecords(t *testing.T) {
	f := newFixture(t)
	n := spec{"/passwd": strings.Repeat(root+sshd, 10)}.tree(t, f.objects)
	check(t, os.WriteFile(filepath.Join(f.objects.dir, n.Dir["passwd"].File.Object.String()), []byte(root), 0o600))
	_, err := Plan(t.Context(), Input{spec{"/passwd": root}.tree(t, f.objects), n, f.disk(spec{"/passwd": alice}.tree(t, f.objects)), f.objects})
	if !errors.Is(err, ErrContent) || !strings.Contains(err.Error(), "/etc/passwd") {
		t.Errorf("got %v, want ErrContent with the path", err)
	}
}

// FuzzRecords merges any three files. Nothing local may be lost, what one side did alone
// is done, and numbers that collide never stop it.
func FuzzRecords(f *testing.F) {
	f.Add("passwd", root, root+sshd, root+alice)
	f.Add("group", "a:x:1:b\n", "a:x:1:b,c\n\n", "a:x:1:\nd:x:1:")
	f.Add("subuid", "a:1:5\na:7:8\n", "b:3:99999999999\n", "c:4294967295:4294967295\n")
	f.Add("gshadow", "\n\n", "::::\n:", "a:::\n#")
	f.Add("shadow", "", "", "x")
	f.Fuzz(func(t *testing.T, file, o, n, l string) {
		kind := recordFiles["/"+file]
		var sets [3]*recordSet
		for i, text := range []string{o, n, l} {
			set, ok := parseRecords([]byte(text))
			if !ok {
				return
			}
			sets[i] = set
		}
		whole := func(s string) string {
			if s != "" && !strings.HasSuffix(s, "\n") {
				s += "\n"
			}
			return s
		}
		lines := func(s string) []string {
			list := strings.Split(s, "\n")
			slices.Sort(list)
			return list
		}
		if got, _ := mergeRecords(kind, sets[0], sets[0], sets[2]); !slices.Equal(lines(string(got)), lines(whole(l))) {
			t.Fatalf("unchanged by the image: got %q, want %q", got, l)
		}
		if got, c := mergeRecords(kind, sets[0], sets[1], sets[0]); !slices.Equal(lines(string(got)), lines(whole(n))) || len(c) != 0 {
			t.Fatalf("unchanged locally: got %q, %v, want %q", got, c, n)
		}
		merged, conflicts := mergeRecords(kind, sets[0], sets[1], sets[2])
		out, ok := parseRecords(merged)
		if !ok {
			t.Fatalf("the result is no text: %q", merged)
		}
		for _, key := range sets[2].keys {
			if v := sets[2].lines[key]; v != sets[0].lines[key] && out.lines[key] != v && kind.lists == nil {
				t.Fatalf("the local %q was lost: %q", v, merged)
			}
		}
		for _, key := range sets[1].keys {
			_, was := sets[0].lines[key]
			if _, there := out.lines[key]; !was && !there {
				t.Fatalf("the image's %q was lost: %q", key, merged)
			}
		}
		for _, c := range conflicts {
			if c.Detail == "" {
				t.Fatalf("a conflict without detail: %+v", c)
			}
		}
	})
}
