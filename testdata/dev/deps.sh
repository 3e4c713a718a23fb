#!/usr/bin/env bash
# deps.sh postgres|cc|curl|prometheus|systemd|containers|mmdebstrap|spin ... finds
# these on the machine, or gets them from the distribution, or says in one
# sentence how to get them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh

# c_compiler asks for what the race detector needs: the compiler that Go calls,
# and the C library's headers.
c_compiler() {
	local cc
	read -ra cc < <(go env CC)
	"${cc[@]}" -fsyntax-only -x c - <<<'#include <stdlib.h>' 2>/dev/null
}

# has_compose asks for either form of Docker Compose.
has_compose() { docker compose version >/dev/null 2>&1 || docker-compose version >/dev/null 2>&1; }

# as_root SENTENCE sets root to what a command is put behind to run as root.
as_root() {
	root=()
	command -v apt-get >/dev/null || fail "$1"
	if ((EUID != 0)); then
		# Without a terminal sudo cannot ask for a password: then it must not need one.
		command -v sudo >/dev/null || fail "$1"
		[[ -t 0 ]] || sudo -n true 2>/dev/null || fail "$1"
		root=(sudo)
	fi
}

# get SENTENCE PACKAGE... installs packages, asking for no more than apt-get itself does.
get() {
	local sentence=$1 root
	shift
	as_root "$sentence"
	say "Installing the distribution's $*."
	"${root[@]}" bash testdata/dev/apt.sh "$@" || fail "$sentence"
}

has_prometheus() {
	local name
	for name in prometheus promtool; do
		command -v "$name" >/dev/null || [[ -x .bin/$name ]] || return 1
	done
}

# unpack_prometheus takes the programs out of the distribution's package into
# .bin. Installed, the package would start a Prometheus now and at every boot, and
# nobody asked for one.
unpack_prometheus() {
	local dir name
	command -v apt-get dpkg-deb >/dev/null || return 1
	say "Unpacking the distribution's prometheus."
	dir=$(mktemp -d)
	chmod 755 "$dir" # apt-get downloads as a user of its own
	! ((EUID == 0)) || chown _apt "$dir" 2>/dev/null || true
	if ! (cd "$dir" && apt-get -q -o Acquire::Retries=3 download prometheus); then
		# Its lists of packages are old or not there yet.
		as_root "$sentence"
		"${root[@]}" apt-get -q -o Acquire::Retries=3 update || true
		(cd "$dir" && apt-get -q -o Acquire::Retries=3 download prometheus) || return 1
	fi
	dpkg-deb -x "$dir"/prometheus_*.deb "$dir/unpacked"
	mkdir -p .bin
	for name in prometheus promtool; do
		mv "$dir/unpacked/usr/bin/$name" .bin/
	done
	rm -rf "$dir"
}

for need in "$@"; do
	case $need in
	postgres)
		sentence="PostgreSQL 15 or later is needed and was not found on PATH or under /usr/lib/postgresql: as root, 'apt-get install postgresql' on Debian 12, Ubuntu 24.04 or later; elsewhere, put the folder of initdb and postgres on PATH."
		postgres_bin any >/dev/null && continue
		get "$sentence" postgresql
		postgres_bin any >/dev/null || fail "$sentence"
		;;
	cc)
		sentence="The race detector needs a C compiler: as root, 'apt-get install gcc libc6-dev' on Debian or Ubuntu; elsewhere, put gcc on PATH."
		c_compiler && continue
		get "$sentence" gcc libc6-dev
		c_compiler || fail "$sentence"
		;;
	containers) # without an engine nothing is needed: the tests say that they had none
		docker_engine || continue
		sentence="A Docker engine is here, but no Docker Compose: as root, 'apt-get install docker-compose' on Debian or Ubuntu; elsewhere, install the compose plugin."
		has_compose && continue
		get "$sentence" docker-compose
		has_compose || fail "$sentence"
		;;
	mmdebstrap)
		sentence="Images that cannot be pulled are made with mmdebstrap: as root, 'apt-get install mmdebstrap' on Debian or Ubuntu."
		command -v mmdebstrap >/dev/null && continue
		get "$sentence" mmdebstrap
		;;
	spin)
		sentence="The model of refresh tokens needs spin and a C compiler: as root, 'apt-get install spin gcc libc6-dev' on Debian or Ubuntu; elsewhere, put spin and gcc on PATH."
		command -v spin >/dev/null && command -v gcc >/dev/null && continue
		get "$sentence" spin gcc libc6-dev
		command -v spin >/dev/null && command -v gcc >/dev/null || fail "$sentence"
		;;
	curl)
		sentence="The drills need curl: as root, 'apt-get install curl' on Debian or Ubuntu."
		command -v curl >/dev/null && continue
		get "$sentence" curl
		;;
	prometheus)
		sentence="Prometheus 2.42 or later is needed, and its promtool: on Debian 12, Ubuntu 24.04 or later, as root, 'apt-get update' once; elsewhere, put both programs on PATH."
		has_prometheus && continue
		unpack_prometheus || fail "$sentence"
		has_prometheus || fail "$sentence"
		;;
	systemd)
		sentence="systemd-analyze 252 or later is needed: as root, 'apt-get install systemd' on Debian 12, Ubuntu 24.04 or later."
		command -v systemd-analyze >/dev/null && continue
		get "$sentence" systemd
		command -v systemd-analyze >/dev/null || fail "$sentence"
		;;
	*) fail "deps.sh: no such need: $need" ;;
	esac
done
