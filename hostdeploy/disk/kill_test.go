package disk

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// killEnv names the disk that this program shall make until it is killed.
const killEnv = "PARTICLE_DISK_TEST_KILL"

// isolateEnv has that program isolate itself first.
const isolateEnv = "PARTICLE_DISK_TEST_ISOLATE"

func TestMain(m *testing.M) {
	if os.Getenv(isolateEnv) != "" {
		if err := Isolate(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		if err := holdDisk(os.Getenv(isolateEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	if os.Geteuid() == 0 {
		// Other programs of this machine must not hold on to what the tests mount. Where
		// it cannot be had, the tests that mount skip.
		_ = Isolate()
	}
	if path := os.Getenv(killEnv); path != "" {
		if err := makeDisk(context.Background(), path, true); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// makeDisk makes a small disk with a file on each file system.
func makeDisk(ctx context.Context, path string, wipe bool) error {
	d, err := Create(ctx, path, Options{Layout: efi, Size: 512 << 20, BootSize: 64 << 20, Wipe: wipe})
	if err != nil {
		return err
	}
	for _, dir := range []string{d.Root(), d.Boot()} {
		if err := os.WriteFile(filepath.Join(dir, "file"), noise(1, 1<<20), 0o644); err != nil {
			return errors.Join(err, d.Close())
		}
	}
	return errors.Join(d.Finish(ctx), d.Close())
}

// holdDisk makes a disk, says where it is mounted and waits.
func holdDisk(path string) error {
	d, err := Create(context.Background(), path, Options{Size: 512 << 20, BootSize: 64 << 20})
	if err != nil {
		return err
	}
	fmt.Println(d.Root())
	_, err = os.Stdin.Read(make([]byte, 1))
	return errors.Join(err, d.Close())
}

// TestIsolate: an isolated program's mounts are not seen, and are gone when it is killed.
func TestIsolate(t *testing.T) {
	needLoops(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	cmd := exec.Command(exe)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "TMPDIR=" + t.TempDir(), isolateEnv + "=" + path}
	var msg bytes.Buffer
	cmd.Stderr = &msg
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	root, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		cmd.Wait()
		t.Fatalf("%v: %s", err, msg.String())
	}
	root = strings.TrimSpace(root)
	sees := func(pid string) bool {
		b, err := os.ReadFile("/proc/" + pid + "/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(b, []byte(" "+root+" "))
	}
	if !sees(fmt.Sprint(cmd.Process.Pid)) || sees("self") {
		t.Errorf("the program sees its mount: %v, want true; this one does: %v, want false", sees(fmt.Sprint(cmd.Process.Pid)), sees("self"))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	var used []string
	if !settle(func() bool {
		c, err := Inspect(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		used = c.InUse
		return len(used) == 0
	}) {
		t.Errorf("after the kill: %q", used)
	}
}

// TestNamespace: a namespace that was made while the disk was mounted does not keep it.
func TestNamespace(t *testing.T) {
	for name, args := range map[string][]string{
		"as it is": {"unshare", "--mount", "--propagation", "unchanged", "sleep", "60"},
		"slave":    {"unshare", "--mount", "--propagation", "slave", "sleep", "60"}, // systemd's
		"private":  {"unshare", "--mount", "--propagation", "private", "sleep", "60"},
	} {
		t.Run(name, func(t *testing.T) {
			needLoops(t)
			need(t, "mkfs.vfat", "mcopy", "unshare", "e2fsck")
			d := create(t, filepath.Join(t.TempDir(), "disk.img"), Options{Layout: efi, Size: 512 << 20, BootSize: 64 << 20})
			cmd := exec.Command(args[0], args[1:]...)
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			defer cmd.Process.Kill()
			if !settle(func() bool {
				comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
				return string(comm) == "sleep\n"
			}) {
				t.Fatal("unshare does not start sleep")
			}
			if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", cmd.Process.Pid)); err != nil || !bytes.Contains(b, []byte(d.Root())) {
				t.Fatalf("the namespace does not have the mount: %v", err)
			}
			if err := d.Finish(t.Context()); err != nil {
				t.Fatal(err)
			}
			dev, _ := attachPart(t, d.Path, d.Partition(RoleRoot), 512)
			tool(t, "e2fsck", "-f", "-n", dev)
		})
	}
}

// TestKill kills a run at many moments. The next one refuses what is half made, or wipes it.
func TestKill(t *testing.T) {
	needLoops(t)
	need(t, "mkfs.vfat", "mcopy", "e2fsck", "fsck.vfat")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	// The moments are shares of the time that a whole run takes here.
	began := time.Now()
	whole := exec.Command(exe)
	whole.Env = append(os.Environ(), killEnv+"="+path)
	if out, err := whole.CombinedOutput(); err != nil {
		t.Fatalf("not killed: %v\n%s", err, out)
	}
	took := time.Since(began)
	const moments = 16
	refused, kills := 0, 0
	for i := range moments {
		delay := took * time.Duration(i+1) / (moments + 1)
		os.Remove(path)
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), killEnv+"="+path)
		var msg bytes.Buffer
		cmd.Stderr = &msg
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(delay, func() { cmd.Process.Kill() })
		err := cmd.Wait()
		timer.Stop()
		if err == nil {
			continue
		}
		if msg.Len() > 0 {
			t.Fatalf("after %v: %s", delay, msg.String())
		}
		kills++
		switch err := makeDisk(t.Context(), path, false); {
		case errors.Is(err, ErrNotEmpty):
			refused++
		case err != nil:
			t.Errorf("killed after %v: %v", delay, err)
		}
		if err := makeDisk(t.Context(), path, true); err != nil {
			t.Fatalf("killed after %v, and then wiped: %v", delay, err)
		}
		// What was mounted, the next run has unmounted. An empty directory may stay.
		bases, _ := filepath.Glob(filepath.Join(os.TempDir(), "particle-disk-*"))
		for _, base := range bases {
			if err := os.Remove(base); err != nil {
				t.Errorf("killed after %v: %v", delay, err)
			}
		}
		c, err := Inspect(t.Context(), path)
		if err != nil || len(c.Partitions) != 2 || len(c.InUse) > 0 {
			t.Fatalf("killed after %v: %+v, %v", delay, c, err)
		}
		for i, judge := range []string{"fsck.vfat -n", "e2fsck -fn"} {
			dev, detach := attachPart(t, path, &c.Partitions[i], 512)
			words := strings.Fields(judge)
			tool(t, words[0], words[1], dev)
			detach()
		}
	}
	t.Logf("killed %d times, %d times there was something already", kills, refused)
	if kills < 5 || refused == 0 {
		t.Errorf("killed %d times, refused %d times: want more of both", kills, refused)
	}
}
