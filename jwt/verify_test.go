package jwt

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"reflect"
	"strings"
	"testing"
	"time"
)

// Every row is refused, for the reason given and no other: where the row is
// about the header or the payload, the signature over it is good.
func TestVerifyRefuses(t *testing.T) {
	good := forge(goodHeader, goodPayload)
	cut := strings.Split(good, ".")
	signed := cut[0] + "." + cut[1]
	header := func(old, new string) string { return forge(edit(goodHeader, old, new), goodPayload) }
	payload := func(old, new string) string { return forge(goodHeader, edit(goodPayload, old, new)) }
	withHeader := func(h, signature string) string { return b64(h) + "." + cut[1] + "." + signature }

	const (
		tooLong    = "longer than 16 KiB"
		threeParts = "not three parts"
		base64url  = "not canonical base64url"
		headerJSON = "header is not one strict JSON object"
		alg        = "alg is not RS256"
		parameter  = "header has a parameter that is not allowed"
		kid        = "kid is missing or malformed"
		typ        = "typ is not at+jwt"
		signature  = "wrong signature"
		claimsJSON = "payload is not one strict JSON object"
		malformed  = " is missing or malformed"
	)
	type row struct{ name, token, reason string }
	rows := []row{
		{"empty", "", threeParts},
		{"one part", "x", threeParts},
		{"two parts", signed, threeParts},
		{"four parts", good + ".", threeParts},
		{"five parts, a JWE", good + "." + cut[0] + "." + cut[1], threeParts},
		{"JSON serialization", `{"payload":"` + cut[1] + `","protected":"` + cut[0] + `","signature":"` + cut[2] + `"}`, threeParts},
		{"16 KiB and a byte", strings.Repeat("A", maxToken+1), tooLong},
		{"1 MiB of dots", strings.Repeat(".", 1<<20), tooLong},
		{"16 KiB of dots", strings.Repeat(".", maxToken), threeParts},
		{"no header", "." + cut[1] + "." + cut[2], headerJSON},
		{"no payload", cut[0] + ".." + cut[2], signature},
		{"no payload, well signed", sign(testKey(), cut[0]+"."), claimsJSON},
		{"no signature", signed + ".", signature},
		{"only dots", "..", headerJSON},

		{"header padded", sign(testKey(), cut[0]+"=."+cut[1]), base64url},
		{"payload padded", sign(testKey(), signed+"="), base64url},
		{"signature padded", good + "==", base64url},
		{"newline in the header", sign(testKey(), cut[0][:4]+"\n"+cut[0][4:]+"."+cut[1]), base64url},
		{"carriage return in the payload", sign(testKey(), cut[0]+"."+cut[1][:4]+"\r"+cut[1][4:]), base64url},
		{"newline in the signature", signed + "." + cut[2][:4] + "\n" + cut[2][4:], base64url},
		{"newline after it", good + "\n", base64url},
		{"space before it", " " + good, base64url},
		{"space after it", good + " ", base64url},
		{"standard alphabet", signed + "." + base64.RawStdEncoding.EncodeToString([]byte{0xfb, 0xff}), base64url},
		{"signature of an impossible length", good[:len(good)-1], base64url},
		{"other trailing bits", good[:len(good)-1] + nextSextet(good[len(good)-1]), base64url},
		{"NUL", good[:len(good)-1] + "\x00", base64url},
		{"not ASCII", "é" + good, base64url},

		{"header null", forge(`null`, goodPayload), headerJSON},
		{"header array", forge(`[`+goodHeader+`]`, goodPayload), headerJSON},
		{"header string", forge(`"alg"`, goodPayload), headerJSON},
		{"header twice", forge(goodHeader+goodHeader, goodPayload), headerJSON},
		{"text after the header", forge(goodHeader+`x`, goodPayload), headerJSON},
		{"comma after the last", header(`"k1"}`, `"k1",}`), headerJSON},
		{"byte order mark", forge("\uFEFF"+goodHeader, goodPayload), headerJSON},
		{"header not UTF-8", header(`"k1"}`, "\"k1\",\"x\":\"\xff\"}"), headerJSON},
		{"lone surrogate", header(`"k1"}`, `"k1","x":"\ud800"}`), headerJSON},
		{"alg twice", header(`{"alg"`, `{"alg":"none","alg"`), headerJSON},
		{"alg twice, escaped", header(`{"alg"`, `{"\u0061lg":"none","alg"`), headerJSON},
		{"kid twice", header(`"k1"}`, `"k1","kid":"k1"}`), headerJSON},
		{"deep duplicate", header(`"k1"}`, `"k1","x":[{"y":{"z":1,"z":1}}]}`), headerJSON},
		{"too deep", header(`"k1"}`, `"k1","x":`+strings.Repeat("[", 32)+strings.Repeat("]", 32)+`}`), headerJSON},

		{"alg none, unsigned", withHeader(edit(goodHeader, "RS256", "none"), ""), alg},
		{"alg none, signed", header("RS256", "none"), alg},
		{"alg None", withHeader(edit(goodHeader, "RS256", "None"), ""), alg},
		{"alg NONE", withHeader(edit(goodHeader, "RS256", "NONE"), ""), alg},
		{"alg nOnE", withHeader(edit(goodHeader, "RS256", "nOnE"), ""), alg},
		{"alg empty", header("RS256", ""), alg},
		{"alg missing", header(`"alg":"RS256",`, ""), alg},
		{"alg null", header(`"RS256"`, "null"), alg},
		{"alg number", header(`"RS256"`, "256"), alg},
		{"alg list", header(`"RS256"`, `["RS256"]`), alg},
		{"alg rs256", header("RS256", "rs256"), alg},
		{"alg Rs256", header("RS256", "Rs256"), alg},
		{"alg with a space", header("RS256", "RS256 "), alg},
		{"alg with a NUL", header("RS256", `RS256\u0000`), alg},
		{"ALG", header(`"alg"`, `"ALG"`), alg},
		{"alg RS384", signRS384(edit(goodHeader, "RS256", "RS384"), cut[1]), alg},
		{"alg RS512", header("RS256", "RS512"), alg},
		{"alg PS256", signPS256(edit(goodHeader, "RS256", "PS256"), cut[1]), alg},
		{"alg ES256", signES256(edit(goodHeader, "RS256", "ES256"), cut[1]), alg},
		{"alg EdDSA", header("RS256", "EdDSA"), alg},
		{"PS256 called RS256", signPS256(goodHeader, cut[1]), signature},
		{"RS384 called RS256", signRS384(goodHeader, cut[1]), signature},

		{"crit", header(`"k1"}`, `"k1","crit":["exp"],"exp":1}`), parameter},
		{"crit empty", header(`"k1"}`, `"k1","crit":[]}`), parameter},
		{"crit null", header(`"k1"}`, `"k1","crit":null}`), parameter},
		{"crit b64", header(`"k1"}`, `"k1","b64":false,"crit":["b64"]}`), parameter},
		{"jwk, signed with it", forgeWithJWK(cut[1]), parameter},
		{"jku", header(`"k1"}`, `"k1","jku":"https://evil.example/jwks.json"}`), parameter},
		{"x5u", header(`"k1"}`, `"k1","x5u":"https://evil.example/x.pem"}`), parameter},
		{"x5c", header(`"k1"}`, `"k1","x5c":["MIIB"]}`), parameter},
		{"x5t", header(`"k1"}`, `"k1","x5t":"AAAA"}`), parameter},
		{"x5t#S256", header(`"k1"}`, `"k1","x5t#S256":"AAAA"}`), parameter},
		{"zip", header(`"k1"}`, `"k1","zip":"DEF"}`), parameter},
		{"enc", header(`"k1"}`, `"k1","enc":"A128GCM"}`), parameter},
		{"jwk null", header(`"k1"}`, `"k1","jwk":null}`), parameter},

		{"kid missing", header(`,"kid":"k1"`, ""), kid},
		{"kid empty", header(`"k1"`, `""`), kid},
		{"kid number", header(`"k1"`, "1"), kid},
		{"kid null", header(`"k1"`, "null"), kid},
		{"kid list", header(`"k1"`, `["k1"]`), kid},
		{"kid with newline", header(`"k1"`, `"k1\n"`), kid},
		{"kid of 129 bytes", header(`"k1"`, `"`+strings.Repeat("k", 129)+`"`), kid},
		{"KID", header(`"kid"`, `"KID"`), kid},
		{"kid unknown", header(`"k1"`, `"k3"`), "unknown kid"},
		{"kid in other case", header(`"k1"`, `"K1"`), "unknown kid"},
		{"kid a path", header(`"k1"`, `"../../dev/null"`), "unknown kid"},

		{"typ missing", header(`"typ":"at+jwt",`, ""), typ},
		{"typ JWT", header("at+jwt", "JWT"), typ},
		{"typ AT+JWT", header("at+jwt", "AT+JWT"), typ},
		{"typ with its prefix", header("at+jwt", "application/at+jwt"), typ},
		{"typ of a logout token", header("at+jwt", "logout+jwt"), typ},
		{"typ null", header(`"at+jwt"`, "null"), typ},
		{"typ list", header(`"at+jwt"`, `["at+jwt"]`), typ},

		{"signed with another key of the set", sign(otherKey(), signed), signature},
		{"kid of another key of the set", forge(edit(goodHeader, "k1", "k2"), goodPayload), signature},
		{"payload exchanged", cut[0] + "." + b64(edit(goodPayload, "user-1", "user-2")) + "." + cut[2], signature},
		{"header exchanged", withHeader(edit(goodHeader, `"k1"`, `"k1" `), cut[2]), signature},
		{"signature of zeros", signed + "." + b64(make([]byte, 256)), signature},
		{"signature of ones", signed + "." + b64(bytes.Repeat([]byte{0xff}, 256)), signature},
		{"signature n", signed + "." + b64(testKey().N.Bytes()), signature},
		{"signature of one byte", signed + ".AA", signature},
		{"signature and a byte", signed + "." + b64(append(decode(cut[2]), 0)), signature},
		{"signature twice", signed + "." + b64(append(decode(cut[2]), decode(cut[2])...)), signature},

		{"payload null", forge(goodHeader, "null"), claimsJSON},
		{"payload array", forge(goodHeader, "["+goodPayload+"]"), claimsJSON},
		{"payload a token", forge(goodHeader, good), claimsJSON},
		{"payload twice", forge(goodHeader, goodPayload+goodPayload), claimsJSON},
		{"text after the payload", forge(goodHeader, goodPayload+"\x00"), claimsJSON},
		{"payload not UTF-8", payload("user-1", "user-\xff"), claimsJSON},
		{"sub half a pair", payload("user-1", `user-\udc00`), claimsJSON},
		{"sub with the replacement", payload("user-1", "user-\uFFFD"), claimsJSON},
		{"sub twice", payload(`"sub":`, `"sub":"root","sub":`), claimsJSON},
		{"sub twice, escaped", payload(`"sub":`, `"\u0073ub":"root","sub":`), claimsJSON},
		{"aud twice", payload(`"aud":`, `"aud":"other","aud":`), claimsJSON},
		{"an own claim twice", payload(`"sub":`, `"roles":[],"roles":["admin"],"sub":`), claimsJSON},
		{"deep duplicate in the payload", payload(`"sub":`, `"x":{"y":[{"z":1,"\u007a":2}]},"sub":`), claimsJSON},
		{"payload too deep", payload(`"sub":`, `"x":`+strings.Repeat(`{"":`, 32)+"1"+strings.Repeat("}", 32)+`,"sub":`), claimsJSON},

		{"iss other", payload("issuer.example", "evil.example"), "other issuer"},
		{"iss with a slash", payload("issuer.example", "issuer.example/"), "other issuer"},
		{"iss in other case", payload("https://issuer", "HTTPS://issuer"), "other issuer"},
		{"aud other", payload(`"aud":"api"`, `"aud":"web"`), "other audience"},
		{"aud longer", payload(`"aud":"api"`, `"aud":"api "`), "other audience"},
		{"aud missing", payload(`"aud":"api",`, ""), "other audience"},
		{"aud null", payload(`"aud":"api"`, `"aud":null`), "other audience"},
		{"aud number", payload(`"aud":"api"`, `"aud":1`), "other audience"},
		{"aud object", payload(`"aud":"api"`, `"aud":{"api":"api"}`), "other audience"},
		{"aud empty list", payload(`"aud":"api"`, `"aud":[]`), "other audience"},
		{"aud list of others", payload(`"aud":"api"`, `"aud":["web","apis"]`), "other audience"},
		{"aud list in a list", payload(`"aud":"api"`, `"aud":[["api"]]`), "other audience"},
		{"aud list with a number", payload(`"aud":"api"`, `"aud":["api",1]`), "other audience"},
		{"aud list of 17", payload(`"aud":"api"`, `"aud":["api"`+strings.Repeat(`,"x"`, 16)+`]`), "other audience"},
		{"amr text", payload(`"sub":`, `"amr":"pwd","sub":`), "amr" + malformed},
		{"amr null", payload(`"sub":`, `"amr":null,"sub":`), "amr" + malformed},
		{"amr numbers", payload(`"sub":`, `"amr":[1],"sub":`), "amr" + malformed},
		{"tenant_id empty", payload(`"sub":`, `"tenant_id":"","sub":`), "tenant_id" + malformed},
		{"tenant_id null", payload(`"sub":`, `"tenant_id":null,"sub":`), "tenant_id" + malformed},
		{"sid number", payload(`"sub":`, `"sid":7,"sub":`), "sid" + malformed},
		{"nbf text", payload(`"iat"`, `"nbf":"0","iat"`), "nbf" + malformed},
		{"nbf null", payload(`"iat"`, `"nbf":null,"iat"`), "nbf" + malformed},
		{"auth_time text", payload(`"iat"`, `"auth_time":"now","iat"`), "auth_time" + malformed},
		{"exp is iat", payload(`"exp":1800000900`, `"exp":1800000000`), "exp is not after iat"},
		{"exp before iat", payload(`"exp":1800000900`, `"exp":1799999999`), "exp is not after iat"},
	}
	for name, member := range map[string]string{
		"iss": `"iss":"https://issuer.example"`, "sub": `"sub":"user-1"`,
		"client_id": `"client_id":"app"`, "jti": `"jti":"id-1"`,
	} {
		for _, value := range []string{`""`, `null`, `1`, `true`, `["user-1"]`, `{}`} {
			rows = append(rows, row{name + " " + value, payload(member, `"`+name+`":`+value), name + malformed})
		}
		rows = append(rows,
			row{name + " missing", payload(member, `"x":1`), name + malformed},
			row{name + " in capitals", payload(`"`+name+`"`, `"`+strings.ToUpper(name)+`"`), name + malformed})
	}
	for name, member := range map[string]string{"iat": `"iat":1800000000`, "exp": `"exp":1800000900`} {
		for _, value := range []string{
			`null`, `true`, `"1800000900"`, `[1800000900]`, `{}`, `-1`, `-0`, `1800000900.0`, `1800000900.5`, `18e8`, `1e999`,
			`253402300800`, `9223372036854775808`, `18446744073709551616`, `1` + strings.Repeat("0", 4000),
		} {
			rows = append(rows, row{name + " " + value[:min(len(value), 24)], payload(member, `"`+name+`":`+value), name + malformed})
		}
		rows = append(rows,
			row{name + " missing", payload(member, `"x":1`), name + malformed},
			row{name + " in capitals", payload(`"`+name+`"`, `"`+strings.ToUpper(name)+`"`), name + malformed})
	}
	for form, secret := range publicKeyForms() {
		mac := hmac.New(sha256.New, secret)
		header := b64(edit(goodHeader, "RS256", "HS256"))
		mac.Write([]byte(header + "." + cut[1]))
		rows = append(rows, row{"alg HS256 keyed with the public key, " + form, header + "." + cut[1] + "." + b64(mac.Sum(nil)), alg})
		mac.Reset()
		mac.Write([]byte(signed))
		rows = append(rows, row{"the same called RS256, " + form, signed + "." + b64(mac.Sum(nil)), signature})
	}

	v := testVerifier(t)
	if _, err := v.VerifyAt(t.Context(), good, issued); err != nil {
		t.Fatalf("the token the rows are made from: %v", err)
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			c, err := v.VerifyAt(t.Context(), row.token, issued)
			if want := "jwt: invalid token: " + row.reason; err == nil || err.Error() != want {
				t.Errorf("got error %v\n  want %s", err, want)
			}
			if !errors.Is(err, ErrInvalid) || errors.Is(err, ErrUnavailable) {
				t.Errorf("%v is not ErrInvalid alone", err)
			}
			if !reflect.DeepEqual(c, Claims{}) {
				t.Errorf("claims came with the error: %+v", c)
			}
		})
	}
}

