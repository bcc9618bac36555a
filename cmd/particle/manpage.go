package main

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
)

// manPages makes the manual pages from the verbs: particle.8, and particle-VERB.8 for
// each verb that people see. They are written in the macros of man(7), which man-db and
// mandoc both read; all text is ASCII.
func manPages(app *cli.App, release string, date time.Time) map[string][]byte {
	pages := map[string][]byte{}
	add := func(name string, fill func(*manPage)) {
		p := &manPage{}
		fmt.Fprintf(p, ".TH %s 8 %s \"%s\" \"System administration\"\n", roffText(strings.ToUpper(name)), date.Format("2006-01-02"), roffText(strings.TrimSpace("particle "+release)))
		// No hyphenation, no padding of lines with blanks: commands stay as they are.
		p.WriteString(".nh\n.ad l\n")
		fill(p)
		pages[name+".8"] = p.Bytes()
	}
	add("particle", func(p *manPage) { p.overview(app) })
	for _, cmd := range app.Commands {
		if !cmd.Hidden {
			add("particle-"+cmd.Name, func(p *manPage) { p.verb(app, cmd) })
		}
	}
	return pages
}

// A manPage is a page in the making.
type manPage struct{ bytes.Buffer }

// line writes a request with its arguments.
func (p *manPage) line(request string, args ...string) {
	p.WriteString(request)
	for _, a := range args {
		p.WriteString(` "` + strings.ReplaceAll(roffText(a), `"`, `\(dq`) + `"`)
	}
	p.WriteByte('\n')
}

// raw writes a line of text that has its markup already.
func (p *manPage) raw(s string) {
	if s == "" {
		return
	}
	if s[0] == '.' || s[0] == '\'' {
		s = `\&` + s
	}
	p.WriteString(s + "\n")
}

// fill writes text that is filled anyway, in lines that people can read.
func (p *manPage) fill(s string) {
	for len(s) > 80 {
		i := strings.LastIndexByte(s[:81], ' ')
		if i < 0 {
			if i = strings.IndexByte(s, ' '); i < 0 {
				break
			}
		}
		p.raw(s[:i])
		s = s[i+1:]
	}
	p.raw(s)
}

func (p *manPage) section(name string) { p.line(".SH", name) }

// paragraph begins one; the first of a section needs no request.
func (p *manPage) paragraph() {
	text := strings.TrimSuffix(p.String(), "\n")
	if last := text[strings.LastIndexByte(text, '\n')+1:]; !strings.HasPrefix(last, ".S") && last != ".PP" {
		p.WriteString(".PP\n")
	}
}

// name writes the NAME section, which whatis(1) reads.
func (p *manPage) name(name, usage string) {
	p.section("NAME")
	p.fill(roffText(name) + ` \- ` + roffText(usage))
}

