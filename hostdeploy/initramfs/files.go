package initramfs

import (
	"embed"
	"io/fs"
)

// The carriers, beside this file: shell scripts, a unit and a setting.
//
//go:embed initramfs-tools dracut
var carriers embed.FS

// A File is one that a system needs so that its initramfs sets up deployments.
type File struct {
	// Path is where it gets installed.
	Path string
	Mode fs.FileMode
	// Data is nil for the program itself, which is built from cmd/particle-init-root.
	Data []byte
}

// places says where the carriers get installed.
var places = []struct {
	source, path string
	mode         fs.FileMode
}{
	{"", Program, 0o755},
	{"initramfs-tools/hook", "/usr/share/initramfs-tools/hooks/particle", 0o755},
	{"initramfs-tools/init-top", "/usr/share/initramfs-tools/scripts/init-top/particle", 0o755},
	{"initramfs-tools/init-bottom", "/usr/share/initramfs-tools/scripts/init-bottom/particle", 0o755},
	{"dracut/module-setup.sh", "/usr/lib/dracut/modules.d/95particle/module-setup.sh", 0o755},
	{"dracut/particle-root-setup.service", "/usr/lib/dracut/modules.d/95particle/particle-root-setup.service", 0o644},
	{"dracut/particle-cmdline.sh", "/usr/lib/dracut/modules.d/95particle/particle-cmdline.sh", 0o755},
	{"dracut/particle-pre-pivot.sh", "/usr/lib/dracut/modules.d/95particle/particle-pre-pivot.sh", 0o755},
}

// Files returns what to install, in a fixed order, the program first.
func Files() []File {
	files := make([]File, len(places))
	for i, p := range places {
		files[i] = File{Path: p.path, Mode: p.mode}
		if p.source == "" {
			continue
		}
		data, err := carriers.ReadFile(p.source)
		if err != nil {
			panic("initramfs: " + err.Error()) // the table names what is not embedded
		}
		files[i].Data = data
	}
	return files
}
