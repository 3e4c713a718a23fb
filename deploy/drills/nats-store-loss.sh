#!/usr/bin/env bash
# Drill: NATS loses its store (RUNBOOK.md, section 13.5). The service goes on
# meanwhile, and the stream is filled again from the outbox.
#
#   BASE          URL of the service, such as http://localhost:8080
#   DATABASE_URL  its database, as psql takes it
#   MONITOR       URL of NATS' monitoring port, such as http://localhost:8222
#   LOSE          command that stops NATS and deletes its store
#   RETURN        command that starts NATS again
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ ${1:-} != --help ]] || { help; exit 0; }
need BASE DATABASE_URL MONITOR LOSE RETURN

# stored prints how many messages AUTH_EVENTS holds, or nothing.
stored() {
	curl -sS --max-time 10 "$MONITOR/jsz?streams=true" | tr -d ' \n' |
		grep -o '"name":"AUTH_EVENTS".*' | grep -o '"messages":[0-9]*' | head -1 | cut -d: -f2 || true
}

unsent() { psql -XAtq -d "$DATABASE_URL" -c "SELECT count(*) FROM identity_auth.outbox WHERE sent_at IS NULL"; }
relayed() { [[ $(unsent) == 0 ]]; }

step "Events before"
ready || fail "the service is not ready: $status $body"
register
login
rotate
within 30 "the outbox is relayed" relayed
before=$(stored)
[[ -n $before ]] || fail "MONITOR tells of no AUTH_EVENTS"
say "$before events in the stream"

step "NATS is gone, and its store with it"
bash -c "$LOSE" || fail "LOSE did not work"
within 10 "readiness shows it" not_ready
register
login
rotate
waiting=$(unsent)
say "register, login and refresh work; $waiting events wait"
((waiting > 0)) || fail "no event waits"

step "NATS is back, empty"
bash -c "$RETURN" || fail "RETURN did not work"
within 60 "it is ready again" ready
within 120 "the outbox is relayed" relayed
after=$(stored)
say "$after events in the stream"
((after >= before + waiting)) || fail "the stream has $after events, want the $before of before and $waiting new ones"

printf '\nNothing was lost.\n'
