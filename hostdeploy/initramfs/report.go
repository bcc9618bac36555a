package initramfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
)

// A Report is what the initramfs found and did: boot.json in the run directory.
type Report struct {
	// Digest is the image that was asked for; zero for a manifest of layers.
	Digest fsverity.Digest `json:"digest"`
	// Deployment is the id of the deployment whose state is in use.
	Deployment string `json:"deployment,omitempty"`
	// Verification says who checks the system's files, and Why says why it is not better.
	Verification mount.Verification `json:"verification"`
	Why          string             `json:"why"`
	// ImageDigest is what the kernel measured, or what was computed where it has no
	// fs-verity (Measured is false then). It equals Digest or the boot was refused.
	ImageDigest fsverity.Digest `json:"imageDigest"`
	Measured    bool            `json:"measured"`
	// Insecure: the command line allowed to boot without fs-verity.
	Insecure bool `json:"insecure"`
	// Loop: the image is on a loop device.
	Loop bool `json:"loop"`
	// Transient names what is lost at the end: "root", "etc", "var".
	Transient []string `json:"transient,omitempty"`
	// Manifest is the path of the manifest of layers that was booted, and Layers the
	// files, lowest first.
	Manifest string   `json:"manifest,omitempty"`
	Layers   []string `json:"layers,omitempty"`
	// Enabled tells of fs-verity that was enabled on this boot.
	Enabled *Enabled `json:"enabled,omitempty"`
	// Warnings are for people.
	Warnings []string `json:"warnings,omitempty"`
	// Device is st_dev of the root that was set up, as "0:45": by it the report knows
	// its own root.
	Device string `json:"device"`
	// Kernel is the release of the kernel that it was set up on.
	Kernel string `json:"kernel"`
}

// Enabled tells how far fs-verity was enabled on a store.
type Enabled struct {
	// Objects is how many have fs-verity and the digest of their name now.
	Objects int `json:"objects"`
	// Already is how many of them had it before: from a boot that was interrupted.
	Already int `json:"already"`
	// Damaged are objects that have another content than their name says, at most
	// a hundred; reading them fails. Where there are any, the store does not promise
	// fs-verity and the next boot tries again.
	Damaged []string `json:"damaged,omitempty"`
	// Complete: all have it, and the store's meta.json says so.
	Complete bool `json:"complete"`
	// Seconds is how long it took.
	Seconds float64 `json:"seconds"`
}

const (
	reportName = "boot.json" // of this boot
	nextName   = "next.json" // of the root that a soft reboot goes to
	maxReport  = 1 << 20
)

// RunDir is where the running system has its report.
const RunDir = "/run/particle"

// Read returns the report of the running system from its run directory, [RunDir]: that
// of the root "/", which after a soft reboot is another than the one that was booted.
// The error is [ErrNoReport] where there is none.
func Read(dir string) (*Report, error) { return readFor(dir, "/") }

func readFor(dir, root string) (*Report, error) {
	boot, err := readReport(filepath.Join(dir, reportName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	next, err := readReport(filepath.Join(dir, nextName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if next != nil {
		dev, err := deviceOf(root)
		if err != nil {
			return nil, fmt.Errorf("reading the report of the boot: %w", err)
		}
		if next.Device == dev {
			return next, nil
		}
	}
	if boot == nil {
		return nil, fmt.Errorf("%w in %q: this system was not booted by Particle", ErrNoReport, dir)
	}
	return boot, nil
}

// readReport returns nil and an error where there is no such file.
func readReport(name string) (*Report, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("reading the report of the boot: %w", err)
	}
	defer f.Close()
	data, err := readLimited(f, maxReport)
	if err != nil {
		return nil, fmt.Errorf("reading the report of the boot: %q: %w", name, err)
	}
	r := &Report{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("reading the report of the boot: %q: %w", name, err)
	}
	return r, nil
}

// write puts a report into the run directory, whole or not at all.
func (r *Report) write(dir, name string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("writing the report of the boot: %w", err)
	}
	temp := filepath.Join(dir, "."+name)
	if err := os.WriteFile(temp, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the report of the boot: %w", err)
	}
	if err := os.Rename(temp, filepath.Join(dir, name)); err != nil {
		return fmt.Errorf("writing the report of the boot: %w", err)
	}
	return nil
}

// deviceOf returns st_dev of a directory as "major:minor".
func deviceOf(dir string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", &fs.PathError{Op: "stat", Path: dir, Err: err}
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)), nil
}

func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// Describe says in words what a report is about.
func Describe(r *Report) string {
	if r.Manifest != "" {
		return fmt.Sprintf("%d layers of %s", len(r.Layers), r.Manifest)
	}
	hex, n, again := strings.Cut(r.Deployment, ".")
	if again {
		n = "." + n
	}
	return "deployment " + hex[:min(12, len(hex))] + n
}
