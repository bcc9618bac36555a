// Package etcmerge carries the local changes of one deployment's /etc into the next
// one's, as a three-way merge of the old image's /etc, the new image's and the current
// directory.
//
// What was not changed locally becomes the new image's; what was changed, added or
// removed locally stays so. Content and metadata (permissions with their ACL, owner,
// each xattr) merge separately; a time of modification is no change by itself. Where
// both sides changed differently the local version stays in force, the image's is kept
// beside it with the name that dpkg(1) would give it, "….dpkg-dist", which run-parts(8)
// and most readers of configuration directories leave alone, and a [Conflict] says so.
// No content that exists locally only is ever lost, whatever changes its type. What the
// image adds to a directory that was removed locally is added, as dpkg does with a new
// configuration file; what was in it before stays removed.
//
// passwd, group, shadow, gshadow, subuid and subgid merge line by line, so that a local
// user and a system user of the new image are both there (passwd(5), group(5),
// shadow(5), gshadow(5), subuid(5)). /etc/.updated, by which systemd knows that /etc is
// as old as /usr (systemd-update-done.service(8)), is left out, and ld.so.cache, which
// lists the image's libraries, is the image's where both sides made it anew.
//
// The current directory may change while it is read. [Merge.Write] compares afterwards
// and starts anew when it did; see [Merge.Late]. No symbolic link is ever followed.
//
// Left out: sockets, attributes of chattr(1), holes, xattrs that the kernel or a policy
// sets (security.selinux, .ima, .evm) as changes, and users or groups in any other place
// than those files: a collision of numbers is listed and not resolved.
package etcmerge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/particle-os/particle/converter/fsverity"
	"github.com/particle-os/particle/converter/tree"
)

// Errors of this package; test with errors.Is.
var (
	// ErrChanged: the current /etc changes so fast that it cannot be read.
	ErrChanged = errors.New("changed while it was merged")
	// ErrExists: the directory to write is there already.
	ErrExists = errors.New("directory exists already")
	// ErrContent: a file of an image has other content than its image says.
	ErrContent = errors.New("other content than the image's")
	// ErrNotDir: what is given as /etc is no directory.
	ErrNotDir = errors.New("not a directory")
)

// Suffix ends the names of the image's versions of files that are in conflict.
const Suffix = ".dpkg-dist"

// An Opener opens contents of the images' files: a store or a transaction.
type Opener interface {
	OpenObject(fsverity.Digest) (*os.File, error)
}

// A Kind says what happened to a path.
type Kind string

const (
	Added    Kind = "added"
	Modified Kind = "modified"
	Removed  Kind = "removed"
)

// A Change is a path at which one /etc differs from another.
type Change struct {
	Path string `json:"path"` // as "/etc/ssh/sshd_config"
	Kind Kind   `json:"kind"`
	// What lists what was modified, as "content, mode 0644 to 0600"; "" for the others.
	What string `json:"what,omitempty"`
}

// String returns the change as `ostree admin config-diff` prints it: A, M or D and the
// path.
func (c Change) String() string {
	letter := map[Kind]string{Added: "A", Modified: "M", Removed: "D"}[c.Kind]
	s := fmt.Sprintf("%s %s", letter, quote(c.Path))
	if c.What != "" {
		s += " (" + c.What + ")"
	}
	return s
}

// A Reason says why something is a conflict.
type Reason string

const (
	// Both sides changed the content or type, or added it: the local one is in force.
	Both Reason = "both"
	// Metadata was changed on both sides: the local one is in force.
	Metadata Reason = "metadata"
	// RemovedByImage: the image has it no more, but it was changed locally and stays.
	RemovedByImage Reason = "removedByImage"
	// RemovedHere: the image changed what was removed locally and stays so.
	RemovedHere Reason = "removedHere"
	// Record: a line of passwd and the like, for any of the reasons above.
	Record Reason = "record"
	// Number: a user, group or range of ids that came with the image has the same
	// number as a local one.
	Number Reason = "number"
	// Derived: a file that is made of others and of the image was made anew on both
	// sides. The image's is in force.
	Derived Reason = "derived"
)

// A Conflict is something that a person may want to look at. The local version is in
// force, unless the reason is Derived.
type Conflict struct {
	Path   string `json:"path"`
	Reason Reason `json:"reason"`
	// Kept is the path of the image's version, "" where there is none to keep.
	Kept string `json:"kept,omitempty"`
	// Detail says more, for people; it never has a line of shadow(5) in it.
	Detail string `json:"detail,omitempty"`
}

