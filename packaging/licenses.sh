#!/bin/bash
# licenses.sh: prints the licences of the modules that the binaries are linked with,
# each text once. Go's own comes first.
set -euo pipefail
cd "$(dirname "$0")/.."
go=${GO:-go}

{
	echo "the Go standard library $("$go" env GOVERSION) $("$go" env GOROOT)"
	"$go" list -deps -f '{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}} {{.Dir}}{{end}}{{end}}' ./cmd/... | sort -u
} | while read -r line; do
	dir=${line##* }
	name=${line% *}
	found=
	for file in "$dir"/{LICENSE,LICENCE,COPYING,NOTICE}*; do
		[ -f "$file" ] || continue
		printf '%s\t%s\n' "$(sha256sum <"$file" | cut -c1-64)" "$file"$'\t'"$name"
		found=y
	done
	# Debian's Go keeps its licence elsewhere; it is that of golang.org/x.
	[ -n "$found" ] || [[ $name == "the Go "* ]] || { echo "licenses.sh: $name has no licence" >&2; exit 1; }
done | awk -F '\t' '
	!($1 in file) { order[++n] = $1; file[$1] = $2 }
	{ users[$1] = users[$1] "  " $3 "\n" }
	END {
		for (i = 1; i <= n; i++) {
			h = order[i]
			printf "%s%s\n", (i > 1 ? "\n" : ""), users[h]
			while ((getline line < file[h]) > 0) print "    " line
			close(file[h])
		}
	}'
