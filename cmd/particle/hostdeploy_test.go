package main

import "testing"

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
