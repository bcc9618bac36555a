#!/usr/bin/env bash
# buildkit.sh DIR VERSION: builds BuildKit from its module, for PARTICLE_BUILDKIT=DIR. It
# needs Go and a module proxy.
#
#   tests/containerd/buildkit.sh /var/cache/particle-test/buildkit 0.26.2
set -euo pipefail
dir=$(realpath -m "${1:?usage: $0 DIR VERSION}")
version=${2:?usage: $0 DIR VERSION}
go=${GO:-go}
module=github.com/moby/buildkit
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$go" mod init buildkit
"$go" get "$module@v$version" "$module/cmd/buildkitd@v$version" "$module/cmd/buildctl@v$version"
mkdir -p "$dir"
for program in buildctl buildkitd; do
	CGO_ENABLED=0 "$go" build -mod=mod -o "$dir/$program" "$module/cmd/$program"
done
