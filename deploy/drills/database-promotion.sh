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
# The refresh token is not presented before it is over: a lost answer would have spent it.
until try_login && [[ $status == 200 ]] && ready; do
	# An outage must look like one, not like a wrong password.
	[[ $status == 200 || $status == 503 || $status == 000 ]] || fail "during the outage: got $status $body"
	((SECONDS - begun < RECOVER)) || fail "not serving within $RECOVER s: $status $body"
	sleep 0.5
done
say "serving again after $((SECONDS - begun)) s"

step "What was answered before is there"
rotate
say "the session goes on"
register
say "new accounts are taken"

printf '\nThe promotion lost nothing.\n'
