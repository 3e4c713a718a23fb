#!/bin/bash
# As much of the official image's entrypoint as docker-compose.yml relies on:
# POSTGRES_PASSWORD_FILE, PGDATA, and the SQL files of docker-entrypoint-initdb.d,
# run once on a server that listens on its socket only.
set -euo pipefail

if [[ $1 == postgres && ! -s $PGDATA/PG_VERSION ]]; then
	mkdir -p "$PGDATA"
	chmod 0700 "$PGDATA"
	initdb -D "$PGDATA" -U postgres --encoding UTF8 --locale C.UTF-8 --auth-local trust --auth-host scram-sha-256 --pwfile "$POSTGRES_PASSWORD_FILE"
	printf 'host all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
	# The just-in-time compiler is not in this image.
	printf "listen_addresses = '*'\njit = off\n" >>"$PGDATA/postgresql.conf"
	pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
	for file in /docker-entrypoint-initdb.d/*.sql; do
		psql -v ON_ERROR_STOP=1 --no-password --no-psqlrc -U postgres -f "$file"
	done
	pg_ctl -D "$PGDATA" -m fast -w stop
fi
exec "$@"
