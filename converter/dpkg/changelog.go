package dpkg

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/particle-os/particle/converter/tree"
)

// maxEntry is how many bytes of a changelog are read to find the end of its first entry.
const maxEntry = 1 << 20

// Changelog returns the date of the newest entry in a package's changelog
// (deb-changelog(5)), the zero time where the tree has none, as in images that were made
// without documentation. Rebuilt packages (binNMU) have a further changelog for the
// architecture; the newest date counts.
func (d *Database) Changelog(p *Package) (time.Time, error) {
	var newest time.Time
	dir := "/usr/share/doc/" + p.Name
	for _, name := range []string{"changelog.Debian." + p.Arch + ".gz", "changelog.Debian.gz", "changelog.gz"} {
		path := tree.Join(dir, name)
		n := d.paths.resolve(path).node
		if n == nil || !n.IsRegular() {
			continue
		}
		// The changelog of a program itself, beside Debian's, has any form.
		if name == "changelog.gz" && !newest.IsZero() {
			break
		}
		r, err := open(d.objects, n.File)
		if err != nil {
			return time.Time{}, fmt.Errorf("reading %q: %w", path, err)
		}
		date, err := changelogDate(r)
		r.Close()
		if err != nil {
			return time.Time{}, fmt.Errorf("reading %q: %w", path, err)
		}
		if date.After(newest) {
			newest = date
		}
	}
	return newest, nil
}

// changelogDate reads the date of the first entry of a compressed changelog: what
// follows the maintainer in the line that begins with " -- ". It is zero where there is
// no such line.
func changelogDate(r io.Reader) (time.Time, error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return time.Time{}, fmt.Errorf("%w: changelog: %w", ErrFormat, err)
	}
	lines := bufio.NewReader(io.LimitReader(z, maxEntry))
	for {
		line, err := lines.ReadString('\n')
		if rest, ok := strings.CutPrefix(line, " -- "); ok {
			_, date, _ := strings.Cut(rest, ">")
			return parseDate(strings.TrimSpace(date)), nil
		}
		if errors.Is(err, io.EOF) {
			return time.Time{}, nil
		} else if err != nil {
			return time.Time{}, fmt.Errorf("%w: changelog: %w", ErrFormat, err)
		}
	}
}

// parseDate reads a date as `date -R` prints it. Old entries have it in other forms,
// which are zero.
func parseDate(s string) time.Time {
	for _, layout := range []string{"Mon, _2 Jan 2006 15:04:05 -0700", "Mon, _2 Jan 2006 15:04:05 MST", "_2 Jan 2006 15:04:05 -0700"} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC()
		}
	}
	return time.Time{}
}