func (c Conflict) String() string {
	s := quote(c.Path) + ": "
	switch c.Reason {
	case Both:
		s += "changed here and by the image"
	case Metadata:
		s += "permissions changed here and by the image"
	case RemovedByImage:
		s += "removed by the image, changed here"
	case RemovedHere:
		s += "removed here, changed by the image"
	default:
		s += c.Detail
		return s
	}
	if c.Detail != "" {
		s += " (" + c.Detail + ")"
	}
	if c.Kept != "" {
		s += "; the image's is " + quote(c.Kept)
	}
	return s
}

// Input is what is merged.
type Input struct {
	// Old and New are the /etc of the image that the current one began as and of the
	// image to come; nil for none.
	Old, New *tree.Node
	// Current is the directory with the local state. Mounts in it count as part of it.
	Current string
	// Objects has the contents of both images.
	Objects Opener
}

// A Merge is a merge that was worked out. Nothing is written before Write.
type Merge struct {
	// Conflicts, Local (what stays of local changes, and differs from the old image)
	// and Image (what will be other than it is now) are sorted by path.
	Conflicts []Conflict `json:"conflicts"`
	Local     []Change   `json:"local"`
	Image     []Change   `json:"image"`
	// Late lists paths that were changed while Write ran, again and again: what was
	// written is an earlier state of theirs.
	Late []string `json:"late,omitempty"`

	in       Input
	snapshot *tree.Node // of Current
	result   *result
}

// Plan works out a merge. It reads Current and writes nothing.
func Plan(ctx context.Context, in Input) (*Merge, error) {
	m := &Merge{in: in}
	if err := m.plan(ctx); err != nil {
		return nil, err
	}
	return m, nil
}

// plan tries again where a file changes between two looks at it.
func (m *Merge) plan(ctx context.Context) error {
	for try := 1; ; try++ {
		err := m.planOnce(ctx)
		if !errors.Is(err, ErrChanged) || try == attempts {
			return err
		}
		if err := pause(ctx, try); err != nil {
			return err
		}
	}
}

// pause waits for what writes to /etc, a little longer each time.
func pause(ctx context.Context, try int) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(10 * time.Millisecond << try):
		return nil
	}
}

func (m *Merge) planOnce(ctx context.Context) error {
	s := newSums(m.in.Objects, m.in.Old, m.in.New)
	o, err := s.image(m.in.Old)
	if err != nil {
		return fmt.Errorf("reading /etc of the old image: %w", err)
	}
	n, err := s.image(m.in.New)
	if err != nil {
		return fmt.Errorf("reading /etc of the new image: %w", err)
	}
	l, err := s.directory(ctx, m.in.Current)
	if err != nil {
		return err
	}
	r, err := merge(s, m.in.Current, o, n, l)
	if err != nil {
		return err
	}
	m.snapshot, m.result = l, r
	m.Conflicts = r.conflicts
	m.Local = s.diff(o, l)
	m.Image = s.diff(l, r.root)
	return nil
}

// Summary returns the counts for people: "3 changes by the image, 12 local ones kept,
// 1 conflict".
func (m *Merge) Summary() string {
	return fmt.Sprintf("%s by the image, %d local kept, %s",
		plural(len(m.Image), "change"), len(m.Local), plural(len(m.Conflicts), "conflict"))
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// Changes lists how the directory current differs from an image's /etc, in the order of
// paths.
func Changes(ctx context.Context, old *tree.Node, current string) ([]Change, error) {
	s := newSums(nil, old)
	o, err := s.image(old)
	if err != nil {
		return nil, fmt.Errorf("reading the image's /etc: %w", err)
	}
	l, err := s.directory(ctx, current)
	if err != nil {
		return nil, err
	}
	return s.diff(o, l), nil
}

// etcPath returns the path that people know of one below /etc that begins with a slash.
func etcPath(p string) string {
	if p == "/" {
		return "/etc"
	}
	return "/etc" + p
}

// quote quotes a path that a terminal could not show as it is.
func quote(p string) string {
	if q := fmt.Sprintf("%q", p); q[1:len(q)-1] != p || strings.Contains(p, " ") {
		return q
	}
	return p
}
