// Command agent is the root shell that the images of the boot tests carry: see package
// guest.
package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/particle-os/particle/tests/boot/vm/guest"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "test shell:", err)
		os.Exit(1)
	}
}

func run() error {
	boot, err := guest.BootID()
	if err != nil {
		return err
	}
	port, err := guest.Open()
	if err != nil {
		return err
	}
	defer port.Close()
	for _, v := range []string{"HOME=/root", "TERM=dumb", "LC_ALL=C.UTF-8",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"} {
		name, value, _ := strings.Cut(v, "=")
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	return guest.Serve(port, port, boot)
}
