package layer

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
)

// PAX records that hold xattrs. Both are vendor extensions (POSIX pax, "pax
// Extended Header"): star's has the raw value, libarchive's a percent-encoded name
// and a base64 value. bsdtar writes both for each xattr.
const (
	schilyXattr     = "SCHILY.xattr."
	libarchiveXattr = "LIBARCHIVE.xattr."
)

// xattrsOf returns the xattrs in PAX records, as strings that share no memory with
// them: a record block may be a megabyte. Podman reads the first kind only; where
// both are there, it counts.
func xattrsOf(records map[string]string) (map[string]string, error) {
	var xattrs map[string]string
	add := func(key, value string) {
		if value == "" {
			return // a record without a value is none (POSIX pax), and podman agrees
		}
		if xattrs == nil {
			xattrs = make(map[string]string)
		}
		xattrs[strings.Clone(key)] = strings.Clone(value)
	}
	for key, value := range records {
		if name, ok := strings.CutPrefix(key, schilyXattr); ok {
			add(name, value)
		}
	}
	for _, key := range sorted(records) {
		name, ok := strings.CutPrefix(key, libarchiveXattr)
		if !ok {
			continue
		}
		name, err := url.PathUnescape(name)
		if err != nil || strings.Contains(name, "\x00") {
			return nil, fmt.Errorf("%w: name of the xattr in record %.300q", ErrValue, key)
		}
		if _, ok := xattrs[name]; ok {
			continue
		}
		value, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(records[key], "="))
		if err != nil {
			return nil, fmt.Errorf("%w: value of the xattr in record %.300q: %w", ErrValue, key, err)
		}
		add(name, string(value))
	}
	return xattrs, nil
}

// xattrRecord returns the PAX record for an xattr. A name with "=" cannot stand in
// star's.
func xattrRecord(key, value string) (string, string) {
	if strings.Contains(key, "=") {
		return libarchiveXattr + strings.NewReplacer("%", "%25", "=", "%3D").Replace(key), base64.RawStdEncoding.EncodeToString([]byte(value))
	}
	return schilyXattr + key, value
}

// sorted returns the keys of m in byte order. Most entries have no records at all.
func sorted(m map[string]string) []string {
	if len(m) == 0 {
		return nil
	}
	return slices.Sorted(maps.Keys(m))
}
