package initramfs

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/particle-os/particle/converter/fsverity"
)

// TestBoot boots a disk that was filled where there is no fs-verity, twice, and then
// damages it.
func TestBoot(t *testing.T) {
	v := newVM(t)
	d := newDisk(t)
	large := strings.Repeat("found on the disk ", 2000)
	image := d.deploy(t, vmSystemTree(t, system{"usr/share/large": large}))
	second := d.deploy(t, vmSystemTree(t, system{"usr/share/large": large, "usr/share/version": "2", "etc/image": "the second image"}))
	noState := d.image(t, bootable(system{"usr/share/version": "3"}))
	d.write(t, verityMark, "")
	disk := ext4(t, d.dir, "64M", "-O", "verity")

	out := v.boot(t, disk, secure(image), "")
	want(t, out, "VM-STATUS 0", `"verification": "enforced"`, `"measured": true`, `"complete": true`, "VM-SYSTEM started",
		"VM-STATE of the state", "VM-STATE of all", "VM-READ large good", "verity=require")
	wantNot(t, out, "VM-USR writable", "VM-AGAIN", "VM-MARK", "VM-READ large bad")

	// The state is kept. What may not boot is refused, and the physical root is left
	// as it was for the next try.
	other := fsverity.Sum(fsverity.SHA256, []byte("other"))
	out = v.boot(t, disk, secure(image), fmt.Sprintf(`
try missing %s
try swapped %s
try arguments composefs.digest=v1-sha256-12:123
try nothing quiet
try state %s
`, secure(other), secure(image)+" particle.deployment="+second.String()+".7", secure(noState)))
	want(t, out, "VM-CASE missing: status 1", "image is not in the store: "+other.String(),
		"VM-CASE swapped: status 1", "/etc of deployment "+second.String()+".7",
		"VM-CASE arguments: status 1", "bad kernel argument: composefs.digest=v1-sha256-12:123",
		"VM-CASE nothing: status 3", "VM-CASE state: status 1", "deployment without its state",
		"VM-STATUS 0", `"verification": "enforced"`, "VM-AGAIN etc", "VM-AGAIN var")
	wantNot(t, out, `"enabled"`)

	// A byte of an object, and the image's own first block, change on the disk.
	flip(t, disk, []byte("found on the disk found"))
	out = v.boot(t, disk, secure(second)+" particle.etc=transient particle.var=transient", "mount -o remount,rw /root; rm -f /root/state/os/default/var/booted")
	want(t, out, "VM-STATUS 0", `"verification": "enforced"`, "VM-READ large bad", "VM-READ second-file good")

	// The image is another one under the old name: without fs-verity, and with its own.
	replace := `
mount -o remount,rw /root
o=/root/composefs/objects/` + image.Path() + `
cp $o /tmp/image
rm $o
printf x >>/tmp/image
cp /tmp/image $o
try plain ` + secure(image) + `
`
	out = v.boot(t, disk, secure(second)+" particle.root=transient", replace)
	want(t, out, "VM-CASE plain: status 1", "fs-verity cannot be enforced", "VM-STATUS 0", "VM-USR writable", "VM-READ large bad", "VM-READ second-file good")

	// Without a shell the machine restarts, and says so. -no-reboot ends it there.
	flip(t, disk, []byte("the second image"))
	out = v.boot(t, disk, secure(second), "")
	want(t, out, "the system cannot be booted: ", "choose another entry", "restarting in 10 seconds")
	wantNot(t, out, "VM-STATUS")
}

// flip changes a byte of a file wherever some text is in it.
func flip(t *testing.T, name string, text []byte) {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for at := 0; ; n++ {
		i := bytes.Index(data[at:], text)
		if i < 0 {
			break
		}
		at += i
		data[at] ^= 1
	}
	if n == 0 {
		t.Fatalf("%q is not in the file", text)
	}
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestBootWithoutVerity has a file system without the feature.
func TestBootWithoutVerity(t *testing.T) {
	v := newVM(t)
	d := newDisk(t)
	image := d.deploy(t, vmSystemTree(t, nil))
	d.write(t, verityMark, "")
	disk := ext4(t, d.dir, "64M", "-O", "^verity")
	out := v.boot(t, disk, insecure(image), "try secure "+secure(image)+"\n")
	want(t, out, "VM-CASE secure: status 1", "tune2fs -O verity",
		"VM-STATUS 0", `"verification": "checked"`, "VM-MARK still there", "VM-READ large good")
}

// TestBootInterrupted kills the program, and the machine, while it enables fs-verity.
func TestBootInterrupted(t *testing.T) {
	v := newVM(t)
	d := newDisk(t)
	many := system{}
	for i := range 3000 {
		many[fmt.Sprintf("usr/share/many/%d", i)] = strings.Repeat(fmt.Sprint("object ", i), 40)
	}
	image := d.deploy(t, vmSystemTree(t, many))
	d.write(t, verityMark, "")
	disk := ext4(t, d.dir, "128M", "-O", "verity")
	// Half of it is made durable, half is lost with the machine.
	out := v.boot(t, disk, secure(image), `
/usr/lib/particle/particle-init-root /root &
sleep 1.5
sync
sleep 0.5
kill -9 $!
echo "VM-KILLED"
poweroff -f
`)
	want(t, out, "VM-KILLED")
	wantNot(t, out, "VM-STATUS", "root is deployment")
	out = v.boot(t, disk, secure(image), "")
	want(t, out, "VM-STATUS 0", `"verification": "enforced"`, `"complete": true`, "VM-READ large good")
	wantNot(t, out, "VM-MARK")
	for _, key := range []string{`"objects"`, `"already"`, `"seconds"`} {
		if i := strings.Index(out, key); i >= 0 {
			t.Log(strings.SplitN(out[i:], "\n", 2)[0])
		}
	}
}

// TestBootDamaged has an object that was changed before it got fs-verity: the system
// boots without it, and the store promises nothing.
func TestBootDamaged(t *testing.T) {
	v := newVM(t)
	d := newDisk(t)
	large := strings.Repeat("large", 5000)
	image := d.deploy(t, vmSystemTree(t, system{"usr/share/large": large}))
	d.write(t, verityMark, "")
	d.tamper(t, object(large))
	name := fsverity.Sum(fsverity.SHA256, []byte(large)).Path()
	out := v.boot(t, ext4(t, d.dir, "64M", "-O", "verity"), secure(image), "")
	want(t, out, "VM-STATUS 0", `"verification": "enforced"`, `"complete": false`, name, "1 objects of the store are damaged",
		"VM-READ large bad", "VM-READ second-file good", "VM-MARK still there")
}
