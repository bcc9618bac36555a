package main

import (
	"strings"

	"github.com/urfave/cli/v2"
)

// arrange moves the flags of a verb in front of its arguments and the flags of the
// whole program in front of the verb, so that they may stand anywhere, as users of
// podman and apt write them. What follows "--" stays where it is, and so do the
// arguments of verbs that parse their own.
func arrange(app *cli.App, args []string) ([]string, error) {
	global := flagTable(app.Flags)
	var front, verbs, flags, rest []string
	cmds := app.Commands
	local := map[string]bool{}
	inVerbs := true

	for i := 1; i < len(args); i++ {
		arg := args[i]
		if arg == "--" || arg == "--generate-bash-completion" {
			rest = append(rest, args[i:]...) // the latter is looked for at the end
			break
		}
		if len(arg) > 1 && arg[0] == '-' {
			name, _, joined := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			dst := &flags
			takesValue, known := local[name]
			if !known {
				if takesValue, known = global[name]; known {
					dst = &front
				}
			}
			*dst = append(*dst, arg)
			if takesValue && !joined {
				if i+1 == len(args) {
					return nil, usagef("flag %s needs a value", arg)
				}
				i++
				*dst = append(*dst, args[i])
			}
			continue
		}
		if inVerbs {
			if cmd := findCommand(cmds, arg); cmd != nil {
				verbs = append(verbs, arg)
				if cmd.SkipFlagParsing {
					rest = append(rest, args[i+1:]...)
					break
				}
				cmds = cmd.Subcommands
				for name, takes := range flagTable(cmd.Flags) {
					local[name] = takes
				}
				continue
			}
			inVerbs = false
		}
		rest = append(rest, arg)
	}

	out := append([]string{args[0]}, front...)
	out = append(out, verbs...)
	out = append(out, flags...)
	return append(out, rest...), nil
}

func findCommand(cmds []*cli.Command, name string) *cli.Command {
	for _, cmd := range cmds {
		if cmd.HasName(name) {
			return cmd
		}
	}
	return nil
}

// flagTable tells for the name of each flag whether it takes a value.
func flagTable(flags []cli.Flag) map[string]bool {
	table := map[string]bool{}
	for _, f := range flags {
		_, isBool := f.(*cli.BoolFlag)
		for _, name := range f.Names() {
			table[name] = !isBool
		}
	}
	return table
}
