package prepare

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
)

// errQuote: a quote or an escape sequence without an end.
var errQuote = errors.New("a quote or an escape sequence without an end")

// splitFields takes up to n fields off a line as systemd does (tmpfiles.d(5)): separated
// by blanks, in quotes or not, with the escape sequences of C. The rest of the line is
// returned as it is, without blanks around it.
func splitFields(line string, n int) (fields []string, rest string, err error) {
	const blanks = " \t\r\n"
	rest = strings.TrimLeft(line, blanks)
	for len(fields) < n && rest != "" {
		var b strings.Builder
		quote := byte(0)
		i := 0
		for ; i < len(rest); i++ {
			c := rest[i]
			switch {
			case c == '\\':
				size, err := unescape(&b, rest[i:])
				if err != nil {
					return nil, "", err
				}
				i += size - 1
			case quote == 0 && (c == '"' || c == '\''):
				quote = c
			case quote != 0 && c == quote:
				quote = 0
			case quote == 0 && strings.IndexByte(blanks, c) >= 0:
				goto end
			default:
				b.WriteByte(c)
			}
		}
	end:
		if quote != 0 {
			return nil, "", errQuote
		}
		fields = append(fields, b.String())
		rest = strings.TrimLeft(rest[i:], blanks)
	}
	return fields, strings.TrimRight(rest, blanks), nil
}

// unescape writes what the escape sequence at the beginning of s stands for, and returns
// how long the sequence is. An unknown one stands for itself.
func unescape(b *strings.Builder, s string) (int, error) {
	if len(s) < 2 {
		return 0, errQuote
	}
	if i := strings.IndexByte("abfnrtvs\\\"'", s[1]); i >= 0 {
		b.WriteByte("\a\b\f\n\r\t\v \\\"'"[i])
		return 2, nil
	}
	number := func(from, digits, base int) (int, error) {
		if len(s) < from+digits {
			return 0, errQuote
		}
		v, err := strconv.ParseUint(s[from:from+digits], base, 32)
		if err != nil {
			return 0, errQuote
		}
		if digits == 8 || digits == 4 {
			b.WriteRune(rune(v))
		} else {
			b.WriteByte(byte(v))
		}
		return from + digits, nil
	}
	switch c := s[1]; {
	case c == 'x':
		return number(2, 2, 16)
	case c == 'u':
		return number(2, 4, 16)
	case c == 'U':
		return number(2, 8, 16)
	case c >= '0' && c <= '3':
		return number(1, 3, 8)
	}
	b.WriteString(s[:2])
	return 2, nil
}

// escape writes a path, or an argument, so that tmpfiles.d gives it back: what is not
// plain as an escape sequence, "%" doubled, as it begins a specifier.
func escape(s string) string {
	if s == "-" {
		return `\x2d` // by itself it stands for nothing
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '%':
			b.WriteString("%%")
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.IndexByte("/._-+,:=@~^!()[]{}", c) >= 0:
			b.WriteByte(c)
		default:
			fmt.Fprintf(&b, `\x%02x`, c)
		}
	}
	return b.String()
}

// A tmpfile is a line of tmpfiles.d(5) that makes something. Path and argument are
// as they are meant, without escapes; mode, user and group without a ":" before them.
type tmpfile struct {
	kind     string // with its modifiers
	path     string
	mode     string
	user     string
	group    string
	argument string
}

// String gives the line, without its end. Mode, user and group are for what is made: the
// ":" has what is there keep its own, except under C lines.
func (t tmpfile) String() string {
	or := func(s string) string {
		if s == "" {
			return "-"
		}
		return ":" + s
	}
	arg := ""
	if t.argument != "" {
		arg = " - " + escape(t.argument)
	}
	return fmt.Sprintf("%s %s %s %s %s%s", t.kind, escape(t.path), or(t.mode), or(t.user), or(t.group), arg)
}

// specifiers are those of tmpfiles.d that are the same on all machines; "%%" is itself.
var specifiers = map[byte]string{'%': "%", 'C': "/var/cache", 'L': "/var/log", 'S': "/var/lib", 't': "/run", 'T': "/tmp", 'V': "/var/tmp"}

// expand replaces specifiers. It reports false where one depends on the machine.
func expand(s string) (string, bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if i++; i == len(s) {
			return "", false
		}
		v, ok := specifiers[s[i]]
		if !ok {
			return "", false
		}
		b.WriteString(v)
	}
	return b.String(), true
}

// parseTmpfiles returns the lines of a file that make something at a path, with path and
// argument as they are meant. Lines that systemd would not understand either, or whose
// path depends on the machine, are left out.
func parseTmpfiles(text string) []tmpfile {
	var lines []tmpfile
	for line := range strings.Lines(text) {
		if trimmed := strings.TrimSpace(line); trimmed == "" || trimmed[0] == '#' {
			continue
		}
		f, arg, err := splitFields(line, 6)
		if err != nil || len(f) < 2 || f[0] == "" || strings.IndexByte("dDvqQfFLpCcb", f[0][0]) < 0 {
			continue
		}
		name, ok := expand(f[1])
		if !ok || !strings.HasPrefix(name, "/") {
			continue
		}
		t := tmpfile{kind: f[0], path: path.Clean(name)}
		for i, to := range []*string{&t.mode, &t.user, &t.group} {
			if len(f) > i+2 && f[i+2] != "-" {
				*to = strings.TrimPrefix(f[i+2], ":")
			}
		}
		if arg != "" && arg != "-" {
			var b strings.Builder
			for i := 0; i < len(arg); {
				size := 1
				if arg[i] != '\\' {
					b.WriteByte(arg[i])
				} else if size, err = unescape(&b, arg[i:]); err != nil {
					break
				}
				i += size
			}
			if err != nil {
				continue
			}
			if t.argument, ok = expand(b.String()); !ok {
				t.argument = ""
			}
		}
		lines = append(lines, t)
	}
	return lines
}