func TestVerifyAccepts(t *testing.T) {
	for name, token := range map[string]string{
		"good":                      forge(goodHeader, goodPayload),
		"white space in the JSON":   forge(" "+edit(goodHeader, `,"typ"`, "\n\t, \"typ\"")+"\r\n", "\n"+goodPayload+" "),
		"escaped names":             forge(edit(goodHeader, `"alg"`, `"\u0061lg"`), edit(goodPayload, `"sub"`, `"\u0073ub"`)),
		"members in another order":  forge(`{"kid":"k1","typ":"at+jwt","alg":"RS256"}`, goodPayload),
		"unknown header parameters": forge(edit(goodHeader, `"k1"}`, `"k1","cty":"x","x":{"jwk":1}}`), goodPayload),
		"aud a list of one":         forge(goodHeader, edit(goodPayload, `"aud":"api"`, `"aud":["api"]`)),
		"aud a list of 16":          forge(goodHeader, edit(goodPayload, `"aud":"api"`, `"aud":[`+strings.Repeat(`"x",`, 15)+`"api"]`)),
		"nesting of 32":             forge(goodHeader, edit(goodPayload, `"sub":`, `"x":`+strings.Repeat("[", 31)+strings.Repeat("]", 31)+`,"sub":`)),
		"reserved claims we ignore": forge(goodHeader, edit(goodPayload, `"sub":`, `"scope":"x","SUB":"y","nonce":1,"sub":`)),
		"the other key":             sign(otherKey(), b64(edit(goodHeader, "k1", "k2"))+"."+b64(goodPayload)),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := testVerifier(t).VerifyAt(t.Context(), token, issued)
			got.Extra = nil
			if want := testClaims(); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("\n got %+v, %v\nwant %+v", got, err, want)
			}
		})
	}
}

