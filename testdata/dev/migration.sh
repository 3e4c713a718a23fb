#!/usr/bin/env bash
# Makes the next numbered file in sql/, called $NAME.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh
export LC_ALL=C # [a-z] is 26 letters
name=${NAME:-}

[[ -n $name ]] || fail "A migration needs a name: make migration NAME=add_something"
[[ $name =~ ^[a-z0-9_]+$ ]] || fail "A migration's name is made of a-z, 0-9 and _ only: make migration NAME=add_something"

last=0000
for file in sql/[0-9][0-9][0-9][0-9]_*.sql; do
	[[ ! -e $file ]] || last=${file:4:4}
done
file=$(printf 'sql/%04d_%s.sql' $((10#$last + 1)) "$name")

set -o noclobber
cat >"$file" <<'END'
-- What changes, and why it is safe while replicas of the version before are
-- running. One transaction, forward only, no rewrite of a large table. Once
-- released this file never changes again: its checksum is kept.
END
say "$file"
