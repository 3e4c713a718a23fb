#!/usr/bin/env bash
# Runs identity-auth together with a PostgreSQL and a NATS server of its own, for
# development. Everything it keeps is in .run; everything it starts listens on
# the loopback address only and is stopped when it ends, however it ends.
set -euo pipefail
umask 077
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh
run=$PWD/.run

mkdir -p .run
[[ -O .run ]] || fail ".run belongs to $(stat -c %U .run): run as that user, or remove it with make clean."

# The servers inherit this lock: it is free only when none of an earlier run is
# left, whatever happened to the script that started them.
exec 8>>.run/lock
flock -n 8 || fail "make run is up in this checkout already (process $(<.run/lock)): stop it first, with Ctrl-C in its terminal."
printf '%s\n' $$ >.run/lock

service='' nats='' postgres='' # process ids

alive() { [[ -n $1 ]] && kill -0 "$1" 2>/dev/null; }

# stop_one NAME PID SIGNAL asks a server to end and waits until it is gone.
stop_one() {
	local i
	alive "$2" || return 0
	kill -s "$3" "$2"
	for ((i = 0; i < 450; i++)); do # the service itself takes 30 s at most
		alive "$2" || return 0
		sleep 0.1
	done
	printf '%s does not stop: killing it.\n' "$1" >&2
	kill -s KILL "$2"
	wait "$2" 2>/dev/null
}

# stop ends the servers before those that they depend on. A second Ctrl-C changes
# nothing, and a terminal that is gone is no error.
stop() {
	local code=$?
	set +e
	trap '' INT TERM HUP PIPE
	if [[ -n $postgres ]]; then
		printf '\nStopping.\n' 2>/dev/null
		stop_one identity-auth "$service" TERM
		stop_one nats-server "$nats" TERM
		stop_one PostgreSQL "$postgres" INT # "fast": open psql sessions do not hold it up
		printf 'Stopped. The data stays in .run; make clean removes it.\n' 2>/dev/null
	fi
	exit "$code"
}
trap stop EXIT
trap 'exit 0' INT TERM HUP PIPE

# A signal to make alone (its terminal was closed, kill -INT) makes it wait for
# this script without a word to it. It shows in the signals that make catches.
make_catches() { sed -n 's/^SigCgt:\s*//p' "/proc/$PPID/status" 2>/dev/null || true; }
under_make=''
[[ $(<"/proc/$PPID/comm") != make ]] || under_make=$(make_catches)

listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# free_port NAME WANTED prints WANTED, or the next port that nobody listens on.
free_port() {
	local port
	for ((port = $2; port < $2 + 100; port++)); do
		listening "$port" && continue
		((port == $2)) || say "Port $2 is taken: $1 listens on $port." >&2
		printf '%s\n' "$port"
		return 0
	done
	fail "No port from $2 to $((port - 1)) is free for $1."
}

# await NAME PID LOG CHECK... waits until CHECK succeeds.
await() {
	local name=$1 pid=$2 log=$3 i
	shift 3
	for ((i = 0; i < 600; i++)); do
		"$@" && return 0
		alive "$pid" || break
		sleep 0.1
	done
	[[ -z $log ]] || tail -n 20 "$log" >&2
	alive "$pid" && fail "$name is not ready after a minute: its log is above."
	fail "$name ended while it was starting: its log is above."
}

# detached COMMAND... becomes COMMAND, in a session of its own, so that the
# terminal's Ctrl-C reaches this script alone and the stop goes in order. Should
# the script be killed, the kernel sends SIGNAL to what it had started.
detached() {
	local signal=$1
	shift
	exec setsid setpriv --pdeathsig "$signal" "$@"
}

# as_postgres COMMAND... becomes COMMAND, as the user that owns PostgreSQL's
# folder: PostgreSQL refuses to run as root. That user may not be able to walk
# down to a checkout below /root, and needs no right to: the folder is handed
# over as an open descriptor and is /proc/self/fd/9 to PostgreSQL.
as_postgres() {
	local drop=()
	((EUID != 0)) || drop=(--reuid "$(stat -c %u "$run/postgres")" --regid "$(stat -c %g "$run/postgres")" --clear-groups)
	exec 9<"$run/postgres"
	cd /
	detached INT "${drop[@]}" "$@"
}

# Settings of the caller that are meant for other servers.
unset "${!PG@}" DATABASE_URL_FILE NATS_URL_FILE JWT_PRIVATE_KEY_PEM JWT_PUBLIC_KEY_PEM JWT_KID_FILE JWT_ISSUER_FILE HOST_FILE PORT_FILE

[[ -s .run/password ]] || od -An -N24 -v -tx1 /dev/urandom | tr -d ' \n' >.run/password
password=$(<.run/password)

# PostgreSQL. Only the service's own role can log in, over TCP and with its
# password; there is no socket (whose path has a length limit that a deep
# checkout exceeds) and the superuser has no password.
if [[ ! -d .run/postgres ]]; then
	mkdir .run/postgres
	if ((EUID == 0)); then
		owner=nobody
		! id postgres >/dev/null 2>&1 || owner=postgres
		chown "$owner:" .run/postgres
	fi
