package vm

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// monitor runs one command of QEMU's machine protocol (QMP) on a connection of its own.
// https://www.qemu.org/docs/master/interop/qmp-spec.html: a greeting, then each command
// is one object and is answered by one with "return" or "error"; objects with "event"
// come in between.
func monitor(ctx context.Context, socket, command string, args any) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	defer stop()
	out, in := json.NewEncoder(conn), json.NewDecoder(conn)
	var greeting struct{ QMP *struct{} }
	if err := in.Decode(&greeting); err != nil || greeting.QMP == nil {
		return fmt.Errorf("reading the monitor's greeting: %v", err)
	}
	type request struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}
	for _, r := range []request{{Execute: "qmp_capabilities"}, {command, args}} {
		if err := out.Encode(r); err != nil {
			return err
		}
		for {
			var answer struct {
				Return json.RawMessage
				Error  *struct{ Class, Desc string }
			}
			if err := in.Decode(&answer); err != nil {
				return fmt.Errorf("running monitor command %q: %w", r.Execute, err)
			}
			if answer.Error != nil {
				return fmt.Errorf("running monitor command %q: %s: %s", r.Execute, answer.Error.Class, answer.Error.Desc)
			}
			if answer.Return != nil {
				break
			}
		}
	}
	return nil
}
