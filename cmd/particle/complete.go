package main

import (
	"regexp"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter"
	"github.com/particle-os/particle/converter/store"
)

// What a shell is asked to complete by itself, besides the lines that it is given.
const (
	completeFiles = "@files"
	completeDirs  = "@dirs"
)

// transports are the beginnings of images' names.
var transports = []string{"docker://", "oci:", "oci-archive:", "docker-archive:", "containers-storage:"}

// complete returns what the last of words, the arguments of particle so far, may
// become: lines of a word, or of a word, a tab and what it means. A line with "@" in
// front asks the shell for names of files. names lists the images of a store.
func complete(app *cli.App, words []string, names func(dir string) []string) []string {
	if len(words) == 0 {
		words = []string{""}
	}
	c := completion{app: app, cmds: app.Commands, flags: slices.Clone(app.Flags), names: names}
	last := words[len(words)-1]
	for _, w := range words[:len(words)-1] {
		c.read(w)
	}
	switch name, value, joined := strings.Cut(last, "="); {
	case c.wants != nil:
		c.values(c.wants, "", last)
	case c.raw || c.ended:
		c.argument(last)
	case joined && strings.HasPrefix(name, "-"):
		if f := c.flag(name); f != nil {
			c.values(f, name+"=", value)
		}
	case strings.HasPrefix(last, "-"):
		c.flagNames(last)
	default:
		c.verbs(last)
		if c.cmd == nil || len(c.cmds) == 0 || c.cmd.ArgsUsage != "" {
			c.argument(last)
		}
	}
	return c.lines
}

// A completion is a command line that has been read in part.
type completion struct {
	app   *cli.App
	cmd   *cli.Command   // the verb so far, nil for none
	cmds  []*cli.Command // the verbs that may follow
	flags []cli.Flag     // of the program and of the verbs so far
	args  int            // how many arguments there were
	wants cli.Flag       // the flag whose value comes next, nil for none
	store string         // the value of --store
	ended bool           // "--" was there
	raw   bool           // the verb parses its own options

	names func(string) []string
	lines []string
}

// read takes a word that is complete.
func (c *completion) read(w string) {
	name, value, joined := strings.Cut(w, "=")
	switch {
	case c.wants != nil:
		c.remember(c.wants, w)
		c.wants = nil
	case c.raw || c.ended || w == "-" || !strings.HasPrefix(w, "-"):
		if cmd := findCommand(c.cmds, w); cmd != nil && c.args == 0 && !c.raw && !c.ended {
			c.cmd, c.cmds, c.raw = cmd, cmd.Subcommands, cmd.SkipFlagParsing
			c.flags = append(c.flags, cmd.Flags...)
			return
		}
		c.args++
	case w == "--":
		c.ended = true
	default:
		f := c.flag(name)
		switch {
		case f == nil || !takesValue(f):
		case joined:
			c.remember(f, value)
		default:
			c.wants = f
		}
	}
}

func (c *completion) remember(f cli.Flag, value string) {
	if f.Names()[0] == "store" {
		c.store = value
	}
}

func (c *completion) flag(word string) cli.Flag {
	for _, f := range c.flags {
		if slices.Contains(f.Names(), strings.TrimLeft(word, "-")) {
			return f
		}
	}
	return nil
}

func takesValue(f cli.Flag) bool {
	doc, ok := f.(cli.DocGenerationFlag)
	return ok && doc.TakesValue()
}

// offer adds a word if it begins as the one to complete does.
func (c *completion) offer(begin, word, meaning string) {
	if !strings.HasPrefix(word, begin) {
		return
	}
	if meaning != "" {
		word += "\t" + meaning
	}
	if !slices.Contains(c.lines, word) {
		c.lines = append(c.lines, word)
	}
}

func (c *completion) verbs(begin string) {
	if c.args > 0 {
		return
	}
	for _, cmd := range c.cmds {
		if !cmd.Hidden {
			c.offer(begin, cmd.Name, cmd.Usage)
		}
	}
}

func (c *completion) flagNames(begin string) {
	for _, f := range c.flags {
		doc, ok := f.(cli.DocGenerationFlag)
		if v, can := f.(cli.VisibleFlag); !ok || can && !v.IsVisible() {
			continue
		}
		_, usage := unquoteUsage(doc.GetUsage())
		for _, n := range f.Names() {
			if len(n) > 1 {
				c.offer(begin, "--"+n, usage)
			}
		}
	}
	c.offer(begin, "--help", "show help")
}

// choices are names of values such as "off|try|require".
var choices = regexp.MustCompile(`^[a-z][a-z0-9-]*(\|[a-z][a-z0-9-]*)+$`)

// values offers the values of a flag, each behind prefix.
func (c *completion) values(f cli.Flag, prefix, begin string) {
	value, _ := unquoteUsage(f.(cli.DocGenerationFlag).GetUsage())
	c.place(value, prefix, begin)
}

// argument offers what the next argument of the verb may be, by its synopsis.
func (c *completion) argument(begin string) {
	if c.raw {
		c.lines = append(c.lines, completeFiles)
		return
	}
	if c.cmd == nil {
		return
	}
	slots := strings.Fields(strings.NewReplacer("[", "", "]", "").Replace(c.cmd.ArgsUsage))
	if len(slots) == 0 {
		return
	}
	i := c.args
	if i >= len(slots) {
		if i = len(slots) - 1; !strings.HasSuffix(slots[i], "...") {
			return
		}
	}
	c.place(strings.TrimSuffix(slots[i], "..."), "", begin)
}

// place offers what may stand for a word of a synopsis.
func (c *completion) place(what, prefix, begin string) {
	if choices.MatchString(what) {
		for v := range strings.SplitSeq(what, "|") {
			c.offer(prefix+begin, prefix+v, "")
		}
		return
	}
	for w := range strings.SplitSeq(what, "|") {
		switch w {
		case "NAME", "IMAGE", "A", "B":
			if c.names != nil {
				for _, n := range c.names(c.store) {
					c.offer(prefix+begin, prefix+n, "image")
				}
			}
		}
		switch w {
		case "SOURCE", "TARGET", "IMAGE", "A", "B":
			for _, t := range transports {
				c.offer(prefix+begin, prefix+t, "")
			}
		}
		switch w {
		case "FILE", "SOURCE", "IMAGE", "A", "B", "DEVICE":
			c.lines = append(c.lines, completeFiles)
		case "DIR", "ROOT":
			c.lines = append(c.lines, completeDirs)
		}
	}
	c.lines = slices.Compact(c.lines)
}

// imageNames lists the names of a store's images; none where it cannot be read.
func imageNames(dir string) []string {
	if dir == "" {
		dir = defaultStore()
	}
	st, err := store.Open(dir)
	if err != nil {
		return nil
	}
	all, err := converter.List(st)
	if err != nil {
		return nil
	}
	var names []string
	for _, s := range all {
		names = append(names, s.Names...)
	}
	return names
}
