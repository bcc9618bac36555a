#!/usr/bin/env bash
# images.sh: builds what the tests look into and boot: localhost/debian:trixie, the base,
# and localhost/server, the example, in the tests' own podman storage. It may run as
# often as one likes: podman keeps what has not changed.
#
# The package particle is built from this tree. Settings come from setup.sh's file.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${PARTICLE_TEST_CACHE:?source the settings first: . \$(tests/setup/setup.sh | tail -n 1)}"
say() { printf 'images: %s\n' "$*" >&2; }

type -P podman >/dev/null || { say "no podman: tests that need an image skip"; exit 0; }
go=${GO:-go}
dist=$PARTICLE_TEST_CACHE/dist
mkdir -p "$dist"

# The same bytes while the programs are the same, so that podman need not build again.
rm -f "$dist"/particle_*.deb
VERSION=0~test SOURCE_DATE_EPOCH=1700000000 GO=$go packaging/deb.sh "$dist" >&2

base=localhost/debian:trixie
if ! podman image exists "$base"; then
	say "making $base"
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	CGO_ENABLED=0 "$go" build -o "$tmp/particle" ./cmd/particle
	"$tmp/particle" --quiet bootstrap trixie "containers-storage:$base" \
		${PARTICLE_TEST_APTOPT:+--aptopt="$PARTICLE_TEST_APTOPT"} ${PARTICLE_TEST_MIRROR:+--mirror="$PARTICLE_TEST_MIRROR"} >&2 </dev/null
fi
say "building localhost/server"
podman build -q -t localhost/server --build-context "deb=$dist" \
	--build-arg APT_OPTS="${PARTICLE_TEST_APT_OPTS:-}" docs/examples/server </dev/null
