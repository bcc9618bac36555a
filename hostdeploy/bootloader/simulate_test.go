package bootloader

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/particle-os/particle/hostdeploy/bootloader/bls"
)

// Here is what each loader does before Linux runs, as far as its files go.

// nextBLS is systemd-boot: the first of the files that it takes for entries, whoever made
// them, unless loader.conf has a default.
func nextBLS(t *testing.T, boot string) string {
	t.Helper()
	for line := range strings.Lines(readMenu(t, boot, "loader/loader.conf")) {
		if pattern, ok := strings.CutPrefix(line, "default "); ok {
			return strings.TrimSpace(pattern)
		}
	}
	list, err := os.ReadDir(filepath.Join(boot, "loader/entries"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	var all []bls.Entry
	for _, f := range list {
		e := bls.Entry{}
		var ok bool
		if e.Name, ok = bls.ParseName(f.Name()); !ok {
			continue
		}
		fields := bls.Parse(readMenu(t, boot, "loader/entries/"+f.Name()))
		_, linux := bls.Last(fields, "linux")
		_, efi := bls.Last(fields, "efi")
		if !linux && !efi {
			continue
		}
		e.SortKey, _ = bls.Last(fields, "sort-key")
		e.MachineID, _ = bls.Last(fields, "machine-id")
		e.Version, _ = bls.Last(fields, "version")
		all = append(all, e)
	}
	if len(all) == 0 {
		return ""
	}
	return slices.MinFunc(all, bls.Compare).ID
}

func bootSystemdBoot(t *testing.T, boot, id string) {
	t.Helper()
	d := entryDir{Paths{Boot: boot}}
	names, err := d.files(id)
	if err != nil || len(names) != 1 {
		t.Fatalf("booting %s: files %q, %v", id, names, err)
	}
	n, _ := bls.ParseName(names[0])
	if !n.Counted {
		return
	}
	n.Left, n.Done = max(0, n.Left-1), n.Done+1
	if err := os.Rename(filepath.Join(d.dir(), names[0]), filepath.Join(d.dir(), n.String())); err != nil {
		t.Fatal(err)
	}
}

var (
	grubIf  = regexp.MustCompile(`^(?:el)?if \[ "\$(\w+)" (!?=) (\S+) \]; then(?: set (\w+)=(\S+))?$`)
	grubSet = regexp.MustCompile(`^set (\w+)=(\S+)$`)
)

// grubRun runs the part of the script that our menus use, at the top or in a menuentry:
// chains of comparisons, each with one assignment in it or after it.
func grubRun(t *testing.T, boot, menuentry string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(boot, "grub/grub.cfg"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		t.Fatal(err)
	}
	env, err := os.ReadFile(filepath.Join(boot, "grub/grubenv"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	vars := map[string]string{"grub_platform": "pc"}
	if list, err := parseEnv(env); err == nil {
		for _, v := range list {
			if regexp.MustCompile(`(?m)^load_env .*\b` + v.name + `\b`).Match(text) {
				vars[v.name] = v.value
			}
		}
	}
	in, taken, active := "", false, true
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch m := grubIf.FindStringSubmatch(line); {
		case strings.HasPrefix(line, "menuentry "):
			in = regexp.MustCompile(`--id (\S+) \{$`).FindStringSubmatch(line)[1]
		case line == "}":
			in = ""
		case in != menuentry:
		case m != nil:
			if strings.HasPrefix(line, "if") {
				taken = false
			}
			active = !taken && (vars[m[1]] == m[3]) == (m[2] == "=")
			if taken = taken || active; active && m[4] != "" {
				vars[m[4]] = m[5]
			}
		case line == "else":
			active = !taken
		case line == "fi":
			active = true
		case active && grubSet.MatchString(line):
			m := grubSet.FindStringSubmatch(line)
			vars[m[1]] = m[2]
		}
	}
	return vars
}

func nextGrub(t *testing.T, boot string) string {
	t.Helper()
	return grubRun(t, boot, "")["default"]
}

// bootGrub writes the variables in place, as GRUB does.
func bootGrub(t *testing.T, boot, id string) {
	t.Helper()
	name := filepath.Join(boot, "grub/grubenv")
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	value := grubRun(t, boot, id)[grubVar(id)]
	if value == "" {
		return
	}
	vars, err := parseEnv(data)
	if err != nil {
		t.Fatal(err)
	}
	next, err := formatEnv(setEnv(vars, grubVar(id), value), len(data))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, next, 0o644); err != nil {
		t.Fatal(err)
	}
}

// installFakeExtlinux makes a ldlinux.sys of which only the last part is real.
func installFakeExtlinux(t *testing.T, boot string) {
	t.Helper()
	adv, err := formatADV(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(boot, "extlinux"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(boot, "extlinux/ldlinux.sys"), append(bytes.Repeat([]byte("x"), 9), adv...), 0o644); err != nil {
		t.Fatal(err)
	}
}

func nextExtlinux(t *testing.T, boot string) string {
	t.Helper()
	armed, err := advFile(filepath.Join(boot, "extlinux/ldlinux.sys")).armed()
	if err != nil {
		t.Fatal(err)
	}
	if armed != "" {
		if !strings.Contains(readMenu(t, boot, "extlinux/extlinux.conf"), "\nLABEL "+armed+"\n") {
			t.Errorf("to be booted once is %q, which the menu lacks", armed)
		}
		return armed
	}
	return menuDefault(readMenu(t, boot, "extlinux/extlinux.conf"), "DEFAULT ")
}

func bootExtlinux(t *testing.T, boot, id string) {
	t.Helper()
	if err := advFile(filepath.Join(boot, "extlinux/ldlinux.sys")).arm(""); err != nil {
		t.Fatal(err)
	}
}

func nextUBoot(t *testing.T, boot string) string {
	t.Helper()
	return menuDefault(readMenu(t, boot, "extlinux/extlinux.conf"), "default ")
}

func readMenu(t *testing.T, boot, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(boot, name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(text)
}

func menuDefault(menu, key string) string {
	for line := range strings.Lines(menu) {
		if id, ok := strings.CutPrefix(line, key); ok {
			return strings.TrimSpace(id)
		}
	}
	return ""
}
