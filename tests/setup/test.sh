#!/usr/bin/env bash
# test.sh: sets up the machine and runs all tests, as root. What go test prints comes
# last, but for the report of what the tests left behind.
set -euo pipefail
cd "$(dirname "$0")/../.."
go=${GO:-go}

settings=$(tests/setup/setup.sh | tail -n 1)
. "$settings"

before=$(mktemp)
trap 'rm -f "$before"' EXIT
tests/setup/leaks.sh >"$before"

echo "== gofmt, vet, staticcheck"
unformatted=$(git ls-files '*.go' | xargs -r "$(dirname "$(type -P "$go")")/gofmt" -l)
[ -z "$unformatted" ] || { echo "not formatted: $unformatted"; exit 1; }
"$go" vet ./...
"$go" run honnef.co/go/tools/cmd/staticcheck@v0.8.2 ./...

echo "== images"
tests/setup/images.sh

# -count=1: the tests drive programs, which go's cache of results knows nothing of.
# The race detector makes the large inputs take ten times as long: it sees the short
# tests, and the full ones run without it.
status=0
echo "== go test -race -short"
"$go" test -count=1 -race -short -timeout 20m ./... || status=1
echo "== go test"
"$go" test -count=1 -timeout 25m ./... || status=1
# Whole systems in virtual machines, one with each firmware and of each kind of loader;
# make test-boot has all of them.
echo "== systems that boot"
PARTICLE_TEST_BOOT=essential "$go" test -count=1 -v -timeout 30m -parallel 2 \
	-run 'TestInstall$/BIOS-grub-bios|TestUpgrade$/systemd-boot' ./tests/boot || status=1

if left=$(tests/setup/leaks.sh | comm -13 "$before" -) && [ -n "$left" ]; then
	printf 'left behind by the tests:\n%s\n' "$left"
	status=1
fi
exit $status
