package dump

import (
	"bytes"
	"encoding/hex"
)

// appendOptional appends a field in which "-" means that there is nothing.
func appendOptional(b []byte, s string) []byte {
	switch s {
	case "":
		return append(b, '-')
	case "-":
		return append(b, `\x2d`...)
	}
	return appendEscaped(b, s, 0)
}

// An EscapeMode changes which bytes are escaped.
type EscapeMode uint8

const (
	KeepSpaces   EscapeMode = 1 << iota // as composefs-info ls has names
	EscapeEquals                        // as in xattrs
)

// Escape returns s with escapes for all but the letters, digits and punctuation of
// ASCII, and for backslashes.
func Escape(s string, mode EscapeMode) string { return string(appendEscaped(nil, s, mode)) }

func appendEscaped(b []byte, s string, mode EscapeMode) []byte {
	const digits = "0123456789abcdef"
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\\':
			b = append(b, `\\`...)
		case c == '\n':
			b = append(b, `\n`...)
		case c == '\r':
			b = append(b, `\r`...)
		case c == '\t':
			b = append(b, `\t`...)
		case c == ' ' && mode&KeepSpaces != 0:
			b = append(b, c)
		case c <= ' ' || c >= 0x7f || c == '=' && mode&EscapeEquals != 0:
			b = append(b, '\\', 'x', digits[c>>4], digits[c&15])
		default:
			b = append(b, c)
		}
	}
	return b
}

// optional is unescape for fields in which "-" means that there is nothing.
func (p *lineParser) optional(s []byte) (value []byte, ok bool, err *LineError) {
	if len(s) == 1 && s[0] == '-' {
		return nil, false, nil
	}
	value, err = p.unescape(s)
	return value, err == nil, err
}

// unescape undoes escapes. What it returns is valid until the next call: it is s
// itself or p.buf.
func (p *lineParser) unescape(s []byte) ([]byte, *LineError) {
	i := bytes.IndexByte(s, '\\')
	if i < 0 {
		return s, nil
	}
	out := append(p.buf[:0], s[:i]...)
	for s = s[i:]; len(s) > 0; {
		if s[0] != '\\' {
			i := bytes.IndexByte(s, '\\')
			if i < 0 {
				i = len(s)
			}
			out = append(out, s[:i]...)
			s = s[i:]
			continue
		}
		if len(s) < 2 {
			return nil, fail(ErrSyntax, "nothing follows a backslash")
		}
		switch s[1] {
		case '\\':
			out = append(out, '\\')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'x':
			if len(s) < 4 {
				return nil, fail(ErrSyntax, "escape %q lacks digits", s)
			}
			var c [1]byte
			if _, err := hex.Decode(c[:], s[2:4]); err != nil {
				return nil, fail(ErrSyntax, "escape %q is not hexadecimal", s[:4])
			}
			out = append(out, c[0])
			s = s[2:]
		default:
			return nil, fail(ErrSyntax, "unknown escape %q", s[:2])
		}
		s = s[2:]
	}
	p.buf = out
	return out, nil
}
