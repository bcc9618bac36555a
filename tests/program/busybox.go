package program

import (
	"bytes"
	"os"
	"os/exec"
	"testing"
)

// Busybox returns the file of a busybox that needs no libraries, to be the only program of
// a tree. It skips the test where there is none.
func Busybox(t testing.TB) []byte {
	t.Helper()
	name, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("busybox is missing (apt install busybox-static)")
	}
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(data, []byte("/ld-linux")) {
		t.Skip("busybox is not a static program (apt install busybox-static)")
	}
	return data
}
