package main

import (
	"strings"
	"testing"
	"time"

	"github.com/particle-os/particle/hostdeploy"
	"github.com/particle-os/particle/hostdeploy/bootloader"
)

func TestParseImage(t *testing.T) {
	for _, c := range []struct {
		image, ref string // "" for none
		name       bool
	}{
		{"registry.example/server:14", "docker://registry.example/server:14", false},
		{"registry.example:5000/server:14", "docker://registry.example:5000/server:14", false},
		{"localhost:5000/server", "docker://localhost:5000/server:latest", false},
		{"docker://localhost/server", "docker://localhost/server:latest", false},
		{"containers-storage:localhost/server", "containers-storage:localhost/server", false},
		{"localhost/server", "docker://localhost/server:latest", true},
		{"server", "docker://docker.io/library/server:latest", true},
		{"debian/server", "docker://docker.io/debian/server:latest", true},
		{"server:14", "", true},
		{"sha256:0123", "", true},
	} {
		ref, name, err := parseImage(c.image)
		got := ref.String()
		if err != nil {
			got = ""
		}
		if got != c.ref || name != c.name {
			t.Errorf("%s: got %q, %v, want %q, %v", c.image, got, name, c.ref, c.name)
		}
	}
}

// Deployments are old (1), new (2) and newer (3), by their manifests.
func TestNoUpdate(t *testing.T) {
	three := 3
	deployment := func(manifest string, set func(d *hostdeploy.Deployment)) *hostdeploy.Deployment {
		d := &hostdeploy.Deployment{Entry: &bootloader.Entry{}}
		d.ID, d.Manifest, d.Created = manifest, manifest, time.Unix(int64(manifest[0]), 0)
		if set != nil {
			set(d)
		}
		return d
	}
	runs := func(d *hostdeploy.Deployment) { d.Booted = true }
	onTrial := func(d *hostdeploy.Deployment) { d.Tries = &three }
	for _, c := range []struct {
		name     string
		all      []*hostdeploy.Deployment
		failures string
		left     string
		manifest string
		force    bool
		want     string // a part of the reason, "" for an update
	}{
		{name: "a newer image", all: []*hostdeploy.Deployment{deployment("1", runs)}, manifest: "2"},
		{name: "what failed", all: []*hostdeploy.Deployment{deployment("1", runs)}, failures: "2", manifest: "2", want: "used up its tries"},
		{name: "what failed, forced", all: []*hostdeploy.Deployment{deployment("1", runs)}, failures: "2", manifest: "2", force: true},
		{name: "after what failed", all: []*hostdeploy.Deployment{deployment("1", runs)}, failures: "2", manifest: "3"},
		{name: "what failed just now", all: []*hostdeploy.Deployment{deployment("1", runs), deployment("2", func(d *hostdeploy.Deployment) { d.Failed = true })},
			manifest: "2", want: "used up its tries"},
		{name: "what was rolled back from", all: []*hostdeploy.Deployment{deployment("1", runs), deployment("2", nil)}, left: "2", manifest: "2", want: "rolled back from"},
		{name: "what was rolled back from, forced", all: []*hostdeploy.Deployment{deployment("1", runs), deployment("2", nil)}, left: "2", manifest: "2", force: true},
		{name: "a rollback waits", all: []*hostdeploy.Deployment{deployment("1", nil), deployment("2", runs)}, left: "2", manifest: "2", force: true, want: "is what runs"},
		{name: "a rollback waits, a newer image", all: []*hostdeploy.Deployment{deployment("1", nil), deployment("2", runs)}, left: "2", manifest: "3", want: "waits for its restart"},
		{name: "a rollback waits, a newer image is forced", all: []*hostdeploy.Deployment{deployment("1", nil), deployment("2", runs)}, manifest: "3", force: true},
		{name: "deployed with --now", all: []*hostdeploy.Deployment{deployment("2", onTrial), deployment("1", runs)}, manifest: "3"},
		{name: "the older one chosen in the menu", all: []*hostdeploy.Deployment{deployment("2", nil), deployment("1", runs)}, manifest: "3"},
		{name: "the running one's entry is lost", all: []*hostdeploy.Deployment{deployment("1", nil)}, manifest: "2"},
		{name: "the running one on its last try", all: []*hostdeploy.Deployment{deployment("1", nil), deployment("2", func(d *hostdeploy.Deployment) { runs(d); onTrial(d) })}, manifest: "3"},
		{name: "nothing boots", manifest: "2"},
	} {
		from := deployment("2", func(d *hostdeploy.Deployment) { d.Booted, d.Entry = true, nil })
		for _, d := range c.all {
			if d.Booted {
				from = d
			}
		}
		events := func(manifest string) []hostdeploy.Event { return []hostdeploy.Event{{Manifest: manifest}} }
		got := noUpdate(c.force, c.all, from, events(c.failures), events(c.left), "docker://r/i", c.manifest)
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: got %q, want %q", c.name, got, c.want)
		}
	}
}
