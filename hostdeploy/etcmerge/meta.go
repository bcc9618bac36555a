package etcmerge

import (
	"fmt"
	"maps"
	"slices"

	"github.com/particle-os/particle/converter/tree"
)

const (
	permissions = 0o7777
	accessACL   = "system.posix_acl_access"
	defaultACL  = "system.posix_acl_default"
)

// assigned are xattrs that the kernel or a policy gives to files: they are written as
// they are found, but never a change.
var assigned = map[string]bool{"security.selinux": true, "security.ima": true, "security.evm": true}

// An attribute is a piece of metadata that changes as a whole.
type attribute struct{ name, value string }

// attributes returns what is compared of a node's metadata. The permission bits of the
// group are the ACL's mask where there is one (acl(5)), so both go together. The bits
// of a symbolic link mean nothing.
func attributes(n *tree.Node) []attribute {
	var list []attribute
	if n.Type() != tree.TypeSymlink {
		list = append(list, attribute{"mode", fmt.Sprintf("%04o", n.Mode&permissions) + aclMark(n)})
	}
	list = append(list, attribute{"owner", fmt.Sprintf("%d:%d", n.UID, n.GID)})
	for _, key := range slices.Sorted(maps.Keys(n.Xattrs)) {
		if key != accessACL && !assigned[key] {
			list = append(list, attribute{"xattr " + key, "=" + n.Xattrs[key]})
		}
	}
	return list
}

func aclMark(n *tree.Node) string {
	if acl, ok := n.Xattrs[accessACL]; ok {
		return "+" + acl
	}
	return ""
}

// meta is attributes as a map; what is missing is "".
func meta(n *tree.Node) map[string]string {
	m := map[string]string{}
	for _, a := range attributes(n) {
		m[a.name] = a.value
	}
	return m
}

func sameMeta(a, b *tree.Node) bool { return maps.Equal(meta(a), meta(b)) }

// metaChanges says what of the metadata makes b of a.
func metaChanges(a, b *tree.Node) []string {
	var list []string
	x, y := meta(a), meta(b)
	for _, key := range attributeNames(x, y) {
		from, to := printable(key, x[key]), printable(key, y[key])
		switch {
		case x[key] == y[key]:
		case from == "" && to == "":
			list = append(list, key)
		case from == "" || to == "": // of a symbolic link, which has no mode
		case from == to:
			list = append(list, "ACL")
		default:
			list = append(list, fmt.Sprintf("%s %s to %s", key, from, to))
		}
	}
	return list
}

// printable returns a value as people read it: an ACL is a "+" as with ls(1), other
// xattrs are not shown.
func printable(key, value string) string {
	switch {
	case key == "mode" && len(value) > 4:
		return value[:5]
	case key == "mode", key == "owner":
		return value
	}
	return ""
}

// attributeNames returns the keys of all, mode and owner first.
func attributeNames(all ...map[string]string) []string {
	keys := map[string]bool{}
	for _, m := range all {
		for k := range m {
			keys[k] = true
		}
	}
	return slices.Sorted(maps.Keys(keys)) // "mode" < "owner" < "xattr …"
}

// mergeMeta merges the metadata of three nodes of one type, o perhaps nil. What is
// assigned, and the time, is taken from base, which is n or l. conflicts names what was
// changed on both sides.
func mergeMeta(o, n, l, base *tree.Node) (st tree.Stat, conflicts []string) {
	om, nm, lm := map[string]string{}, meta(n), meta(l)
	if o != nil {
		om = meta(o)
	}
	st = base.Stat
	st.Mode = base.Mode &^ permissions
	st.Xattrs = map[string]string{}
	for key := range assigned {
		if v, ok := base.Xattrs[key]; ok {
			st.Xattrs[key] = v
		}
	}
	if base.Type() == tree.TypeSymlink {
		st.Mode = base.Mode
	}
	for _, key := range attributeNames(om, nm, lm) {
		from := l
		switch {
		case nm[key] == lm[key]:
		case o != nil && om[key] == lm[key]:
			from = n
		case o != nil && om[key] == nm[key]:
		default:
			conflicts = append(conflicts, describe(key, nm[key], lm[key]))
		}
		switch key {
		case "mode":
			st.Mode |= from.Mode & permissions
			if acl, ok := from.Xattrs[accessACL]; ok {
				st.Xattrs[accessACL] = acl
			}
		case "owner":
			st.UID, st.GID = from.UID, from.GID
		default:
			name := key[len("xattr "):]
			if v, ok := from.Xattrs[name]; ok {
				st.Xattrs[name] = v
			}
		}
	}
	if len(st.Xattrs) == 0 {
		st.Xattrs = nil
	}
	return st, conflicts
}

func describe(key, image, local string) string {
	if image, local = printable(key, image), printable(key, local); image != local {
		return fmt.Sprintf("%s here %s, of the image %s", key, local, image)
	}
	if key == "mode" {
		return "ACL"
	}
	return key
}
