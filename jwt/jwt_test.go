package jwt

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

// newTestKey returns a key whose modulus leaves room above it in its bytes, so
// that the tests can add it to a small signature.
func newTestKey() *rsa.PrivateKey {
	for {
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			panic(err)
		}
		if key.N.Bytes()[0] < 0xFF {
			return key
		}
	}
}

var (
	testKey  = sync.OnceValue(newTestKey)
	otherKey = sync.OnceValue(newTestKey)
)

// What the tests start from: a token that is good at issued.
const (
	goodHeader  = `{"alg":"RS256","typ":"at+jwt","kid":"k1"}`
	goodPayload = `{"iss":"https://issuer.example","sub":"user-1","aud":"api","client_id":"app",` +
		`"jti":"id-1","iat":1800000000,"exp":1800000900}`
)

var issued = time.Unix(1800000000, 0).UTC()

func testVerifier(t testing.TB) *Verifier {
	t.Helper()
	set, err := NewKeySet(Key{"k1", &testKey().PublicKey}, Key{"k2", &otherKey().PublicKey})
	if err != nil {
		t.Fatal(err)
	}
	return NewVerifier("https://issuer.example", "api", set)
}

func testSigner(t testing.TB) *Signer {
	t.Helper()
	s, err := NewSigner("k1", testKey())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func testClaims() Claims {
	return Claims{
		Issuer: "https://issuer.example", Subject: "user-1", Audience: "api", ClientID: "app", ID: "id-1",
		IssuedAt: issued, ExpiresAt: issued.Add(15 * time.Minute),
	}
}

func b64[T string | []byte](s T) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }

// sign appends a good signature to whatever stands before the second dot.
func sign(key *rsa.PrivateKey, signed string) string {
	digest := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	if err != nil {
		panic(err)
	}
	return signed + "." + b64(signature)
}

// forge makes a token of any header and payload, well signed with testKey.
func forge(header, payload string) string {
	return sign(testKey(), b64(header)+"."+b64(payload))
}

// edit replaces the one occurrence of old in s.
func edit(s, old, new string) string {
	if strings.Count(s, old) != 1 {
		panic("the test edits what is not there once: " + old)
	}
	return strings.Replace(s, old, new, 1)
}

func TestReservedClaim(t *testing.T) {
	for _, name := range []string{"roles", "perms", "actor_type", "ver", "groups", "entitlements", "", "issuer", "sub "} {
		if ReservedClaim(name) {
			t.Errorf("ReservedClaim(%q) = true, want false", name)
		}
	}
	names := []string{
		"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "auth_time", "acr", "amr", "azp",
		"nonce", "sid", "cnf", "act", "may_act", "tenant_id", "SUB", "Tenant_ID", "\u017fub",
	}
	claims := reflect.TypeFor[tokenClaims]()
	for i := range claims.NumField() {
		name, _, _ := strings.Cut(claims.Field(i).Tag.Get("json"), ",")
		names = append(names, name)
	}
	for _, name := range names {
		if !ReservedClaim(name) {
			t.Errorf("ReservedClaim(%q) = false, want true", name)
		}
	}
}

// A Signer's output is pinned to the byte; other services parse it.
func TestSignWritesThis(t *testing.T) {
	c := testClaims()
	c.NotBefore, c.AuthTime = issued, issued.Add(-time.Hour)
	c.TenantID, c.SessionID, c.AMR = "t-1", "s-1", []string{"pwd"}
	c.Extra = []byte(" { \"roles\" : [\"admin\"] }\n")
	token, err := testSigner(t).Sign(c)
	if err != nil {
		t.Fatal(err)
	}
	parts, err := split(token)
	if err != nil {
		t.Fatal(err)
	}
	const payload = `{"iss":"https://issuer.example","sub":"user-1","aud":"api","client_id":"app","jti":"id-1",` +
		`"iat":1800000000,"exp":1800000900,"nbf":1800000000,"auth_time":1799996400,` +
		`"tenant_id":"t-1","sid":"s-1","amr":["pwd"],"roles" : ["admin"] }`
	if got := string(parts.header); got != goodHeader {
		t.Errorf("header\n got %s\nwant %s", got, goodHeader)
	}
	if got := string(parts.payload); got != payload {
		t.Errorf("payload\n got %s\nwant %s", got, payload)
	}
}

