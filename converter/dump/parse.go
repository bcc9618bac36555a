package dump

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"

	"github.com/particle-os/particle/converter/tree"
)

// Options say how to parse. The zero value is what mkcomposefs does.
type Options struct {
	// Strict refuses what mkcomposefs refuses when CFS_PARSE_STRICT is set: a last
	// line without its newline, device numbers on what is no device, sizes of
	// symbolic links that are not their length, and symbolic links with content.
	Strict bool
}

// Parse reads a dump. Nodes of the tree may share maps of xattrs.
//
// Lines are read side by side by as many goroutines as there are processors and put
// in place by the calling one; memory besides the tree does not grow with the
// input.
func Parse(r io.Reader, o Options) (*tree.Tree, error) {
	workers := runtime.GOMAXPROCS(0)
	jobs := make(chan *chunk)
	defer close(jobs)
	for range workers {
		go func() {
			p := &lineParser{strict: o.Strict}
			for c := range jobs {
				c.parse(p)
				c.done <- struct{}{}
			}
		}()
	}

	var (
		l       = linker{dirs: map[string]*tree.Node{}}
		free    []*chunk // to be used again
		pending []*chunk // in the order of the input
		rest    []byte   // the beginning of a line
		line    = 1      // the number of the first pending line
	)
	for atEnd := false; !atEnd || len(pending) > 0; {
		if !atEnd && len(pending) <= workers {
			var c *chunk
			if len(free) > 0 {
				c, free = free[len(free)-1], free[:len(free)-1]
			} else {
				c = &chunk{buf: make([]byte, MaxLine), done: make(chan struct{}, 1)}
			}
			var err error
			if rest, err = c.fill(r, rest); errors.Is(err, io.EOF) {
				atEnd = true
				c.unterminated = o.Strict && len(c.text) > 0 && c.text[len(c.text)-1] != '\n'
			} else if err != nil {
				return nil, err
			}
			if len(c.text) > 0 {
				pending = append(pending, c)
				jobs <- c
			}
			continue
		}
		c := pending[0]
		pending = pending[1:]
		<-c.done
		if err := l.add(c, line); err != nil {
			return nil, err
		}
		line += len(c.entries)
		free = append(free, c)
	}
	return l.finish()
}

// A chunk is a piece of the input that consists of whole lines.
type chunk struct {
	buf  []byte
	text []byte        // in buf
	done chan struct{} // gets a value when the chunk is parsed

	entries []entry
	err     *LineError // of the line after the last entry

	unterminated bool // the last line lacks its newline and must not
}

// fill sets text to whole lines: rest, which the last call returned, and what r
// gives. At the end of the input it returns io.EOF, and the last line may lack its
// newline.
func (c *chunk) fill(r io.Reader, rest []byte) ([]byte, error) {
	n := copy(c.buf, rest)
	for n < len(c.buf) {
		m, err := r.Read(c.buf[n:])
		n += m
		if errors.Is(err, io.EOF) {
			c.text = c.buf[:n]
			return nil, io.EOF
		}
		if err != nil {
			return nil, fmt.Errorf("reading dump: %w", err)
		}
	}
	end := bytes.LastIndexByte(c.buf, '\n') + 1
	// Without an end of line, text is a part of a line that nobody can use: parse
	// refuses it by its length.
	if end == 0 {
		end = len(c.buf)
	}
	c.text = c.buf[:end]
	return c.buf[end:], nil
}

func (c *chunk) parse(p *lineParser) {
	p.kept = p.kept[:0]
	c.entries, c.err = slices.Grow(c.entries[:0], bytes.Count(c.text, []byte{'\n'})+1), nil
	for text := c.text; len(text) > 0; {
		i := bytes.IndexByte(text, '\n')
		end := i + 1
		if i < 0 {
			i, end = len(text), len(text)
			if c.unterminated {
				c.err = fail(ErrSyntax, "the last line does not end in a newline")
				break
			}
		}
		if i >= MaxLine {
			c.err = fail(ErrLimit, "line is too long: want at most %d bytes", MaxLine-1)
			break
		}
		c.entries = append(c.entries, entry{})
		if c.err = p.parse(text[:i], &c.entries[len(c.entries)-1]); c.err != nil {
			c.entries = c.entries[:len(c.entries)-1]
			break
		}
		text = text[end:]
	}
	kept := string(p.kept)
	for i := range c.entries {
		c.entries[i].finish(kept)
	}
}

// A linker makes a tree of entries.
type linker struct {
	root  *tree.Node
	dirs  map[string]*tree.Node // by canonical path
	links []link
	last  []byte // the directory of the last entry
	dir   *tree.Node
}

