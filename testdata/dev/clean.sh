#!/usr/bin/env bash
# Removes what the Makefile's commands made in this checkout. It stops nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh

if [[ -d .run ]]; then
	[[ -O .run ]] || ((EUID == 0)) || fail ".run belongs to $(stat -c %U .run): clean as that user or as root."
	exec 8>>.run/lock
	flock -n 8 || fail "make run is up in this checkout: stop it first (Ctrl-C in its terminal)."
fi
rm -rf .run .bin
