#!/usr/bin/env bash
# Drill: change the JWT key in five steps (RUNBOOK.md, section 6) while a session
# goes on. No valid token may be refused, and no session may end.
#
#   BASE         URL of the service, such as http://localhost:8080
#   KEYS_DIR     folder with the files that JWT_*_FILE name, each called like its
#                variable: JWT_PRIVATE_KEY_PEM, JWT_KID, JWT_NEXT_KID, ...
#   RELOAD       command that sends SIGHUP to every replica
#   KEYGEN       command that is given a folder and makes a pair in it
#                (identity-auth keygen)
#   FETCH_WAIT   seconds until verifiers have fetched a new key (600)
#   ACCESS_TTL   ACCESS_TOKEN_TTL in seconds (900)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ ${1:-} != --help ]] || { help; exit 0; }
need BASE KEYS_DIR RELOAD
KEYGEN=${KEYGEN:-identity-auth keygen} FETCH_WAIT=${FETCH_WAIT:-600} ACCESS_TTL=${ACCESS_TTL:-900}

# published KID... tells whether the key set holds these kids and no other.
published() {
	api GET /.well-known/jwks.json ""
	[[ $(grep -o '"kid":"[^"]*"' <<<"$body" | sort) == "$(printf '"kid":"%s"\n' "$@" | sort)" ]]
}

# reload KID... makes the replicas read their files, and looks at everything that
# may not break: the access tokens so far, and the session.
reload() {
	bash -c "$RELOAD" || fail "RELOAD did not work"
	within 30 "the key set holds $*" published "$@"
	local token
	rotate
	for token in "${tokens[@]}" "$access"; do
		api GET /api/auth/sessions "" -H "Authorization: Bearer $token"
		want 200 "an access token from before"
	done
	tokens+=("$access")
	say "key set: $*; ${#tokens[@]} access tokens accepted, the session goes on"
}

file() { cat "$KEYS_DIR/$1"; }
put() { (umask 077 && cat >"$KEYS_DIR/$1"); }

old=$(file JWT_KID)
new=drill-$(date +%Y%m%d%H%M%S)
register
login
tokens=("$access")

step "1. Make new keys"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bash -c "$KEYGEN \"\$0\"" "$work/new" >/dev/null || fail "KEYGEN did not work"

step "2. Publish the new key ahead as $new"
put JWT_NEXT_PUBLIC_KEY_PEM <"$work/new/public.pem"
put JWT_NEXT_KID <<<"$new"
reload "$old" "$new"

step "3. Wait $FETCH_WAIT s until verifiers have fetched it"
sleep "$FETCH_WAIT"

step "4. Sign with it, and keep the old one"
file JWT_PUBLIC_KEY_PEM >"$work/old.pem"
put JWT_PREV_PUBLIC_KEY_PEM <"$work/old.pem"
put JWT_PREV_KID <<<"$old"
put JWT_PRIVATE_KEY_PEM <"$work/new/private.pem"
put JWT_PUBLIC_KEY_PEM <"$work/new/public.pem"
put JWT_KID <<<"$new"
put JWT_NEXT_PUBLIC_KEY_PEM </dev/null
put JWT_NEXT_KID </dev/null
reload "$old" "$new"
header=$(cut -d. -f1 <<<"$access" | tr '_-' '/+')
while ((${#header} % 4)); do header+="="; done
base64 -d <<<"$header" | grep -q "\"kid\":\"$new\"" || fail "new access tokens are not signed with $new"

step "5. Remove the old key after twice ACCESS_TOKEN_TTL"
sleep $((2 * ACCESS_TTL))
put JWT_PREV_PUBLIC_KEY_PEM </dev/null
put JWT_PREV_KID </dev/null
tokens=()
rotate
tokens=("$access")
reload "$new"

printf '\nThe key was rotated from %s to %s.\n' "$old" "$new"
