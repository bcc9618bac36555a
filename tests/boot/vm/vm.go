// Package vm runs virtual machines for tests: QEMU without hardware acceleration, on
// any machine. A test can wait for text on the console, run commands in the guest by a
// channel besides the console (package guest), reset the machine, cut its power, and
// have every write to its disk recorded (package writelog reads that).
//
// It is no general front end to QEMU: there is one kind of machine with one serial line,
// a network that reaches the host's loopback interface at 10.0.2.2, and disks. It knows
// nothing of Particle.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ErrEnded: the machine has switched itself off, or was switched off.
var ErrEnded = errors.New("the virtual machine has ended")

// Qemu is the program that is run; in Debian it is in the package qemu-system-x86.
const Qemu = "qemu-system-x86_64"

// Firmware is what starts the machine.
type Firmware uint8

const (
	BIOS   Firmware = iota // SeaBIOS
	UEFI                   // OVMF, without Secure Boot; Debian's package ovmf
	Direct                 // QEMU loads Config.Kernel itself
)

func (f Firmware) String() string { return [...]string{"BIOS", "UEFI", "direct"}[f] }

// A Disk is a virtio disk of the machine, /dev/vda and so on.
type Disk struct {
	File   string
	Format string // "raw" or "qcow2"; empty is qcow2 for *.qcow2, raw otherwise
	// WriteLog, where not empty, is a file that gets all writes and flushes, in the
	// format of dm-log-writes. Discards are off then.
	WriteLog string
}

// A Config says what to run. Dir and a disk or a kernel are all that is needed.
type Config struct {
	// Dir is a directory for sockets, logs and the firmware's variables. The latter are
	// kept for a later machine in the same directory. Its path must be short
	// (sockets: 108 bytes).
	Dir      string
	Firmware Firmware
	Disks    []Disk
	// For Direct only.
	Kernel, Initrd, Append string
	Memory                 int // MiB; 0 is 1024
	CPUs                   int // 0 is 2
	// Unsafe lets QEMU ignore flushes: faster, and nothing is lost unless the host
	// itself goes down. It goes not with WriteLog.
	Unsafe bool
	Args   []string // more arguments for QEMU
}

// A VM is a running machine. Its methods may be called side by side.
type VM struct {
	Console *Console

	cfg   Config
	shell *shell
	qmp   string
	cmd   *exec.Cmd
	done  chan struct{} // closed when QEMU has ended
	err   error         // of the process, valid after done
}

