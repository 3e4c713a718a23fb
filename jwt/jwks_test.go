package jwt

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/big"
	"strings"
	"testing"
)

// RFC 7517 appendix A.1, an EC key for encryption and an RSA key to sign.
const rfc7517A1 = `{"keys":
  [
    {"kty":"EC",
     "crv":"P-256",
     "x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
     "y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
     "use":"enc",
     "kid":"1"},

    {"kty":"RSA",
     "n": "` + rfc7517A1Modulus + `",
     "e":"AQAB",
     "alg":"RS256",
     "kid":"2011-04-29"}
  ]
}`

const rfc7517A1Modulus = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_B" +
	"JECPebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaS" +
	"qzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBni" +
	"Iqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"

func jwks(keys ...string) string { return `{"keys":[` + strings.Join(keys, ",") + `]}` }

// goodJWK is testKey as k1; the rows edit it.
func goodJWK() string {
	return `{"kty":"RSA","use":"sig","alg":"RS256","kid":"k1","n":"` + b64(testKey().N.Bytes()) + `","e":"AQAB"}`
}

func otherJWK() string {
	return `{"kty":"RSA","use":"sig","alg":"RS256","kid":"k2","n":"` + b64(otherKey().N.Bytes()) + `","e":"AQAB"}`
}

