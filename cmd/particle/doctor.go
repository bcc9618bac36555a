package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/particle-os/particle/converter/mount"
)

func newDoctorCommand(t *term) *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "tell what this machine can do, and what to install",
		Description: "Tries what the kernel and the store's filesystem can do, looks for the programs that\n" +
			"some verbs need, and tells which state of verification a mount can have here. Nothing\n" +
			"is changed. The exit status is 1 if images cannot be mounted.",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON"}},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			d := diagnose(c.String("store"))
			if place, err := (&podmanBridge{}).place(c.Context); err == nil {
				d.Podman = podmanChecks(place, &d.features)
			}
			if c.Bool("json") {
				if err := t.printJSON(d); err != nil {
					return err
				}
			} else if err := d.print(t); err != nil {
				return err
			}
			if err := d.features.Mountable(); err != nil {
				return fmt.Errorf("%w\n%s", err, d.advice())
			}
			return nil
		},
	}
}

// A diagnosis is the result of doctor.
type diagnosis struct {
	Store        string             `json:"store"`
	Kernel       string             `json:"kernel"`
	Verification mount.Verification `json:"verification"` // the best that a mount can have
	Why          string             `json:"why"`          // that it is not better
	Checks       []check            `json:"checks"`
	// Podman is what of the store podman can share, empty where it is not installed.
	Podman []check `json:"podman,omitempty"`
	Tools  []tool  `json:"tools"`

	features mount.Features
}

// A check is something that the kernel or the filesystem should be able to do.
type check struct {
	Name string `json:"name"`
	mount.Support
	// Otherwise tells what it means that it is not OK.
	Otherwise string `json:"otherwise,omitempty"`
}

// A tool is a program, or a file, that some verbs need.
type tool struct {
	Name    string `json:"name"`
	For     string `json:"for"`
	Path    string `json:"path,omitempty"` // "" if missing
	Package string `json:"package"`        // of Debian
}

func diagnose(store string) diagnosis {
	f := mount.Probe(store)
	d := diagnosis{Store: store, Kernel: f.Kernel, features: f}
	d.Verification, d.Why = f.Best()
	d.Checks = []check{
		{"right to mount", f.Privilege, "images can be converted, not mounted"},
		{"EROFS", f.Erofs, "images cannot be mounted"},
		{"EROFS on a file", f.File, "a loop device is used for each mount"},
		{"two overlays on that", f.FileStacks, "a loop device is used where containers run on a mount"},
		{"EROFS on a loop device", f.Loop, "only EROFS on a file is left"},
		{"overlayfs", f.Overlay, "images cannot be mounted"},
		{"data-only layers", f.DataOnly, "the objects are an ordinary layer, which the image hides"},
		{"detached layers", f.LayerFds, "mounting takes a moment longer"},
		{"escaped whiteouts", f.Whiteouts, "an overlay on an image of a single layer does not see its deletions"},
		{"overlay verity=require", f.VerityOpt, "the kernel does not check files"},
		{"fs-verity in the store", f.FsVerity, "digests are compared by particle when files are stored, not at each read"},
		{"user namespaces", f.UserNS, "podman needs root"},
	}
	for i := range d.Checks {
		if d.Checks[i].OK || d.Checks[i].Why == mount.NotTried {
			d.Checks[i].Otherwise = ""
		}
	}
	d.Tools = findTools()
	return d
}

// podmanChecks tells what podman can share with the store. Without root it is nothing,
// whatever its version: the kernel mounts EROFS for root alone, and the files of a
// mount that root made belong, in a user's namespace, to nobody.
func podmanChecks(p *podmanPlace, f *mount.Features) []check {
	mounts := mount.Support{OK: true}
	if err := f.Mountable(); err != nil {
		mounts = mount.Support{Why: err.Error()}
	}
	layers, images := mounts, mounts
	if layers.OK && !p.takesLayers() {
		layers = mount.Support{Why: "podman " + p.version + " forgets them, as all since 5.5"}
	}
	if images.OK && !p.takesImages() {
		images = mount.Support{Why: "podman " + p.version + ", 5.4 is needed"}
	}
	checks := []check{
		{"podman: pulls from the store", layers, "what it pulls are copies of its own"},
		{"podman: runs the store's images", images, "it has to pull them"},
		{"podman without root", mount.Support{Why: "the kernel mounts EROFS for root only"},
			"it pulls, builds and runs as ever, with copies of its own; particle convert containers-storage: takes its images"},
	}
	for i := range checks {
		if checks[i].OK {
			checks[i].Otherwise = ""
		}
	}
	return checks
}

func findTools() []tool {
	tools := []struct {
		tool
		look []string // programs, or files if they start with a slash; any will do
	}{
		{tool{"podman", "building images, containers-storage:", "", "podman"}, []string{"podman"}},
		{tool{"runc or crun", "podman", "", "runc"}, []string{"runc", "crun"}},
		{tool{"mmdebstrap", "bootstrap", "", "mmdebstrap"}, []string{"mmdebstrap"}},
		{tool{"keys of Debian", "bootstrap of Debian", "", "debian-archive-keyring"},
			[]string{"/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp"}},
		{tool{"keys of Ubuntu", "bootstrap of Ubuntu", "", "ubuntu-keyring"},
			[]string{"/usr/share/keyrings/ubuntu-archive-keyring.gpg"}},
	}
	found := make([]tool, len(tools))
	for i, t := range tools {
		for _, name := range t.look {
			if t.Path != "" {
				break
			}
			if strings.HasPrefix(name, "/") {
				if _, err := os.Stat(name); err == nil {
					t.Path = name
				}
			} else if path, err := exec.LookPath(name); err == nil {
				t.Path = path
			}
		}
		found[i] = t.tool
	}
	return found
}

func (d *diagnosis) print(t *term) error {
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "kernel\t%s\n", d.Kernel)
	fmt.Fprintf(w, "store\t%s\n", d.Store)
	fmt.Fprintf(w, "mounts are at best\t%s: %s\n", d.Verification, d.Why)
	fmt.Fprintln(w)
	for _, c := range slices.Concat(d.Checks, d.Podman) {
		switch {
		case c.OK:
			fmt.Fprintf(w, "%s\tyes\n", c.Name)
		case c.Why == mount.NotTried:
			fmt.Fprintf(w, "%s\tnot tried\n", c.Name)
		default:
			fmt.Fprintf(w, "%s\tno: %s (%s)\n", c.Name, c.Otherwise, c.Why)
		}
	}
	fmt.Fprintln(w)
	var missing []string
	for _, tool := range d.Tools {
		if tool.Path != "" {
			fmt.Fprintf(w, "%s\t%s\n", tool.Name, tool.Path)
		} else {
			fmt.Fprintf(w, "%s\tmissing, for %s\n", tool.Name, tool.For)
			missing = append(missing, tool.Package)
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(missing) > 0 {
		t.printf("\nto get what is missing: apt install %s\n", strings.Join(missing, " "))
	}
	return nil
}

// advice tells what to do where images cannot be mounted.
func (d *diagnosis) advice() string {
	f := d.features
	switch {
	case !f.Privilege.OK:
		return "try sudo particle doctor; in a container it takes --privileged"
	case !f.Erofs.OK:
		return "try modprobe erofs; Debian's kernel package linux-image-amd64 has it, its cloud and vendors' kernels may not"
	case !f.File.OK && !f.Loop.OK:
		return "try modprobe loop, or a kernel of Linux 6.12 or later"
	}
	return "try modprobe overlay"
}
