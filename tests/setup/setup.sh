#!/usr/bin/env bash
# setup.sh: what the tests, the demo and the benchmark need on Debian 12 or 13.
#
#   tests/setup/setup.sh            install what is missing, make the oracle, write the settings
#                                   (their file's name is the last line, on stdout: source it)
#
# It may run as often as one likes: what is there already is left alone. It must run
# as root. Everything it makes lies below PARTICLE_TEST_CACHE (/var/cache/particle-test):
#
#   env             the variables for the tests; source it
#   oracle/         a chroot of Debian's sid with the C composefs tools to compare with
#   containers.conf, storage.conf   for podman, buildah and skopeo, so that the tests
#                   neither see nor change the images of this machine
#   storage/        the images of the tests
#
# The machine's own settings are not touched. Packages come from the machine's own
# apt sources, chroots from PARTICLE_TEST_MIRROR or where mmdebstrap takes them from by
# itself. The Valid-Until of Release files is not enforced here, because test
# machines have odd clocks; Particle itself never turns that check off.
set -euo pipefail

cache=${PARTICLE_TEST_CACHE:-/var/cache/particle-test}
day=$((24 * 60 * 60))
no_expiry=(-o 'Acquire::Check-Valid-Until=false')

# The program a package is wanted for, and the package. All of them exist in Debian 12
# and 13; what a release lacks is reported and the tests that need it skip.
wanted='
podman          podman
buildah         buildah
skopeo          skopeo
umoci           umoci
mkfs.erofs      erofs-utils
mmdebstrap      mmdebstrap
mksquashfs      squashfs-tools
runc            runc
conmon          conmon
netavark        netavark
newuidmap       uidmap
setfattr        attr
setfacl         acl
strace          strace
hyperfine       hyperfine
zstd            zstd
bsdtar          libarchive-tools
time            time
jq              jq
fsverity        fsverity
gcc             gcc
make            make
git             git
gpg             gpg
losetup         mount
qemu-system-x86_64 qemu-system-x86
qemu-img        qemu-utils
mcopy           mtools
mkfs.vfat       dosfstools
mkfs.ext4       e2fsprogs
mkfs.btrfs      btrfs-progs
mkfs.xfs        xfsprogs
sgdisk          gdisk
sfdisk          fdisk
cpio            cpio
xz              xz-utils
busybox         busybox-static
grub-script-check grub-common
containerd      containerd
xfs_quota       xfsprogs
man             man-db
'
# netavark is no command of PATH: it lies beside other helpers.
PATH=$PATH:/usr/sbin:/sbin:/usr/lib/podman

say() { printf 'setup: %s\n' "$*" >&2; }

if [ "$(id -u)" != 0 ]; then
	say "must run as root: sudo $0"
	exit 1
fi
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9

# age FILE prints the seconds since FILE was touched.
age() {
	if [ -e "$1" ]; then echo $(($(date +%s) - $(stat -c %Y "$1"))); else echo $((10 * day)); fi
}

# installable NAME: apt knows the package.
installable() { [ -n "$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: \(.*\)/\1/p' | grep -v '(none)')" ]; }

