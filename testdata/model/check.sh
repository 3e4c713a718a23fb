#!/usr/bin/env bash
# Searches the model of refresh tokens in full, in several configurations, and
# then sees each of its claims fail on a row that is broken for it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh
model=$PWD/testdata/model/refresh.pml
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp" # spin and pan write where they stand

# search DEFINE... leaves what the search said in $said. -o3: without statement
# merging, with which spin 6.5.2 loses branches of this model.
said=''
search() {
	spin -o3 "$@" -a "$model" >spin.out 2>&1 || fail "spin $*: $(<spin.out)"
	gcc -O1 -w -DSAFETY -DMEMLIM=4096 -o pan pan.c
	said=$(./pan -n -w22 -m1000000 2>&1) || true
}

# states prints how many a search that was complete and found nothing has seen.
states() {
	[[ $said == *'Full statespace search'* && $said == *'errors: 0'* ]] || return 1
	! grep -qiE 'not completed|depth too small|out of memory|memory limit|aborted|interrupt' <<<"$said" || return 1
	sed -n 's/^ *\([0-9.e+]*\) states, stored.*/\1/p' <<<"$said"
}

say "every interleaving"
while read -r config; do
	read -ra defines <<<"$config"
	search "${defines[@]}"
	n=$(states) || fail "$config: $said"
	say "  $config: $n states, no claim fails"
done <<'END'
-DCLIENTS=2 -DTOKENS=4 -DGRACE=0
-DCLIENTS=2 -DTOKENS=4 -DGRACE=0 -DREVOKE=1 -DFAULTS=1 -DLIMIT=1 -DPROMOTE=1
-DCLIENTS=2 -DTOKENS=4 -DGRACE=1 -DREVOKE=1 -DFAULTS=1 -DLIMIT=1 -DPROMOTE=1
-DCLIENTS=2 -DTOKENS=6 -DGRACE=1 -DFAULTS=1
-DCLIENTS=3 -DTOKENS=4 -DGRACE=0 -DREVOKE=1
-DCLIENTS=3 -DTOKENS=3 -DGRACE=1 -DREVOKE=1 -DFAULTS=1 -DLIMIT=1
END

# Or the claims would hold of a model in which nothing happens.
say "every outcome occurs"
for outcome in ahead revoked expired limited rotated replay_again reused replay; do
	search -DTOKENS=4 -DGRACE=1 -DREVOKE=1 -DLIMIT=1 -DPROMOTE=1 -DONLY=9 -DNEVER="$outcome"
	[[ $said == *'assertion violated (outcome!='* || $said == *'assertion violated ((outcome!='* ]] || fail "the outcome $outcome does not occur: $said"
done

# The claim alone, so that no other one can fail in its place.
say "every claim fails where it should"
while read -r claim broken; do
	search -DTOKENS=4 -DGRACE=1 -DREVOKE=1 -DFAULTS=1 -DPROMOTE=1 -DONLY="$claim" -D"$broken"
	[[ $said == *'assertion violated'* ]] || fail "claim $claim does not notice $broken: $said"
	say "  claim $claim notices $broken"
done <<'END'
1 BROKEN_TWO_STEPS
1 BROKEN_SPENT_LAST_IS_CURRENT
2 BROKEN_OLD_IS_UNKNOWN
2 BROKEN_GRACE_WITHOUT_CLOCK
3 BROKEN_NEW_SUCCESSOR
3 BROKEN_GRACE_OF_ANY_SPENT
3 BROKEN_GRACE_WITHOUT_CLOCK
4 BROKEN_GRACE_BEFORE_REVOKED
4 BROKEN_GRACE_OUTLIVES_SESSION
4 BROKEN_REVOKED_ROTATES
4 BROKEN_OVER_ROTATES
5 BROKEN_ANSWER_BEFORE_COMMIT
5 BROKEN_REVOKED_ROTATES
6 BROKEN_TWO_STEPS
7 BROKEN_AHEAD_IS_REPLAY
7 BROKEN_GENERATION_IS_ENOUGH
END
