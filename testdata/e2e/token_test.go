package e2e

import (
	"bytes"
	"crypto"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/go-jose/go-jose/v4"
	josejwt "github.com/go-jose/go-jose/v4/jwt"
	"github.com/golang-jwt/jwt/v5"
)

// part decodes one part of a compact JWS as a JSON object.
func part(t *testing.T, token string, n int) map[string]any {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatalf("got a token of %d parts, want 3", len(parts))
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[n])
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func header(t *testing.T, token string) map[string]any { t.Helper(); return part(t, token, 0) }
func claims(t *testing.T, token string) map[string]any { t.Helper(); return part(t, token, 1) }

// verifier is a JWT library that no one here wrote, with the keys that the
// service publishes. It returns the claims of a token it believes.
type verifier struct {
	name   string
	verify func(token string) (map[string]any, error)
}

// verifiers fetch the JWKS of s. Both are set up as their manuals tell a
// resource server to: one algorithm, issuer and audience.
func verifiers(t *testing.T, s *service, issuer, audience string) []verifier {
	t.Helper()
	document := s.get("/.well-known/jwks.json").body
	return []verifier{
		{"golang-jwt", func(token string) (map[string]any, error) {
			claims := jwt.MapClaims{}
			_, err := jwt.ParseWithClaims(token, claims, func(token *jwt.Token) (any, error) { return keyNamed(document, token.Header["kid"]) },
				jwt.WithValidMethods([]string{"RS256"}), jwt.WithIssuer(issuer), jwt.WithAudience(audience),
				jwt.WithExpirationRequired(), jwt.WithIssuedAt(), jwt.WithStrictDecoding())
			return claims, err
		}},
		{"go-jose", func(token string) (map[string]any, error) {
			var keys jose.JSONWebKeySet
			if err := json.Unmarshal(document, &keys); err != nil {
				return nil, err
			}
			parsed, err := josejwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
			if err != nil {
				return nil, err
			}
			var registered josejwt.Claims
			claims := map[string]any{}
			if err := parsed.Claims(&keys, &registered, &claims); err != nil {
				return nil, err
			}
			return claims, registered.ValidateWithLeeway(josejwt.Expected{Issuer: issuer, AnyAudience: josejwt.Audience{audience}, Time: time.Now()}, 0)
		}},
	}
}

// keyNamed reads one key of a JWKS as RFC 7518 section 6.3.1 says.
func keyNamed(document []byte, kid any) (*rsa.PublicKey, error) {
	var set struct{ Keys []struct{ Kid, N, E string } }
	if err := json.Unmarshal(document, &set); err != nil {
		return nil, err
	}
	for _, key := range set.Keys {
		if key.Kid != kid {
			continue
		}
		n, nErr := base64.RawURLEncoding.DecodeString(key.N)
		e, eErr := base64.RawURLEncoding.DecodeString(key.E)
		return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}, errors.Join(nErr, eErr)
	}
	return nil, fmt.Errorf("no key %v", kid)
}

func TestAccessToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const issuer, audience = "https://auth.example.com", "the-api"
	s := held(t, w.start(cheap, unlimited, env{"JWT_ISSUER": issuer, "JWT_AUDIENCE": audience, "ACCESS_TOKEN_TTL": "5m"}))
	p := s.register()
	spelt := p
	spelt.TenantID = strings.ToUpper(p.TenantID)
	before := time.Now().Unix()
	login := s.login(spelt)
	after := time.Now().Unix()
	sid := newestSession(t, w)

	if got, want := header(t, login.AccessToken), map[string]any{"alg": "RS256", "typ": "at+jwt", "kid": "test-1"}; !reflect.DeepEqual(got, want) {
		t.Errorf("header: got %v, want %v", got, want)
	}
	// check holds the claims of one token to the contract and returns its jti.
	check := func(what, token string, authTime float64, own map[string]any) any {
		t.Helper()
		got := claims(t, token)
		iat, _ := got["iat"].(float64)
		jti := got["jti"]
		if iat < float64(before) || iat > float64(time.Now().Unix()) || iat != float64(int64(iat)) {
			t.Errorf("%s: got iat %v, want the whole second of the answer", what, got["iat"])
		}
		if s, _ := jti.(string); !uuidForm.MatchString(s) {
			t.Errorf("%s: got jti %v, want a UUID", what, jti)
		}
		want := map[string]any{
			"iss": issuer, "sub": p.UserID, "aud": audience, "client_id": audience, "iat": iat, "exp": iat + 300, "jti": jti,
			"tenant_id": p.TenantID, "sid": sid, "auth_time": authTime, "amr": []any{"pwd"},
		}
		maps.Copy(want, own)
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: claims: got %v, want %v", what, got, want)
		}
		if strings.Contains(string(toJSON(got)), "@") {
			t.Errorf("%s: an e-mail address in the claims %v", what, got)
		}
		for _, v := range verifiers(t, s, issuer, audience) {
			verified, err := v.verify(token)
			if err != nil {
				t.Errorf("%s: %s: %v", what, v.name, err)
			} else if verified["sub"] != p.UserID || verified["sid"] != sid {
				t.Errorf("%s: %s: got claims %v", what, v.name, verified)
			}
		}
		return jti
	}
	const authTime = `SELECT floor(extract(epoch FROM created_at))::float8 FROM sessions`
	at := dbtest.Value[float64](t, w.db, authTime)
	if at < float64(before) || at > float64(after) {
		t.Errorf("auth_time: got %v, want the moment of the login, %d to %d", at, before, after)
	}
	first := check("login", login.AccessToken, at, nil)

	// auth_time stays that of the login, however old the session is.
	dbtest.Exec(t, w.db, `UPDATE sessions SET created_at = created_at - interval '1 hour'`)
	refreshed := s.refresh(login.RefreshToken).tokens(t)
	if second := check("refresh", refreshed.AccessToken, at-3600, nil); second == first {
		t.Error("two tokens have one jti")
	}

	// The account's own claims stand at the top level.
	dbtest.Exec(t, w.db, `UPDATE accounts SET claims = '{"roles": ["admin", "billing"], "plan": {"level": 3}}'`)
	again := s.refresh(refreshed.RefreshToken).tokens(t)
	check("with claims", again.AccessToken, at-3600, map[string]any{"roles": []any{"admin", "billing"}, "plan": map[string]any{"level": 3.0}})
}

// TestVerifiersRefuse: a stock verifier believes the service's tokens and
// nothing made of them without its key.
func TestVerifiersRefuse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"ACCESS_TOKEN_TTL": "1s"}))
	p := s.register()
	token := s.login(p).AccessToken
	h, c, signature := header(t, token), claims(t, token), strings.Split(token, ".")[2]
	c["exp"] = c["exp"].(float64) + 3600
	stranger := newKeyPair()
	b64 := func(v any) string { return base64.RawURLEncoding.EncodeToString(toJSON(v)) }
	with := func(m map[string]any, name string, value any) map[string]any {
		m = maps.Clone(m)
		m[name] = value
		return m
	}
	sign := func(key *rsa.PrivateKey, h, c map[string]any) string {
		text := b64(h) + "." + b64(c)
		digest := sha256.Sum256([]byte(text))
		signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return text + "." + base64.RawURLEncoding.EncodeToString(signature)
	}
	mac := func(secret []byte, h, c map[string]any) string {
		text := b64(h) + "." + b64(c)
		m := hmac.New(sha256.New, secret)
		m.Write([]byte(text))
		return text + "." + base64.RawURLEncoding.EncodeToString(m.Sum(nil))
	}
	flipped, err := base64.RawURLEncoding.DecodeString(signature)
	if err != nil {
		t.Fatal(err)
	}
	flipped[len(flipped)/2] ^= 1
	for _, v := range verifiers(t, s, "identity-auth", "identity-auth") {
		// The key is this test's own, so a token can be made that must be let in.
		if _, err := v.verify(sign(keyPair().key, h, c)); err != nil {
			t.Errorf("%s: a good token: %v", v.name, err)
		}
		for _, row := range []struct{ name, token string }{
			{"another payload", b64(h) + "." + b64(c) + "." + signature},
			{"another signature", strings.TrimSuffix(token, signature) + base64.RawURLEncoding.EncodeToString(flipped)},
			{"no signature", strings.TrimSuffix(token, signature)},
			{"alg none", b64(with(h, "alg", "none")) + "." + b64(c) + "."},
			{"HS256 with the public key", mac([]byte(keyPair().public), with(h, "alg", "HS256"), c)},
			{"a stranger's key", sign(stranger.key, h, c)},
			{"a stranger's key, kid of none", sign(stranger.key, with(h, "kid", "test-9"), c)},
			{"another issuer", sign(keyPair().key, h, with(c, "iss", "someone"))},
			{"another audience", sign(keyPair().key, h, with(c, "aud", "someone"))},
			{"expired", sign(keyPair().key, h, with(c, "exp", c["iat"].(float64)-1))},
		} {
			if _, err := v.verify(row.token); err == nil {
				t.Errorf("%s lets in: %s", v.name, row.name)
			}
		}
	}

	// ACCESS_TOKEN_TTL is meant: by its exp alone the token is bad a second on.
	for _, v := range verifiers(t, s, "identity-auth", "identity-auth") {
		eventually(t, v.name+" finds the token expired", 10*time.Second, func() bool { _, err := v.verify(token); return err != nil })
	}
}