func TestParseJWKSRefuses(t *testing.T) {
	good := goodJWK()
	n := b64(testKey().N.Bytes())
	with := func(old, new string) string { return jwks(otherJWK(), edit(good, old, new)) }
	modulus := func(s string) string { return with(n, s) }
	bits := func(n uint) string { // an odd number of n bits
		x := new(big.Int).Lsh(big.NewInt(1), n-1)
		return b64(x.SetBit(x, 0, 1).Bytes())
	}
	even := new(big.Int).SetBit(testKey().N, 0, 0)

	const (
		notOne    = "not one JSON object"
		noArray   = "no array of keys"
		noUsable  = "a key set needs 1 to 64 RS256 keys"
		notObject = "a key is not an object"
		private   = "a private or symmetric key"
		malformed = "a malformed RSA key"
		keyID     = "a key id has"
		bitRange  = "the RSA key must have 2048 to 8192 bits"
		exponent  = "the RSA exponent must be"
	)
	for name, tc := range map[string]struct{ data, want string }{
		"empty":                   {``, notOne},
		"not JSON":                {`<html>`, notOne},
		"null":                    {`null`, notOne},
		"an array of keys":        {`[` + good + `]`, notOne},
		"two documents":           {jwks(good) + jwks(good), notOne},
		"cut off":                 {jwks(good)[:100], notOne},
		"1 MiB and a byte":        {jwks(good) + strings.Repeat(" ", maxJWKS), "larger than 1 MiB"},
		"too deep":                {`{"keys":` + strings.Repeat("[", 32) + strings.Repeat("]", 32) + `}`, "nested too deep"},
		"keys twice":              {`{"keys":[],"keys":[` + good + `]}`, "duplicate member"},
		"n twice":                 {with(`"kid"`, `"n":"AQ","kid"`), "duplicate member"},
		"not UTF-8":               {with(`"kid"`, "\"x\":\"\xff\",\"kid\""), "not valid Unicode"},
		"one key":                 {good, noArray},
		"no keys":                 {`{}`, noArray},
		"keys an object":          {`{"keys":{"k1":` + good + `}}`, noArray},
		"KEYS":                    {`{"KEYS":[` + good + `]}`, noArray},
		"keys null":               {`{"keys":null}`, noUsable},
		"keys empty":              {`{"keys":[]}`, noUsable},
		"a key null":              {jwks(good, `null`), notObject},
		"a key text":              {jwks(good, `"k1"`), notObject},
		"65 keys":                 {manyJWKs(65), noUsable},
		"only EC":                 {jwks(`{"kty":"EC","crv":"P-256","x":"AA","y":"AA","kid":"1","alg":"ES256"}`), noUsable},
		"only without alg":        {jwks(edit(good, `"alg":"RS256",`, ``)), noUsable},
		"only PS256":              {jwks(edit(good, `"RS256"`, `"PS256"`)), noUsable},
		"only alg null":           {jwks(edit(good, `"RS256"`, "null")), noUsable},
		"only for encryption":     {jwks(edit(good, `"sig"`, `"enc"`)), noUsable},
		"only use null":           {jwks(edit(good, `"sig"`, "null")), noUsable},
		"only to sign":            {jwks(edit(good, `"use":"sig"`, `"key_ops":["sign"]`)), noUsable},
		"only key_ops text":       {jwks(edit(good, `"use":"sig"`, `"key_ops":"verify"`)), noUsable},
		"only without kid":        {jwks(edit(good, `"kid":"k1",`, ``)), noUsable},
		"only rsa":                {jwks(edit(good, `"RSA"`, `"rsa"`)), noUsable},
		"private exponent":        {with(`"kid"`, `"d":"AQAB","kid"`), private},
		"a prime":                 {with(`"kid"`, `"p":"AQAB","kid"`), private},
		"private, null":           {with(`"kid"`, `"qi":null,"kid"`), private},
		"a secret beside it":      {jwks(good, `{"kty":"oct","alg":"HS256","kid":"s","k":"AAAA"}`), private},
		"a private EC key beside": {jwks(good, `{"kty":"EC","crv":"P-256","x":"AA","y":"AA","d":"AA","kid":"1"}`), private},
		"one kid twice":           {jwks(good, edit(otherJWK(), `"k2"`, `"k1"`)), "two keys have the same key id"},
		"a key twice":             {jwks(good, good), "two keys have the same key id"},
		"kid number":              {with(`"k1"`, "1"), keyID},
		"kid empty":               {with(`"k1"`, `""`), keyID},
		"kid with a newline":      {with(`"k1"`, `"k\n"`), keyID},
		"kid not ASCII":           {with(`"k1"`, `"ké"`), keyID},
		"kid of 129 bytes":        {with(`"k1"`, `"`+strings.Repeat("k", 129)+`"`), keyID},
		"n missing":               {with(`"n":"`+n+`",`, ``), malformed},
		"n a number":              {with(`"`+n+`"`, `12345`), malformed},
		"n empty":                 {modulus(""), malformed},
		"n zero":                  {modulus("AA"), malformed},
		"n with a leading zero":   {modulus(b64(append([]byte{0}, testKey().N.Bytes()...))), malformed},
		"n padded":                {modulus(n + "=="), malformed},
		"n with a newline":        {modulus(n[:8] + `\n` + n[8:]), malformed},
		"n with a space":          {modulus(n + " "), malformed},
		"n with other last bits":  {modulus(n[:len(n)-1] + nextSextet(n[len(n)-1])), malformed},
		"n in another alphabet":   {modulus("+/" + n[2:]), malformed},
		"n of 1025 bytes":         {modulus(bits(8193)), malformed},
		"n of 2047 bits":          {modulus(bits(2047)), bitRange},
		"n of 1024 bits":          {modulus(bits(1024)), bitRange},
		"n even":                  {modulus(b64(even.Bytes())), "the RSA modulus is even"},
		"e missing":               {with(`,"e":"AQAB"`, ``), malformed},
		"e a number":              {with(`"AQAB"`, `65537`), malformed},
		"e empty":                 {with(`"AQAB"`, `""`), malformed},
		"e zero":                  {with(`"AQAB"`, `"AA"`), malformed},
		"e with a leading zero":   {with(`"AQAB"`, `"AAEAAQ"`), malformed},
		"e of five bytes":         {with(`"AQAB"`, `"AQAAAAE"`), malformed},
		"e one":                   {with(`"AQAB"`, `"AQ"`), exponent},
		"e two":                   {with(`"AQAB"`, `"Ag"`), exponent},
		"e even":                  {with(`"AQAB"`, `"AQAA"`), exponent},
		"e above 2^31":            {with(`"AQAB"`, `"gAAAAQ"`), exponent},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := ParseJWKS([]byte(tc.data))
			if err == nil || !strings.Contains(err.Error(), tc.want) || set != nil {
				t.Errorf("ParseJWKS = %v, %v; want an error with %q", set, err, tc.want)
			}
		})
	}
}

