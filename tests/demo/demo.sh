#!/usr/bin/env bash
# demo.sh: the main job end to end. An OS image is built from apt, becomes a mounted
# composefs, is compared with podman's own view of it, and goes back to OCI.
#
# Run it by `sudo make demo`. All it makes lies in one scratch directory, which is
# removed at the end: the images and settings of this machine stay as they are.
#
#   DEMO_IMAGE=tiny   the small example instead of the bootable server
#   DEMO_SUITE=...    the suite of the base, trixie by default
#   DEMO_KEEP=1       keep the scratch directory to look around
set -euo pipefail
cd "$(dirname "$0")/../.."
image=${DEMO_IMAGE:-server}
suite=${DEMO_SUITE:-trixie}
[ -e "docs/examples/$image/Containerfile" ] || { echo "demo: there is no example $image in docs/examples" >&2; exit 2; }

bold='' dim='' green='' red='' plain=''
if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'; fi

echo "${bold}Setting up${plain}"
. "$(tests/setup/setup.sh 2> >(sed 's/^setup: /  /' >&2) | tail -n 1)"
export PATH=$PWD/bin:$PATH

# A store and a storage of our own; podman's caches go with them.
scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/particle-demo-XXXXXX")
export PARTICLE_STORE=$scratch/store TMPDIR=$scratch/tmp
mkdir -p "$TMPDIR" "$scratch/mnt"
sed "s|^graphroot = .*|graphroot = \"$scratch/podman\"|; s|^runroot = .*|runroot = \"$scratch/run\"|" \
	"$CONTAINERS_STORAGE_CONF" >"$scratch/storage.conf"
export CONTAINERS_STORAGE_CONF=$scratch/storage.conf

log=$scratch/log
started=$(date +%s%N)
current=''