func TestSignRefuses(t *testing.T) {
	extra := func(s string) func(*Claims) { return func(c *Claims) { c.Extra = []byte(s) } }
	for name, tc := range map[string]struct {
		change func(*Claims)
		want   string // part of the error
	}{
		"no issuer":              {func(c *Claims) { c.Issuer = "" }, "must not be empty"},
		"no subject":             {func(c *Claims) { c.Subject = "" }, "must not be empty"},
		"no audience":            {func(c *Claims) { c.Audience = "" }, "must not be empty"},
		"no client":              {func(c *Claims) { c.ClientID = "" }, "must not be empty"},
		"no id":                  {func(c *Claims) { c.ID = "" }, "must not be empty"},
		"no iat":                 {func(c *Claims) { c.IssuedAt = time.Time{} }, "exp must be after iat"},
		"no exp":                 {func(c *Claims) { c.ExpiresAt = time.Time{} }, "exp must be after iat"},
		"exp is iat":             {func(c *Claims) { c.ExpiresAt = c.IssuedAt.Add(999 * time.Millisecond) }, "exp must be after iat"},
		"iat before 1970":        {func(c *Claims) { c.IssuedAt = time.Unix(-1, 0) }, "before 1970"},
		"exp in the year 10000":  {func(c *Claims) { c.ExpiresAt = time.Unix(maxDate+1, 0) }, "after 9999"},
		"nbf before 1970":        {func(c *Claims) { c.NotBefore = time.Unix(-1, 0) }, "before 1970"},
		"auth_time after 9999":   {func(c *Claims) { c.AuthTime = time.Unix(maxDate+1, 0) }, "after 9999"},
		"invalid UTF-8":          {func(c *Claims) { c.Subject = "a\xff" }, "not valid Unicode"},
		"replacement character":  {func(c *Claims) { c.TenantID = "\uFFFD" }, "not valid Unicode"},
		"invalid UTF-8 in amr":   {func(c *Claims) { c.AMR = []string{"\xc3", "\xa9"} }, "not valid Unicode"},
		"17 amr":                 {func(c *Claims) { c.AMR = make([]string, 17) }, "amr is too long"},
		"over 16 KiB":            {func(c *Claims) { c.Subject = strings.Repeat("x", 12<<10) }, "16 KiB"},
		"extra null":             {extra(`null`), "not one JSON object"},
		"extra array":            {extra(`[]`), "not one JSON object"},
		"extra blank":            {extra(` `), "not one JSON object"},
		"extra and more":         {extra(`{"a":1},"sub":"root"`), "not one JSON object"},
		"extra two objects":      {extra(`{"a":1}{"b":2}`), "not one JSON object"},
		"extra open":             {extra(`{"a":1`), "not one JSON object"},
		"extra repeats":          {extra(`{"a":1,"a":2}`), "duplicate member"},
		"extra reserved":         {extra(`{"sub":"root"}`), "reserved"},
		"extra reserved escaped": {extra(`{"\u0073ub":"root"}`), "reserved"},
		"extra reserved folded":  {extra(`{"Sub":"root"}`), "reserved"},
		"extra reserved long s":  {extra("{\"\u017fid\":\"x\"}"), "reserved"},
		"extra reserved, absent": {extra(`{"sid":"s-2"}`), "reserved"},
		"extra number too large": {extra(`{"a":[{"b":1e999}]}`), "too large"},
		"extra text with NUL":    {extra(`{"a":["x\u0000"]}`), "NUL"},
		"extra name with NUL":    {extra(`{"\u0000":1}`), "NUL"},
	} {
		t.Run(name, func(t *testing.T) {
			c := testClaims()
			tc.change(&c)
			token, err := testSigner(t).Sign(c)
			if err == nil || !strings.Contains(err.Error(), tc.want) || token != "" {
				t.Errorf("Sign = %q, %v; want an error with %q", token, err, tc.want)
			}
		})
	}
}