fi
data=/proc/self/fd/9/data
if [[ ! -d .run/postgres/data ]]; then
	say "Making a database in .run/postgres."
	bin=$(postgres_bin any) || fail "PostgreSQL 15 or later was not found."
	rm -rf .run/postgres/new # left by a run that was killed half-way
	new=/proc/self/fd/9/new
	(as_postgres "$bin/initdb" -D $new -U postgres --encoding UTF8 --locale C --auth reject) >.run/postgres.log 2>&1 ||
		{ cat .run/postgres.log >&2 && fail "initdb failed: what it said is above."; }
	say 'host identity_auth identity_auth 127.0.0.1/32 scram-sha-256' >.run/postgres/new/pg_hba.conf
	(as_postgres "$bin/postgres" --single -D $new -c exit_on_error=true postgres) >.run/postgres.log 2>&1 <<-END ||
		CREATE ROLE identity_auth LOGIN PASSWORD '$password'
		CREATE DATABASE identity_auth OWNER identity_auth
	END
		{ cat .run/postgres.log >&2 && fail "The database could not be made: what PostgreSQL said is above."; }
	mv .run/postgres/new .run/postgres/data
fi
major=$(<.run/postgres/data/PG_VERSION)
bin=$(postgres_bin "$major") || fail "The database in .run was made by PostgreSQL $major, which is not here any more: install it, or start afresh with make clean."
# Left by a server that was killed. The process number in it may be another
# program's by now, and PostgreSQL would wait for that; the lock says it is stale.
rm -f .run/postgres/data/postmaster.pid
postgres_port=$(free_port PostgreSQL 5433)
as_postgres "$bin/postgres" -D $data -c listen_addresses=127.0.0.1 -c port="$postgres_port" \
	-c unix_socket_directories= >.run/postgres.log 2>&1 &
postgres=$!
postgres_ready() { [[ $(sed -n 8p .run/postgres/data/postmaster.pid 2>/dev/null) == ready* ]]; }
await PostgreSQL "$postgres" .run/postgres.log postgres_ready

# NATS. sync_interval: an event that was acknowledged survives a power cut. The
# store's path is relative, so that the checkout's may hold any character.
nats_port=$(free_port NATS 4222)
cat >.run/nats.conf <<END
listen: "127.0.0.1:$nats_port"
authorization { user: "identity_auth", password: "$password" }
jetstream { store_dir: ".run/nats", sync_interval: always }
END
detached TERM .bin/nats-server -c .run/nats.conf >.run/nats.log 2>&1 &
nats=$!
await NATS "$nats" .run/nats.log listening "$nats_port"

# Keys. Made once; a pair is there as a whole or not at all.
if [[ ! -d .run/keys ]]; then
	rm -rf .run/keys.new
	mkdir .run/keys.new
	.bin/identity-auth keygen .run/keys.new >/dev/null
	mv .run/keys.new .run/keys
	say "Made a key pair in .run/keys."
fi

# The service. What the caller's environment sets beyond this (LOG_LEVEL, say) holds.
wanted=${PORT:-8080}
[[ $wanted =~ ^[0-9]{1,5}$ ]] || fail "PORT is not a port number."
PORT=$(free_port identity-auth "$wanted")
base=http://127.0.0.1:$PORT
kid=$(sha256sum .run/keys/public.pem)
export HOST=127.0.0.1 PORT
export DATABASE_URL="postgres://identity_auth:$password@127.0.0.1:$postgres_port/identity_auth?sslmode=disable"
export NATS_URL="nats://identity_auth:$password@127.0.0.1:$nats_port"
export JWT_PRIVATE_KEY_PEM_FILE=.run/keys/private.pem JWT_PUBLIC_KEY_PEM_FILE=.run/keys/public.pem
export JWT_KID="dev-${kid:0:8}" # follows the key
export JWT_ISSUER=$base
detached TERM .bin/identity-auth serve &
service=$!
healthy() { timeout 5 .bin/identity-auth healthcheck >/dev/null 2>&1; }
await identity-auth "$service" '' healthy

tenant=$(</proc/sys/kernel/random/uuid)
user=$(</proc/sys/kernel/random/uuid)
json="-H 'Content-Type: application/json'"
cat <<END

identity-auth is up. Ctrl-C stops it, its PostgreSQL and its NATS; the next make run
goes on with the same data and keys.

  service     $base
  key set     $base/.well-known/jwks.json
  OpenAPI     $base/openapi.json
  readiness   $base/health/ready
  metrics     $base/metrics
  PostgreSQL  psql '$DATABASE_URL'
  NATS        $NATS_URL
  logs        the service's: here; .run/postgres.log, .run/nats.log

Register, log in and refresh, in another terminal:

curl -sS $base/api/auth/register $json -d '{"tenant_id":"$tenant","user_id":"$user","email":"ada@example.com","password":"StrongPassword123"}'

login=\$(curl -sS $base/api/auth/login $json -d '{"tenant_id":"$tenant","email":"ada@example.com","password":"StrongPassword123"}'); echo "\$login"

curl -sS $base/api/auth/refresh $json -d "{\"refresh_token\":\"\$(echo "\$login" | sed 's/.*"refresh_token": *"\([^"]*\)".*/\1/')\"}"

END
command -v curl >/dev/null || printf "There is no curl here yet: as root, 'apt-get install curl'.\n\n"

while :; do
	alive "$service" || { wait "$service" && code=0 || code=$?; fail "identity-auth ended by itself (exit code $code): its last lines are above."; }
	alive "$nats" || fail "nats-server ended by itself: see .run/nats.log."
	alive "$postgres" || fail "PostgreSQL ended by itself: see .run/postgres.log."
	[[ -z $under_make || $under_make == "$(make_catches)" ]] || exit 0
	sleep 1 &
	wait $! || true # a signal ends this wait at once, unlike a plain sleep
done
