#!/usr/bin/env bash
# containerds.sh DIR VERSION...: builds releases of containerd from their modules, for
# PARTICLE_CONTAINERDS=DIR. It needs Go and a module proxy.
#
#   tests/containerd/containerds.sh /var/cache/particle-test/containerds 1.7.24 2.1.9 2.4.2
set -euo pipefail
dir=$(realpath -m "${1:?usage: $0 DIR VERSION...}")
shift
go=${GO:-go}
for version; do
	to=$dir/$version
	[ -x "$to/containerd" ] && continue
	module=github.com/containerd/containerd
	case $version in 1.*) ;; *) module+=/v${version%%.*} ;; esac
	work=$(mktemp -d)
	(
		cd "$work"
		"$go" mod init containerds
		"$go" get "$module@v$version" "$module/cmd/containerd@v$version"
		"$go" mod download "$module"
		mkdir -p "$to.new"
		for program in ctr containerd-shim-runc-v2 containerd; do
			CGO_ENABLED=0 "$go" build -mod=mod -tags no_btrfs,no_devmapper,no_zfs \
				-ldflags "-s -w -X $module/version.Version=$version" -o "$to.new/$program" "$module/cmd/$program"
		done
		mv "$to.new" "$to"
	) >&2
	rm -rf "$work"
	"$to/containerd" --version
done
