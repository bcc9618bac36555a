package bootloader

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

// checkScript asks GRUB's own parser.
func checkScript(t *testing.T, text string) {
	t.Helper()
	cmd := exec.Command("grub-script-check")
	if cmd.Err != nil {
		dir := loadersDir(t)
		needRoot(t)
		cmd = exec.Command("/usr/bin/grub-script-check")
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: dir}
		cmd.Dir = "/"
	}
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("grub-script-check: %v: %s\n%s", err, out, text)
	}
}

const hostile = "it's \"$HOME\" ${x} \\ {a;b} `c` & | < > # !? * [z] ~ \t é \x1b '"

func grubRecords() []record {
	e := Entry{ID: "particle-3", Generation: 3, Title: hostile, Linux: "/particle-a/vmlinuz", Initrd: []string{"/a/ucode", "/a/initrd"},
		Options: `a="b c" d={e;f} g=$h i=*?[j] "k l=m" n~o p=a;reboot|q #r`, Counter: &Counter{Left: 1, Done: 1},
		Extra: []bls.Field{{Key: "devicetree", Value: "a/b.dtb"}}}
	uki := Entry{ID: "particle-2", Generation: 2, EFI: "/EFI/Linux/b.efi", Options: "x=y", Counter: &Counter{Left: 0, Done: 3}}
	return []record{{Entry: e}, {Entry: uki}, {Entry: entry(1, nil)}}
}

