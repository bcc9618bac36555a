#!/bin/bash
# deb.sh: builds the Debian package.
#
#   packaging/deb.sh DIR        DIR/particle_VERSION_ARCH.deb; its name is all that goes to stdout
#
# The same commit gives the same bytes: times are the commit's, owners root, names in
# order, no build paths. From the environment, where git does not say or one knows better:
#
#   VERSION             the package's version
#   SOURCE_DATE_EPOCH   seconds since 1970
#   GOARCH, GOARM       another architecture than this machine's, as go build takes them
#   DEB_MAINTAINER      Name <mail>
#
# It needs make, Go and dpkg-deb (package dpkg).
set -euo pipefail

out=$(realpath -m "${1:?usage: $0 DIR}")
cd "$(dirname "$0")/.."
go=${GO:-go}
export GO="$go"
umask 022
export LC_ALL=C.UTF-8 TZ=UTC

# A version that sorts as it should: 1.2.0 on its tag, 1.2.0+git5.abcdef after it, and
# 0.1.0~git5.abcdef before there is a tag.
version() {
	local described
	if described=$(git describe --tags --match 'v[0-9]*' --long 2>/dev/null); then
		described=${described#v}
		local hash=${described##*-g} rest=${described%-g*}
		local count=${rest##*-} base=${rest%-*}
		base=${base//-/\~} # v1.0-rc1 comes before v1.0
		if [ "$count" = 0 ]; then echo "$base"; else echo "$base+git$count.$hash"; fi
	else
		echo "0.1.0~git$(git rev-list --count HEAD).$(git rev-parse --short=10 HEAD)"
	fi
}
VERSION=${VERSION:-$(version)}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export VERSION SOURCE_DATE_EPOCH
maintainer=${DEB_MAINTAINER:-"Particle developers <packages@particle-os.invalid>"}

case $("$go" env GOARCH)$("$go" env GOARM) in
386*) arch=i386 ;;
arm5) arch=armel ;;
arm[67]*) arch=armhf ;;
ppc64le*) arch=ppc64el ;;
*) arch=$("$go" env GOARCH) ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root
doc=$root/usr/share/doc/particle

make --no-print-directory install DESTDIR="$root" PREFIX=/usr BIN="$work/bin" LDFLAGS='-s -w' \
	TOOLDIR=/usr/lib/particle MOUNTDIR=/usr/lib/particle RELEASE="$VERSION" >&2

mkdir -p "$doc" "$root/usr/share/lintian/overrides"
cp README.md docs/*.md "$doc"
cp packaging/debian/copyright "$doc/copyright"
cp packaging/debian/lintian-overrides "$root/usr/share/lintian/overrides/particle"
packaging/licenses.sh >"$doc/third-party-licenses"
cat >"$doc/changelog" <<END
particle ($VERSION) unstable; urgency=medium

  * Built from its source$(commit=$(git rev-parse HEAD 2>/dev/null) && echo ", commit $commit").

 -- $maintainer  $(date -R -d "@$SOURCE_DATE_EPOCH")
END
gzip -9n "$doc"/{changelog,third-party-licenses,*.md} "$root"/usr/share/man/man8/*

mkdir "$root/DEBIAN"
cp packaging/debian/{postinst,prerm,postrm,triggers} "$root/DEBIAN"
find "$root" -type d -exec chmod 755 {} +
find "$root" -type f -exec chmod u=rwX,go=rX {} +
size=$(find "$root" -path "$root/DEBIAN" -prune -o -type f -printf '%s\n' | awk '{ k += int(($1 + 1023) / 1024) } END { print k }')
cat >"$root/DEBIAN/control" <<END
Package: particle
Version: $VERSION
Architecture: $arch
Maintainer: $maintainer
Installed-Size: $size
$(cat packaging/debian/control)
END
(cd "$root" && find usr -type f | sort | xargs md5sum >DEBIAN/md5sums)
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$out"
# One thread and a named compressor: both decide about the bytes.
dpkg-deb --root-owner-group -Zxz -z6 --threads-max=1 --build "$root" "$work" >&2
mv "$work/particle_${VERSION}_$arch.deb" "$out/"
# For builds that have the package in a mount, which podman's cache does not look into: a
# step that copies this one is made again when the package is another.
(cd "$out" && sha256sum "particle_${VERSION}_$arch.deb" >particle.sha256)
echo "$out/particle_${VERSION}_$arch.deb"
