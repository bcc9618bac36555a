package main

import (
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
)

// arrange moves the flags of a verb in front of its arguments and the flags of the
// whole program in front of the verb, so that they may stand anywhere, as users of
// podman and apt write them. What follows "--" stays where it is, and so do the
// arguments of verbs that parse their own. Where help is asked for, nothing but the verb
// is left.
func arrange(app *cli.App, args []string) ([]string, error) {
	global := flagTable(app.Flags)
	var front, verbs, flags, rest, unknown []string
	cmds := app.Commands
	help, parsed := false, true
	local := map[string]bool{}
	inVerbs := true

	for i := 1; i < len(args); i++ {
		arg := args[i]
		if arg == "--" || arg == "--generate-bash-completion" {
			rest = append(rest, args[i:]...) // the latter is looked for at the end
			break
		}
		if len(arg) > 1 && arg[0] == '-' {
			name, value, joined := strings.Cut(strings.TrimLeft(arg, "-"), "=")
			dst := &flags
			takesValue, known := local[name]
			if !known {
				if takesValue, known = global[name]; known {
					dst = &front
				}
			}
			if name == "help" || name == "h" {
				help = true
				continue
			}
			if !known {
				unknown = append(unknown, arg)
			}
			if _, err := strconv.ParseBool(value); known && !takesValue && joined && err != nil {
				return nil, usagef("option %s takes no value, got %q", strings.TrimSuffix(arg, "="+value), value)
			}
			*dst = append(*dst, arg)
			if takesValue && !joined {
				if i+1 == len(args) {
					return nil, usagef("option %s needs a value", arg)
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
					parsed = false
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

	// "particle help VERB" is another way to say it.
	if len(verbs) == 0 && len(rest) > 0 && (rest[0] == "help" || rest[0] == "h") {
		return arrange(app, append(append([]string{args[0]}, rest[1:]...), "--help"))
	}
	if help && (len(verbs) > 0 || len(rest) == 0) {
		return append(append([]string{args[0]}, verbs...), "--help"), nil
	}
	// Of a flag before its verb only now is known what it is. The shell's completion
	// asks with flags that are half written.
	completes := len(rest) > 0 && rest[0] == "--generate-bash-completion"
	for _, arg := range unknown {
		option, _, _ := strings.Cut(arg, "=")
		if _, known := local[strings.TrimLeft(option, "-")]; !known && parsed && !completes {
			return nil, usagef("there is no option %s; see %s --help", option, strings.Join(append([]string{app.Name}, verbs...), " "))
		}
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

// noArgs refuses the arguments of a verb that takes none: what was meant as a limit to
// what it does is no limit.
func noArgs(c *cli.Context) error {
	if c.NArg() == 0 {
		return nil
	}
	return usagef("%s takes no arguments, got %q", strings.TrimPrefix(c.Command.HelpName, c.App.Name+" "), c.Args().First())
}
