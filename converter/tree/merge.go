package tree

import "maps"

// Merge lays the upper layer over the lower tree, as overlayfs would show them
// (OCI image-layout, "Representing Changes"): directories merge and take the upper
// one's Stat, anything else replaces, whiteouts delete and opaque directories hide.
//
// Neither argument is changed; the result shares what it can with both. Links
// between names of the lower tree stay links, and so do those of the upper layer. A
// lower file that the upper layer lists anew under one of its names is replaced
// there only.
//
// Merging a layer on [New] removes the whiteouts from it.
func Merge(lower, upper *Tree) *Tree {
	return &Tree{Root: mergeDir(lower.Root, upper.Root)}
}

// mergeDir merges two directories; lower is nil where there is nothing below.
func mergeDir(lower, upper *Node) *Node {
	opaque := upper.IsOpaque()
	if lower == nil && !opaque && !hasMarks(upper) {
		return upper
	}

	n := &Node{Stat: upper.Stat, Implied: upper.Implied}
	if opaque {
		n.Xattrs = without(n.Xattrs, OpaqueAttr)
	}
	if lower == nil {
		n.Dir = make(map[string]*Node, len(upper.Dir))
	} else {
		if upper.Implied {
			n.Stat, n.Implied = lower.Stat, lower.Implied
		}
		if opaque {
			lower = nil
			n.Dir = make(map[string]*Node, len(upper.Dir))
		} else if len(upper.Dir) == 0 {
			n.Dir = lower.Dir // shared: nobody changes a tree
			return n
		} else {
			n.Dir = maps.Clone(lower.Dir)
		}
	}

	for name, child := range upper.Dir {
		switch {
		case child.IsWhiteout():
			delete(n.Dir, name)
		case child.IsDir():
			var below *Node
			if lower != nil {
				if b := lower.Dir[name]; b != nil && b.IsDir() {
					below = b
				}
			}
			n.Dir[name] = mergeDir(below, child)
		default:
			n.Dir[name] = child
		}
	}
	return n
}

// hasMarks reports whether there is a whiteout or an opaque directory below n.
func hasMarks(n *Node) bool {
	for _, child := range n.Dir {
		if child.IsWhiteout() || child.IsOpaque() || child.IsDir() && hasMarks(child) {
			return true
		}
	}
	return false
}

// without returns a copy of xattrs that lacks one key.
func without(xattrs map[string]string, key string) map[string]string {
	if len(xattrs) == 1 {
		return nil
	}
	m := maps.Clone(xattrs)
	delete(m, key)
	return m
}
