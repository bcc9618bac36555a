package podmanext

import (
	"errors"
	"strings"
	"testing"
)

func TestAddStores(t *testing.T) {
	for name, c := range map[string]struct{ conf, want string }{
		"empty": {"", "[storage.options] # particle plugins\n" +
			"additionalimagestores = [\"/i\"] # particle plugins\n" +
			"additionallayerstores = [\"/l:ref\"] # particle plugins\n"},
		"no options": {"[storage]\ndriver = \"overlay\" # mine", "[storage]\ndriver = \"overlay\" # mine\n" +
			"# particle plugins, the line above was not ended\n" +
			"[storage.options] # particle plugins\n" +
			"additionalimagestores = [\"/i\"] # particle plugins\n" +
			"additionallayerstores = [\"/l:ref\"] # particle plugins\n"},
		"other keys and tables": {"[storage]\ndriver = \"overlay\"\n\n[storage.options]\n# text\nsize = \"\"\n[storage.options.overlay]\nmountopt = \"nodev\"\n",
			"[storage]\ndriver = \"overlay\"\n\n[storage.options]\n" +
				"additionalimagestores = [\"/i\"] # particle plugins\n" +
				"additionallayerstores = [\"/l:ref\"] # particle plugins\n" +
				"# text\nsize = \"\"\n[storage.options.overlay]\nmountopt = \"nodev\"\n"},
		"lists of the user": {"[storage.options]\nadditionalimagestores = [\n  \"/usr/lib/images\", # theirs\n]\nsize = \"1\"\n",
			"[storage.options]\n" +
				"additionallayerstores = [\"/l:ref\"] # particle plugins\n" +
				"additionalimagestores = [\"/usr/lib/images\", \"/i\"] # particle plugins\n" +
				"# particle plugins, before:additionalimagestores = [\n" +
				"# particle plugins, before:  \"/usr/lib/images\", # theirs\n" +
				"# particle plugins, before:]\nsize = \"1\"\n"},
		"there already": {"[storage.options]\nadditionalimagestores = [\"/i\"]\nadditionallayerstores = ['/l:ref']",
			"[storage.options]\nadditionalimagestores = [\"/i\"]\nadditionallayerstores = ['/l:ref']"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := AddStores(c.conf, []string{"/i"}, []string{"/l:ref"})
			if err != nil {
				t.Fatal(err)
			}
			if got != c.want {
				t.Errorf("got:\n%s\nwant:\n%s", got, c.want)
			}
			if again, err := AddStores(got, []string{"/i"}, []string{"/l:ref"}); err != nil || again != got {
				t.Errorf("added again: got %v and\n%s", err, again)
			}
			if back, err := TakeStores(got); err != nil || back != c.conf {
				t.Errorf("taken back: got %v and\n%q\nwant\n%q", err, back, c.conf)
			}
		})
	}
}

// TestTakeStoresEdited: what the user has written since keeps its meaning, or nothing
// is done.
func TestTakeStoresEdited(t *testing.T) {
	added, err := AddStores("[storage]\ndriver = \"overlay\"", []string{"/i"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, conf := range map[string]string{
		"a line after no line end": added + "[storage.options.overlay]\nmountopt = \"nodev\"\n",
		"CRLF":                     strings.ReplaceAll(added, "\n", "\r\n"),
	} {
		if got, err := TakeStores(conf); !errors.Is(err, ErrStorageConf) {
			t.Errorf("%s: got %v and %q, want ErrStorageConf", name, err, got)
		}
	}
	added, err = AddStores("[storage.options]\n", []string{"/i"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := TakeStores(added + "size = \"1\"\n"); err != nil || got != "[storage.options]\nsize = \"1\"\n" {
		t.Errorf("a key below the user's header: got %v and %q", err, got)
	}
}

func TestAddStoresRefuses(t *testing.T) {
	for _, conf := range []string{
		"[storage", "storage = 1", "[storage]\noptions = { size = \"1\" }\n",
		"[storage.options]\nadditionalimagestores = \"/i\"\n", "[storage.options]\nadditionalimagestores = [1]\n",
	} {
		if got, err := AddStores(conf, []string{"/i"}, nil); !errors.Is(err, ErrStorageConf) {
			t.Errorf("%q: got %v and %q, want ErrStorageConf", conf, err, got)
		}
	}
	if _, err := AddStores("", []string{"/a\"b"}, nil); !errors.Is(err, ErrStorageConf) {
		t.Errorf("a quote in a path: got %v", err)
	}
}

// FuzzStorageConf checks that an edit says what was meant and can be taken back.
func FuzzStorageConf(f *testing.F) {
	for _, seed := range []string{
		"", "[storage]\ndriver=\"overlay\"", "[storage.options]\nadditionalimagestores = [\n\"/x\",\n]",
		"storage.options.size = \"1\"\n", "[ storage . options ]\nx=1", "[storage]\noptions={}\n",
		"a = \"\"\"\n[storage.options]\n\"\"\"\n", "[storage.options] # particle plugins\n", "[[storage.options]]\n",
		"[storage.options]\r\nsize=\"1\"\r\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, conf string) {
		clean := RemoveStores(conf)
		got, err := AddStores(conf, []string{"/i"}, []string{"/l:ref"})
		if err != nil {
			return
		}
		if back := RemoveStores(got); back != clean {
			t.Fatalf("taken back: got %q, want %q", back, clean)
		}
		c, err := parseStorageConf(got)
		if err != nil {
			t.Fatal(err)
		}
		for key, want := range map[string]string{keyImageStores: "/i", keyLayerStores: "/l:ref"} {
			list, err := c.list(key)
			if err != nil || !strings.Contains(strings.Join(list, "\n")+"\n", want+"\n") {
				t.Fatalf("%s: got %q, %v", key, list, err)
			}
		}
	})
}