func TestGrubConfig(t *testing.T) {
	text, err := grubConfig(grubRecords(), settings{timeout: 5, serial: "115200"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	const want = `# Made by Particle from loader/entries: changes are lost.

load_env particle_3 particle_2
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
if [ "$grub_platform" = efi ]; then
  insmod all_video
  set gfxpayload=keep
fi
set timeout=5
set timeout_style=menu

if [ "$particle_3" != 0-2 ]; then
  set default=particle-3
  set fallback="1 2"
elif [ "$particle_2" != 0-3 ]; then
  set default=particle-2
  set fallback="2"
else
  set default=particle-1
  set fallback=""
fi

menuentry TITLE --id particle-3 {
  if [ "$particle_3" = 2-0 ]; then set particle_3=1-1
  elif [ "$particle_3" = 1-1 ]; then set particle_3=0-2
  fi
  if [ -n "$particle_3" ]; then save_env particle_3; fi
  linux '/particle-a/vmlinuz' 'a=b c' 'd={e;f}' 'g=$h' 'i=*?[j]' 'k l=m' 'n~o' 'p=a;reboot|q' '#r'
  initrd '/a/ucode' '/a/initrd'
  devicetree '/a/b.dtb'
}

menuentry 'particle-2' --id particle-2 {
  if [ "$particle_2" = 3-0 ]; then set particle_2=2-1
  elif [ "$particle_2" = 2-1 ]; then set particle_2=1-2
  elif [ "$particle_2" = 1-2 ]; then set particle_2=0-3
  fi
  if [ -n "$particle_2" ]; then save_env particle_2; fi
  chainloader '/EFI/Linux/b.efi' 'x=y'
}

menuentry 'Debian (particle 1)' --id particle-1 {
  linux '/particle-1/vmlinuz' 'root=UUID=1' 'n=1'
  initrd '/particle-1/initrd'
}
`
	if want := strings.ReplaceAll(want, "TITLE", grubQuote(hostile)); text != want {
		t.Errorf("got\n%s\nwant\n%s", text, want)
	}
}

func TestGrubScriptCheck(t *testing.T) {
	for _, records := range [][]record{nil, grubRecords(), grubRecords()[:1], grubRecords()[2:]} {
		text, err := grubConfig(records, settings{serial: "9600"}, []previousMenu{newPrevious(0, ".cfg"), newPrevious(1, ".cfg")})
		if err != nil {
			t.Fatal(err)
		}
		checkScript(t, text)
	}
	checkScript(t, grubStub("1234-ABCD"))
}

func TestGrubArgs(t *testing.T) {
	for _, c := range []struct {
		options string
		want    []string // nil for an error
	}{
		{"", []string{}},
		{"a  b\tc", []string{"a", "b", "c"}},
		{`a="b"`, []string{"a=b"}},
		{`a="" "" b`, []string{"a=", "b"}},
		{`"a b"`, []string{"a b"}},
		{`a="b=c d"`, []string{"a=b=c d"}},
		{`a=\x2f`, nil},
		{`a=it's`, nil},
		{`a=b\c`, nil},
		{`a=b"c d"`, nil},
		{`a="b`, nil},
		{`"a"b`, nil},
		{`"a"="b"`, nil},
		{"a=\"b\tc\"", nil},
	} {
		got, err := grubArgs(c.options)
		if c.want == nil {
			if !errors.Is(err, ErrEntry) {
				t.Errorf("%s: got %q, %v, want %v", c.options, got, err, ErrEntry)
			}
		} else if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: got %q, %v, want %q", c.options, got, err, c.want)
		}
	}
	l, boot := hosts[1].open(t)
	e := entry(1, nil)
	e.Options = `a="b\c"`
	if err := l.Add(e); !errors.Is(err, ErrEntry) {
		t.Errorf("got error %v, want %v", err, ErrEntry)
	}
	if tree(t, boot) != "" {
		t.Errorf("a refused entry left\n%s", tree(t, boot))
	}
}

func TestEnv(t *testing.T) {
	// What grub-editenv makes of "set a=1", "set b=x\y".
	block := "# GRUB Environment Block\na=1\nb=x\\\\y\n"
	block += strings.Repeat("#", 1024-len(block))
	vars, err := parseEnv([]byte(block))
	if err != nil || !slices.Equal(vars, []envVar{{"a", "1"}, {"b", `x\y`}}) {
		t.Fatalf("got %q, %v", vars, err)
	}
	if again, err := formatEnv(vars, 1024); err != nil || string(again) != block {
		t.Errorf("got %q, %v", again, err)
	}
	if _, err := formatEnv([]envVar{{"a", strings.Repeat("x", 1024)}}, 1024); !errors.Is(err, ErrMenu) {
		t.Errorf("too much: got error %v, want %v", err, ErrMenu)
	}
	if _, err := parseEnv([]byte("# grub")); !errors.Is(err, ErrMenu) {
		t.Errorf("no block: got error %v, want %v", err, ErrMenu)
	}
}

// TestEnvKeepsOthers: the variables of others stay, a block that is none is made anew.
func TestEnvKeepsOthers(t *testing.T) {
	l, boot := hosts[1].open(t)
	name := filepath.Join(boot, "grub/grubenv")
	if err := os.Mkdir(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	mine := "# GRUB Environment Block\n# WARNING: Do not edit\nsaved_entry=x\nparticle_99=1-0\nparticle_x=y\n"
	if err := os.WriteFile(name, []byte(mine+strings.Repeat("#", 1024-len(mine))), 0o600); err != nil {
		t.Fatal(err)
	}
	add(t, l, entry(1, &Counter{Left: 2}))
	vars, size, err := readEnv(name)
	if want := []envVar{{"saved_entry", "x"}, {"particle_x", "y"}, {"particle_1", "2-0"}}; err != nil || size != 1024 || !slices.Equal(vars, want) {
		t.Errorf("got %q, %d, %v, want %q", vars, size, err, want)
	}
	if err := os.WriteFile(name, []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := l.Sync(); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(name); err != nil || len(data) != 1024 || !bytes.HasPrefix(data, []byte(envHeader)) {
		t.Errorf("got %q, %v", data, err)
	}
}

// TestGrubCannotWrite: what GRUB could not count down is not counted.
func TestGrubCannotWrite(t *testing.T) {
	old := grubCannotWrite
	t.Cleanup(func() { grubCannotWrite = old })
	grubCannotWrite = func(string) string { return "btrfs" }
	l, boot := hosts[2].open(t)
	if got := l.Tries(); got.Max != 0 || !strings.Contains(got.How, "btrfs") {
		t.Errorf("got %+v, want no tries and why", got)
	}
	if err := l.Check(entry(1, &Counter{Left: 3})); !errors.Is(err, ErrEntry) {
		t.Errorf("got error %v, want %v", err, ErrEntry)
	}
	add(t, l, entry(1, nil))
	hosts[2].wantNext(t, l, boot, "particle-1")
	if why := old(boot); why != "" {
		t.Errorf("GRUB cannot write to %q, %s", boot, why)
	}
	sys := t.TempDir()
	for link, dir := range map[string]string{"253:0": "virtual/block/dm-0/dm", "9:0": "virtual/block/md0/md", "8:1": "pci/block/sda/sda1/holders"} {
		full := filepath.Join(sys, "devices", dir)
		if err := os.MkdirAll(full, 0o755); err != nil {
			t.Fatal(err)
		}
		putLink(t, filepath.Join(sys, "dev/block", link), filepath.Dir(full))
	}
	part := filepath.Join(sys, "devices/virtual/block/md0/md0p1")
	if err := os.Mkdir(part, 0o755); err != nil {
		t.Fatal(err)
	}
	putLink(t, filepath.Join(sys, "dev/block/259:1"), part)
	for _, c := range []struct {
		major, minor uint32
		want         string
	}{{253, 0, "LVM"}, {9, 0, "RAID"}, {259, 1, "RAID"}, {8, 1, ""}, {1, 1, ""}} {
		if got := stackedOn(sys, c.major, c.minor); !strings.Contains(got, c.want) || c.want == "" && got != "" {
			t.Errorf("%d:%d: got %q, want %q", c.major, c.minor, got, c.want)
		}
	}
}

func putLink(t *testing.T, name, to string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, name); err != nil {
		t.Fatal(err)
	}
}

func TestPatchGrubCore(t *testing.T) {
	core := make([]byte, 1300)
	copy(core[510:], "\x20\x08")
	if err := patchGrubCore(core, 2048, 1<<20); err != nil {
		t.Fatal(err)
	}
	// From sector 2049 two sectors to segment 0x820.
	if got, want := core[500:512], []byte{1, 8, 0, 0, 0, 0, 0, 0, 2, 0, 0x20, 8}; !bytes.Equal(got, want) {
		t.Errorf("got %x, want %x", got, want)
	}
	if err := patchGrubCore(core, 2048, 1024); !errors.Is(err, ErrTarget) {
		t.Errorf("no room: got error %v, want %v", err, ErrTarget)
	}
	core[510] = 0
	if err := patchGrubCore(core, 2048, 1<<20); !errors.Is(err, ErrMissing) {
		t.Errorf("another core: got error %v, want %v", err, ErrMissing)
	}
}

func FuzzEnv(f *testing.F) {
	f.Add([]byte("# GRUB Environment Block\na=1\n#c\\\nd=e\nb=x\\\\y\\\nz\n####"))
	f.Add([]byte("# GRUB Environment Block\n=\n\\"))
	f.Fuzz(func(t *testing.T, data []byte) {
		vars, err := parseEnv(data)
		if err != nil {
			return
		}
		for _, v := range vars {
			// No program makes names with these, so they are not written.
			if strings.ContainsAny(v.name, "\\\n") || strings.HasPrefix(v.name, "#") {
				return
			}
		}
		text, err := formatEnv(vars, 2*len(data)+envSize)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := parseEnv(text); err != nil || !slices.Equal(again, vars) {
			t.Fatalf("got %q, %v, want %q", again, err, vars)
		}
	})
}
