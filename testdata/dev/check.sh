#!/usr/bin/env bash
# What can be said about the source without running the service. Everything is
# looked at before the script fails, so that one run names all there is to mend.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh
staticcheck=$PWD/.bin/staticcheck
bad=()

# go_files DIR [FIND OPTION...]: the Go files below DIR that are ours.
go_files() {
	local dir=$1
	shift
	find "$dir" \( -name .git -o -name .run -o -name .bin \) -prune -o -name '*.go' -type f "$@"
}

say "gofmt"
# The gofmt of the toolchain that builds: another version may format otherwise.
gofmt=$(go env GOROOT)/bin/gofmt
unformatted=$(go_files . -exec "$gofmt" -l {} +) || bad+=(gofmt)
if [[ -n $unformatted ]]; then
	say "gofmt -w would change:" "$unformatted"
	bad+=(gofmt)
fi

for module in . testdata/*/; do
	module=${module%/}
	# The module of the tools has no Go file of its own, and vet refuses that.
	[[ -f $module/go.mod && -n $(go_files "$module" -print -quit) ]] || continue
	say "vet, staticcheck: $module"
	(cd "$module" && go vet ./...) || bad+=("vet in $module")
	(cd "$module" && "$staticcheck" ./...) || bad+=("staticcheck in $module")
done

say "layout"
# By name, from the file: go test is content when no test matches, and then
# nothing would hold the import table and the list of dependencies any more.
tests=$(sed -n 's/^func \(Test[A-Za-z0-9_]*\)(.*/\1/p' layout_test.go | paste -sd'|')
[[ -n $tests ]] || fail "layout_test.go has no test."
go test -count=1 -run "^($tests)\$" . || bad+=(layout)

((${#bad[@]} == 0)) || fail "make check failed: $(printf '%s\n' "${bad[@]}" | sort -u | paste -sd, | sed 's/,/, /g')"
