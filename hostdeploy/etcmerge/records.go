package etcmerge

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// maxRecords is the size in bytes up to which files of records are merged by line.
const maxRecords = 16 << 20

// A recordFile is a file with one record a line, fields separated by colons, the first
// of which is the key. Field numbers count from 0; 0 means that there is none.
type recordFile struct {
	fields int
	id     int // the field with the number that no other record should have
	count  int // the field that says how many numbers, from that on, there are
	lists  []int
}

// From passwd(5), group(5), shadow(5), gshadow(5), subuid(5) and subgid(5).
var recordFiles = map[string]recordFile{
	"/passwd":  {fields: 7, id: 2},
	"/group":   {fields: 4, id: 2, lists: []int{3}},
	"/shadow":  {fields: 9},
	"/gshadow": {fields: 4, lists: []int{2, 3}},
	"/subuid":  {fields: 3, id: 1, count: 2},
	"/subgid":  {fields: 3, id: 1, count: 2},
}

// records merges a file of records that both sides changed. It returns nil where p is
// none, or cannot be read as one.
func (m *merger) records(p string, o, n, l *tree.Node) ([]byte, error) {
	kind, ok := recordFiles[p]
	if !ok || !n.IsRegular() {
		return nil, nil
	}
	var parsed [3]*recordSet
	for i, node := range []*tree.Node{o, n, l} {
		var data []byte
		if node != nil {
			if node.File.Size > maxRecords {
				return nil, nil
			}
			var r io.ReadCloser
			var err error
			if i < 2 {
				r, err = open(m.objects, node.File)
			} else {
				r, err = openLocal(m.current, p)
			}
			if err != nil {
				return nil, fmt.Errorf("reading %q: %w", etcPath(p), err)
			}
			data, err = io.ReadAll(io.LimitReader(r, maxRecords+1))
			r.Close()
			if err == nil && fsverity.Sum(m.alg, data) != m.of[node.File] {
				err = map[bool]error{true: ErrChanged, false: ErrContent}[i == 2]
			}
			if err != nil {
				return nil, fmt.Errorf("reading %q: %w", etcPath(p), err)
			}
		}
		if parsed[i], ok = parseRecords(data); !ok {
			return nil, nil
		}
	}
	merged, conflicts := mergeRecords(kind, parsed[0], parsed[1], parsed[2])
	for _, c := range conflicts {
		c.Path = etcPath(p)
		m.conflicts = append(m.conflicts, c)
	}
	return merged, nil
}

// A recordSet is a file of records. Lines of one key (subuid may have several) count as
// one record; a line without a colon is its own key.
type recordSet struct {
	keys  []string
	lines map[string]string // with all their newlines
}

// parseRecords fails for what is no text.
func parseRecords(data []byte) (*recordSet, bool) {
	if bytes.IndexByte(data, 0) >= 0 {
		return nil, false
	}
	r := &recordSet{lines: map[string]string{}}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		key, _, _ := strings.Cut(line, ":")
		if _, ok := r.lines[key]; !ok {
			r.keys = append(r.keys, key)
		}
		r.lines[key] += line + "\n"
	}
	return r, true
}

// mergeRecords merges three files of records. The local order stays; what the image adds
// comes behind what precedes it in the image. The result is never nil.
func mergeRecords(kind recordFile, o, n, l *recordSet) ([]byte, []Conflict) {
	var conflicts []Conflict
	conflict := func(why Reason, format string, args ...any) {
		conflicts = append(conflicts, Conflict{Reason: why, Detail: fmt.Sprintf(format, args...)})
	}
	// label names a record; a line that has no fields may be anything.
	label := func(key, line string) string {
		if !strings.Contains(line, ":") {
			return "a line without fields"
		}
		return strconv.Quote(key)
	}
	out := &recordSet{lines: map[string]string{}}
	for _, key := range l.keys {
		lv := l.lines[key]
		ov, inOld := o.lines[key]
		nv, inNew := n.lines[key]
		switch {
		case inNew && lv == nv, !inNew && !inOld, inNew && inOld && ov == nv:
		case inOld && ov == lv: // changed or removed by the image
			if !inNew {
				continue
			}
			lv = nv
		case !inNew:
			conflict(Record, "%s: removed by the image, changed here and kept", label(key, lv))
		default:
			merged, ok := kind.mergeLists(ov, nv, lv)
			if !ok {
				conflict(Record, "%s: changed here and by the image, the local line is kept", label(key, lv))
			} else {
				lv = merged
			}
		}
		out.keys = append(out.keys, key)
		out.lines[key] = lv
	}

	// What to add behind each key; "\n", which is in no key, stands for the beginning.
	const begin = "\n"
	behind := map[string][]string{}
	last := begin
	for _, key := range n.keys {
		if _, ok := out.lines[key]; ok {
			last = key
			continue
		}
		ov, inOld := o.lines[key]
		if !inOld {
			behind[last] = append(behind[last], key)
		} else if ov != n.lines[key] {
			conflict(Record, "%s: removed here, changed by the image", label(key, ov))
		}
	}
	var text bytes.Buffer
	add := func(keys []string) {
		for _, key := range keys {
			text.WriteString(n.lines[key])
			out.lines[key] = n.lines[key]
		}
	}
	add(behind[begin])
	for _, key := range out.keys {
		text.WriteString(out.lines[key])
		add(behind[key])
	}
	kind.collisions(out, n, l, conflict)
	return append([]byte{}, text.Bytes()...), conflicts
}