func TestSignedVerifies(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*Claims)
		extra  string // as Verify returns it
	}{
		"the least":        {func(c *Claims) {}, ""},
		"everything":       {func(c *Claims) { c.NotBefore, c.AuthTime, c.TenantID, c.SessionID = issued, issued, "t", "s" }, ""},
		"amr":              {func(c *Claims) { c.AMR = []string{"pwd", "otp"} }, ""},
		"quotes":           {func(c *Claims) { c.Subject = "\"\\\n<&>\u2028é𝄞" }, ""},
		"extra empty":      {func(c *Claims) { c.Extra = []byte(` { } `) }, ""},
		"extra sorted":     {func(c *Claims) { c.Extra = []byte(`{"b": 1e99, "a": {"sub": [null]}}`) }, `{"a":{"sub":[null]},"b":1e99}`},
		"extra name, odd":  {func(c *Claims) { c.Extra = []byte(`{"\"": 1}`) }, `{"\"":1}`},
		"extra, no name":   {func(c *Claims) { c.Extra = []byte(`{"": 1}`) }, `{"":1}`},
		"exp in year 9999": {func(c *Claims) { c.ExpiresAt = time.Unix(maxDate, 0).UTC() }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			want := testClaims()
			tc.change(&want)
			token, err := testSigner(t).Sign(want)
			if err != nil {
				t.Fatal(err)
			}
			want.Extra = nil
			if tc.extra != "" {
				want.Extra = []byte(tc.extra)
			}
			got, err := testVerifier(t).VerifyAt(context.Background(), token, issued)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("\n got %+v, %v\nwant %+v", got, err, want)
			}
		})
	}
}

func TestNewSignerRefuses(t *testing.T) {
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	mixed := &rsa.PrivateKey{PublicKey: otherKey().PublicKey, D: testKey().D, Primes: testKey().Primes}
	for name, tc := range map[string]struct {
		kid string
		key *rsa.PrivateKey
	}{
		"no kid":           {"", testKey()},
		"kid of 129 bytes": {strings.Repeat("k", 129), testKey()},
		"kid with newline": {"k\n", testKey()},
		"kid not ASCII":    {"ké", testKey()},
		"no key":           {"k1", nil},
		"empty key":        {"k1", &rsa.PrivateKey{}},
		"1024 bits":        {"k1", small},
		"not a pair":       {"k1", mixed},
	} {
		if s, err := NewSigner(tc.kid, tc.key); err == nil {
			t.Errorf("%s: NewSigner = %v, want an error", name, s)
		}
	}
	s, err := NewSigner(`a"\<`, testKey())
	if err != nil {
		t.Fatal(err)
	}
	token, err := s.Sign(testClaims())
	if err != nil {
		t.Fatal(err)
	}
	set, err := NewKeySet(Key{s.KeyID(), s.Public()})
	if err != nil {
		t.Fatal(err)
	}
	v := NewVerifier("https://issuer.example", "api", set)
	if _, err := v.VerifyAt(context.Background(), token, issued); err != nil {
		t.Errorf("kid %q: %v", s.KeyID(), err)
	}
}

func BenchmarkSign(b *testing.B) {
	s, c := testSigner(b), testClaims()
	for b.Loop() {
		if _, err := s.Sign(c); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	v := testVerifier(b)
	token := forge(goodHeader, goodPayload)
	for b.Loop() {
		if _, err := v.VerifyAt(b.Context(), token, issued); err != nil {
			b.Fatal(err)
		}
	}
}