// Start starts a machine. It ends with Kill, PowerOff or by itself, at the latest with
// the process that started it.
func Start(ctx context.Context, cfg Config) (*VM, error) {
	v := &VM{Console: newConsole(), cfg: cfg, qmp: filepath.Join(cfg.Dir, "qmp"), done: make(chan struct{})}
	args, err := cfg.args()
	if err != nil {
		return nil, fmt.Errorf("starting a virtual machine: %w", err)
	}
	for _, name := range []string{"qmp", "console", "shell"} {
		if err := os.Remove(filepath.Join(cfg.Dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	stderr, err := os.Create(filepath.Join(cfg.Dir, "qemu.log"))
	if err != nil {
		return nil, err
	}
	defer stderr.Close()
	v.cmd = exec.Command(Qemu, args...)
	v.cmd.Stdout, v.cmd.Stderr = stderr, stderr
	// No machine outlives its test, even one that is killed. The signal comes when the
	// thread that started the child ends, so this thread must stay. A group of its own
	// keeps a terminal's interrupt for the test, which then stops the machine.
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := v.cmd.Start()
		started <- err
		if err == nil {
			v.err = v.cmd.Wait()
			close(v.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting a virtual machine: %w", err)
	}
	if err := v.connect(ctx); err != nil {
		v.Kill()
		log, _ := os.ReadFile(stderr.Name())
		return nil, fmt.Errorf("starting a virtual machine: %w: %s", err, log)
	}
	return v, nil
}

// connect connects to the machine's sockets and lets its processors run.
func (v *VM) connect(ctx context.Context) error {
	console, err := v.dial(ctx, "console")
	if err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(v.cfg.Dir, "console.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	v.Console.in = console
	go func() {
		v.Console.read(console, log)
		console.Close()
		log.Close()
	}()
	port, err := v.dial(ctx, "shell")
	if err != nil {
		return err
	}
	v.shell = newShell(port)
	return v.Monitor(ctx, "cont", nil)
}

// dial connects to a socket that QEMU may not have made yet.
func (v *VM) dial(ctx context.Context, name string) (net.Conn, error) {
	for {
		conn, err := net.Dial("unix", filepath.Join(v.cfg.Dir, name))
		if err == nil {
			return conn, nil
		}
		select {
		case <-v.done:
			return nil, ErrEnded
		case <-ctx.Done():
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *Config) args() ([]string, error) {
	def := func(n, d int) string {
		if n == 0 {
			n = d
		}
		return strconv.Itoa(n)
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-S",
		// All of max: without svm, QEMU 7.2 gives a guest in which mount(2) mounts nothing.
		"-accel", "tcg,thread=multi", "-cpu", "max",
		"-smp", def(c.CPUs, 2), "-m", def(c.Memory, 1024),
		"-qmp", "unix:" + filepath.Join(c.Dir, "qmp") + ",server=on,wait=off",
		"-chardev", "socket,id=console,server=on,wait=off,path=" + filepath.Join(c.Dir, "console"),
		"-serial", "chardev:console",
		"-device", "virtio-serial-pci",
		"-chardev", "socket,id=shell,server=on,wait=off,path=" + filepath.Join(c.Dir, "shell"),
		"-device", "virtserialport,chardev=shell,name=" + shellPort,
		"-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=",
		"-device", "virtio-rng-pci",
	}
	switch c.Firmware {
	case UEFI:
		code, vars, err := ovmf()
		if err != nil {
			return nil, err
		}
		own := filepath.Join(c.Dir, "vars.fd")
		if _, err := os.Stat(own); err != nil {
			if err := copyFile(own, vars); err != nil {
				return nil, err
			}
		}
		args = append(args, "-machine", "q35",
			"-drive", "if=pflash,format=raw,unit=0,readonly=on,file="+comma(code),
			"-drive", "if=pflash,format=raw,unit=1,file="+comma(own))
	case Direct:
		args = append(args, "-machine", "q35", "-kernel", c.Kernel, "-append", c.Append)
		if c.Initrd != "" {
			args = append(args, "-initrd", c.Initrd)
		}
	default:
		args = append(args, "-machine", "pc")
	}
	for i, d := range c.Disks {
		a, err := d.args(i, c.Unsafe)
		if err != nil {
			return nil, err
		}
		args = append(args, a...)
	}
	return append(args, c.Args...), nil
}

func (d *Disk) args(i int, unsafe bool) ([]string, error) {
	format := d.Format
	if format == "" {
		format = "raw"
		if strings.HasSuffix(d.File, ".qcow2") {
			format = "qcow2"
		}
	}
	cache := "cache.direct=off,cache.no-flush="
	if unsafe {
		cache += "on"
	} else {
		cache += "off"
	}
	node := fmt.Sprintf("disk%d", i)
	device := fmt.Sprintf("virtio-blk-pci,drive=%s,bootindex=%d,write-cache=on", node, i+1)
	file := fmt.Sprintf("driver=file,filename=%s,discard=unmap,%s", comma(d.File), cache)
	if d.WriteLog == "" {
		return []string{
			"-blockdev", fmt.Sprintf("node-name=%s-file,%s", node, file),
			"-blockdev", fmt.Sprintf("node-name=%s,driver=%s,file=%s-file,discard=unmap,%s", node, format, node, cache),
			"-device", device,
		}, nil
	}
	// The filter must see the guest's flushes. Only the files below may ignore them:
	// the log is what counts.
	file = fmt.Sprintf("driver=file,filename=%s,cache.no-flush=on", comma(d.File))
	if err := os.WriteFile(d.WriteLog, nil, 0o644); err != nil {
		return nil, err
	}
	return []string{
		"-blockdev", fmt.Sprintf("node-name=%s-file,%s", node, file),
		"-blockdev", fmt.Sprintf("node-name=%s-disk,driver=%s,file=%s-file,cache.no-flush=on", node, format, node),
		"-blockdev", fmt.Sprintf("node-name=%s-log,driver=file,filename=%s,cache.no-flush=on", node, comma(d.WriteLog)),
		"-blockdev", fmt.Sprintf("node-name=%s,driver=blklogwrites,file=%s-disk,log=%s-log,log-sector-size=512", node, node, node),
		// Writes of zeroes are logged in two steps, between which another write may come
		// and spoil the log (QEMU before 9): the guest shall write zeroes as data.
		"-device", device + ",discard=off,write-zeroes=off",
	}, nil
}

// comma doubles commas, which end a value in QEMU's options.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// ovmf finds the UEFI firmware: code, and the variables that belong to it.
func ovmf() (code, vars string, err error) {
	for _, size := range []string{"_4M", ""} {
		code, vars = "/usr/share/OVMF/OVMF_CODE"+size+".fd", "/usr/share/OVMF/OVMF_VARS"+size+".fd"
		_, errCode := os.Stat(code)
		_, errVars := os.Stat(vars)
		if errCode == nil && errVars == nil {
			return code, vars, nil
		}
	}
	return "", "", errors.New("no UEFI firmware below /usr/share/OVMF (Debian package ovmf)")
}

// HaveUEFI reports whether UEFI machines can be started here.
func HaveUEFI() bool {
	_, _, err := ovmf()
	return err == nil
}

func copyFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

// Overlay makes a qcow2 disk over a base that it leaves as it is.
func Overlay(ctx context.Context, file, base, baseFormat string) error {
	base, err := filepath.Abs(base)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", baseFormat, "-b", base, file)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("making a disk over %q: %w: %s", base, err, out)
	}
	return nil
}

// Monitor runs a command of QEMU's machine protocol.
func (v *VM) Monitor(ctx context.Context, command string, args any) error {
	return monitor(ctx, v.qmp, command, args)
}

// Reset presses the reset button.
func (v *VM) Reset(ctx context.Context) error { return v.Monitor(ctx, "system_reset", nil) }

// Done is closed when the machine has ended.
func (v *VM) Done() <-chan struct{} { return v.done }

// Kill cuts the power, at once, and waits until QEMU is gone. A machine that has ended
// already is left alone.
func (v *VM) Kill() {
	select {
	case <-v.done:
	default:
		// The process is ours and not yet waited for: the id is no other's.
		_ = v.cmd.Process.Kill()
		<-v.done
	}
	if v.shell != nil {
		v.shell.conn.Close()
	}
}

// WaitEnd waits until the machine has switched itself off, or has restarted where the
// arguments say -no-reboot.
func (v *VM) WaitEnd(ctx context.Context) error {
	select {
	case <-v.done:
	case <-ctx.Done():
		return fmt.Errorf("waiting for the end of the virtual machine: %w; its last lines:\n%s", context.Cause(ctx), v.Console.Tail(60))
	}
	if v.err != nil {
		log, _ := os.ReadFile(filepath.Join(v.cfg.Dir, "qemu.log"))
		return fmt.Errorf("running the virtual machine: %w: %s", v.err, log)
	}
	return nil
}

// Args returns the command line of QEMU, for reports.
func (v *VM) Args() []string { return slices.Clone(v.cmd.Args) }
