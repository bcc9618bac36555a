package main

import (
	"fmt"
	"strings"
)

// A longOption is an option of a program that parses with getopt_long(3).
type longOption struct {
	name     string
	hasValue bool
}

// getopt parses arguments as getopt_long(3) does for programs without short
// options: options and arguments in any order, "--" before the last of the options,
// values after "=" or as the next argument, and names cut short where that leaves
// one choice. It calls fn for each option and returns the arguments.
func getopt(args []string, options []longOption, fn func(name, value string) error) ([]string, error) {
	var rest []string
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		if arg == "--" {
			return append(rest, args...), nil
		}
		if len(arg) < 2 || arg[0] != '-' {
			rest = append(rest, arg)
			continue
		}
		text, isLong := strings.CutPrefix(arg, "--")
		if !isLong {
			return nil, fmt.Errorf("unknown option %q", arg)
		}
		name, value, hasValue := strings.Cut(text, "=")
		opt, err := findOption(options, name)
		switch {
		case err != nil:
			return nil, err
		case hasValue && !opt.hasValue:
			return nil, fmt.Errorf("option --%s takes no value", opt.name)
		case opt.hasValue && !hasValue:
			if len(args) == 0 {
				return nil, fmt.Errorf("option --%s needs a value", opt.name)
			}
			value, args = args[0], args[1:]
		}
		if err := fn(opt.name, value); err != nil {
			return nil, err
		}
	}
	return rest, nil
}

// wantsHelp reports whether help is all that is asked for. The programs of the composefs
// project have no such option, and nobody relies on an error.
func wantsHelp(args []string) bool {
	return len(args) == 1 && (args[0] == "--help" || args[0] == "-h")
}

func findOption(options []longOption, name string) (longOption, error) {
	var found []longOption
	for _, o := range options {
		if o.name == name {
			return o, nil
		}
		if strings.HasPrefix(o.name, name) {
			found = append(found, o)
		}
	}
	switch len(found) {
	case 0:
		return longOption{}, fmt.Errorf("unknown option \"--%s\"", name)
	case 1:
		return found[0], nil
	}
	return longOption{}, fmt.Errorf("option \"--%s\" is ambiguous: --%s or --%s", name, found[0].name, found[1].name)
}
