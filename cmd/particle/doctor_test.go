package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/mount"
)

func TestDoctor(t *testing.T) {
	dir := t.TempDir()
	var out, stderr bytes.Buffer
	status := run([]string{"particle", "--store", dir, "doctor", "--json"}, nil, &out, &stderr)
	var d diagnosis
	if err := json.Unmarshal(out.Bytes(), &d); err != nil {
		t.Fatalf("%v\n%s", err, out.Bytes())
	}
	f := mount.Probe(dir)
	want, why := f.Best()
	if d.Store != dir || d.Kernel != f.Kernel || d.Verification != want || d.Why != why {
		t.Errorf("got %+v, want store %q, kernel %q, %s: %s", d, dir, f.Kernel, want, why)
	}
	if got := status == exitOK; got != (f.Mountable() == nil) {
		t.Errorf("got status %d, and Mountable says %v", status, f.Mountable())
	}
	for _, c := range d.Checks {
		if c.OK != (c.Why == "") || c.OK && c.Otherwise != "" {
			t.Errorf("got %+v", c)
		}
	}

	out.Reset()
	if status := run([]string{"particle", "doctor", "x"}, nil, &out, &stderr); status != exitUsage || out.Len() != 0 {
		t.Errorf("with an argument: got status %d and %q, want %d", status, out.String(), exitUsage)
	}
}

func TestDoctorTable(t *testing.T) {
	var out bytes.Buffer
	d := diagnosis{
		Store: "/store", Kernel: "6.1", Verification: mount.Checked, Why: "no fs-verity",
		Checks: []check{
			{"EROFS", mount.Support{OK: true}, ""},
			{"data-only layers", mount.Support{Why: "invalid argument"}, "the objects are an ordinary layer"},
			{"two overlays", mount.Support{Why: mount.NotTried}, ""},
		},
		Tools: []tool{
			{"podman", "building", "/usr/bin/podman", "podman"},
			{"mmdebstrap", "bootstrap", "", "mmdebstrap"},
		},
	}
	if err := d.print(&term{out: &out}); err != nil {
		t.Fatal(err)
	}
	want := `kernel              6.1
store               /store
mounts are at best  checked: no fs-verity

EROFS             yes
data-only layers  no: the objects are an ordinary layer (invalid argument)
two overlays      not tried

podman      /usr/bin/podman
mmdebstrap  missing, for bootstrap

to get what is missing: apt install mmdebstrap
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}

	for want, f := range map[string]mount.Features{
		"sudo":             {},
		"modprobe erofs":   {Privilege: mount.Support{OK: true}},
		"modprobe loop":    {Privilege: mount.Support{OK: true}, Erofs: mount.Support{OK: true}},
		"modprobe overlay": {Privilege: mount.Support{OK: true}, Erofs: mount.Support{OK: true}, Loop: mount.Support{OK: true}},
	} {
		d := diagnosis{features: f}
		if got := d.advice(); !strings.Contains(got, want) || f.Mountable() == nil {
			t.Errorf("%+v: got %q, want something with %q", f, got, want)
		}
	}
}

func TestPodmanChecks(t *testing.T) {
	all := mount.Support{OK: true}
	f := &mount.Features{Privilege: all, Erofs: all, File: all, Loop: all, Overlay: all}
	for _, c := range []struct {
		version      string
		major, minor int
		want         []bool // layers, images, without root
	}{{"4.3.1", 4, 3, []bool{true, false, false}}, {"5.4.2", 5, 4, []bool{true, true, false}}, {"5.8.6", 5, 8, []bool{false, true, false}}} {
		for i, got := range podmanChecks(&podmanPlace{version: c.version, major: c.major, minor: c.minor}, f) {
			if got.OK != c.want[i] || got.OK != (got.Why == "") || got.OK != (got.Otherwise == "") {
				t.Errorf("podman %s: got %+v, want ok=%v", c.version, got, c.want[i])
			}
		}
	}
	f.Erofs = mount.Support{Why: "no such device"}
	for _, got := range podmanChecks(&podmanPlace{version: "5.4.2", major: 5, minor: 4}, f) {
		if got.OK {
			t.Errorf("without EROFS: got %+v", got)
		}
	}
}
