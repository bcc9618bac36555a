#!/usr/bin/env bash
# fuzz.sh TIME runs each fuzz target of the module for TIME, one after another. go test
# takes one target at a time.
set -euo pipefail
cd "$(dirname "$0")/../.."
time=${1:-60s}
go=${GO:-go}
git grep -hoE '^func Fuzz[A-Za-z0-9_]+\(f \*testing\.F\)' -- '*_test.go' >/dev/null || { echo "no fuzz targets"; exit 1; }
git grep -oE '^func Fuzz[A-Za-z0-9_]+\(f \*testing\.F\)' -- '*_test.go' |
	sed -E 's|^([^:]*)/[^/:]*:func (Fuzz[A-Za-z0-9_]+).*|\1 \2|' | sort -u |
	while read -r dir target; do
		echo "== $dir $target"
		"$go" test "./$dir" -run '^$' -fuzz "^$target\$" -fuzztime "$time" </dev/null
	done
