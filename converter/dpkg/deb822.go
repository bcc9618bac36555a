package dpkg

import (
	"fmt"
	"strings"
)

// A Field is one of a paragraph, as "Depends: libc6 (>= 2.38)".
type Field struct {
	Name string
	// Value has no white space at its ends. Lines after the first begin with the
	// white space that they have in the file.
	Value string
}

// A Paragraph is the fields that describe one package, in their order.
type Paragraph []Field

// Field returns the value of a field, "" where there is none. Names are compared without
// regard to case.
func (p Paragraph) Field(name string) string {
	for i := range p {
		if strings.EqualFold(p[i].Name, name) {
			return p[i].Value
		}
	}
	return ""
}

// Parse reads paragraphs in the form of deb822(5) as the dpkg database has it: fields
// begin in the first column, their further lines with white space, and lines that are
// empty or blank end a paragraph. A field that occurs twice in one is an error, as for
// dpkg(1). The error is ErrFormat with the number of the line.
//
// The result refers to text and takes no memory for values of its own.
func Parse(text string) ([]Paragraph, error) {
	var all []Paragraph
	var p Paragraph
	start, end := 0, 0 // of the present field's value in text
	// A Paragraph's fields are compared by name for duplicates; more than a few dozen
	// occur in hostile files only, which must not take quadratic time.
	seen := map[string]bool{}
	field := func() {
		if len(p) > 0 {
			p[len(p)-1].Value = strings.TrimSpace(text[start:end])
		}
	}
	paragraph := func() {
		if len(p) > 0 {
			field()
			all = append(all, p)
			p = nil
			clear(seen)
		}
	}
	pos := 0
	for number := 1; pos < len(text); number++ {
		line := text[pos:]
		next := len(text)
		if i := strings.IndexByte(line, '\n'); i >= 0 {
			line, next = line[:i], pos+i+1
		}
		switch {
		case strings.Trim(line, " \t\r") == "":
			paragraph()
		case line[0] == ' ' || line[0] == '\t':
			if len(p) == 0 {
				return nil, fmt.Errorf("%w: line %d continues no field: %s", ErrFormat, number, excerpt(line))
			}
			end = pos + len(line)
		default:
			name, _, ok := strings.Cut(line, ":")
			if !ok || name == "" || strings.ContainsAny(name, " \t") {
				return nil, fmt.Errorf("%w: line %d is no field: %s", ErrFormat, number, excerpt(line))
			}
			field()
			key := strings.ToLower(name)
			if seen[key] {
				return nil, fmt.Errorf("%w: line %d has field %q a second time", ErrFormat, number, name)
			}
			seen[key] = true
			if p == nil {
				p = make(Paragraph, 0, 16)
			}
			p = append(p, Field{Name: name})
			start, end = pos+len(name)+1, pos+len(line)
		}
		pos = next
	}
	paragraph()
	return all, nil
}

// excerpt quotes the beginning of what may be long and is foreign.
func excerpt(s string) string {
	if len(s) > 60 {
		return fmt.Sprintf("%q…", s[:60])
	}
	return fmt.Sprintf("%q", s)
}
