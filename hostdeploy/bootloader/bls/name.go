package bls

import (
	"cmp"
	"fmt"
	"math"
	"strconv"
	"strings"
)

// A Name is the name of an entry's file, "ID+LEFT-DONE.conf"
// (Boot Loader Specification, "Boot counting").
type Name struct {
	ID string
	// Counted: the name has a counter. Left tries may still be made, Done were.
	Counted    bool
	Left, Done int
}

// Suffix ends the name of each entry's file.
const Suffix = ".conf"

// ParseName takes a file's name apart; ok is false for a file that a loader skips: one
// that does not end in ".conf" (in any case, the file system being FAT), or is hidden, or
// begins with "auto-", which systemd-boot keeps for itself.
//
// What looks like a counter and is none ("a+b.conf", "a+3x.conf", a number above
// 2147483647) belongs to the ID, as in systemd-boot.
func ParseName(file string) (n Name, ok bool) {
	cut := len(file) - len(Suffix)
	if cut < 0 || !strings.EqualFold(file[cut:], Suffix) || file[0] == '.' {
		return Name{}, false
	}
	n.ID = file[:cut]
	if len(n.ID) >= 5 && strings.EqualFold(n.ID[:5], "auto-") {
		return Name{}, false
	}
	plus := strings.LastIndexByte(n.ID, '+')
	if plus < 0 {
		return n, true
	}
	left, done, hasDone := strings.Cut(n.ID[plus+1:], "-")
	l, okLeft := number(left)
	d, okDone := number(done)
	if !okLeft || hasDone && !okDone {
		return n, true
	}
	return Name{ID: n.ID[:plus], Counted: true, Left: l, Done: d}, true
}

func number(s string) (int, bool) {
	if s == "" || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return int(n), err == nil && n <= math.MaxInt32
}

// String is the file's name. A counter that has not been used is "+LEFT" alone.
func (n Name) String() string {
	switch {
	case !n.Counted:
		return n.ID + Suffix
	case n.Done == 0:
		return fmt.Sprintf("%s+%d%s", n.ID, n.Left, Suffix)
	}
	return fmt.Sprintf("%s+%d-%d%s", n.ID, n.Left, n.Done, Suffix)
}

// An Entry is what an entry is sorted by.
type Entry struct {
	Name
	SortKey, MachineID, Version string
}

// Compare is negative where a stands before b in the menu. The first entry of the menu
// is what boots.
//
// The order is that of boot_entry_compare in systemd-boot, which is that of the
// specification ("Sorting") with two rules more: entries that are equal but for their
// counters come by tries left, most first, then by tries done, fewest first. IDs are
// compared in lower case and with the suffix.
func Compare(a, b Entry) int {
	return cmp.Or(
		compareBool(a.bad(), b.bad()),
		compareBool(a.SortKey == "", b.SortKey == ""),
		compareKeyed(a, b),
		-CompareVersions(strings.ToLower(a.ID)+Suffix, strings.ToLower(b.ID)+Suffix),
		compareCounters(a, b),
	)
}

func (n Name) bad() bool { return n.Counted && n.Left == 0 }

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// compareKeyed compares entries of which both or none have a sort key.
func compareKeyed(a, b Entry) int {
	if a.SortKey == "" {
		return 0
	}
	return cmp.Or(
		strings.Compare(a.SortKey, b.SortKey),
		strings.Compare(a.MachineID, b.MachineID),
		-CompareVersions(a.Version, b.Version),
	)
}

func compareCounters(a, b Entry) int {
	if !a.Counted || !b.Counted {
		return 0
	}
	return cmp.Or(cmp.Compare(b.Left, a.Left), cmp.Compare(a.Done, b.Done))
}
