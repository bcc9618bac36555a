#!/bin/bash
# Particle's set-up of the root, as a module of dracut (dracut.modules(7)), which sets
# the variables that are not set here.
# shellcheck disable=SC2154

check() {
	require_binaries /usr/lib/particle/particle-init-root || return 1
	return 0
}

depends() {
	echo base fs-lib rootfs-block
}

installkernel() {
	# The image is made for machines that are not this one: what the physical root may
	# need comes along whether it is in use here or not.
	hostonly='' instmods erofs overlay loop squashfs ext4 btrfs xfs \
		libcrc32c crc32c crc32c_generic crc32c_intel crc32c_cryptoapi \
		sha256 sha256_generic sha256_ssse3 sha512 sha512_generic sha512_ssse3
}

install() {
	inst /usr/lib/particle/particle-init-root
	inst_multiple modprobe
	inst_multiple -o fsck fsck.ext4 e2fsck fsck.xfs fsck.btrfs
	# The image decides whether a shell may come when its boot fails.
	if [[ -e ${dracutsysrootdir-}/usr/lib/particle/shell ]]; then
		mkdir -p "$initdir/usr/lib/particle"
		: > "$initdir/usr/lib/particle/shell"
	fi
	inst_hook cmdline 00 "$moddir/particle-cmdline.sh"
	if dracut_module_included systemd; then
		inst_simple "$moddir/particle-root-setup.service" "$systemdsystemunitdir/particle-root-setup.service"
		mkdir -p "$initdir$systemdsystemunitdir/initrd-root-fs.target.requires"
		ln -sf ../particle-root-setup.service "$initdir$systemdsystemunitdir/initrd-root-fs.target.requires/particle-root-setup.service"
	else
		inst_hook pre-pivot 10 "$moddir/particle-pre-pivot.sh"
	fi
}