func manyJWKs(n int) string {
	keys := make([]string, n)
	for i := range keys {
		keys[i] = edit(goodJWK(), `"k1"`, fmt.Sprintf(`"k%d"`, i))
	}
	return jwks(keys...)
}

func TestParseJWKSAccepts(t *testing.T) {
	good := goodJWK()
	for name, tc := range map[string]struct{ data, kids string }{
		"one key":              {jwks(good), "k1"},
		"in their order":       {jwks(otherJWK(), good), "k2 k1"},
		"64 keys":              {manyJWKs(64), ""},
		"no use":               {jwks(edit(good, `"use":"sig",`, ``)), "k1"},
		"to verify":            {jwks(edit(good, `"use":"sig"`, `"key_ops":["verify"]`)), "k1"},
		"more members":         {jwks(edit(good, `"use"`, `"x5c":["MIIB"],"x":{"y":1},"use"`)), "k1"},
		"e 3":                  {jwks(edit(good, `"AQAB"`, `"Aw"`)), "k1"},
		"e 2^31-1":             {jwks(edit(good, `"AQAB"`, `"f____w"`)), "k1"},
		"up to 1 MiB":          {jwks(good) + strings.Repeat(" ", maxJWKS-len(jwks(good))), "k1"},
		"EC beside it":         {jwks(`{"kty":"EC","kid":"k1"}`, good), "k1"},
		"a nameless key":       {jwks(edit(good, `"kid":"k1",`, ``), good), "k1"},
		"a key of the future":  {jwks(`{"kty":"AKP","alg":"ML-DSA-44","pub":"AA","kid":"f"}`, good), "k1"},
		"RFC 7517 section A.1": {rfc7517A1, "2011-04-29"},
	} {
		t.Run(name, func(t *testing.T) {
			set, err := ParseJWKS([]byte(tc.data))
			if err != nil {
				t.Fatal(err)
			}
			var kids []string
			for _, k := range set.Keys() {
				kids = append(kids, k.ID)
			}
			if got := strings.Join(kids, " "); tc.kids != "" && got != tc.kids {
				t.Errorf("kids = %s, want %s", got, tc.kids)
			}
		})
	}
}

