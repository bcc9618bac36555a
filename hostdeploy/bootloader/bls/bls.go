// Package bls reads and writes the text files of the Boot Loader Specification, type 1
// (https://uapi-group.org/specifications/specs/boot_loader_specification/), their names
// with boot counters, and the order in which a loader shows them.
//
// The specification is loose where a program must decide: how a line is split, what a
// quote means, whether "~" sorts below the end of a version. There this package does
// what systemd-boot does, because what it computes shall be what systemd-boot boots.
//
// Left out: files (everything here works on strings), unified kernel images (type 2)
// and what the keys mean.
package bls

import (
	"errors"
	"fmt"
	"strings"
)

// ErrField is the error of a line that cannot be written.
var ErrField = errors.New("cannot be written as a line of an entry")

// Comment is the key of a comment; the value is the line's rest after the "#".
const Comment = "#"

// A Field is one line: keys may repeat, and their order matters.
type Field struct{ Key, Value string }

const blanks = " \t"

// Parse splits a file into its lines. Nothing is an error: empty lines are dropped, a
// word alone is a key with an empty value, and the text ends at the first zero byte.
//
// Lines end at "\n" or "\r", blanks around a line do not count, and a value in quotes of
// one kind loses them: that is line_get_key_value of systemd-boot.
func Parse(text string) []Field {
	text, _, _ = strings.Cut(text, "\x00")
	var fields []Field
	for line := range strings.FieldsFuncSeq(text, func(r rune) bool { return r == '\n' || r == '\r' }) {
		line = strings.Trim(line, blanks)
		if rest, ok := strings.CutPrefix(line, Comment); ok {
			fields = append(fields, Field{Comment, rest})
			continue
		}
		if line == "" {
			continue
		}
		key, value := line, ""
		if i := strings.IndexAny(line, blanks); i >= 0 {
			key, value = line[:i], strings.TrimLeft(line[i:], blanks)
		}
		fields = append(fields, Field{key, unquote(value)})
	}
	return fields
}

// unquote takes one pair of equal quotes away. A single quote character is both its
// beginning and its end.
func unquote(value string) string {
	if !quoted(value) {
		return value
	}
	if len(value) == 1 {
		return ""
	}
	return value[1 : len(value)-1]
}

func quoted(value string) bool {
	return value != "" && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0]
}

// Format prints lines so that Parse returns them again, values in one column. The error
// is ErrField for what no line can hold: a line break or a zero byte, or a key that is
// empty, has blanks or would be a comment.
func Format(fields []Field) (string, error) {
	var b strings.Builder
	for _, f := range fields {
		if strings.ContainsAny(f.Key+f.Value, "\n\r\x00") {
			return "", fmt.Errorf("line %q %q: %w: it has a line break or a zero byte", f.Key, f.Value, ErrField)
		}
		if f.Key == Comment {
			b.WriteString(Comment + strings.TrimRight(f.Value, blanks) + "\n")
			continue
		}
		if f.Key == "" || strings.ContainsAny(f.Key, blanks) || strings.HasPrefix(f.Key, Comment) {
			return "", fmt.Errorf("line %q %q: %w: the key must be one word", f.Key, f.Value, ErrField)
		}
		value := f.Value
		// A value that has quotes of its own at both ends, or blanks there, is put into
		// one more pair, which the reader takes away.
		if value != strings.Trim(value, blanks) || quoted(value) {
			value = `"` + value + `"`
		}
		if value == "" {
			b.WriteString(f.Key + "\n")
			continue
		}
		fmt.Fprintf(&b, "%-10s %s\n", f.Key, value)
	}
	return b.String(), nil
}

// Last returns the value of a key that is there once. Of several the last one counts, as
// in systemd-boot; lines without a value do not count.
func Last(fields []Field, key string) (value string, ok bool) {
	for _, f := range fields {
		if f.Key == key && f.Value != "" {
			value, ok = f.Value, true
		}
	}
	return value, ok
}

// Values returns the values of a key that may repeat, in their order.
func Values(fields []Field, key string) []string {
	var values []string
	for _, f := range fields {
		if f.Key == key && f.Value != "" {
			values = append(values, f.Value)
		}
	}
	return values
}

// Options returns the kernel command line: all lines "options", joined by a blank.
func Options(fields []Field) string { return strings.Join(Values(fields, "options"), " ") }
