#!/usr/bin/env bash
# images.sh up|down: the images that Dockerfile and docker-compose.yml name.
#
# up: an image that is here stays, and one that can be pulled is pulled. For the
# others stand-ins are made from the distribution's packages, this machine's Go and
# the pinned nats-server. They are kept as identity-auth-stand-in, and have the
# name of the image they stand for only until down. One run at a time on an engine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. testdata/dev/lib.sh
cache=identity-auth-stand-in
# The builder that every engine has: it takes a base image that is here and asks
# no registry.
export DOCKER_BUILDKIT=0

# reference VARIABLE FILE prints the image that is the variable's default there.
reference() {
	local image
	image=$(sed -n "s/^ARG $1=//p; s/.*\${$1:-\([^}]*\)}.*/\1/p" "$2" | head -n 1)
	[[ -n $image ]] || fail "$2 names no image as $1."
	printf '%s\n' "$image"
}
declare -A images=(
	[golang]=$(reference GO_IMAGE Dockerfile) [static]=$(reference BASE_IMAGE Dockerfile)
	[postgres]=$(reference POSTGRES_IMAGE docker-compose.yml) [nats]=$(reference NATS_IMAGE docker-compose.yml)
	[nginx]=$(reference NGINX_IMAGE docker-compose.yml)
)

# label IMAGE prints what a stand-in was made of, and nothing for any other image.
label() { docker image inspect -f "{{with .Config.Labels}}{{index . \"$cache\"}}{{end}}" "$1" 2>/dev/null; }

# tar_root prints a small Debian with the programs that the images need. Nothing
# of it is started here, and no package's script sees this machine.
tar_root() {
	local suite exclude=()
	suite=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
	for path in /usr/share/doc /usr/share/man /usr/share/locale '/usr/lib/*/libLLVM'; do
		exclude+=("--dpkgopt=path-exclude=$path*")
	done
	mmdebstrap --quiet --variant=apt "${exclude[@]}" \
		--include=make,ca-certificates,wget,curl,tzdata,postgresql,nginx-light "$suite" -
}

# context NAME DIR fills DIR with what testdata/images/NAME/Dockerfile copies.
context() {
	local dir=$2 goroot
	cp -r "testdata/images/$1/." "$dir"
	case $1 in
	golang)
		goroot=$(go env GOROOT)
		mkdir "$dir/go"
		tar -C "$goroot" --exclude=./test --exclude=./api --exclude=./doc --exclude=./misc -c . | tar -C "$dir/go" -x
		# From this machine's cache as far as it goes: what is compared with go.sum
		# may come from anywhere.
		GOMODCACHE=$dir/mod GOFLAGS=-modcacherw GOPROXY=file://$(go env GOMODCACHE)/cache/download,$(go env GOPROXY) go mod download
		;;
	nats) cp .bin/nats-server "$dir" ;;
	static)
		mkdir -p "$dir"/root/{etc/ssl/certs,usr/share,home/nonroot,tmp}
		chmod 1777 "$dir/root/tmp"
		printf 'root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n' >"$dir/root/etc/passwd"
		printf 'root:x:0:\nnonroot:x:65532:\n' >"$dir/root/etc/group"
		docker run --rm --network none $cache:debian tar -C / -ch etc/ssl/certs/ca-certificates.crt usr/share/zoneinfo | tar -C "$dir/root" -x
		;;
	esac
}

# function_text NAME prints a function of this file: what an image is made by.
function_text() { sed -n "/^$1()/,/^[})]/p" testdata/dev/images.sh; }

# make_one NAME makes a stand-in, unless the one in the cache is made of the same.
make_one() (
	name=$1
	want=$({ function_text context && cat "testdata/images/$name"/* go.sum testdata/tools/go.sum && go version; } | sha256sum | cut -c 1-32)
	[[ $(label $cache:"$name") != "$want" ]] || exit 0
	say "Making a stand-in for ${images[$name]}."
	dir=$(mktemp -d)
	trap 'rm -rf "$dir"' EXIT
	context "$name" "$dir"
	out=$(docker build --label "$cache=$want" -t $cache:"$name" "$dir" 2>&1) ||
		fail "$out" "The stand-in for ${images[$name]} could not be made: see above."
)

up() {
	local name missing=() root
	for name in "${!images[@]}"; do
		# A name that an earlier run left behind is no reason to keep an old stand-in.
		if [[ -n $(label "${images[$name]}") ]] || ! docker image inspect "${images[$name]}" >/dev/null 2>&1; then
			missing+=("$name")
		fi
	done
	((${#missing[@]} > 0)) || return 0
	# One that cannot be pulled says that the others cannot either.
	if timeout 600 docker pull -q "${images[${missing[0]}]}" >/dev/null 2>&1; then
		for name in "${missing[@]}"; do
			timeout 600 docker pull -q "${images[$name]}" >/dev/null || fail "${images[$name]} could not be pulled: see above."
		done
		return 0
	fi
	root=$(function_text tar_root | sha256sum | cut -c 1-32)
	if [[ $(label $cache:debian) != "$root" ]]; then
		testdata/dev/deps.sh mmdebstrap
		say "Making a small Debian for the stand-ins of images that cannot be pulled."
		tar_root | docker import -c "LABEL $cache=$root" - $cache:debian >/dev/null
	fi
	for name in "${missing[@]}"; do
		make_one "$name"
		docker tag $cache:"$name" "${images[$name]}"
	done
}

# down takes the names away from stand-ins again, and removes what was built on
# them and has no name of its own. A real image keeps its name.
down() {
	local name
	for name in "${!images[@]}"; do
		[[ -z $(label "${images[$name]}") ]] || docker rmi "${images[$name]}" >/dev/null
	done
	docker image prune -f --filter "label=$cache" >/dev/null
}

docker_engine || fail "No Docker engine answers here."
case ${1:-} in
up | down) "$1" ;;
*) fail "usage: images.sh up|down" ;;
esac
