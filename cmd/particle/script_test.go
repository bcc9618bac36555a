package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/particle-os/particle/registry"
)

func TestMain(m *testing.M) {
	program := func() { os.Exit(run(os.Args, os.Stdin, os.Stdout, os.Stderr)) }
	testscript.Main(m, map[string]func(){
		"particle":       program,
		"mkcomposefs":    program,
		"composefs-info": program,
	})
}

// TestScripts runs the command as a user does; testdata/script says what for.
func TestScripts(t *testing.T) {
	server, err := registry.Serve(context.Background(), "", "127.0.0.1:0", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("PARTICLE_STORE", filepath.Join(env.WorkDir, "store"))
			env.Setenv("REGISTRY", server.Addr())
			return nil
		},
		Condition: func(cond string) (bool, error) {
			if cond == "root" {
				return os.Geteuid() == 0, nil
			}
			return false, fmt.Errorf("unknown condition %q", cond)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){"mktar": makeTar},
	})
}

// makeTar is the script command "mktar FILE ENTRY...": it writes a tar. An entry is
// NAME/ (a directory), NAME=CONTENT, NAME*SIZE (of letters), NAME->TARGET (a
// symbolic link) or NAME=>TARGET (a hard link).
func makeTar(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: mktar FILE ENTRY...")
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, arg := range args[1:] {
		h := &tar.Header{Mode: 0o644, ModTime: time.Unix(1_000_000_000, 0), Typeflag: tar.TypeReg, Name: arg}
		body := ""
		switch {
		case strings.Contains(arg, "=>"):
			h.Typeflag = tar.TypeLink
			h.Name, h.Linkname, _ = strings.Cut(arg, "=>")
		case strings.Contains(arg, "->"):
			h.Typeflag = tar.TypeSymlink
			h.Name, h.Linkname, _ = strings.Cut(arg, "->")
		case strings.Contains(arg, "="):
			h.Name, body, _ = strings.Cut(arg, "=")
		case strings.Contains(arg, "*"):
			name, size, _ := strings.Cut(arg, "*")
			n, err := strconv.Atoi(size)
			ts.Check(err)
			h.Name, body = name, strings.Repeat(name[len(name)-1:], n)
		case strings.HasSuffix(arg, "/"):
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
		}
		h.Size = int64(len(body))
		ts.Check(w.WriteHeader(h))
		_, err := w.Write([]byte(body))
		ts.Check(err)
	}
	ts.Check(w.Close())
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b.Bytes(), 0o644))
}
