package program

import (
	"errors"
	"fmt"
	"os"
	"strings"
)

// Namespace is containerd's for the tests of this process: runc knows containers by
// namespace and id, on the whole machine and whichever containerd they are of.
var Namespace = fmt.Sprintf("test-%d", os.Getpid())

// End is what a program that runs in a container prints at its end, for Whole.
const End = "(that was all)\n"

// errLost is what Whole returns when it gives up.
var errLost = errors.New("ctr loses the end of what a container prints again and again")

// Whole returns what a program prints in a container, without End. ctr of containerd
// 1.x may lose the last of it: when the container's process ends, ctr deletes the task,
// and with it closes the pipes that it has not read to their end. So run, which starts
// a new process each time, is called again until End is there.
func Whole(run func() (string, error)) (string, error) {
	var out string
	for range 5 {
		var err error
		if out, err = run(); err != nil {
			return out, err
		}
		if whole, ok := strings.CutSuffix(out, End); ok {
			return whole, nil
		}
	}
	return out, fmt.Errorf("%w: %q", errLost, out)
}