install_packages() {
	local missing=() gone=() p
	while read -r program package; do
		[ -n "$program" ] || continue
		type -P "$program" >/dev/null || missing+=("$package")
	done <<<"$wanted"
	[ -e /usr/share/distro-info/debian.csv ] || missing+=(distro-info-data)
	[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates)
	[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
	[ -e /usr/share/OVMF/OVMF_CODE.fd ] || [ -e /usr/share/OVMF/OVMF_CODE_4M.fd ] || missing+=(ovmf)
	[ ${#missing[@]} -gt 0 ] || { say "packages: all there"; return 0; }

	if [ "$(age "$cache/apt-updated")" -gt "$day" ]; then
		# One source of many may be away: what counts is whether the packages come.
		apt-get "${no_expiry[@]}" -q update >&2 || say "apt-get update failed in part; going on with what there is"
		touch "$cache/apt-updated"
	fi
	local have=()
	for p in "${missing[@]}"; do
		if installable "$p"; then have+=("$p"); else gone+=("$p"); fi
	done
	[ ${#gone[@]} -eq 0 ] || say "apt has no ${gone[*]}: tests that need them skip"
	[ ${#have[@]} -gt 0 ] || return 0
	say "installing ${have[*]}"
	DEBIAN_FRONTEND=noninteractive apt-get "${no_expiry[@]}" -q -y --no-install-recommends install "${have[@]}" >&2 </dev/null
}

# make_oracle builds the chroot with the C composefs tools.
make_oracle() {
	local root=$cache/oracle
	if [ -x "$root/usr/bin/mkcomposefs" ]; then
		say "oracle: $(chroot "$root" dpkg-query -W -f '${Package} ${Version}' composefs), kept from an earlier run"
		return 0
	fi
	if [ "$(age "$cache/oracle-failed")" -lt 600 ]; then
		say "oracle: could not be made a moment ago; see $cache/oracle.log"
		return 0
	fi
	rm -rf "$root" "$root.new"
	if mmdebstrap --mode=root --variant=minbase --include=composefs,erofs-utils \
		--aptopt='Acquire::Check-Valid-Until "false"' \
		sid "$root.new" ${mirror:+"$mirror"} >"$cache/oracle.log" 2>&1 </dev/null; then
		mv "$root.new" "$root"
		rm -f "$cache/oracle-failed"
		say "oracle: $(chroot "$root" dpkg-query -W -f '${Package} ${Version}' composefs)"
	else
		rm -rf "$root.new"
		touch "$cache/oracle-failed"
		say "oracle: Debian's sid is not to be had, tests against the C tools skip:"
		grep '^E:' "$cache/oracle.log" | tail -n 3 >&2 || true
	fi
}

# write_podman_settings finds out what podman needs to run on this machine.
write_podman_settings() {
	local runtime='' cgroups=cgroupfs ulimits=''
	# crun refuses hybrid cgroup hierarchies; runc runs on them.
	if [ "$(stat -f -c %T /sys/fs/cgroup 2>/dev/null)" != cgroup2fs ] && type -P runc >/dev/null; then
		runtime='runtime = "runc"'
	fi
	[ -d /run/systemd/system ] && cgroups=systemd
	# Without CAP_SYS_RESOURCE (bit 24) root cannot raise its limits to podman's defaults.
	local caps
	caps=$((16#$(sed -n 's/^CapEff:[[:space:]]*//p' /proc/self/status)))
	if ((!(caps >> 24 & 1))); then
		ulimits='default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]'
	fi
	# The network of the host: the builds need apt's mirrors and nothing else, and a
	# bridge would change the machine.
	cat >"$cache/containers.conf" <<-END
		[containers]
		netns = "host"
		$ulimits
		[engine]
		cgroup_manager = "$cgroups"
		events_logger = "file"
		$runtime
	END
	cat >"$cache/storage.conf" <<-END
		[storage]
		driver = "overlay"
		graphroot = "$cache/storage"
		runroot = "/run/particle-test"
	END
}

write_env() {
	{
		echo "export PARTICLE_TEST_CACHE='$cache'"
		[ -x "$cache/oracle/usr/bin/mkcomposefs" ] && echo "export PARTICLE_ORACLE='$cache/oracle'"
		echo "export CONTAINERS_CONF='$cache/containers.conf'"
		echo "export CONTAINERS_STORAGE_CONF='$cache/storage.conf'"
		# For mmdebstrap and particle bootstrap; empty where the defaults do.
		echo "export PARTICLE_TEST_MIRROR='$mirror'"
		echo "export PARTICLE_TEST_APTOPT='Acquire::Check-Valid-Until \"false\"'"
		# For apt-get, as the examples' build argument APT_OPTS.
		echo "export PARTICLE_TEST_APT_OPTS='${no_expiry[*]}'"
	} >"$cache/env.new"
	mv "$cache/env.new" "$cache/env"
}

install_packages
# Where Debian comes from: what mmdebstrap takes by itself, unless the caller says.
mirror=${PARTICLE_TEST_MIRROR:-}
write_podman_settings
make_oracle
write_env
say "settings: . $cache/env"
echo "$cache/env"