// Extra has an account's own claims, and nothing that could pass for another.
func TestVerifyReturnsExtra(t *testing.T) {
	token := forge(goodHeader, edit(goodPayload, `"sub":`,
		`"roles": ["a" , "\u0062"], "SUB":"x", "act":{"sub":"y"}, "sid":"s-1", "ver":1.0, "actor_type":null, "sub":`))
	c, err := testVerifier(t).VerifyAt(t.Context(), token, issued)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"actor_type":null,"roles":["a","\u0062"],"ver":1.0}`; string(c.Extra) != want {
		t.Errorf("Extra = %s, want %s", c.Extra, want)
	}
}

func TestVerifyTime(t *testing.T) {
	plain := forge(goodHeader, goodPayload)
	nbf := forge(goodHeader, edit(goodPayload, `"iat"`, `"nbf":1800000300,"iat"`))
	sub := forge(goodHeader, edit(goodPayload, `"iat":1800000000`, `"iat":0`)) // not what decides below
	for _, tc := range []struct {
		token  string
		after  time.Duration // iat
		reason string
	}{
		{plain, -Leeway - 1, "issued in the future"},
		{plain, -time.Hour, "issued in the future"},
		{plain, 15*time.Minute + Leeway, "expired"},
		{plain, 15*time.Minute + Leeway + 1, "expired"},
		{plain, 24 * time.Hour, "expired"},
		{nbf, 5*time.Minute - Leeway - 1, "not valid yet"},
		{nbf, 0, "not valid yet"},
		{nbf, 15*time.Minute + Leeway, "expired"},
		{plain, -Leeway, ""},
		{plain, 0, ""},
		{plain, 15 * time.Minute, ""},
		{plain, 15*time.Minute + Leeway - 1, ""},
		{nbf, 5*time.Minute - Leeway, ""},
		{sub, -time.Hour, ""},
	} {
		_, err := testVerifier(t).VerifyAt(t.Context(), tc.token, issued.Add(tc.after))
		got := strings.TrimPrefix(fmt.Sprint(err), "jwt: invalid token: ")
		if err == nil {
			got = ""
		}
		if got != tc.reason {
			t.Errorf("%v after iat: got %q, want %q", tc.after, got, tc.reason)
		}
	}
	if Leeway > 30*time.Second {
		t.Errorf("Leeway is %v, want 30s at most", Leeway)
	}
}

// Verify decides by the clock, whose now is neither 1970 nor 2027.
func TestVerifyNow(t *testing.T) {
	c := testClaims()
	for _, tc := range []struct {
		issuedAgo time.Duration
		ok        bool
	}{{-time.Minute, false}, {2 * time.Hour, false}, {0, true}, {30 * time.Minute, true}} {
		c.IssuedAt = time.Now().Add(-tc.issuedAgo)
		c.ExpiresAt = c.IssuedAt.Add(time.Hour)
		token, err := testSigner(t).Sign(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := testVerifier(t).Verify(t.Context(), token); (err == nil) != tc.ok {
			t.Errorf("issued %v ago, for an hour: %v", tc.issuedAgo, err)
		}
	}
}

func TestVerifierWithoutNamesAcceptsNothing(t *testing.T) {
	for name, tc := range map[string]struct{ issuer, audience, token string }{
		"no issuer":   {"", "api", forge(goodHeader, edit(goodPayload, `"https://issuer.example"`, `""`))},
		"no audience": {"https://issuer.example", "", forge(goodHeader, edit(goodPayload, `"aud":"api"`, `"aud":""`))},
		"no aud":      {"https://issuer.example", "", forge(goodHeader, edit(goodPayload, `"aud":"api",`, ``))},
		"blank list":  {"https://issuer.example", "", forge(goodHeader, edit(goodPayload, `"aud":"api"`, `"aud":[""]`))},
	} {
		v := NewVerifier(tc.issuer, tc.audience, testVerifier(t).keys)
		if c, err := v.VerifyAt(t.Context(), tc.token, issued); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %+v, %v; want ErrInvalid", name, c, err)
		}
	}
}

// Whatever single bit of a token changes, in whatever part, it is no token.
func TestVerifyRefusesBitFlips(t *testing.T) {
	v, token := testVerifier(t), forge(goodHeader, goodPayload)
	for i := range len(token) {
		for bit := range 8 {
			flipped := []byte(token)
			flipped[i] ^= 1 << bit
			if _, err := v.VerifyAt(t.Context(), string(flipped), issued); !errors.Is(err, ErrInvalid) {
				t.Fatalf("bit %d of byte %d flipped: %v, want ErrInvalid", bit, i, err)
			}
		}
	}
}

// A signature is a number below n in exactly as many bytes as n has. One with
// a leading zero has the most other spellings that a careless verifier takes.
func TestSignatureHasOneSpelling(t *testing.T) {
	var signed string
	var s []byte
	for i := 0; s == nil || s[0] != 0; i++ {
		token := forge(goodHeader, edit(goodPayload, "id-1", fmt.Sprint(i)))
		dot := strings.LastIndex(token, ".")
		signed, s = token[:dot], decode(token[dot+1:])
	}
	plusN := new(big.Int).SetBytes(s)
	plusN.Add(plusN, testKey().N)
	for name, tc := range map[string]struct {
		signature []byte
		ok        bool
	}{
		"zero stripped":   {s[1:], false},
		"zero added":      {append([]byte{0}, s...), false},
		"zero at the end": {append(s[:len(s):len(s)], 0), false},
		"plus n":          {plusN.FillBytes(make([]byte, 256)), false},
		"as signed":       {s, true},
	} {
		_, err := testVerifier(t).VerifyAt(t.Context(), signed+"."+b64(tc.signature), issued)
		if (err == nil) != tc.ok || err != nil && !strings.HasSuffix(err.Error(), "wrong signature") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is refused for its size or its shape costs no allocation worth naming,
// and asks for no key.
func TestVerifyRefusesCheaply(t *testing.T) {
	v := NewVerifier("https://issuer.example", "api", nil) // a look at the keys would panic
	for name, token := range map[string]string{
		"1 MiB of dots":    strings.Repeat(".", 1<<20),
		"1 MiB of letters": strings.Repeat("A", 1<<20),
		"16 KiB of dots":   strings.Repeat(".", maxToken),
		"16 KiB, no dot":   strings.Repeat("A", maxToken),
	} {
		allocations := testing.AllocsPerRun(10, func() {
			if _, err := v.Verify(context.Background(), token); !errors.Is(err, ErrInvalid) {
				t.Errorf("%s: %v, want ErrInvalid", name, err)
			}
		})
		if allocations > 1 {
			t.Errorf("%s: %v allocations, want 1 at most", name, allocations)
		}
	}
}

// keysFunc is a Keys that tests the order of Verify's steps.
type keysFunc func(kid string) (*rsa.PublicKey, error)

func (f keysFunc) Key(_ context.Context, kid string) (*rsa.PublicKey, error) { return f(kid) }

func TestVerifyPassesOnWhatKeysSays(t *testing.T) {
	outage := fmt.Errorf("%w: %w", ErrUnavailable, errors.New("connection refused"))
	v := NewVerifier("https://issuer.example", "api", keysFunc(func(string) (*rsa.PublicKey, error) { return nil, outage }))
	if _, err := v.Verify(t.Context(), forge(goodHeader, goodPayload)); err != outage || errors.Is(err, ErrInvalid) {
		t.Errorf("got %v, want the outage", err)
	}
	// With a wrong signature and a broken payload, the signature is what counts.
	if _, err := testVerifier(t).Verify(t.Context(), sign(otherKey(), b64(goodHeader)+"."+b64("{"))); fmt.Sprint(err) != "jwt: invalid token: wrong signature" {
		t.Errorf("got %v, want wrong signature", err)
	}
}

// RFC 7515 appendix A.2, to the byte: the signature is good, the token is not
// one of ours.
func TestRFC7515ExampleA2(t *testing.T) {
	parts, err := split(rfc7515A2)
	if err != nil {
		t.Fatal(err)
	}
	n := new(big.Int).SetBytes(decode(rfc7515A2Modulus))
	if err := checkSignature(&rsa.PublicKey{N: n, E: 65537}, parts); err != nil {
		t.Error(err)
	}
	parts.signature[255] ^= 1
	if err := checkSignature(&rsa.PublicKey{N: n, E: 65537}, parts); err == nil {
		t.Error("a changed signature was accepted")
	}
	if _, err := testVerifier(t).Verify(t.Context(), rfc7515A2); !errors.Is(err, ErrInvalid) {
		t.Errorf("got %v, want ErrInvalid", err)
	}
}

const rfc7515A2 = "eyJhbGciOiJSUzI1NiJ9" +
	".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ" +
	".cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CU" +
	"Ar7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_d" +
	"O--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0ig" +
	"cN_IoypGlUPQGe77Rw"

const rfc7515A2Modulus = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt" +
	"0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e" +
	"-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8" +
	"q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"

// Whatever header, payload and token come in, nothing panics; and claims that
// came out can be signed and come out the same.
func FuzzVerify(f *testing.F) {
	f.Add(goodHeader, goodPayload, forge(goodHeader, goodPayload))
	f.Add(`{"alg":"RS256"}`, `{"iss":"joe","exp":1300819380,"http://example.com/is_root":true}`, rfc7515A2)
	f.Add(edit(goodHeader, "RS256", "none"), `{"aud":["api"]}`, "..")
	f.Add(`{"alg":"RS256","crit":[],"\u0061lg":1}`, edit(goodPayload, `"sub"`, `"roles":[1e9,{"a":"\ud834\udd1e"}],"sub"`), "a.b.c")
	f.Add(``, edit(goodPayload, `"sub"`, `"amr":["pwd"],"tenant_id":"t","sid":"s","nbf":1,"auth_time":0,"sub"`), ".")
	for _, token := range rfc7515Tokens {
		f.Add(goodHeader, rfc7519Claims, token)
	}
	for _, header := range rfcHeaders {
		f.Add(header, rfc9068Claims, rfc7515A2)
	}
	v, s := testVerifier(f), testSigner(f)
	f.Fuzz(func(t *testing.T, header, payload, token string) {
		if c, err := v.VerifyAt(t.Context(), token, issued); err != nil && !errors.Is(err, ErrInvalid) {
			t.Fatalf("%v is not ErrInvalid (%+v)", err, c)
		}
		if kid, err := checkHeader([]byte(header)); err == nil && CheckKeyID(kid) != nil {
			t.Fatalf("accepted kid %q", kid)
		}
		c, err := v.claims([]byte(payload), issued)
		if err != nil {
			return
		}
		again, err := s.Sign(c)
		if err != nil {
			if strings.Contains(err.Error(), "16 KiB") { // escaping makes some payloads longer
				return
			}
			t.Fatalf("%+v verifies, but: %v", c, err)
		}
		if got, err := v.VerifyAt(t.Context(), again, issued); err != nil || !reflect.DeepEqual(got, c) {
			t.Fatalf("\n got %+v, %v\nwant %+v", got, err, c)
		}
	})
}

func decode(s string) []byte {
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// nextSextet is the character after c in the alphabet: the bits that differ
// are among those that the last character of 256 bytes does not need.
func nextSextet(c byte) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return string(alphabet[strings.IndexByte(alphabet, c)|1])
}

func signPS256(header, payload string) string {
	signed := b64(header) + "." + payload
	digest := sha256.Sum256([]byte(signed))
	s, err := rsa.SignPSS(rand.Reader, testKey(), crypto.SHA256, digest[:], nil)
	if err != nil {
		panic(err)
	}
	return signed + "." + b64(s)
}

func signRS384(header, payload string) string {
	signed := b64(header) + "." + payload
	digest := sha512.Sum384([]byte(signed))
	s, err := rsa.SignPKCS1v15(nil, testKey(), crypto.SHA384, digest[:])
	if err != nil {
		panic(err)
	}
	return signed + "." + b64(s)
}

func signES256(header, payload string) string {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	signed := b64(header) + "." + payload
	digest := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		panic(err)
	}
	return signed + "." + b64(append(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))...))
}

// forgeWithJWK signs with a key that the header brings along (CVE-2018-0114).
func forgeWithJWK(payload string) string {
	header := edit(goodHeader, `"k1"}`, `"k1","jwk":{"kty":"RSA","e":"AQAB","n":"`+b64(otherKey().N.Bytes())+`"}}`)
	return sign(otherKey(), b64(header)+"."+payload)
}

// publicKeyForms are the bytes that a confused verifier would take for a secret.
func publicKeyForms() map[string][]byte {
	key := &testKey().PublicKey
	pkix, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		panic(err)
	}
	pkixPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pkix})
	return map[string][]byte{
		"PEM":                   pkixPEM,
		"PEM without a newline": pkixPEM[:len(pkixPEM)-1],
		"PKCS#1 PEM":            pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: x509.MarshalPKCS1PublicKey(key)}),
		"DER":                   pkix,
		"modulus":               key.N.Bytes(),
	}
}
