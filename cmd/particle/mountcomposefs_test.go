package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/mount"
)

func TestMountComposefsOptions(t *testing.T) {
	digest := fsverity.Sum(fsverity.SHA256, nil)
	for _, c := range []struct {
		args string // separated by spaces
		want mount.Options
	}{
		{"-o basedir=/o IMG DIR", mount.Options{Objects: []string{"/o"}}},
		{"IMG DIR -o rw,basedir=/o", mount.Options{Objects: []string{"/o"}}},
		{"IMG -tcomposefs DIR -obasedir=/o:/p,ro", mount.Options{Objects: []string{"/o", "/p"}, ReadOnly: true}},
		{"-o ro,rw,basedir=/o -- IMG DIR", mount.Options{Objects: []string{"/o"}}},
		{"-o verity,basedir=/o IMG DIR", mount.Options{Objects: []string{"/o"}, Verity: mount.VerityRequire}},
		{"-o tryverity,basedir=/o IMG DIR", mount.Options{Objects: []string{"/o"}, Verity: mount.VerityTry}},
		{"-o tryverity,digest=" + strings.ToUpper(digest.String()) + ",basedir=/o IMG DIR",
			mount.Options{Objects: []string{"/o"}, Verity: mount.VerityRequire, Digest: digest}},
		{`-o basedir=/a\,b=c\\d,upperdir=/u,workdir=/w IMG DIR`,
			mount.Options{Objects: []string{`/a,b=c\d`}, Upper: "/u", Work: "/w"}},
		{"-o basedir=/x -o basedir=/o IMG DIR", mount.Options{Objects: []string{"/o"}}}, // the last -o counts
	} {
		image, target, got, err := parseMountComposefs(strings.Fields(c.args))
		if err != nil || image != "IMG" || target != "DIR" || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %q %q %+v, %v; want %+v", c.args, image, target, got, err, c.want)
		}
	}
}

func TestMountComposefsFailures(t *testing.T) {
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, bytes.Repeat([]byte("x"), 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   []string
		want   string
		usage  bool
		status int
	}{
		{[]string{"-h"}, "", true, 0},
		{nil, "No source path specified", true, 1},
		{[]string{"IMG"}, "No mount path specified", true, 1},
		{[]string{"IMG", "DIR"}, "No object dirs specified", true, 1},
		{[]string{"-x", "IMG", "DIR"}, "invalid option -- 'x'", true, 1},
		{[]string{"IMG", "DIR", "-o"}, "option requires an argument -- 'o'", true, 1},
		{[]string{"-t", "erofs", "IMG", "DIR"}, "Unsupported fs type 'erofs'", false, 1},
		{[]string{"-o", "basedir", "IMG", "DIR"}, "No value specified for basedir option", false, 1},
		{[]string{"-o", "basedir=/o,nosuid", "IMG", "DIR"}, "Unsupported option nosuid", false, 1},
		{[]string{"-o", "basedir=/o::/p", "IMG", "DIR"}, "Value for basedir option has incorrect format", false, 1},
		{[]string{"-o", "basedir=/o,upperdir=/u", "IMG", "DIR"}, "Both workdir and upperdir must be specified if used", false, 1},
		{[]string{"-o", "basedir=/o,digest=xyz", "IMG", "DIR"}, "digest option", false, 1},
		{[]string{"-o", "basedir=/o,idmap=" + dir + "/missing", "IMG", "DIR"}, "Failed to open userns " + dir + "/missing: No such file or directory", false, 1},
		{[]string{"-o", "basedir=/o", dir + "/missing", "DIR"}, "Failed to open " + dir + "/missing: No such file or directory", false, 1},
		{[]string{"-o", "basedir=/o", text, dir}, "Failed to mount composefs " + text + ": ", false, 1},
		{[]string{"-o", "basedir=/o", text, dir}, "not a composefs image", false, 1},
	} {
		var stdout, stderr bytes.Buffer
		status := mountComposefsMain(context.Background(), c.args, nil, &stdout, &stderr)
		if status != c.status || !strings.Contains(stderr.String(), c.want) || stdout.Len() != 0 {
			t.Errorf("%q: got status %d and %q, want %d and %q", c.args, status, stderr.String(), c.status, c.want)
		}
		if got := strings.Contains(stderr.String(), "usage:"); got != c.usage {
			t.Errorf("%q: usage printed: %t, want %t", c.args, got, c.usage)
		}
	}
}
