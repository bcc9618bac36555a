package boot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/tests/boot/vm"
)

// bootLimit is how long a machine may take to its login prompt. It takes about thirty
// seconds where nothing else runs, and several times that on a busy machine.
const bootLimit = 8 * time.Minute

// Patterns of the console.
var (
	loginPrompt = regexp.MustCompile(`login: `)
	kernelPanic = regexp.MustCompile(`Kernel panic - not syncing`)
	kernelStart = regexp.MustCompile(`Linux version [0-9]`)
	cannotBoot  = regexp.MustCompile(`the system cannot be booted: .*`)
	// bootedImage has the digits of the image that the kernel was started with.
	bootedImage = regexp.MustCompile(`Command line: .*composefs\.digest=[^ ]*:([0-9a-f]{64})`)
)

// A loader is a way of starting a machine: firmware and boot loader.
type loader struct {
	name     string // as --bootloader takes it
	firmware vm.Firmware
	tries    int // of a new deployment, where it fails
}

var loaders = []loader{
	{"systemd-boot", vm.UEFI, 3},
	{"grub-efi", vm.UEFI, 3},
	{"grub-bios", vm.BIOS, 3},
	{"extlinux", vm.BIOS, 1},
}

// oneLoader is what tests take for which the loader does not matter.
func oneLoader(t testing.TB) loader {
	name := os.Getenv("PARTICLE_TEST_BOOT_LOADER")
	if name == "" {
		return loaders[0]
	}
	for _, l := range loaders {
		if l.name == name {
			return l
		}
	}
	t.Fatalf("PARTICLE_TEST_BOOT_LOADER is %q, which is none of %v", name, loaders)
	panic("unreachable")
}

// A machine is a running virtual machine of a test. Its methods fail the test.
type machine struct {
	*vm.VM
	t      testing.TB
	config vm.Config
}

// start starts a machine from a disk and waits for nothing.
func start(t testing.TB, l loader, disk vm.Disk) *machine {
	t.Helper()
	if l.firmware == vm.UEFI && !vm.HaveUEFI() {
		t.Skip("there is no UEFI firmware here (Debian package ovmf)")
	}
	return startConfig(t, vm.Config{Firmware: l.firmware, Disks: []vm.Disk{disk}, Unsafe: disk.WriteLog == ""})
}

// startConfig starts a machine. When the guest resets it, it ends, and must be started
// anew: OVMF does not always come back from a reset without hardware acceleration (QEMU 7.2),
// whatever runs on it. Where writes are logged, that must do.
func startConfig(t testing.TB, c vm.Config) *machine {
	t.Helper()
	c.Dir, c.Memory = dirFor(t), 1200
	if c.Disks[0].WriteLog == "" {
		c.Args = append(c.Args, "-no-reboot")
	}
	v, err := vm.Start(interrupted, c)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{VM: v, t: t, config: c}
	t.Cleanup(func() {
		m.Kill()
		if keep := os.Getenv("PARTICLE_TEST_BOOT_KEEP"); keep != "" || t.Failed() {
			m.keepLog(keep)
		}
	})
	return m
}

// keepLog saves what the console showed, or prints its end.
func (m *machine) keepLog(dir string) {
	if dir == "" {
		m.t.Logf("the console's last lines:\n%s", m.Console.Tail(60))
		return
	}
	name := filepath.Join(dir, fmt.Sprintf("%s-%d.log", strings.ReplaceAll(m.t.Name(), "/", "-"), time.Now().UnixMilli()))
	if err := os.WriteFile(name, []byte(m.Console.Text()), 0o644); err != nil {
		m.t.Log(err)
	}
}

// within returns a context that ends after a time limit and with the tests.
func within(limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(interrupted, limit, fmt.Errorf("not within %v", limit))
}

// login waits for the login prompt of a boot whose shell answers.
func (m *machine) login() {
	m.t.Helper()
	began := time.Now()
	m.expect(loginPrompt)
	m.shell()
	m.t.Logf("login prompt after %.1f s", time.Since(began).Seconds())
}

// shell waits until the guest's shell answers.
func (m *machine) shell() {
	m.t.Helper()
	ctx, cancel := within(time.Minute)
	defer cancel()
	if _, err := m.Boot(ctx); err != nil {
		m.t.Fatal(err)
	}
}

