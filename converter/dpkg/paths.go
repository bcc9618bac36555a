package dpkg

import (
	"path"
	"strings"
	"sync"

	"github.com/particle-os/particle/converter/tree"
)

// maxLinks is how many symbolic links one path may go through, as in Linux
// (path_resolution(7)).
const maxLinks = 40

// A place is a path without symbolic links in its directories, and what is there: nil
// for nothing.
type place struct {
	path string
	node *tree.Node
}

// paths follows the symbolic links of a tree, inside it.
type paths struct {
	root *tree.Node
	mu   sync.Mutex
	dirs map[string]place // directories by any path of theirs
}

func newPaths(t *tree.Tree) *paths {
	return &paths{root: t.Root, dirs: map[string]place{"/": {"/", t.Root}}}
}

// canonical returns the path of a name with its directory resolved: what two paths have
// in common if, and only if, they are the same name. A path need not exist.
func (p *paths) canonical(name string) string {
	dir, base := path.Split(path.Clean("/" + name))
	if base == "" {
		return "/"
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return tree.Join(p.dir(strings.TrimSuffix(dir, "/")).path, base)
}

// resolve follows all links of a path.
func (p *paths) resolve(name string) place {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dir(path.Clean("/" + name))
}

// dir resolves a clean path, "" for the root, and remembers it.
func (p *paths) dir(name string) place {
	if name == "" {
		name = "/"
	}
	at, ok := p.dirs[name]
	if !ok {
		links := 0
		if at = p.walk(place{"/", p.root}, name, &links); links > maxLinks {
			at = place{path: name} // a loop leads nowhere
		}
		p.dirs[name] = at
	}
	return at
}

// walk goes from a place along a path, which may have links and ".." in it.
func (p *paths) walk(at place, name string, links *int) place {
	if strings.HasPrefix(name, "/") {
		at = place{"/", p.root}
	}
	for element := range strings.SplitSeq(name, "/") {
		switch element {
		case "", ".":
			continue
		case "..":
			at.path = path.Dir(at.path)
			at.node = (&tree.Tree{Root: p.root}).Lookup(at.path)
			continue
		}
		next := place{path: tree.Join(at.path, element)}
		if at.node != nil {
			next.node = at.node.Dir[element]
		}
		if n := next.node; n != nil && n.Type() == tree.TypeSymlink {
			if *links++; *links > maxLinks {
				return next
			}
			next = p.walk(at, n.Target, links)
		}
		at = next
	}
	return at
}
