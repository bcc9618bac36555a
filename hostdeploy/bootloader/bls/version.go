package bls

import (
	"cmp"
	"strings"
)

// CompareVersions compares two versions as the UAPI group's version format specification
// says (https://uapi-group.org/specifications/specs/version_format_specification/):
// negative where a is the older one.
//
// Where the specification's text and systemd's strverscmp_improved differ, this is the
// program, since it is the program that boots: "~" sorts below the end of the string
// ("1~rc1" is older than "1"), and "^" below all but the end and "-" ("1^a" is newer than
// "1", older than "1.1" and "1a"). The test asks systemd-analyze(1).
func CompareVersions(a, b string) int {
	for {
		a, b = strings.TrimLeftFunc(a, ignored), strings.TrimLeftFunc(b, ignored)
		// A part after "~" is older than anything, even than nothing.
		if r, done := separator(&a, &b, '~', -1); done {
			return r
		}
		if a == "" || b == "" {
			return cmp.Compare(len(a), len(b))
		}
		if r, done := separator(&a, &b, '-', -1); done {
			return r
		}
		if r, done := separator(&a, &b, '^', -1); done {
			return r
		}
		if r, done := separator(&a, &b, '.', -1); done {
			return r
		}
		var r int
		if startsWithDigit(a) || startsWithDigit(b) {
			x, y := prefix(&a, isDigit), prefix(&b, isDigit)
			r = compareDigits(x, y)
		} else {
			x, y := prefix(&a, isLetter), prefix(&b, isLetter)
			r = strings.Compare(x, y)
		}
		if r != 0 {
			return r
		}
	}
}

// separator takes c from the beginning of both strings. Where only one has it, the
// comparison is done: sign is the result for a string with it against one without.
func separator(a, b *string, c byte, sign int) (result int, done bool) {
	inA, inB := strings.HasPrefix(*a, string(c)), strings.HasPrefix(*b, string(c))
	switch {
	case inA && inB:
		*a, *b = (*a)[1:], (*b)[1:]
		return 0, false
	case inA:
		return sign, true
	case inB:
		return -sign, true
	}
	return 0, false
}

// compareDigits compares numbers of any length; no digits are less than zero.
func compareDigits(x, y string) int {
	if x == "" || y == "" {
		return cmp.Compare(len(x), len(y))
	}
	x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
	return cmp.Or(cmp.Compare(len(x), len(y)), strings.Compare(x, y))
}

// prefix cuts the longest beginning of *s that has only bytes of a kind.
func prefix(s *string, kind func(byte) bool) string {
	n := 0
	for n < len(*s) && kind((*s)[n]) {
		n++
	}
	head := (*s)[:n]
	*s = (*s)[n:]
	return head
}

func isDigit(c byte) bool  { return '0' <= c && c <= '9' }
func isLetter(c byte) bool { return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' }

func startsWithDigit(s string) bool { return s != "" && isDigit(s[0]) }

// ignored reports whether a character only separates parts of a version.
func ignored(r rune) bool {
	return r >= 0x80 || !isDigit(byte(r)) && !isLetter(byte(r)) && !strings.ContainsRune("~-^.", r)
}
