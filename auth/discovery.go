package auth

import (
	_ "embed"
	"encoding/json"
	"net/http"
	"strings"
)

//go:embed openapi.json
var openAPI []byte

// handleJWKS serves the public keys (RFC 7517). Verifiers may keep them for 5
// minutes and revalidate with the ETag.
func (s *Server) handleJWKS(w http.ResponseWriter, r *http.Request) {
	ring := s.live.Load().keys
	writeCacheable(w, r, ring.JWKS, ring.ETag)
}

func (s *Server) handleOpenAPI(w http.ResponseWriter, r *http.Request) {
	writeCacheable(w, r, openAPI, s.openAPIETag)
}

// metadata is what standard verifiers need (RFC 8414, OpenID Connect Discovery
// 1.0). There is no authorization endpoint and no grant, and it says so.
type metadata struct {
	Issuer             string   `json:"issuer"`
	JWKSURI            string   `json:"jwks_uri"`
	ResponseTypes      []string `json:"response_types_supported"`
	GrantTypes         []string `json:"grant_types_supported"`
	SubjectTypes       []string `json:"subject_types_supported"`
	IDTokenSigningAlgs []string `json:"id_token_signing_alg_values_supported"`
	TokenEndpointAuth  []string `json:"token_endpoint_auth_methods_supported"`
	ClaimsSupported    []string `json:"claims_supported"`
}

// newMetadata is nil when the issuer is no http(s) URL: then no verifier could
// find the document by it.
func newMetadata(issuer string) []byte {
	if !strings.HasPrefix(issuer, "https://") && !strings.HasPrefix(issuer, "http://") {
		return nil
	}
	body, err := json.Marshal(metadata{
		Issuer: issuer, JWKSURI: strings.TrimSuffix(issuer, "/") + "/.well-known/jwks.json",
		ResponseTypes: []string{}, GrantTypes: []string{}, SubjectTypes: []string{"public"},
		IDTokenSigningAlgs: []string{"RS256"}, TokenEndpointAuth: []string{"none"},
		ClaimsSupported: []string{"iss", "sub", "aud", "client_id", "iat", "exp", "jti", "tenant_id", "sid", "auth_time", "amr"},
	})
	if err != nil { // unreachable: strings
		panic(err)
	}
	return body
}

func (s *Server) handleMetadata(w http.ResponseWriter, r *http.Request) {
	if s.metadata == nil {
		writeProblem(w, traceOf(r.Context()), &failure{problem: errNotFound})
		return
	}
	writeCacheable(w, r, s.metadata, s.metadataETag)
}

// writeCacheable answers a GET whose body anyone may keep for 5 minutes.
func writeCacheable(w http.ResponseWriter, r *http.Request, body []byte, etag string) {
	h := w.Header()
	h.Set("Cache-Control", "public, max-age=300")
	h.Set("ETag", etag)
	if etagMatches(r.Header.Get("If-None-Match"), etag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	h.Set("Content-Type", "application/json")
	w.Write(body)
}

// etagMatches compares weakly, as RFC 9110 13.1.2 asks for If-None-Match.
func etagMatches(ifNoneMatch, etag string) bool {
	for _, candidate := range strings.Split(ifNoneMatch, ",") {
		candidate = strings.TrimPrefix(strings.TrimSpace(candidate), "W/")
		if candidate == "*" || candidate == etag {
			return true
		}
	}
	return false
}