func TestJWKS(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	previous, next := newKeyPair(), newKeyPair()
	alone := held(t, w.start(cheap, unlimited))
	s := held(t, w.start(cheap, unlimited, env{
		"JWT_PREV_PUBLIC_KEY_PEM": previous.public, "JWT_PREV_KID": "test-0",
		"JWT_NEXT_PUBLIC_KEY_PEM": strings.ReplaceAll(next.public, "\n", `\n`), "JWT_NEXT_KID": "test-2",
	}))
	jwk := func(kid string, p pair) map[string]any {
		e := big.NewInt(int64(p.key.E)).Bytes()
		return map[string]any{
			"kty": "RSA", "use": "sig", "alg": "RS256", "kid": kid,
			"n": base64.RawURLEncoding.EncodeToString(p.key.N.Bytes()), "e": base64.RawURLEncoding.EncodeToString(e),
		}
	}
	const path = "/.well-known/jwks.json"
	wantBody(t, "one key", alone.get(path), 200, map[string]any{"keys": []any{jwk("test-1", keyPair())}})
	a := s.get(path)
	wantBody(t, "three keys", a, 200, map[string]any{"keys": []any{jwk("test-1", keyPair()), jwk("test-0", previous), jwk("test-2", next)}})
	for name, want := range map[string]string{"Cache-Control": "public, max-age=300", "Content-Type": "application/json"} {
		if got := a.header.Get(name); got != want {
			t.Errorf("got %s %q, want %q", name, got, want)
		}
	}
	etag := a.header.Get("ETag")
	if len(etag) < 10 || !strings.HasPrefix(etag, `"`) || !strings.HasSuffix(etag, `"`) {
		t.Errorf("got ETag %q, want a strong one", etag)
	}
	if got := s.get(path).header.Get("ETag"); got != etag {
		t.Errorf("got ETag %s, then %s for the same document", etag, got)
	}
	if got := alone.get(path).header.Get("ETag"); got == etag {
		t.Errorf("two documents have one ETag %s", etag)
	}
	for _, row := range []struct {
		name, ifNoneMatch string
		status            int
	}{
		{"the same", etag, 304},
		{"weak", "W/" + etag, 304},
		{"in a list", `"other", ` + etag, 304},
		{"any", "*", 304},
		{"another", `"other"`, 200},
		{"a part", etag[:len(etag)-2] + `"`, 200},
		{"without quotes", strings.Trim(etag, `"`), 200},
	} {
		a := s.get(path, "If-None-Match", row.ifNoneMatch)
		if a.status != row.status || (len(a.body) > 0) != (row.status == 200) {
			t.Errorf("If-None-Match %s: got %d with %d bytes, want %d", row.name, a.status, len(a.body), row.status)
		}
		if got := a.header.Get("ETag"); got != etag {
			t.Errorf("If-None-Match %s: got ETag %q, want %q", row.name, got, etag)
		}
	}
	for kid, role := range map[string]string{"test-0": "previous", "test-1": "current", "test-2": "next"} {
		if got := s.metric(fmt.Sprintf(`auth_jwt_key_info{kid=%q,role=%q}`, kid, role)); got != 1 {
			t.Errorf("auth_jwt_key_info of %s as %s: got %v, want 1", kid, role, got)
		}
	}

	// Only the current key signs; tokens of the others are believed.
	p := s.register()
	token := s.login(p).AccessToken
	if got := header(t, token)["kid"]; got != "test-1" {
		t.Errorf("kid of a token: got %v, want test-1", got)
	}
	for kid, key := range map[string]pair{"test-0": previous, "test-2": next} {
		signed := jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.MapClaims(claims(t, token)))
		signed.Header["kid"] = kid
		text, err := signed.SignedString(key.key)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range verifiers(t, s, "identity-auth", "identity-auth") {
			if _, err := v.verify(text); err != nil {
				t.Errorf("%s: a token of %s: %v", v.name, kid, err)
			}
		}
	}
}

