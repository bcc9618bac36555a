package prepare

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Where the state of dpkg and apt goes: beside the packages' files, so that what it says
// is true of them whichever image is booted. /usr/lib/sysimage is what RPM uses, too.
const (
	dpkgDir   = "usr/lib/sysimage/dpkg"
	dpkgLink  = "var/lib/dpkg"
	toDpkg    = "../../usr/lib/sysimage/dpkg"
	aptState  = "usr/lib/sysimage/apt/extended_states"
	aptBefore = "var/lib/apt/extended_states"
)

// packages moves the state of dpkg and apt into /usr.
//
// dpkg follows the link, its triggers, locks and updates included. apt replaces
// extended_states by rename(2), which would put a file in the place of a link: it is told
// by a setting (rootfs/etc/apt/apt.conf.d/90particle).
func (p *preparation) packages(context.Context) error {
	fi, err := p.lstat(dpkgLink)
	if err != nil {
		return err
	}
	there, err := p.exists(path.Join(dpkgDir, "status"))
	if err != nil {
		return err
	}
	switch {
	case fi == nil && !there:
		return fmt.Errorf("%w: neither /%s nor /%s/status", ErrNoDpkg, dpkgLink, dpkgDir)
	case fi == nil:
		if err := p.link(dpkgLink, toDpkg, ""); err != nil {
			return err
		}
	case fi.Mode().Type() == fs.ModeSymlink:
		target, err := p.root.Readlink(dpkgLink)
		if err != nil {
			return err
		}
		if target != toDpkg && target != "/"+dpkgDir {
			return fmt.Errorf("/%s leads to %q: %w; want %q", dpkgLink, target, ErrConflict, toDpkg)
		}
		if !there {
			return fmt.Errorf("%w: no /%s/status", ErrNoDpkg, dpkgDir)
		}
	default:
		if err := p.moveDpkg(); err != nil {
			return err
		}
	}
	if err := p.moveExtendedStates(); err != nil {
		return err
	}
	return p.audit()
}

func (p *preparation) moveDpkg() error {
	// The status file moves last. So where both have one, it is not because a move was
	// cut off.
	for _, name := range []string{"status", "info"} {
		have, err := p.exists(path.Join(dpkgLink, name))
		if err != nil {
			return err
		}
		if !have && name == "status" {
			return fmt.Errorf("%w: no /%s/status", ErrNoDpkg, dpkgLink)
		}
	}
	both, err := p.exists(path.Join(dpkgDir, "status"))
	if err != nil {
		return err
	}
	if both {
		return fmt.Errorf("moving /%s: %w: /%s has a status file, too; remove the older of the two databases", dpkgLink, ErrConflict, dpkgDir)
	}
	if !p.will(Move, dpkgLink, "/"+dpkgDir, "it describes /usr") {
		return nil
	}
	if err := p.move(dpkgLink, dpkgDir, "status"); err != nil {
		return err
	}
	return p.root.Symlink(toDpkg, dpkgLink)
}

func (p *preparation) moveExtendedStates() error {
	if err := p.makeDir(path.Dir(aptState), 0o755); err != nil {
		return err
	}
	fi, err := p.lstat(aptBefore)
	if fi == nil || err != nil {
		return err
	}
	if behind, err := p.behindMount(aptBefore); behind || err != nil {
		return err // a cache of the build's
	}
	if fi.Mode().Type() == fs.ModeSymlink {
		if p.will(Remove, aptBefore, "", "apt would replace the link") {
			return p.root.Remove(aptBefore)
		}
		return nil
	}
	// One that is there is the newer: apt wrote it without our setting.
	if p.will(Move, aptBefore, "/"+aptState, "it describes /usr") {
		return p.root.Rename(aptBefore, aptState)
	}
	return nil
}

// audit looks for packages that are installed by half: nobody can finish them on a
// read-only root.
func (p *preparation) audit() error {
	dir := dpkgDir
	if have, err := p.exists(path.Join(dir, "status")); err != nil {
		return err
	} else if !have {
		dir = dpkgLink
	}
	data, err := p.root.ReadFile(path.Join(dir, "status"))
	if err != nil {
		return err
	}
	if half := unfinished(data); len(half) > 0 {
		p.warnf("packages that are not fully installed (dpkg --audit): %s", strings.Join(half, ", "))
	}
	updates, err := p.list(path.Join(dir, "updates"))
	if err != nil {
		return err
	}
	if len(updates) > 0 {
		p.warnf("dpkg was interrupted: /%s/updates is not empty; dpkg --configure --pending completes it", dir)
	}
	return nil
}

// unfinished returns the packages of a status file (fields as in deb822(5))
// deb822(5)) whose state is neither installed nor removed.
func unfinished(status []byte) []string {
	var names []string
	var name string
	s := bufio.NewScanner(bytes.NewReader(status))
	s.Buffer(nil, len(status)+1)
	for s.Scan() {
		key, value, ok := strings.Cut(s.Text(), ":")
		switch {
		case !ok:
		case strings.EqualFold(key, "Package"):
			name = strings.TrimSpace(value)
		case strings.EqualFold(key, "Status"):
			// want, error flag, state: dpkg-query(1), db:Status-Status.
			words := strings.Fields(value)
			if len(words) != 3 || !slices.Contains([]string{"installed", "not-installed", "config-files"}, words[2]) || words[1] != "ok" {
				names = append(names, name)
			}
		}
	}
	return names
}