var roffEscapes = strings.NewReplacer(`\`, `\e`, `-`, `\-`, `'`, `\(aq`, "`", `\(ga`, `^`, `\(ha`, `~`, `\(ti`, `…`, `...`)

func roffText(s string) string { return roffEscapes.Replace(s) }

// emphasize marks options and words in capitals that stand for something.
func emphasize(s string, words []string) string {
	var b strings.Builder
	last := 0
	for _, m := range markable.FindAllStringIndex(s, -1) {
		word := s[m[0]:m[1]]
		font := ""
		switch {
		case m[0] > 0 && isWord(s[m[0]-1]):
			continue // within a word: not an option
		case word[0] == '-':
			font = "B"
		case slices.Contains(words, word):
			font = "I"
		default:
			continue
		}
		b.WriteString(roffText(s[last:m[0]]) + `\f` + font + roffText(word) + `\fR`)
		last = m[1]
	}
	return b.String() + roffText(s[last:])
}

var markable = regexp.MustCompile(`--?[a-zA-Z][a-z-]*|[A-Z][A-Z0-9]*`)

func isWord(c byte) bool {
	return c == '-' || c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// placeholders lists the words in capitals of a synopsis.
func placeholders(usage string) []string {
	return regexp.MustCompile(`[A-Z][A-Z0-9]*`).FindAllString(usage, -1)
}

// text writes paragraphs. An empty line parts them; an indented line is an example or
// a table and stays as it is.
func (p *manPage) text(s string, words []string) {
	fresh, literal := true, false
	margin, empty := 0, 0 // of an example: its indentation, and empty lines not yet written
	for l := range strings.Lines(s) {
		l = strings.TrimRight(strings.ReplaceAll(l, "\t", "    "), " \n")
		indented := strings.HasPrefix(l, " ")
		switch {
		case l == "":
			fresh = true
			empty++
			continue
		case indented && !literal:
			p.paragraph()
			p.WriteString(".RS 4\n.nf\n")
			literal = true
			margin, empty = len(l)-len(strings.TrimLeft(l, " ")), 0
		case !indented && literal:
			p.WriteString(".fi\n.RE\n")
			literal, fresh = false, true
		}
		if literal {
			p.WriteString(strings.Repeat("\\&\n", empty))
			empty = 0
			p.raw(roffText(l[min(margin, len(l)-len(strings.TrimLeft(l, " "))):]))
			continue
		}
		if fresh {
			p.paragraph()
			fresh = false
		}
		p.fill(emphasize(l, words))
	}
	if literal {
		p.WriteString(".fi\n.RE\n")
	}
}

// synopsis writes how a verb is called.
func (p *manPage) synopsis(path, args string, options bool) {
	s := `\fB` + roffText(path) + `\fR`
	if options {
		s += ` [\fIoptions\fR]`
	}
	if args != "" {
		s += " " + emphasize(args, placeholders(args))
	}
	p.raw(s)
}

// options writes a list of flags.
func (p *manPage) options(flags []cli.Flag) {
	for _, f := range flags {
		doc, ok := f.(cli.DocGenerationFlag)
		if v, can := f.(cli.VisibleFlag); !ok || can && !v.IsVisible() {
			continue
		}
		value, usage := unquoteUsage(doc.GetUsage())
		if value == "" && doc.TakesValue() {
			value = "VALUE"
		}
		var short, names []string
		for _, n := range f.Names() {
			if len(n) == 1 {
				short = append(short, `\fB`+roffText("-"+n)+`\fR`)
			} else {
				names = append(names, `\fB`+roffText("--"+n)+`\fR`)
			}
		}
		names = append(short, names...)
		tag := strings.Join(names, ", ")
		if doc.TakesValue() {
			tag += ` \fI` + roffText(value) + `\fR`
		}
		p.WriteString(".TP\n")
		p.raw(tag)
		p.text2(sentence(usage)+defaultOf(f, doc, usage)+environment(doc), placeholders(value))
	}
}

// text2 writes text below the tag of a list.
func (p *manPage) text2(s string, words []string) {
	for _, l := range strings.Split(s, "\n") {
		p.fill(emphasize(l, words))
	}
}

// unquoteUsage takes the backquoted name of a flag's value out of its usage.
func unquoteUsage(usage string) (value, text string) {
	before, rest, ok := strings.Cut(usage, "`")
	if !ok {
		return "", usage
	}
	value, after, _ := strings.Cut(rest, "`")
	return value, before + value + after
}

// sentence makes one of a line of help. The names of programs stay as they are.
func sentence(s string) string {
	if s == "" {
		return ""
	}
	if !strings.HasSuffix(s, ".") {
		s += "."
	}
	switch first, _, _ := strings.Cut(s, " "); first {
	case "apt", "gzip,", "mmdebstrap's":
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

func defaultOf(f cli.Flag, doc cli.DocGenerationFlag, usage string) string {
	if strings.Contains(usage, "(default:") {
		return ""
	}
	switch {
	case f.Names()[0] == "store":
		return "\nThe default is /sysroot/composefs on a host that Particle booted, else /var/lib/particle for root and ~/.local/share/particle for others."
	case !doc.TakesValue():
		return ""
	}
	if v := strings.Trim(doc.GetValue(), `"`); v != "" && v != "0" && v != "[]" {
		return "\nThe default is " + v + "."
	}
	return ""
}

func environment(doc cli.DocGenerationFlag) string {
	if vars := doc.GetEnvVars(); len(vars) > 0 {
		return "\nTaken from $" + strings.Join(vars, " or $") + " where the option is not given."
	}
	return ""
}

// overview is the page of the command as a whole.
func (p *manPage) overview(app *cli.App) {
	p.name("particle", app.Usage)
	p.section("SYNOPSIS")
	rest := strings.TrimPrefix(app.UsageText, "particle ")
	p.raw(`\fBparticle\fR ` + emphasize(rest, placeholders(rest)))
	p.section("DESCRIPTION")
	description, _, _ := strings.Cut(app.Description, "\n\nExit status:")
	p.text(aboutParticle+"\n\n"+description, nil)
	p.section("OPTIONS")
	p.options(app.Flags)
	p.paragraph()
	p.fill("Options may stand before the verb, after it, and among its arguments; what follows \\fB\\-\\-\\fR are arguments.")

	p.section("VERBS")
	for _, category := range categories(app) {
		p.line(".SS", category)
		for _, cmd := range app.Commands {
			if cmd.Category == category && !cmd.Hidden {
				p.WriteString(".TP\n")
				p.raw(`\fBparticle\-` + roffText(cmd.Name) + `\fR(8)`)
				p.text2(sentence(cmd.Usage), nil)
			}
		}
	}
	p.examples("")
	p.exitStatus(nil)
	p.files(app.Name)
	p.section("SEE ALSO")
	p.raw(`\fBpodman\fR(1), \fBskopeo\fR(1), \fBmmdebstrap\fR(1), \fBmount\fR(8), \fBsystemd.special\fR(7)`)
}

// categories lists the groups of verbs in the order in which they were added.
func categories(app *cli.App) []string {
	var all []string
	for _, cmd := range app.Commands {
		if !cmd.Hidden && !slices.Contains(all, cmd.Category) {
			all = append(all, cmd.Category)
		}
	}
	return all
}

// verb is the page of one verb with all below it.
func (p *manPage) verb(app *cli.App, cmd *cli.Command) {
	p.name("particle-"+cmd.Name, cmd.Usage)
	p.section("SYNOPSIS")
	path := "particle " + cmd.Name
	tool := toolUsages[cmd.Name]
	if tool != "" {
		call, _, _ := strings.Cut(strings.TrimPrefix(tool, "usage: "), "\n")
		call = strings.TrimPrefix(strings.TrimPrefix(call, cmd.Name), " ")
		p.raw(`\fB` + roffText(path) + `\fR ` + emphasize(call, placeholders(call)))
	}
	below := descend(cmd, "")
	if tool == "" {
		for i, sub := range append([]subverb{{"", cmd}}, below...) {
			if len(visible(sub.Subcommands)) > 0 && sub.ArgsUsage == "" {
				continue // does nothing by itself
			}
			if i > 0 && !strings.HasSuffix(p.String(), ".SH \"SYNOPSIS\"\n") {
				p.WriteString(".br\n")
			}
			p.synopsis(path+sub.path, sub.ArgsUsage, len(sub.Flags) > 0)
		}
	}
	p.section("DESCRIPTION")
	switch {
	case tool != "":
		p.text("The options are those of the program "+cmd.Name+" of the composefs project:\n\n"+indent(tool), nil)
	case cmd.Description != "":
		p.text(cmd.Description, placeholders(cmd.ArgsUsage))
	default:
		p.text2(sentence(cmd.Usage), nil)
	}
	p.section("OPTIONS")
	p.options(cmd.Flags)
	if len(cmd.Flags) > 0 {
		p.WriteString(".PP\n")
	}
	p.raw(`The options of the whole program are in \fBparticle\fR(8).`)
	if len(below) > 0 {
		p.section("VERBS")
		for _, sub := range below {
			words := placeholders(sub.ArgsUsage)
			p.line(".SS", strings.TrimSpace(sub.path+" "+sub.ArgsUsage))
			p.text2(sentence(sub.Usage), words)
			p.text(sub.Description, words)
			p.options(sub.Flags)
		}
	}
	p.examples(cmd.Name)
	p.exitStatus(cmd)
	p.files(cmd.Name)

	p.section("SEE ALSO")
	also := []string{`\fBparticle\fR(8)`}
	for _, other := range app.Commands {
		if other != cmd && !other.Hidden && other.Category == cmd.Category {
			also = append(also, `\fBparticle\-`+roffText(other.Name)+`\fR(8)`)
		}
	}
	slices.Sort(also[1:])
	p.fill(strings.Join(also, ", "))
}

// A subverb is a verb below another, with the words that lead to it: " install to-disk".
type subverb struct {
	path string
	*cli.Command
}

// descend lists the verbs below one that people see, each before those below it.
func descend(cmd *cli.Command, path string) []subverb {
	var all []subverb
	for _, sub := range visible(cmd.Subcommands) {
		all = append(all, subverb{path + " " + sub.Name, sub})
		all = append(all, descend(sub, path+" "+sub.Name)...)
	}
	return all
}

func visible(cmds []*cli.Command) []*cli.Command {
	return slices.DeleteFunc(slices.Clone(cmds), func(c *cli.Command) bool { return c.Hidden })
}

func indent(s string) string {
	return "  " + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n  ")
}

// examples writes what examples.go has for a verb.
func (p *manPage) examples(verb string) {
	all := examples[verb]
	if len(all) == 0 {
		return
	}
	p.section("EXAMPLES")
	for _, e := range all {
		p.paragraph()
		p.text2(strings.TrimSuffix(sentence(e.what), ".")+":", nil)
		p.paragraph()
		p.WriteString(".RS 4\n.nf\n")
		for _, l := range strings.Split(e.commands, "\n") {
			p.raw(`\fB` + roffText(l) + `\fR`)
		}
		p.WriteString(".fi\n.RE\n")
	}
}

func (p *manPage) exitStatus(cmd *cli.Command) {
	p.section("EXIT STATUS")
	statuses := [][2]string{{"0", "Success."}, {"1", "Failure; the reason is on standard error."}, {"2", "Wrong usage."}}
	if cmd != nil && toolUsages[cmd.Name] != "" {
		statuses = statuses[:2] // as the program that it stands for
	}
	for _, s := range statuses {
		p.WriteString(".TP\n")
		p.raw(`\fB` + s[0] + `\fR`)
		p.raw(s[1])
	}
}

func (p *manPage) files(verb string) {
	first := true
	for _, f := range files {
		if slices.Contains(strings.Fields(f.verbs), verb) {
			if first {
				p.section("FILES")
				first = false
			}
			p.WriteString(".TP\n")
			p.raw(`\fI` + roffText(f.path) + `\fR`)
			p.text2(f.what, nil)
		}
	}
}
