#!/usr/bin/env bash
# apt.sh PACKAGE... installs the distribution's packages, as root. PostgreSQL's
# comes without the server that the package otherwise makes and starts on port
# 5432: this checkout runs servers of its own, and nobody asked for another.
set -euo pipefail

export DEBIAN_FRONTEND=noninteractive
apt=(apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)

# One unreachable source among several is no reason to give up; the installation
# below finds out whether the package can be had.
"${apt[@]}" update || true

if [[ " $* " == *" postgresql "* ]]; then
	version=$(apt-cache show --no-all-versions postgresql 2>/dev/null | sed -n 's/^Version: \([0-9]*\).*/\1/p')
	if ((${version:-0} < 15)); then
		printf 'The PostgreSQL of this distribution is too old: %s.\n' "${version:-none}" >&2
		exit 1
	fi
	# A drop-in, so that no configuration file of the package is touched; gone
	# again at the end, with the folders that were not there before.
	made=()
	for dir in /etc/postgresql-common /etc/postgresql-common/createcluster.d; do
		[[ -d $dir ]] || { mkdir "$dir" && made=("$dir" "${made[@]}"); }
	done
	conf=/etc/postgresql-common/createcluster.d/identity-auth.conf
	trap 'rm -f "$conf"; for dir in "${made[@]}"; do rmdir --ignore-fail-on-non-empty "$dir"; done' EXIT
	printf 'create_main_cluster = false\n' >"$conf"
fi

"${apt[@]}" install -y --no-install-recommends "$@"
