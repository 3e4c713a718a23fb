#!/usr/bin/env bash
# Drill: back the database up with pg_dump and restore it into an empty one
# (RUNBOOK.md, section 9). Accounts and sessions of before go on there.
#
#   BASE          URL of the service, such as http://localhost:8080
#   DATABASE_URL  its database, as pg_dump takes it
#   RESTORE_URL   an empty database
#   START         command that starts the service on RESTORE_URL, with the same
#                 JWT key, and returns
#   RESTORED      URL of that service
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ ${1:-} != --help ]] || { help; exit 0; }
need BASE DATABASE_URL RESTORE_URL START RESTORED

# rows URL prints the number of rows of every table but the relay's state.
rows() {
	local table
	for table in accounts sessions guards reset_tokens schema_migrations; do
		printf '%s %s\n' "$table" "$(psql -XAtq -d "$1" -c "SELECT count(*) FROM identity_auth.$table")"
	done
}

step "An account with two sessions"
register
login
kept=$refresh
login
rotate

step "Backup"
[[ $(psql -XAtq -d "$RESTORE_URL" -c "SELECT count(*) FROM pg_namespace WHERE nspname = 'identity_auth'") == 0 ]] ||
	fail "RESTORE_URL is not empty"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(umask 077 && pg_dump --format=custom --schema=identity_auth --file="$work/dump" -d "$DATABASE_URL") || fail "pg_dump"
before=$(rows "$DATABASE_URL")
say "$(stat -c %s "$work/dump") bytes"

step "Restore into an empty database"
pg_restore --exit-on-error --no-owner -d "$RESTORE_URL" "$work/dump" || fail "pg_restore"
diff <(cat <<<"$before") <(rows "$RESTORE_URL") || fail "the tables differ"
say "${before//$'\n'/, } rows"

step "The service on the restored database"
bash -c "$START" || fail "START did not work"
BASE=$RESTORED
within 60 "it is ready" ready
rotate
say "the session goes on"
refresh=$kept
rotate
say "so does the other"
login
say "the account logs in"
password=wrong-$password
try_login
want 401 "a wrong password"

printf '\nThe backup holds accounts and sessions.\n'
