#!/usr/bin/env bash
# Drill: change ADMIN_TOKEN and REGISTER_TOKEN by SIGHUP, without a restart. The
# old value is refused from then on, and a bad new value changes nothing.
#
#   BASE                URL of the service, such as http://localhost:8080
#   ADMIN_BASE          URL of ADMIN_ADDR
#   ADMIN_TOKEN_FILE    the files that the service's variables of these names
#   REGISTER_TOKEN_FILE point to
#   RELOAD              command that sends SIGHUP to every replica
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
[[ ${1:-} != --help ]] || { help; exit 0; }
need BASE ADMIN_BASE ADMIN_TOKEN_FILE REGISTER_TOKEN_FILE RELOAD

# as_admin TOKEN and as_registrar TOKEN set status to what the token gets. They
# change nothing: the account is unknown, the body is refused after the token.
as_admin() { BASE=$ADMIN_BASE api GET "/api/admin/tenants/$(uuid)/users/$(uuid)" "" -H "Authorization: Bearer $1"; }
as_registrar() { api POST /api/auth/register '{}' -H "Authorization: Bearer $1"; }
admin_knows() { as_admin "$1" && [[ $status == 404 ]]; }
registrar_knows() { as_registrar "$1" && [[ $status == 400 ]]; }

secret() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
put() { (umask 077 && printf '%s\n' "$2" >"$1"); }
reload() { bash -c "$RELOAD" || fail "RELOAD did not work"; }

old_admin=$(cat "$ADMIN_TOKEN_FILE") old_register=$(cat "$REGISTER_TOKEN_FILE")
new_admin=$(secret) new_register=$(secret)

step "The secrets of today work"
admin_knows "$old_admin" || fail "the ADMIN_TOKEN of the file: got $status"
registrar_knows "$old_register" || fail "the REGISTER_TOKEN of the file: got $status"

step "New values, SIGHUP"
put "$ADMIN_TOKEN_FILE" "$new_admin"
put "$REGISTER_TOKEN_FILE" "$new_register"
reload
within 10 "the new ADMIN_TOKEN works" admin_knows "$new_admin"
within 10 "the new REGISTER_TOKEN works" registrar_knows "$new_register"
as_admin "$old_admin"
want 401 "the old ADMIN_TOKEN"
as_registrar "$old_register"
want 401 "the old REGISTER_TOKEN"
say "the new ones work, the old ones are refused"

step "A bad value, SIGHUP"
put "$ADMIN_TOKEN_FILE" "too short"
put "$REGISTER_TOKEN_FILE" "$old_register"
reload
sleep 2 # the service looks at the files
admin_knows "$new_admin" || fail "a bad value took the good one away: got $status"
as_registrar "$old_register"
want 401 "a good value beside a bad one"
say "config.reload_failed: nothing was taken over"

step "The good values again"
put "$ADMIN_TOKEN_FILE" "$new_admin"
put "$REGISTER_TOKEN_FILE" "$new_register"
reload
within 10 "the new REGISTER_TOKEN works" registrar_knows "$new_register"

printf '\nADMIN_TOKEN and REGISTER_TOKEN were rotated.\n'
