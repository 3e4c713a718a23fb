# The commands of this checkout. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The steps share the package manager, the ports and two cores.
.NOTPARALLEL:

# sudo drops the folder that Go is usually installed in from PATH.
export PATH := $(PATH):/usr/local/go/bin
# A go.work in a folder above must not change what is built here.
export GOWORK := off

# Only this checkout's own repository counts, not one in a folder above; none
# at all (an unpacked archive) is fine too.
DESCRIBE := git --git-dir=.git describe --dirty --match 'v[0-9]*'
VERSION   = $(shell $(DESCRIBE) --tags 2>/dev/null || echo dev)
COMMIT    = $(shell $(DESCRIBE) --always --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)

# Where build puts the binary.
OUT = .bin/identity-auth

# Through the environment, so that no shell reads what they hold.
export FUZZTIME ?= 10s
export NAME     := $(value NAME)

.PHONY: help
help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name text; do \
		printf '  make %-11s%s\n' "$$name" "$$text"; done

.PHONY: run
run: need-go postgres .bin/nats-server build ## start the service with a PostgreSQL and a NATS of its own
	@exec setpriv --pdeathsig TERM testdata/dev/run.sh # stops what it started even if make is killed

.PHONY: test
test: need-go postgres curl prometheus systemd cc containers check build ## check and test everything, with the race detector
	CGO_ENABLED=1 go test -race -count=1 -timeout 20m ./...
	cd testdata/e2e && CGO_ENABLED=1 go test -race -count=1 -timeout 60m ./...
	cd testdata/manifests && go test -count=1 ./...
	@. testdata/dev/lib.sh; say "make test: all passed$$(without_engine)"

.PHONY: check
check: need-go tools ## gofmt, vet, staticcheck, and who may import what
	@testdata/dev/check.sh

.PHONY: build
build: need-go ## the static binary, .bin/identity-auth
	CGO_ENABLED=0 go build -trimpath -buildvcs=false \
		-ldflags "-s -w -X main.version=$(VERSION) -X main.commit=$(COMMIT)" -o "$(OUT)" .

.PHONY: image
image: ## the container image, identity-auth:VERSION
	docker build --build-arg VERSION="$(VERSION)" --build-arg COMMIT="$(COMMIT)" -t "identity-auth:$(VERSION)" .

.PHONY: release
release: need-go ## binaries, checksums, SBOM and licences in .bin/release
	@VERSION="$(VERSION)" COMMIT="$(COMMIT)" testdata/dev/release.sh

.PHONY: bench
bench: need-go postgres tools ## run every benchmark
	go test -run '^$$' -bench . -benchmem -timeout 30m ./...
	cd testdata/e2e && go test -run '^$$' -bench . -timeout 90m .

.PHONY: torture
torture: need-go postgres spin tools ## the model of refresh tokens, the long fault tests, and a minute of every fuzz target
	testdata/model/check.sh
	go test -tags torture -run Torture -count=1 -timeout 30m -v ./natsbus
	cd testdata/e2e && go test -tags torture -run Torture -count=1 -timeout 60m -v .
	FUZZTIME=60s testdata/dev/fuzz.sh

.PHONY: fuzz
fuzz: need-go ## fuzz every target for FUZZTIME (10s) each
	@testdata/dev/fuzz.sh

.PHONY: migration
migration: ## NAME=x: the next numbered file in sql/
	@testdata/dev/migration.sh

.PHONY: vuln
vuln: need-go .bin/govulncheck ## ask the vulnerability database about this code (needs the network)
	.bin/govulncheck ./...

.PHONY: clean
clean: ## remove what run and build made: .run, .bin
	@testdata/dev/clean.sh

.PHONY: tools
tools: need-go .bin/nats-server .bin/staticcheck ## build the pinned nats-server and staticcheck

# Their versions stand in testdata/tools/go.mod.
.bin/nats-server: package := github.com/nats-io/nats-server/v2
.bin/staticcheck: package := honnef.co/go/tools/cmd/staticcheck
.bin/govulncheck: package := golang.org/x/vuln/cmd/govulncheck
.bin/nats-server .bin/staticcheck .bin/govulncheck: testdata/tools/go.mod testdata/tools/go.sum
	cd testdata/tools && CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '-s -w' -o ../../$@ $(package)

.PHONY: postgres curl prometheus systemd cc containers spin
postgres curl prometheus systemd cc containers spin: need-go
	@testdata/dev/deps.sh $@

.PHONY: need-go
need-go:
	@command -v go >/dev/null || { echo 'Go is not on PATH: install Go 1.26 or later.' >&2; exit 1; }
