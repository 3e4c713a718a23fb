package jwt_test

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/7d-solutions/identity-auth/jwt"
)

// A resource server verifies access tokens against the JWKS of the issuer, and
// refuses those of a session as soon as it hears that the session was revoked.
func Example() {
	// The issuer: its key, and the JWKS that it publishes.
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		log.Fatal(err)
	}
	signer, err := jwt.NewSigner("2026-01", key)
	if err != nil {
		log.Fatal(err)
	}
	published, err := jwt.NewKeySet(jwt.Key{ID: signer.KeyID(), Public: signer.Public()})
	if err != nil {
		log.Fatal(err)
	}
	issuer := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(published)
	}))
	defer issuer.Close()

	// The resource server. In production the list is fed from the stream
	// AUTH_EVENTS, by a consumer that starts one access token lifetime back.
	keys, err := jwt.NewRemoteKeySet(issuer.URL+"/.well-known/jwks.json", nil)
	if err != nil {
		log.Fatal(err)
	}
	revocations := jwt.NewRevocationList()
	verifier := jwt.NewVerifier("https://auth.example", "orders", keys).WithRevocations(revocations)
	orders := func(w http.ResponseWriter, r *http.Request) {
		scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
		if !strings.EqualFold(scheme, "Bearer") {
			w.Header().Set("WWW-Authenticate", "Bearer")
			http.Error(w, "unauthorized", http.StatusUnauthorized)
			return
		}
		claims, err := verifier.Verify(r.Context(), token)
		switch {
		case errors.Is(err, jwt.ErrUnavailable): // says nothing about the token
			w.Header().Set("Retry-After", "1")
			http.Error(w, "try again", http.StatusServiceUnavailable)
		case err != nil:
			w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
			http.Error(w, "invalid token", http.StatusUnauthorized)
		default:
			fmt.Fprintf(w, "orders of %s with %s\n", claims.Subject, claims.Extra)
		}
	}

	now := time.Now()
	token, err := signer.Sign(jwt.Claims{
		Issuer: "https://auth.example", Audience: "orders", ClientID: "orders",
		Subject: "alice", SessionID: "session-1", ID: "token-1",
		IssuedAt: now, ExpiresAt: now.Add(15 * time.Minute),
		Extra: json.RawMessage(`{"roles":["buyer"]}`),
	})
	if err != nil {
		log.Fatal(err)
	}
	request := func() {
		r := httptest.NewRequest("GET", "/orders", nil)
		r.Header.Set("Authorization", "Bearer "+token)
		w := httptest.NewRecorder()
		orders(w, r)
		fmt.Print(w.Code, " ", w.Body)
	}

	request()
	event := fmt.Sprintf(`{"event_type":"auth.session.revoked","data":{"session_id":"session-1","access_tokens_expire_at":%q}}`,
		now.Add(15*time.Minute).Format(time.RFC3339))
	if err := revocations.HandleEvent([]byte(event)); err != nil {
		log.Fatal(err)
	}
	request()
	// Output:
	// 200 orders of alice with {"roles":["buyer"]}
	// 401 invalid token
}
