#!/usr/bin/env bash
# Makes .bin/release: the binaries of $VERSION, their checksums, an SBOM and the
# licences of all that is linked. Each binary is built twice, in two folders and
# from two caches; when the two differ, nothing is released.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh
version=${VERSION:-dev} commit=${COMMIT:-unknown}
[[ $version =~ ^[0-9A-Za-z._+-]+$ ]] || fail "VERSION is no name for a file: $version"

out=$PWD/.bin/release
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$out"
mkdir -p "$work/release" "$work/sources elsewhere"
cp -r Makefile go.mod go.sum main.go auth db jwt migrate natsbus sql "$work/sources elsewhere"

# Settings of the caller's that would end up in the binary.
export GOFLAGS= GOEXPERIMENT= GOAMD64=v1 GOARM64=v8.0 GOFIPS140=off GOOS=linux
build() { make -s build OUT="$1" VERSION="$version" COMMIT="$commit"; }

binaries=()
for GOARCH in amd64 arm64; do
	export GOARCH
	name=identity-auth-$version-linux-$GOARCH
	say "$name"
	build "$work/release/$name"
	(cd "$work/sources elsewhere" && GOCACHE=$work/cache build "$work/again")
	cmp "$work/release/$name" "$work/again" || fail "Two builds of $name differ."
	binaries+=("$work/release/$name")
done
unset GOOS GOARCH

(cd testdata/release && go build -o "$work/write" .)
"$work/write" "$version" "$work/release" "${binaries[@]}"
chmod 0644 "$work/release"/*
chmod 0755 "${binaries[@]}"
(cd "$work/release" && sha256sum -- * >SHA256SUMS)
mkdir -p .bin
mv "$work/release" "$out"
say "The same twice: .bin/release" && cat "$out/SHA256SUMS"