cleanup() {
	local status=$?
	trap - EXIT INT TERM
	if [ "$status" != 0 ]; then
		[ -z "$current" ] || echo "  ${red}failed: $current${plain}"
		cat "$log.out" "$log" 2>/dev/null | tail -n 25 | sed 's/^/  | /'
	fi
	mountpoint -q "$scratch/mnt" && { particle umount "$scratch/mnt" || umount "$scratch/mnt" || true; } >/dev/null 2>&1
	podman image umount --all >/dev/null 2>&1 || true
	if [ -n "${DEMO_KEEP:-}" ]; then
		echo "kept: $scratch (PARTICLE_STORE=$PARTICLE_STORE CONTAINERS_STORAGE_CONF=$CONTAINERS_STORAGE_CONF)"
	else
		mountpoint -q "$scratch/podman/overlay" && umount "$scratch/podman/overlay"
		# Never below a mount that did not go away.
		if findmnt -rn -o TARGET | grep -q "^$scratch/"; then
			echo "still mounted below $scratch, so it is not removed" >&2
		else
			rm -rf "$scratch"
		fi
	fi
	exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

human() { numfmt --to=iec-i --suffix=B --format=%.1f "$1"; }
bytes() { du -s -B1 "$@" | awk '{ n += $1 } END { print n }'; } # on disk, a hard link once

# step TEXT COMMAND...: says what is done, does it, and says what it took. What the
# command prints is shown only if it fails.
step_number=0
seconds=0
step() {
	current=$1
	shift
	step_number=$((step_number + 1))
	printf '\n%s%d. %s%s\n' "$bold" "$step_number" "$current" "$plain"
	printf '   %s$ %s%s\n' "$dim" "${*//$scratch/\$DIR}" "$plain"
	local t0 t1
	t0=$(date +%s%N)
	"$@" >"$log.out" 2>"$log" </dev/null
	t1=$(date +%s%N)
	seconds=$(awk -v n=$((t1 - t0)) 'BEGIN { printf "%.1f", n / 1e9 }')
	current=''
}
say() { printf '   %s\n' "$*"; }

# same WHAT A B: both must be equal.
same() {
	current="comparing $1"
	if [ "$2" = "$3" ]; then
		say "${green}same${plain} $1  ${dim}$2${plain}"
	else
		say "${red}$1 differs:${plain} $2 and $3"
		: >"$log" >"$log.out"
		exit 1
	fi
	current=''
}
field() { jq -er "$1" "$log.out"; }

costs=()
cost() { costs+=("$(printf '%-44s %8s  %12s' "$1" "$2" "$3")"); }

opts=()
[ -z "$PARTICLE_TEST_MIRROR" ] || opts+=(--mirror="$PARTICLE_TEST_MIRROR")
step "A base image of Debian $suite, from apt alone" \
	particle bootstrap "$suite" containers-storage:localhost/debian:"$suite" --json --aptopt="$PARTICLE_TEST_APTOPT" "${opts[@]}"
epoch=$(field .epoch)
say "$(field .title), $(field .entries) entries, $(human "$(field .tarBytes)"), as of $(date -u -d "@$epoch" +%F), in $seconds s"
say "image $(field .digest): the same on any machine while the mirrors stand still"
cost "bootstrap $suite" "$seconds s" "$(human "$(field .tarBytes)")"

step "The package particle, which the server installs" packaging/deb.sh "$scratch/deb"
say "$(basename "$(tail -n 1 "$log.out")"), in $seconds s"

step "podman builds docs/examples/$image on it" \
	podman build --build-context deb="$scratch/deb" --squash --timestamp "$epoch" --build-arg BASE=localhost/debian:"$suite" \
	--build-arg SOURCE_DATE_EPOCH="$epoch" --build-arg APT_OPTS="$PARTICLE_TEST_APT_OPTS" \
	-t localhost/demo "docs/examples/$image"
built=$(podman image inspect --format '{{.Size}}' localhost/demo)
say "$(podman image inspect --format '{{len .RootFS.Layers}}' localhost/demo) layers, $(human "$built"), in $seconds s"
cost "podman build $image" "$seconds s" "$(human "$built")"

bootable=()
[ "$image" != server ] || bootable=(--bootable)
step "OCI to composefs: every file stored once, by its digest" \
	particle convert --json "${bootable[@]}" containers-storage:localhost/demo demo
cp "$log.out" "$scratch/converted.json"
first=$(bytes "$PARTICLE_STORE")
say "$(field '[.images[]] | length') composefs images of $(field '.layers | length') layers, $(field .newObjects) objects, $(human "$(field .newBytes)"), in $seconds s"
field '.images | to_entries[] | .key + " " + .value' | while read -r line; do say "${dim}$line${plain}"; done
cost "convert: OCI to composefs" "$seconds s" "$(human "$first")"

step "Mounted: a few MiB of metadata over the objects, nothing unpacked" \
	particle mount --json demo "$scratch/mnt"
say "$(findmnt -rn -o FSTYPE "$scratch/mnt" | tail -n 1), read-only, in $seconds s; $(field '.verification + ": " + .why')"
say "$(sed -n 's/^PRETTY_NAME=//p' "$scratch/mnt/usr/lib/os-release" | tr -d '"'): $(find "$scratch/mnt/boot" -name 'vmlinuz*' -printf 'kernel /boot/%f, ' -quit 2>/dev/null)$(find "$scratch/mnt" -xdev | wc -l) paths"

podman_root=$(podman image mount localhost/demo)
step "The same as podman shows it: every path, type, mode, owner, time, size, content, hard link, xattr, device" \
	particle diff --no-root "$podman_root" "$scratch/mnt"
say "${green}no difference${plain} in $(find "$podman_root" -xdev | wc -l) paths, in $seconds s"
podman image umount localhost/demo >/dev/null
particle umount "$scratch/mnt"

step "composefs to OCI: the layers are put together again to the very same bytes" \
	particle export --json demo oci:"$scratch/oci":demo
cp "$log.out" "$scratch/exported.json"
say "in $seconds s"
cost "export: composefs to OCI" "$seconds s" "$(human "$(bytes "$scratch/oci")")"
index=$(jq -er '.manifests[0].digest' "$scratch/oci/index.json")
config=$(jq -er .config.digest "$scratch/oci/blobs/sha256/${index#sha256:}")
same "image ID (the config's digest) as podman's" "$config" "sha256:$(podman image inspect --format '{{.Id}}' localhost/demo)"
diff_ids() { jq -r '.rootfs.diff_ids | join(" ")' "$1" | sha256sum | cut -c -16; }
podman image inspect localhost/demo | jq '{rootfs: {diff_ids: .[0].RootFS.Layers}}' >"$scratch/podman.json"
same "diffIDs of the layers                  " "$(diff_ids "$scratch/oci/blobs/sha256/${config#sha256:}")" "$(diff_ids "$scratch/podman.json")"
same "manifest as the one converted          " "$index" "$(jq -er .manifest "$scratch/converted.json")"
[ "$(sha256sum <"$scratch/oci/blobs/sha256/${index#sha256:}" | cut -d' ' -f1)" = "${index#sha256:}" ]

# The second image of the same base.
other=tiny
[ "$image" != tiny ] || other=server
step "A second image of the same base ($other) costs what differs" \
	podman build --build-context deb="$scratch/deb" --timestamp "$epoch" --build-arg BASE=localhost/debian:"$suite" \
	--build-arg SOURCE_DATE_EPOCH="$epoch" --build-arg APT_OPTS="$PARTICLE_TEST_APT_OPTS" -t localhost/second "docs/examples/$other"
particle convert --json containers-storage:localhost/second second >"$log.out" 2>"$log"
second=$(($(bytes "$PARTICLE_STORE") - first))
say "podman image of $(human "$(podman image inspect --format '{{.Size}}' localhost/second)"); the store grew by $(human "$second"), $(field .newObjects) new objects"
cost "second image, $other: disk added" "-" "$(human "$second")"

step "The store is clean" particle store fsck
[ ! -s "$log.out" ] || say "$(tail -n 1 "$log.out")"

printf '\n%sWhat it cost%s\n' "$bold" "$plain"
printf '   %s\n' "${costs[@]}"
say "all of it took $(awk -v n=$(($(date +%s%N) - started)) 'BEGIN { printf "%.0f", n / 1e9 }') s; disk in use at the end: $(human "$(bytes "$scratch")")"
