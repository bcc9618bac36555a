package dump

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strconv"

	"github.com/particle-os/particle/converter/tree"
)

// A Printer prints trees. The zero value prints what a tree says by itself.
type Printer struct {
	// Size returns what stands in the SIZE field of a directory; nil means 0.
	// Parse and mkcomposefs skip the field, composefs-info fills it.
	Size func(dir *tree.Node) int64
	// Xattrs returns a node's xattrs in the order in which to print them; nil means
	// by name.
	Xattrs func(*tree.Node) iter.Seq2[string, string]
}

// Print writes t with the zero Printer.
func Print(w io.Writer, t *tree.Tree) error { return new(Printer).Print(w, t) }

// Print writes a line for every name in t, in the order of Walk. Of a node with
// several names, the owner (see [tree.Tree]) has the line of the file; the others
// have lines of links with the same fields.
func (p *Printer) Print(w io.Writer, t *tree.Tree) error {
	q := printer{Printer: p, w: bufio.NewWriterSize(w, 64<<10), links: t.Links(), owners: maps.Clone(t.Owners)}
	if q.owners == nil {
		q.owners = map[*tree.Node]string{}
	}
	if err := q.node("/", t.Root); err != nil {
		return fmt.Errorf("writing dump: %w", err)
	}
	if err := q.w.Flush(); err != nil {
		return fmt.Errorf("writing dump: %w", err)
	}
	return nil
}

type printer struct {
	*Printer
	w      *bufio.Writer
	line   []byte
	links  map[*tree.Node]int
	owners map[*tree.Node]string // of files with several names
}

func (p *printer) node(path string, n *tree.Node) error {
	owner := path
	if p.links[n] > 1 {
		if o, ok := p.owners[n]; ok {
			owner = o
		} else {
			p.owners[n] = path
		}
	}
	p.line = p.appendLine(p.line[:0], path, owner, n)
	if _, err := p.w.Write(p.line); err != nil {
		return err
	}
	for name, child := range n.Children() {
		if err := p.node(tree.Join(path, name), child); err != nil {
			return err
		}
	}
	return nil
}

func (p *printer) appendLine(b []byte, path, owner string, n *tree.Node) []byte {
	var (
		size             int64
		payload, content string
		digest           []byte
		rdev             uint64
	)
	nlink := uint32(p.links[n])
	switch n.Type() {
	case tree.TypeDir:
		nlink = 2
		for _, child := range n.Dir {
			if child.IsDir() {
				nlink++
			}
		}
		if p.Size != nil {
			size = p.Size(n)
		}
	case tree.TypeRegular:
		size = n.File.Size
		if content = string(n.File.Inline); content == "" {
			payload = n.File.Path()
			digest = n.File.Object.AppendTo(nil)
		}
	case tree.TypeSymlink:
		size, payload = int64(len(n.Target)), n.Target
	case tree.TypeChar, tree.TypeBlock:
		rdev = n.Rdev
		fallthrough
	default:
		if n.File != nil {
			size = n.File.Size
		}
	}
	if n.Nlink != 0 {
		nlink = n.Nlink
	}

	b = appendEscaped(b, path, 0)
	b = strconv.AppendInt(append(b, ' '), size, 10)
	b = append(b, ' ')
	if path != owner {
		b = append(b, '@')
		payload = owner
	}
	b = strconv.AppendUint(b, uint64(n.Mode), 8)
	b = strconv.AppendUint(append(b, ' '), uint64(nlink), 10)
	b = strconv.AppendUint(append(b, ' '), uint64(n.UID), 10)
	b = strconv.AppendUint(append(b, ' '), uint64(n.GID), 10)
	b = strconv.AppendUint(append(b, ' '), rdev, 10)
	b = strconv.AppendInt(append(b, ' '), n.MtimeSec, 10)
	b = strconv.AppendUint(append(b, '.'), uint64(n.MtimeNsec), 10)
	b = appendOptional(append(b, ' '), payload)
	b = appendOptional(append(b, ' '), content)
	b = append(b, ' ')
	if len(digest) == 0 {
		b = append(b, '-')
	} else {
		b = hex.AppendEncode(b, digest)
	}
	for name, value := range p.xattrs(n) {
		b = appendEscaped(append(b, ' '), name, EscapeEquals)
		b = appendEscaped(append(b, '='), value, EscapeEquals)
	}
	return append(b, '\n')
}

func (p *printer) xattrs(n *tree.Node) iter.Seq2[string, string] {
	if p.Xattrs != nil {
		return p.Xattrs(n)
	}
	return func(yield func(string, string) bool) {
		if len(n.Xattrs) == 0 {
			return
		}
		for _, name := range slices.Sorted(maps.Keys(n.Xattrs)) {
			if !yield(name, n.Xattrs[name]) {
				return
			}
		}
	}
}
