# shellcheck shell=bash
# What the drills share. A drill prints each step and ends with 0 only when every
# promise of its runbook section held. BASE is the URL of the service.

step() { printf '\n== %s\n' "$*"; }
say() { printf '   %s\n' "$*"; }
fail() {
	printf 'FAILED: %s\n' "$*" >&2
	exit 1
}

# need NAME... stops when a variable is missing.
need() {
	local name
	for name in "$@"; do
		[[ -n ${!name:-} ]] || fail "$name is not set; --help lists the variables"
	done
}

# help prints the comment at the head of a drill.
help() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# api METHOD PATH JSON [CURL OPTION...] sets status and body. No answer is 000.
api() {
	local out method=$1 path=$2 json=$3
	shift 3
	[[ -z $json ]] || set -- -H 'Content-Type: application/json' -d "$json" "$@"
	out=$(curl -sS --max-time 20 -X "$method" -w '\n%{http_code}' "$@" "$BASE$path" 2>/dev/null) || out=$'\n000'
	status=${out##*$'\n'} body=${out%$'\n'*}
}

# want STATUS WHAT holds the last answer against STATUS.
want() { [[ $status == "$1" ]] || fail "$2: got $status, want $1: $body"; }

# member NAME prints a text member of the last answer.
member() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" <<<"$body"; }

uuid() { cat /proc/sys/kernel/random/uuid; }

# register makes an account of its own for the drill; REGISTER_TOKEN is used if set.
register() {
	tenant=$(uuid) user=$(uuid)
	email=drill-$user@example.com password=drill-$(uuid)
	api POST /api/auth/register "{\"tenant_id\":\"$tenant\",\"user_id\":\"$user\",\"email\":\"$email\",\"password\":\"$password\"}" \
		${REGISTER_TOKEN:+-H "Authorization: Bearer $REGISTER_TOKEN"}
	want 201 "register"
}

try_login() { api POST /api/auth/login "{\"tenant_id\":\"$tenant\",\"email\":\"$email\",\"password\":\"$password\"}"; }

# login begins a session and sets access and refresh.
login() {
	try_login
	want 200 "login"
	access=$(member access_token) refresh=$(member refresh_token)
}

# rotate trades the refresh token for new tokens.
rotate() {
	api POST /api/auth/refresh "{\"refresh_token\":\"$refresh\"}"
	want 200 "refresh"
	access=$(member access_token) refresh=$(member refresh_token)
}

# within SECONDS WHAT COMMAND... repeats a command until it succeeds.
within() {
	local end=$((SECONDS + $1)) what=$2
	shift 2
	until "$@"; do
		((SECONDS < end)) || fail "$what: not in time; the last answer was $status $body"
		sleep 0.2
	done
}

ready() { api GET /health/ready "" && [[ $status == 200 ]]; }
not_ready() { ! ready; }