// mergeLists merges a record that both sides changed, but for lists of names the same
// fields or different ones. ok is false where that cannot be done: ov may be "".
func (k recordFile) mergeLists(ov, nv, lv string) (merged string, ok bool) {
	if k.lists == nil {
		return "", false
	}
	split := func(v string) []string { return strings.Split(strings.TrimSuffix(v, "\n"), ":") }
	nf, lf := split(nv), split(lv)
	of := make([]string, k.fields)
	if ov != "" {
		of = split(ov)
	}
	if len(of) != k.fields || len(nf) != k.fields || len(lf) != k.fields || strings.Count(nv, "\n")+strings.Count(lv, "\n") != 2 {
		return "", false
	}
	for i := range lf {
		switch {
		case lf[i] == nf[i]:
		case slices.Contains(k.lists, i):
			lf[i] = mergeNames(of[i], nf[i], lf[i])
		case ov != "" && of[i] == lf[i]:
			lf[i] = nf[i]
		case ov != "" && of[i] == nf[i]:
		default:
			return "", false
		}
	}
	return strings.Join(lf, ":") + "\n", true
}

// mergeNames merges lists of names that are separated by commas.
func mergeNames(o, n, l string) string {
	old, image := splitNames(o), splitNames(n)
	var out []string
	for _, name := range splitNames(l) {
		if slices.Contains(image, name) || !slices.Contains(old, name) {
			out = append(out, name)
		}
	}
	for _, name := range image {
		if !slices.Contains(old, name) && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return strings.Join(out, ",")
}

func splitNames(list string) []string {
	return slices.DeleteFunc(strings.Split(list, ","), func(s string) bool { return s == "" })
}

// A span is the numbers of one record: one of them, or a range.
type span struct {
	first, count uint64
	key          string
	image        bool // the record came with the image
}

// collisions reports numbers that a record of the image and a local one have in common.
// What was so on one side already is nobody's business here.
func (k recordFile) collisions(out, n, l *recordSet, conflict func(Reason, string, ...any)) {
	if k.id == 0 {
		return
	}
	var spans []span
	for key, v := range out.lines {
		ours, theirs := k.spans(key, l.lines[key]), k.spans(key, n.lines[key])
		for _, s := range k.spans(key, v) {
			image, local := slices.Contains(theirs, s), slices.Contains(ours, s)
			if image != local {
				s.image = image
				spans = append(spans, s)
			}
		}
	}
	slices.SortFunc(spans, func(a, b span) int {
		return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.key, b.key))
	})
	// The farthest end so far of each side is what the next one may run into.
	var far [2]*span
	for i := range spans {
		s := &spans[i]
		side, other := 0, 1
		if s.image {
			side, other = 1, 0
		}
		if f := far[other]; f != nil && f.key != s.key && s.first < f.first+f.count && s.count > 0 {
			image, local := s, f
			if f.image {
				image, local = f, s
			}
			conflict(Number, "number %d of %q, which came with the image, is that of %q, too", max(s.first, f.first), image.key, local.key)
		}
		if f := far[side]; f == nil || s.first+s.count > f.first+f.count {
			far[side] = s
		}
	}
}

// spans returns the numbers of a record, what is none left out.
func (k recordFile) spans(key, lines string) []span {
	var list []span
	for line := range strings.Lines(lines) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(f) != k.fields {
			continue
		}
		s := span{key: key, count: 1}
		var err error
		if s.first, err = strconv.ParseUint(f[k.id], 10, 32); err == nil && k.count != 0 {
			s.count, err = strconv.ParseUint(f[k.count], 10, 32)
		}
		if err == nil {
			list = append(list, s)
		}
	}
	return list
}
