package main

// aboutParticle is the beginning of the manual.
const aboutParticle = `particle turns container images into bootable, immutable Debian and Ubuntu systems, and back. It keeps images as composefs: the metadata of each in one small EROFS image, every file stored once by its fs-verity digest. One store serves containers and boot.`

// An example is a task and the commands that do it.
type example struct{ what, commands string }

// examples are those of the manual: by verb, "" for the whole program.
var examples = map[string][]example{
	"": {
		{"make a base image from apt, build a server on it, and keep that as composefs",
			"particle bootstrap trixie containers-storage:localhost/debian:trixie\npodman build -t localhost/server docs/examples/server\nparticle convert --bootable containers-storage:localhost/server server"},
		{"mount it read-only, and see in which state of verification",
			"particle mount server /mnt"},
		{"give it back as the OCI image that it was",
			"particle export server oci-archive:server.tar"},
	},
	"bootstrap": {
		{"make a base image of Debian 13 in podman's storage",
			"particle bootstrap trixie containers-storage:localhost/debian:trixie"},
		{"make one of Ubuntu with a few more packages, in an OCI layout",
			"particle bootstrap noble oci:ubuntu:noble --include=ca-certificates,curl --keyring=/usr/share/keyrings/ubuntu-archive-keyring.gpg"},
	},
	"build": {
		{"build an image, and keep it in the store with the image to boot from",
			"particle build --bootable -t localhost/server docs/examples/server"},
		{"build in CI: run only the steps that no job ran before, and push",
			"particle build --cache-from=registry.example/cache --cache-to=registry.example/cache -t registry.example/server:13 --push ."},
	},
	"diff": {
		{"see what an upgrade changes", "particle diff server:1 server:2"},
	},
	"images": {
		{"list the images as JSON", "particle images --json"},
	},
	"inspect": {
		{"print the manifest, byte for byte", "particle inspect server --manifest"},
	},
	"rm": {
		{"remove an image, and free its disk", "particle rm server:1\nparticle store gc"},
	},
	"convert": {
		{"take an image of podman's storage, with the image to boot from", "particle convert --bootable containers-storage:localhost/server server"},
		{"take a directory without copying its files", "particle convert --link ./rootfs base"},
	},
	"export": {
		{"write an archive", "particle export server oci-archive:server.tar"},
		{"give it to podman", "particle export server containers-storage:localhost/server:again"},
		{"let podman run it without a copy", "particle export server podman-store:/var/lib/particle-podman/images"},
	},
	"layer-store": {
		{"give podman the layers of the store, and fetch those that are missing", "systemctl enable --now particle-layer-store"},
		{"let podman find the layers of one image without a service", "particle pull docker.io/library/debian:13\nparticle layer-store tree docker.io/library/debian:13"},
	},
	"mount": {
		{"mount an image of the store", "particle mount server /mnt"},
		{"mount one only if the kernel checks every read", "particle mount --verity=require server /mnt"},
		{"list what is mounted", "particle mount"},
	},
	"umount": {
		{"unmount one", "particle umount /mnt"},
	},
	"mkcomposefs": {
		{"make a composefs image of a directory, its files beside it", "particle mkcomposefs --digest-store=objects ./rootfs rootfs.cfs"},
	},
	"dump": {
		{"look for programs that run as their owner", "particle dump server | awk '$3 ~ /^10[4-7]/'"},
	},
	"info": {
		{"show digest, format and size", "particle info rootfs.cfs"},
	},
	"pull": {
		{"fetch an image under a short name", "particle pull registry.example/server:13 server"},
	},
	"push": {
		{"give an image to a registry of the local network", "particle push --insecure server localhost:5000/server"},
	},
	"store": {
		{"see how much a collection would free", "particle store gc --dry-run"},
		{"read everything and compare digests", "particle store scrub"},
	},
	"prepare": {
		{"end the build of an image that shall boot", "RUN particle prepare"},
		{"see what a tree lacks", "particle prepare --check ./rootfs"},
	},
	"hostdeploy": {
		{"put an image of the store on a disk", "particle hostdeploy install to-disk --image=server /dev/sdb"},
		{"make a disk for a virtual machine, with a console on its serial line",
			"particle hostdeploy install to-disk --image=server --size=16G --karg=console=ttyS0 server.img"},
		{"see what is booted, staged and kept", "particle hostdeploy status"},
		{"fetch the newest image, and boot it", "particle hostdeploy upgrade --reboot"},
		{"boot the one before again", "particle hostdeploy rollback --reboot"},
	},
	"plugins": {
		{"see what containerd would be told", "particle plugins enable containerd --dry-run"},
		{"see which programs use the store", "particle plugins status"},
	},
	"snapshotter": {
		{"serve containerd's layers, as the system's unit does", "particle snapshotter --metrics 127.0.0.1:9464"},
	},
	"doctor": {
		{"see what this machine can do", "particle doctor"},
	},
}

// A place is a file or directory that verbs read or write.
type place struct{ path, what, verbs string }

// files are those of the manual. "particle" in verbs stands for the page of the whole.
var files = []place{
	{"/var/lib/particle", "The store of a host that Particle did not boot.", "particle bootstrap convert export mount umount images inspect rm pull push diff dump info store"},
	{"/sysroot/composefs", "The store of one that it did.", "particle bootstrap convert export mount umount images inspect rm pull push diff dump info store hostdeploy"},
	{"/run/particle", "Directories of mounts, what the initramfs reported (boot.json), what is staged (staged.json).", "particle mount umount hostdeploy"},
	{"/var/lib/particle-snapshotter", "Records of the snapshotter, and what containers write.", "snapshotter"},
	{"/run/particle/snapshotter.sock", "Where containerd reaches the snapshotter.", "snapshotter plugins"},
	{"/etc/containerd/conf.d/particle.toml", "What containerd is told about the snapshotter.", "plugins"},
	{"/sysroot/state", "The /etc of each deployment, the /var of all, and the history.", "particle hostdeploy"},
	{"/boot/loader/entries", "Entries of the boot menu, one a deployment (Boot Loader Specification).", "particle hostdeploy"},
	{"/usr/lib/particle/kargs.d/*.toml", "Kernel arguments that an image brings.", "hostdeploy"},
	{"${XDG_RUNTIME_DIR}/containers/auth.json", "Credentials for registries, as podman login keeps them.", "pull push convert export"},
}

// toolUsages are the usages of verbs that parse their own options.
var toolUsages = map[string]string{"mkcomposefs": mkcomposefsUsage}