// expect waits until the console shows one of the patterns and returns which.
func (m *machine) expect(exprs ...*regexp.Regexp) int {
	m.t.Helper()
	which, _, err := m.Console.WaitWithin(interrupted, bootLimit, exprs...)
	if err != nil {
		m.t.Fatal(err)
	}
	return which
}

// sh runs a command in the guest, which must succeed, and returns what it prints,
// without the last newline.
func (m *machine) sh(format string, args ...any) string {
	m.t.Helper()
	command := fmt.Sprintf(format, args...)
	r := m.try("%s", command)
	if r.Status != 0 {
		m.t.Fatalf("%s: status %d\n%s%s", command, r.Status, r.Stdout, r.Stderr)
	}
	return strings.TrimSuffix(r.Stdout, "\n")
}

// expectThrough is expect for a machine that restarts itself meanwhile. It also returns the
// groups of the match.
func (m *machine) expectThrough(exprs ...*regexp.Regexp) (int, []string) {
	m.t.Helper()
	for {
		which, groups, err := m.Console.WaitWithin(interrupted, bootLimit, exprs...)
		switch {
		case err == nil:
			return which, groups
		case !errors.Is(err, vm.ErrEnded):
			m.t.Fatal(err)
		}
		m.again()
	}
}

// again starts a machine that has ended.
func (m *machine) again() {
	m.t.Helper()
	m.Kill()
	v, err := vm.Start(interrupted, m.config)
	if err != nil {
		m.t.Fatal(err)
	}
	m.VM = v
}

// try is sh for what may fail.
func (m *machine) try(format string, args ...any) vm.Result {
	m.t.Helper()
	return m.tryWithin(bootLimit, format, args...)
}

// tryWithin is try for what takes longer than a boot may.
func (m *machine) tryWithin(limit time.Duration, format string, args ...any) vm.Result {
	m.t.Helper()
	ctx, cancel := within(limit)
	defer cancel()
	r, err := m.Sh(ctx, fmt.Sprintf(format, args...))
	if err != nil {
		m.t.Fatal(err)
	}
	return r
}

// fails runs a command that must fail with a message that has all of the texts.
func (m *machine) fails(command string, texts ...string) {
	m.t.Helper()
	r := m.try("%s", command)
	if r.Status == 0 {
		m.t.Errorf("%s succeeded:\n%s", command, r.Stdout)
		return
	}
	for _, text := range texts {
		if !strings.Contains(r.Stderr, text) {
			m.t.Errorf("%s: got the error\n%swant one with %q", command, r.Stderr, text)
		}
	}
}

// equal compares what a command prints.
func (m *machine) equal(command, want string) {
	m.t.Helper()
	if got := m.sh("%s", command); got != want {
		m.t.Errorf("%s: got %q, want %q", command, got, want)
	}
}

// reboot restarts the guest in the orderly way and waits for the login prompt.
func (m *machine) reboot() {
	m.t.Helper()
	if m.config.Disks[0].WriteLog != "" {
		ctx, cancel := within(bootLimit)
		defer cancel()
		if err := m.Restart(ctx); err != nil {
			m.t.Fatal(err)
		}
	} else {
		m.off()
		m.again()
	}
	m.login()
}

// off switches the guest off in the orderly way. Its disk may be changed then.
func (m *machine) off() {
	m.t.Helper()
	ctx, cancel := within(bootLimit)
	defer cancel()
	if err := m.PowerOff(ctx); err != nil {
		m.t.Fatal(err)
	}
}

// A status is what the tests look at of particle hostdeploy status --json.
type status struct {
	Deployments []deployment `json:"deployments"`
	Boot        *struct {
		Digest       string `json:"digest"`
		Deployment   string `json:"deployment"`
		Verification string `json:"verification"`
		Why          string `json:"why"`
	} `json:"boot"`
	Bootloader string `json:"bootloader"`
	Fallback   string `json:"fallback"`
	BootFree   int64  `json:"bootFree"`
	BootSize   int64  `json:"bootSize"`
	EtcChanges []struct {
		Path string `json:"path"`
	} `json:"etcChanges"`
	Conflicts []conflict `json:"conflicts"`
	Failures  []failure  `json:"failures"`
	Verity    bool       `json:"verity"`
}

