# The binary on a base without a shell, as a user without rights. The base
# images are build arguments: for a mirror, or to pin a digest.
ARG GO_IMAGE=golang:1.26.8-bookworm
ARG BASE_IMAGE=gcr.io/distroless/static-debian12:nonroot

FROM ${GO_IMAGE} AS build
# Go's own settings, for who has to build through a module mirror.
ARG GOPROXY
ARG GOSUMDB
ARG GOFLAGS
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG VERSION=dev
ARG COMMIT=unknown
# The time of the file is part of the layer: a fixed one makes it the same each time.
ARG SOURCE_DATE_EPOCH=0
RUN make build VERSION="$VERSION" COMMIT="$COMMIT" && touch -d "@$SOURCE_DATE_EPOCH" .bin/identity-auth

FROM ${BASE_IMAGE}
ARG VERSION=dev
ARG COMMIT=unknown
LABEL org.opencontainers.image.title=identity-auth \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT" \
      org.opencontainers.image.licenses=Apache-2.0
COPY --from=build /src/.bin/identity-auth /identity-auth
# By number: Kubernetes sees that it is not root (runAsNonRoot).
USER 65532:65532
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["/identity-auth", "healthcheck"]
ENTRYPOINT ["/identity-auth"]
