#!/usr/bin/env bash
# deps.sh postgres|cc|containers|mmdebstrap|spin ... finds these on the machine, or gets them from the
# distribution, or says in one sentence how to get them.
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

# get SENTENCE PACKAGE... installs packages, asking for no more than apt-get itself does.
get() {
	local sentence=$1 root=()
	shift
	command -v apt-get >/dev/null || fail "$sentence"
	if ((EUID != 0)); then
		# Without a terminal sudo cannot ask for a password: then it must not need one.
		command -v sudo >/dev/null || fail "$sentence"
		[[ -t 0 ]] || sudo -n true 2>/dev/null || fail "$sentence"
		root=(sudo)
	fi
	say "Installing the distribution's $*."
	"${root[@]}" bash testdata/dev/apt.sh "$@" || fail "$sentence"
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
	*) fail "deps.sh: no such need: $need" ;;
	esac
done