// TestDiscovery: the documents exist where an issuer can be found by its URL,
// and say nothing that is not so.
func TestDiscovery(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	paths := []string{"/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"}
	for _, issuer := range []string{"identity-auth", "urn:example:auth", "ftp://auth.example.com", "auth.example.com"} {
		s := held(t, w.start(cheap, unlimited, env{"JWT_ISSUER": issuer}))
		for _, path := range paths {
			wantCode(t, "issuer "+issuer+": "+path, s.get(path), 404, "not_found")
		}
		s.stop()
	}
	c := w.config(cheap, unlimited)
	for _, row := range []struct{ issuer, jwks string }{
		{"https://auth.example.com", "https://auth.example.com/.well-known/jwks.json"},
		{"https://auth.example.com/", "https://auth.example.com/.well-known/jwks.json"},
		{"https://example.com/auth", "https://example.com/auth/.well-known/jwks.json"},
		{"http://127.0.0.1:" + c["PORT"], "http://127.0.0.1:" + c["PORT"] + "/.well-known/jwks.json"},
	} {
		c["JWT_ISSUER"] = row.issuer
		s := held(t, w.launch(racyBinary, c))
		s.waitReady()
		for _, path := range paths {
			a := s.get(path)
			if got := a.header.Get("Content-Type"); got != "application/json" {
				t.Errorf("%s: got Content-Type %q, want application/json", path, got)
			}
			if etag := a.header.Get("ETag"); !strings.HasPrefix(etag, `"`) || s.get(path, "If-None-Match", etag).status != 304 {
				t.Errorf("%s: got ETag %q, want a strong one that answers 304", path, etag)
			}
			m := a.json(t)
			// What go-oidc and its like insist on: the issuer to the letter.
			if m["issuer"] != row.issuer || m["jwks_uri"] != row.jwks {
				t.Errorf("%s: got issuer %v and jwks_uri %v, want %s and %s", path, m["issuer"], m["jwks_uri"], row.issuer, row.jwks)
			}
			if got, want := m["id_token_signing_alg_values_supported"], []any{"RS256"}; !reflect.DeepEqual(got, want) {
				t.Errorf("%s: got id_token_signing_alg_values_supported %v, want %v", path, got, want)
			}
			// An absent grant_types_supported would mean two grants (RFC 8414 2).
			for _, name := range []string{"response_types_supported", "grant_types_supported"} {
				if got, ok := m[name].([]any); !ok || len(got) != 0 {
					t.Errorf("%s: got %s %v, want an empty list", path, name, m[name])
				}
			}
			for name := range m {
				if strings.HasSuffix(name, "_endpoint") {
					t.Errorf("%s names %s, which does not exist", path, name)
				}
			}
		}
		token := s.login(s.register()).AccessToken
		if got := claims(t, token)["iss"]; got != row.issuer {
			t.Errorf("iss: got %v, want %s", got, row.issuer)
		}
		if row.jwks == s.base+"/.well-known/jwks.json" {
			resp, err := http.Get(row.jwks)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || !bytes.Equal(body, s.get("/.well-known/jwks.json").body) {
				t.Errorf("jwks_uri serves %q, %v", body, err)
			}
		}
		s.stop()
	}
}
