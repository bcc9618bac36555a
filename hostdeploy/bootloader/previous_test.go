package bootloader

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// previousCases are the loaders whose menu has the place of another system's.
var previousCases = []struct {
	host  int // in hosts
	menu  string
	old   string
	leads string // how the new menu ends
}{
	{1, "grub/grub.cfg", "menuentry 'Debian' { linux /vmlinuz }\n",
		"\nmenuentry 'Previous system (before Particle)' --id particle-previous {\n  configfile \"$prefix/particle-previous.cfg\"\n}\n"},
	{2, "grub/grub.cfg", "menuentry 'Debian' { linux /vmlinuz }\n",
		"\nmenuentry 'Previous system (before Particle)' --id particle-previous {\n  configfile \"$prefix/particle-previous.cfg\"\n}\n"},
	{3, "extlinux/extlinux.conf", "LABEL l0\n  LINUX /vmlinuz\n",
		"\nLABEL particle-previous\n  MENU LABEL Previous system (before Particle)\n  CONFIG particle-previous.conf\n"},
	{4, "extlinux/extlinux.conf", "default l0\nlabel l0\n  linux /vmlinuz\n",
		"\ninclude particle-previous.conf\nmenu title Particle\nprompt 0\ntimeout 30\ndefault particle-1\n"},
}

func previousFile(menu string) string {
	return filepath.Join(filepath.Dir(menu), "particle-previous"+filepath.Ext(menu))
}

// TestPrevious keeps the menu of the system that the machine had before.
func TestPrevious(t *testing.T) {
	for _, c := range previousCases {
		h := hosts[c.host]
		t.Run(h.name, func(t *testing.T) {
			prepare := func() (Loader, string) {
				l, boot := h.open(t)
				putPrevious(t, boot, c.menu, c.old)
				return l, boot
			}
			l, boot := prepare()
			add(t, l, entry(1, nil))
			for range 2 {
				if menu := readMenu(t, boot, c.menu); !strings.HasSuffix(menu, c.leads) {
					t.Errorf("got\n%s\nwant at its end\n%s", menu, c.leads)
				}
				if saved := readMenu(t, boot, previousFile(c.menu)); saved != c.old {
					t.Errorf("saved was %q, want %q", saved, c.old)
				}
				if err := l.Sync(); err != nil {
					t.Fatal(err)
				}
			}
			if fi, err := os.Stat(filepath.Join(boot, previousFile(c.menu))); err != nil || fi.Mode().Perm() != 0o600 {
				t.Errorf("what was not for all is: %v, %v", fi.Mode(), err)
			}
			h.wantNext(t, l, boot, "particle-1")
			want := tree(t, boot)

			n := 0
			for ; ; n++ {
				l, boot := prepare()
				if !killAt(t, n, func() error { return l.Add(entry(1, nil)) }) {
					break
				}
				menu, saved := readMenu(t, boot, c.menu), readMenu(t, boot, previousFile(c.menu))
				if menu != c.old && saved != c.old {
					t.Errorf("killed at step %d: the old menu is lost: got %q, saved was %q", n, menu, saved)
				}
				for m := 0; killAt(t, m, l.Sync); m++ {
				}
				add(t, l, entry(1, nil))
				if got := tree(t, boot); got != want {
					t.Errorf("killed at step %d, done again: got\n%s\nwant\n%s", n, got, want)
				}
			}
			if n < 3 {
				t.Errorf("only %d steps were seen", n)
			}
		})
	}
}

// TestPreviousAlone: between the loader and the first entry the previous system boots.
func TestPreviousAlone(t *testing.T) {
	for _, c := range previousCases {
		h := hosts[c.host]
		l, boot := h.open(t)
		putPrevious(t, boot, c.menu, c.old)
		if err := l.Sync(); err != nil {
			t.Fatal(err)
		}
		if saved := readMenu(t, boot, previousFile(c.menu)); saved != c.old {
			t.Errorf("%s: saved was %q, want %q", h.name, saved, c.old)
		}
		menu, want := readMenu(t, boot, c.menu), ""
		switch h.name {
		case "extlinux":
			want = "\nDEFAULT particle-previous\n"
		case "u-boot": // the default of the file that is taken in
			if strings.Contains(menu, "\ndefault ") {
				t.Errorf("u-boot: got a default in\n%s", menu)
			}
		default: // the only menuentry
			if strings.Contains(menu, "set default") || strings.Count(menu, "\nmenuentry ") != 1 {
				t.Errorf("%s: got\n%s", h.name, menu)
			}
		}
		if !strings.Contains(menu, want) {
			t.Errorf("%s: got\n%s\nwant in it %q", h.name, menu, want)
		}
	}
}

func putPrevious(t *testing.T, boot, menu, text string) {
	t.Helper()
	name := filepath.Join(boot, menu)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestPreviousLater: the first menu is never replaced, whatever writes one later.
func TestPreviousLater(t *testing.T) {
	l, boot := hosts[1].open(t)
	dir := filepath.Join(boot, "grub")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"first\n", "second\n", "first\n", "third\n", "fourth\n", " \n", ""} {
		if err := os.WriteFile(filepath.Join(dir, "grub.cfg"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := l.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for n := range mostPrevious + 1 {
		got = append(got, readMenu(t, boot, "grub/"+newPrevious(n, ".cfg").file))
	}
	if want := []string{"first\n", "second\n", "fourth\n", ""}; !slices.Equal(got, want) {
		t.Errorf("saved were %q, want %q", got, want)
	}
	menu := readMenu(t, boot, "grub/grub.cfg")
	for n := range mostPrevious {
		if m := newPrevious(n, ".cfg"); !strings.Contains(menu, "menuentry '"+m.title+"' --id "+m.id+" {\n") {
			t.Errorf("menu %d is missing in\n%s", n, menu)
		}
	}
	checkScript(t, menu)
}

// TestPreviousFallback: GRUB goes on to the previous system where no kernel of ours can be
// loaded.
func TestPreviousFallback(t *testing.T) {
	text, err := grubConfig([]record{{Entry: entry(2, &Counter{Left: 1})}, {Entry: entry(1, nil)}}, settings{}, []previousMenu{newPrevious(0, ".cfg")})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"set default=particle-2\n  set fallback=\"1 2\"\n", "set default=particle-1\n  set fallback=\"2\"\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("got\n%s\nwant in it\n%s", text, want)
		}
	}
}

// TestInstallKeepsSettings: a loader.conf that is there is someone's choice.
func TestInstallKeepsSettings(t *testing.T) {
	boot := t.TempDir()
	p := Paths{Boot: boot}
	if err := os.MkdirAll(filepath.Join(boot, "loader"), 0o755); err != nil {
		t.Fatal(err)
	}
	const mine = "timeout 7\neditor no\n"
	if err := os.WriteFile(p.loaderConf(), []byte(mine), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := p.installSettings("115200"); err != nil {
		t.Fatal(err)
	}
	if got := readMenu(t, boot, "loader/loader.conf"); got != mine {
		t.Errorf("got %q, want %q", got, mine)
	}
	fresh := Paths{Boot: t.TempDir()}
	if err := fresh.installSettings(""); err != nil {
		t.Fatal(err)
	}
	if got, want := readMenu(t, fresh.Boot, "loader/loader.conf"), fmt.Sprintf("timeout    %d\n", defaultTimeout); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
