#!/usr/bin/env bash
# Drill: the primary dies and a standby is promoted (RUNBOOK.md, section 13.6),
# under a DATABASE_URL with several hosts. The service recovers by itself.
#
#   BASE     URL of the service, such as http://localhost:8080
#   PROMOTE  command that stops the primary and promotes the standby
#   RECOVER  seconds until the service must be ready again (60)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ ${1:-} != --help ]] || { help; exit 0; }
need BASE PROMOTE
RECOVER=${RECOVER:-60}

step "An account with a session"
ready || fail "the service is not ready: $status $body"
register
login
rotate

step "The primary dies, the standby takes over"
begun=$SECONDS
bash -c "$PROMOTE" || fail "PROMOTE did not work"
until ready; do
	# An outage must look like one.
	api POST /api/auth/refresh '{"refresh_token":"iar_no-token-of-ours"}'
	[[ $status == 401 || $status == 503 || $status == 000 ]] || fail "during the outage: got $status"
	((SECONDS - begun < RECOVER)) || fail "not ready within $RECOVER s: $status $body"
	sleep 0.2
done
say "ready again after $((SECONDS - begun)) s"

step "What was answered before is there"
rotate
say "the session goes on"
login
say "the account logs in"
register
say "new accounts are taken"

printf '\nThe promotion lost nothing.\n'
