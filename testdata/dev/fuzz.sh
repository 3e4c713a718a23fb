#!/usr/bin/env bash
# Runs every fuzz target of the service for $FUZZTIME, one after the other. What a target finds, go test leaves in the package's testdata/fuzz: a
# row to keep.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh
time=${FUZZTIME:-10s}

# go test -list prints a package's targets, and then the package.
list=$(go test -list '^Fuzz' ./...) || fail "$list"
names=() targets=0 bad=()
while read -r word package _; do
	case $word in
	Fuzz*) names+=("$word") ;;
	ok)
		for name in "${names[@]}"; do
			targets=$((targets + 1))
			say "$package $name"
			go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" "$package" || bad+=("$name")
		done
		names=()
		;;
	esac
done <<<"$list"

((targets > 0)) || fail "no fuzz target was found"
((${#bad[@]} == 0)) || fail "make fuzz failed: ${bad[*]}"
say "$targets fuzz targets, $time each: nothing found"