// RFC 7638 section 3.1 gives the thumbprint of the RSA key in RFC 7517: that
// pins down modulus, exponent and how both are written.
func TestRFC7638Thumbprint(t *testing.T) {
	set, err := ParseJWKS([]byte(rfc7517A1))
	if err != nil {
		t.Fatal(err)
	}
	doc, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"keys":[{"kty":"RSA","use":"sig","alg":"RS256","kid":"2011-04-29","n":"` + rfc7517A1Modulus + `","e":"AQAB"}]}`
	if string(doc) != want {
		t.Errorf("\n got %s\nwant %s", doc, want)
	}
	thumbprint := sha256.Sum256([]byte(`{"e":"AQAB","kty":"RSA","n":"` + rfc7517A1Modulus + `"}`))
	if got := b64(thumbprint[:]); got != "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs" {
		t.Errorf("thumbprint = %s: the modulus above is not that of the RFC", got)
	}
}

func TestNewKeySetRefuses(t *testing.T) {
	good := Key{"k1", &testKey().PublicKey}
	odd := func(bits uint) *big.Int { return new(big.Int).SetBit(new(big.Int).Lsh(big.NewInt(1), bits-1), 0, 1) }
	for name, keys := range map[string][]Key{
		"no key":        {},
		"65 keys":       make([]Key, 65),
		"nil":           {good, {"k2", nil}},
		"no modulus":    {{"k1", &rsa.PublicKey{E: 65537}}},
		"negative":      {{"k1", &rsa.PublicKey{N: new(big.Int).Neg(testKey().N), E: 65537}}},
		"2047 bits":     {{"k1", &rsa.PublicKey{N: odd(2047), E: 65537}}},
		"8193 bits":     {{"k1", &rsa.PublicKey{N: odd(8193), E: 65537}}},
		"even":          {{"k1", &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537}}},
		"e 1":           {{"k1", &rsa.PublicKey{N: testKey().N, E: 1}}},
		"e -1":          {{"k1", &rsa.PublicKey{N: testKey().N, E: -1}}},
		"no kid":        {{"", good.Public}},
		"kid with NUL":  {{"k\x00", good.Public}},
		"kid with DEL":  {{"k\x7f", good.Public}},
		"one kid twice": {good, {"k1", &otherKey().PublicKey}},
	} {
		if set, err := NewKeySet(keys...); err == nil {
			t.Errorf("%s: NewKeySet = %v, want an error", name, set)
		}
	}
}

func TestKeySetIsImmutable(t *testing.T) {
	keys := []Key{{"k1", &testKey().PublicKey}, {"k2", &otherKey().PublicKey}}
	set, err := NewKeySet(keys...)
	if err != nil {
		t.Fatal(err)
	}
	keys[0].ID = "other"
	set.Keys()[1].ID = "other"
	if got := set.Keys(); got[0].ID != "k1" || got[1].ID != "k2" {
		t.Errorf("Keys() = %v, want k1 and k2", got)
	}
}

// What is accepted has keys, and says the same when it is written and read again.
func FuzzParseJWKS(f *testing.F) {
	f.Add([]byte(rfc7517A1))
	f.Add([]byte(rfc7517A3))
	f.Add([]byte(rfc7517EC))
	f.Add([]byte(jwks(goodJWK(), otherJWK())))
	f.Add([]byte(jwks(edit(goodJWK(), `"use":"sig"`, `"key_ops":["verify"]`))))
	f.Add([]byte(jwks(edit(goodJWK(), `"use"`, `"d":"AQAB","use"`))))
	f.Add([]byte(`{"keys":[{"kty":"EC"},null,1,[{}]]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := ParseJWKS(data)
		if err != nil {
			return
		}
		doc, err := json.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseJWKS(doc)
		if err != nil {
			t.Fatalf("%s: %v", doc, err)
		}
		keys, want := again.Keys(), set.Keys()
		if len(keys) != len(want) || len(keys) == 0 {
			t.Fatalf("%d keys, then %d", len(want), len(keys))
		}
		for i := range keys {
			if keys[i].ID != want[i].ID || !keys[i].Public.Equal(want[i].Public) {
				t.Fatalf("key %d: got %v, want %v", i, keys[i], want[i])
			}
			// A key that was accepted verifies without trouble, though not this.
			_ = rsa.VerifyPKCS1v15(keys[i].Public, 0, nil, make([]byte, keys[i].Public.Size()))
		}
	})
}

// The JWKS of a key of any legal size is read back.
func TestKeySizes(t *testing.T) {
	for _, bits := range []int{2048, 2056, 3072} {
		key, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		s, err := NewSigner("k", key)
		if err != nil {
			t.Fatal(err)
		}
		token, err := s.Sign(testClaims())
		if err != nil {
			t.Fatal(err)
		}
		set, err := NewKeySet(Key{"k", s.Public()})
		if err != nil {
			t.Fatal(err)
		}
		doc, err := json.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		if set, err = ParseJWKS(doc); err != nil {
			t.Fatal(err)
		}
		if _, err := NewVerifier("https://issuer.example", "api", set).VerifyAt(t.Context(), token, issued); err != nil {
			t.Errorf("%d bits: %v", bits, err)
		}
	}
}
