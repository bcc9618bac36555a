#!/usr/bin/env bash
# leaks.sh prints, sorted, what tests could leave behind on this machine: mounts of
# images, loop devices, and processes of the programs that tests start. Compare two
# outputs with comm -13.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
{
	findmnt -rn -o FSTYPE,TARGET -t erofs,overlay,fuse,fuse.particle | sed 's/^/mount /' || true
	losetup -ln -O NAME,BACK-FILE | sed 's/  */ /g; s/^/loop /'
	# Without process ids: one that was started twice is no news.
	ps -eo comm= | grep -E '^(particle|podman|conmon|runc|crun|buildah|skopeo|umoci|mmdebstrap|qemu-system.*|registry)$' |
		sort | uniq -c | sed 's/^ */process /' || true
} | LC_ALL=C sort
