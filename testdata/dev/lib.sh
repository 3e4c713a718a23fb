# shellcheck shell=bash
# What the scripts of this folder share. They source it from the checkout's top.

say() { printf '%s\n' "$*"; }

fail() {
	printf '%s\n' "$*" >&2
	exit 1
}

# postgres_major DIR prints the major version of the server in DIR, or nothing.
postgres_major() {
	local version
	[[ -x $1/postgres && -x $1/initdb ]] || return 0
	version=$("$1/postgres" --version 2>/dev/null) || return 0
	version=${version##*"(PostgreSQL) "}
	printf '%s\n' "${version%%[!0-9]*}"
}

# postgres_bin MAJOR|any prints the folder of PostgreSQL's programs: those on PATH,
# or else the newest, of that major version. It fails when there is none of
# version 15 or later.
postgres_bin() {
	local path dir dirs major
	path=$(command -v postgres || true)
	mapfile -t dirs < <(printf '%s\n' "${path%/*}" && printf '%s\n' /usr/lib/postgresql/*/bin | sort -rV)
	for dir in "${dirs[@]}"; do
		major=$(postgres_major "$dir")
		if [[ -n $major ]] && ((major >= 15)) && [[ $1 == any || $1 == "$major" ]]; then
			printf '%s\n' "$dir"
			return 0
		fi
	done
	return 1
}

# docker_engine succeeds when a Docker engine answers.
docker_engine() { command -v docker >/dev/null && timeout 30 docker version >/dev/null 2>&1; }

# without_engine prints what the tests left out, for the end of the last line.
without_engine() {
	docker_engine || printf '%s' '; not run, since no Docker engine answers here: the image and docker-compose.yml'
}
