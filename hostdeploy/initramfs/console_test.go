package initramfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// newConsole returns a console whose devices are files, and a function that reads one.
func newConsole(t *testing.T, printk string, devices ...string) (*Console, func(name string) string) {
	dir := t.TempDir()
	c := &Console{Dev: filepath.Join(dir, "dev"), Proc: filepath.Join(dir, "proc")}
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range devices {
		write(filepath.Join(c.Dev, d), "")
	}
	write(filepath.Join(c.Proc, "sys/kernel/printk"), printk)
	write(filepath.Join(c.Proc, "consoles"), "tty0                 -WU (EC p  )    4:1\nttyS0                -W- (E  p a)    4:64\nnetcon0              E\n")
	return c, func(name string) string {
		data, err := os.ReadFile(filepath.Join(c.Dev, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
}

func TestConsole(t *testing.T) {
	// "quiet": the kernel shows errors, so nobody else needs to.
	c, read := newConsole(t, "4\t4\t1\t7\n", "kmsg", "tty0", "ttyS0")
	c.Error("first\nsecond \x1b[2Jline")
	// Each write is a record of its own; a file has them one behind the other.
	if got := read("kmsg"); got != "<3>particle: first<3>particle: second ?[2Jline" {
		t.Errorf("kmsg: got %q", got)
	}
	if got := read("tty0") + read("ttyS0"); got != "" {
		t.Errorf("shown twice: %q", got)
	}

	// The kernel shows nothing: all consoles get it from here.
	c, read = newConsole(t, "1\t4\t1\t7\n", "kmsg", "tty0", "ttyS0")
	c.Error("first\nsecond")
	for _, name := range []string{"tty0", "ttyS0"} {
		if got, want := read(name), "particle: first\r\nparticle: second\r\n"; got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}

	// Without a kernel log.
	c, read = newConsole(t, "7\t4\t1\t7\n", "tty0", "ttyS0")
	c.Error("message")
	if got := read("ttyS0"); got != "particle: message\r\n" {
		t.Errorf("got %q", got)
	}
	c.Info("not here")
	if got := read("ttyS0"); strings.Contains(got, "not here") {
		t.Errorf("got %q", got)
	}

	// Without /proc.
	c, read = newConsole(t, "", "console")
	c.Proc += "-missing"
	c.Error("message")
	if got := read("console"); got != "particle: message\r\n" {
		t.Errorf("got %q", got)
	}
}

func TestProgress(t *testing.T) {
	c, read := newConsole(t, "4", "tty0", "ttyS0")
	c.Progress("doing", 1, 9)
	if got := read("ttyS0"); got != "" {
		t.Errorf("a short step is not worth a line: got %q", got)
	}
	c.last = time.Now().Add(-3 * time.Second)
	c.Progress("doing", 5, 9)
	c.Progress("doing", 6, 9)
	if got := read("ttyS0"); got != "particle: doing: 5 of 9\r\n" {
		t.Errorf("got %q", got)
	}
}
