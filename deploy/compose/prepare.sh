#!/bin/sh
# Makes what docker-compose.yml mounts: passwords, once, and the configuration
# that holds them. It runs to its end before anything else starts, at every `up`.
#
# Each service has a volume of its own with what it needs to know, in files that
# only its user can read.
set -eu
umask 077

chown "$POSTGRES_USER_ID" /data/postgres
chown "$NATS_USER_ID" /data/nats

# put USER FILE: standard input becomes FILE as a whole or not at all.
put() {
	cat >"$2.new"
	chmod 0400 "$2.new"
	chown "$1" "$2.new"
	mv "$2.new" "$2"
}

secret() { od -An -N24 -v -tx1 /dev/urandom | tr -d ' \n'; }

# The kid is written last: without it nothing has started yet, and all passwords
# can be made anew.
if [ ! -e /config/identity-auth/kid ]; then
	secret | put "$POSTGRES_USER_ID" /config/postgres/superuser
	secret | put "$POSTGRES_USER_ID" /config/postgres/identity_auth
	secret >/config/nats/identity_auth
	secret >/config/nats/consumer
	mkdir -p /config/identity-auth/keys
	chown "$SERVICE_USER_ID" /config/identity-auth/keys
	printf 'compose-%s' "$(secret | cut -c 1-8)" | put "$SERVICE_USER_ID" /config/identity-auth/kid
fi

# Hexadecimal: nothing in these needs quoting, in a URL or anywhere else.
database=$(cat /config/postgres/identity_auth)
nats=$(cat /config/nats/identity_auth)
consumer=$(cat /config/nats/consumer)

printf 'postgres://identity_auth:%s@postgres:5432/identity_auth?sslmode=disable' "$database" |
	put "$SERVICE_USER_ID" /config/identity-auth/database-url
printf 'nats://identity_auth:%s@nats:4222' "$nats" | put "$SERVICE_USER_ID" /config/identity-auth/nats-url
sed "s/@identity_auth@/$nats/; s/@consumer@/$consumer/" /source/nats.conf | put "$NATS_USER_ID" /config/nats/nats.conf
put "$POSTGRES_USER_ID" /config/postgres/role.sql </source/role.sql
put "$NGINX_USER_ID" /config/nginx/nginx.conf </source/nginx.conf