type failure struct{ ID, Manifest string }

type conflict struct {
	Path string `json:"path"`
	Kept string `json:"kept"`
}

type deployment struct {
	ID         string `json:"id"`
	Digest     string `json:"digest"`
	Manifest   string `json:"manifest"`
	Reference  string `json:"reference"`
	Title      string `json:"title"`
	Version    string `json:"version"`
	Generation int    `json:"generation"`
	Booted     bool   `json:"booted"`
	Staged     bool   `json:"staged"`
	Default    bool   `json:"default"`
	Failed     bool   `json:"failed"`
	Pinned     bool   `json:"pinned"`
	TriesLeft  *int   `json:"triesLeft"`
	Kept       string `json:"kept"`
	KArgs      struct {
		Boot, Machine, Image, User, Deleted []string
	} `json:"kargs"`
	Packages []struct {
		Name string `json:"name"`
		Old  string `json:"old"`
		New  string `json:"new"`
	} `json:"packages"`
	Missing string `json:"missing"`
}

func (m *machine) status() *status {
	m.t.Helper()
	var s status
	if out := m.sh("particle hostdeploy status --json"); true {
		if err := json.Unmarshal([]byte(out), &s); err != nil {
			m.t.Fatalf("reading the status: %v\n%s", err, out)
		}
	}
	return &s
}

// hex returns the digest's digits, without the prefix that says its kind.
func (d *deployment) hex() string { return d.Digest[strings.LastIndexByte(d.Digest, ':')+1:] }

// booted returns the running deployment.
func (s *status) booted(t testing.TB) *deployment {
	t.Helper()
	for i := range s.Deployments {
		if s.Deployments[i].Booted {
			return &s.Deployments[i]
		}
	}
	t.Fatalf("no deployment is booted: %+v", s.Deployments)
	return nil
}

// good waits until the boot has been marked good.
func (m *machine) good() {
	m.t.Helper()
	m.sh(`for i in $(seq 240); do
		case $(systemctl show -P ActiveState particle-boot-success.service) in
		active) exit 0 ;;
		failed) break ;;
		esac
		sleep 1
	done
	systemctl status --no-pager particle-boot-success.service boot-complete.target >&2
	systemctl list-jobs --no-pager >&2
	exit 1`)
}

// registry lets the guest reach the tests' registry at localhost:5000, so that it is a
// registry of its own machine as far as rules about plain HTTP go.
func (m *machine) registry() {
	m.t.Helper()
	m.sh("%s", registryScript(m.t))
}

func registryScript(t testing.TB) string {
	t.Helper()
	if server == nil {
		t.Fatal("no image has been pushed")
	}
	_, port, err := net.SplitHostPort(server.Addr())
	if err != nil {
		t.Fatal(err)
	}
	return `systemctl is-active -q test-registry || {
		for i in $(seq 240); do ip route get 10.0.2.2 >/dev/null 2>&1 && break; sleep 0.5; done
		systemd-run -q --unit=test-registry systemd-socket-activate -l 127.0.0.1:5000 /usr/lib/systemd/systemd-socket-proxyd 10.0.2.2:` + port + `
		for i in $(seq 240); do ss -Hltn 'sport = :5000' | grep -q . && exit 0; sleep 0.5; done
		exit 1
	}`
}

// literal is a pattern of just this text.
func literal(text string) *regexp.Regexp { return regexp.MustCompile(regexp.QuoteMeta(text)) }

// unexpected returns the lines of dpkg --verify that tell of files which nobody is
// supposed to change. A "c" is a file in /etc, which is the machine's. What the image has
// in /boot is not there: the boot file system is, with the kernels under other names.
func unexpected(verify string) []string {
	var bad []string
	for line := range strings.Lines(verify) {
		f := strings.Fields(line)
		inBoot := len(f) == 2 && f[0] == "missing" && strings.HasPrefix(f[1], "/boot/")
		if len(f) > 1 && f[1] != "c" && !inBoot {
			bad = append(bad, strings.TrimSpace(line))
		}
	}
	return bad
}