// A link is a hard link. A node of its own stands for it in its directory until all
// of the input is known.
type link struct {
	line   int
	path   string
	node   *tree.Node
	target string

	// What resolve finds: the file behind the link and its path.
	final *tree.Node
	owner string
	busy  bool
}

// resolve sets final and owner, of the link and of those that it leads through.
func (k *link) resolve(t *tree.Tree, links map[*tree.Node]*link) *LineError {
	var chain []*link
	n, path := k.node, k.path
	for {
		next := links[n]
		if next == nil {
			break
		}
		if next.final != nil {
			n, path = next.final, next.owner
			break
		}
		if next.busy {
			return fail(ErrTree, "hard link %q to itself", k.path)
		}
		next.busy = true
		chain = append(chain, next)
		path = next.target
		if n = t.Lookup(path); n == nil {
			return fail(ErrTree, "hard link %q to %q, which does not exist", k.path, path)
		}
	}
	if n.IsDir() {
		return fail(ErrTree, "hard link %q to a directory, %q", k.path, path)
	}
	for _, c := range chain {
		c.final, c.owner = n, path
	}
	return nil
}

// add puts the entries of a chunk in place; its first line has the given number.
func (l *linker) add(c *chunk, line int) error {
	for i := range c.entries {
		if err := l.place(&c.entries[i], line+i); err != nil {
			err.Line = line + i
			return err
		}
	}
	l.last = bytes.Clone(l.last) // the chunk will be used again
	if c.err != nil {
		c.err.Line = line + len(c.entries)
		return c.err
	}
	return nil
}

func (l *linker) place(e *entry, line int) *LineError {
	if e.name == "" { // the root
		switch {
		case !e.node.IsDir():
			return fail(ErrTree, "the root is not a directory")
		case l.root != nil:
			return fail(ErrTree, "a second root")
		}
		l.root = e.node
		l.dirs["/"] = e.node
		return nil
	}
	if l.root == nil {
		return fail(ErrTree, "%q comes before the root", e.path)
	}
	if dir := e.dir(); l.dir == nil || !bytes.Equal(dir, l.last) {
		if l.dir = l.dirs[string(dir)]; l.dir == nil {
			if (&tree.Tree{Root: l.root}).Lookup(string(dir)) != nil {
				return fail(ErrTree, "%q is not a directory, but %q is to be in it", dir, e.path)
			}
			return fail(ErrTree, "the directory of %q is missing", e.path)
		}
		l.last = dir
	}
	before := len(l.dir.Dir)
	if l.dir.Dir[e.name] = e.node; len(l.dir.Dir) == before {
		return fail(ErrTree, "%q is there already", e.path)
	}
	switch {
	case e.isLink:
		l.links = append(l.links, link{line: line, path: string(e.path), node: e.node, target: e.target})
	case e.node.IsDir():
		l.dirs[string(e.path)] = e.node
	}
	return nil
}

// finish replaces the links by what they link to.
func (l *linker) finish() (*tree.Tree, error) {
	if l.root == nil {
		return nil, fmt.Errorf("%w: it has no lines", ErrSyntax)
	}
	t := &tree.Tree{Root: l.root}
	if len(l.links) == 0 {
		return t, nil
	}

	byNode := make(map[*tree.Node]*link, len(l.links))
	for i := range l.links {
		byNode[l.links[i].node] = &l.links[i]
	}
	type file struct {
		path  string   // the owner
		links []string // paths
	}
	files := map[*tree.Node]*file{}
	for i := range l.links {
		k := &l.links[i]
		if err := k.resolve(t, byNode); err != nil {
			err.Line = k.line
			return nil, err
		}
		f := files[k.final]
		if f == nil {
			f = &file{path: k.owner}
			files[k.final] = f
		}
		f.links = append(f.links, k.path)
	}
	for n, f := range files {
		for _, path := range f.links {
			if tree.ComparePaths(path, f.path) < 0 {
				if t.Owners == nil {
					t.Owners = map[*tree.Node]string{}
				}
				t.Owners[n] = f.path
			}
		}
		// 0 stood for 1 so far; from here on it stands for the number of names.
		switch names := uint32(1 + len(f.links)); {
		case n.Nlink == 0:
			n.Nlink = 1
		case n.Nlink == names:
			n.Nlink = 0
		}
		for _, path := range f.links {
			i := strings.LastIndexByte(path, '/')
			l.dirs[cmp.Or(path[:i], "/")].Dir[path[i+1:]] = n
		}
	}
	return t, nil
}
