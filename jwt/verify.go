package jwt

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	algorithm = "RS256"  // the only one there is (RFC 8725 section 3.1)
	tokenType = "at+jwt" // keeps ID tokens and other JWTs of the same issuer out (RFC 8725 section 3.11)
)

// Keys finds the public key of a key id: *KeySet and *RemoteKeySet. A key must
// be one that NewKeySet accepts. The error is ErrInvalid when there is no such
// key, ErrUnavailable when that could not be found out.
type Keys interface {
	Key(ctx context.Context, kid string) (*rsa.PublicKey, error)
}

// Verifier checks the access tokens of one issuer for one audience. It is safe
// for concurrent use.
type Verifier struct {
	issuer, audience string
	keys             Keys
	revoked          *RevocationList // nil: none
}

// NewVerifier returns a Verifier of tokens whose iss is issuer and whose aud is
// or contains audience, to the byte. An empty one of them accepts nothing.
func NewVerifier(issuer, audience string, keys Keys) *Verifier {
	return &Verifier{issuer: issuer, audience: audience, keys: keys}
}

// WithRevocations returns a Verifier that also refuses the tokens of sessions
// in l, and tokens without a session, which nobody could revoke.
func (v *Verifier) WithRevocations(l *RevocationList) *Verifier {
	w := *v
	w.revoked = l
	return &w
}

// Verify returns the claims of a token that is good now. Its error is
// ErrInvalid or ErrUnavailable.
func (v *Verifier) Verify(ctx context.Context, token string) (Claims, error) {
	payload, err := v.open(ctx, token)
	if err != nil {
		return Claims{}, err
	}
	return v.claims(payload, time.Now()) // after the key was fetched, which takes its time
}

// VerifyAt is Verify for another time than now. Revocations are those of now.
func (v *Verifier) VerifyAt(ctx context.Context, token string, now time.Time) (Claims, error) {
	payload, err := v.open(ctx, token)
	if err != nil {
		return Claims{}, err
	}
	return v.claims(payload, now)
}

// open returns the payload of a token whose signature is good. Nothing in the
// payload is looked at before that.
func (v *Verifier) open(ctx context.Context, token string) ([]byte, error) {
	t, err := split(token)
	if err != nil {
		return nil, err
	}
	kid, err := checkHeader(t.header)
	if err != nil {
		return nil, err
	}
	key, err := v.keys.Key(ctx, kid)
	if err != nil {
		return nil, err
	}
	if err := checkSignature(key, t); err != nil {
		return nil, err
	}
	return t.payload, nil
}

// parts are a token's decoded parts, and the text that the signature covers.
type parts struct {
	header, payload, signature []byte
	signed                     string
}

// split takes a compact JWS apart (RFC 7515 section 7.1). The size comes first:
// everything after it costs at most what 16 KiB cost.
func split(token string) (parts, error) {
	if len(token) > maxToken {
		return parts{}, invalidError("longer than 16 KiB")
	}
	header, rest, twoParts := strings.Cut(token, ".")
	payload, signature, threeParts := strings.Cut(rest, ".")
	if !twoParts || !threeParts || strings.Contains(signature, ".") { // five parts are a JWE
		return parts{}, invalidError("not three parts")
	}
	t := parts{signed: token[:len(header)+len(".")+len(payload)]}
	var headerOK, payloadOK, signatureOK bool
	t.header, headerOK = decodeBase64(header)
	t.payload, payloadOK = decodeBase64(payload)
	t.signature, signatureOK = decodeBase64(signature)
	if !headerOK || !payloadOK || !signatureOK {
		return parts{}, invalidError("not canonical base64url")
	}
	return t, nil
}

// decodeBase64 accepts the one encoding that RFC 7515 section 2 allows for some
// bytes. Go's decoder skips line breaks and stray bits at the end, which would
// let one signature stand under many spellings of a token.
func decodeBase64(s string) ([]byte, bool) {
	b, err := base64.RawURLEncoding.DecodeString(s)
	return b, err == nil && base64.RawURLEncoding.EncodeToString(b) == s
}

// foreignHeaders are the header parameters that no token of ours has. They
// bring a key along or point to one (RFC 8725 sections 2.9 and 3.10), compress
// or encrypt (section 3.6), or demand extensions, of which we know none (RFC
// 7515 section 4.1.11). Others are ignored, as RFC 7515 section 4 has it.
var foreignHeaders = []string{"crit", "jwk", "jku", "x5u", "x5c", "x5t", "x5t#S256", "zip", "enc"}

// checkHeader returns the key id of a JOSE header that RFC 9068 section 2.1
// and we allow.
func checkHeader(header []byte) (kid string, err error) {
	h, err := parseObject(header)
	if err != nil {
		return "", invalidError("header is not one strict JSON object")
	}
	if alg, _ := text(h["alg"]); alg != algorithm {
		return "", invalidError("alg is not RS256")
	}
	for _, name := range foreignHeaders {
		if _, present := h[name]; present {
			return "", invalidError("header has a parameter that is not allowed")
		}
	}
	// A kid that no set can contain must not make a RemoteKeySet fetch.
	kid, _ = text(h["kid"])
	if CheckKeyID(kid) != nil {
		return "", invalidError("kid is missing or malformed")
	}
	if typ, _ := text(h["typ"]); typ != tokenType {
		return "", invalidError("typ is not at+jwt")
	}
	return kid, nil
}

// checkSignature verifies RSASSA-PKCS1-v1_5 with SHA-256 (RFC 7518 section
// 3.3, RFC 8017 section 8.2.2). crypto/rsa builds the padding anew and compares
// it whole, it does not parse it, so there is one padding for a digest. The
// length is exact: with leading zeros a signature would have many spellings.
func checkSignature(key *rsa.PublicKey, t parts) error {
	digest := sha256.Sum256([]byte(t.signed))
	if len(t.signature) != key.Size() || rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], t.signature) != nil {
		return invalidError("wrong signature")
	}
	return nil
}

// claims reads a payload whose signature is good, and decides at now.
func (v *Verifier) claims(payload []byte, now time.Time) (Claims, error) {
	o, err := parseObject(payload)
	if err != nil {
		return Claims{}, invalidError("payload is not one strict JSON object")
	}
	r := claimReader{object: o}
	c := Claims{
		Issuer:    r.text("iss", required),
		Subject:   r.text("sub", required),
		Audience:  v.audience,
		ClientID:  r.text("client_id", required),
		ID:        r.text("jti", required),
		IssuedAt:  r.date("iat", required),
		ExpiresAt: r.date("exp", required),
		NotBefore: r.date("nbf", optional),
		AuthTime:  r.date("auth_time", optional),
		TenantID:  r.text("tenant_id", optional),
		SessionID: r.text("sid", optional),
		AMR:       r.list("amr", optional),
	}
	switch {
	case r.wrong != "":
		return Claims{}, invalidError(r.wrong + " is missing or malformed")
	case c.Issuer != v.issuer:
		return Claims{}, invalidError("other issuer")
	case !namesAudience(o["aud"], v.audience):
		return Claims{}, invalidError("other audience")
	case !c.ExpiresAt.After(c.IssuedAt):
		return Claims{}, invalidError("exp is not after iat")
	case !now.Before(c.ExpiresAt.Add(Leeway)): // on exp it is over (RFC 7519 section 4.1.4)
		return Claims{}, invalidError("expired")
	case c.IssuedAt.After(now.Add(Leeway)):
		return Claims{}, invalidError("issued in the future")
	case c.NotBefore.After(now.Add(Leeway)): // the zero time is not
		return Claims{}, invalidError("not valid yet")
	case v.revoked != nil && c.SessionID == "":
		return Claims{}, invalidError("no session")
	case v.revoked != nil && v.revoked.Revoked(c.SessionID):
		return Claims{}, invalidError("session revoked")
	}
	maps.DeleteFunc(o, func(name string, _ json.RawMessage) bool { return ReservedClaim(name) })
	if len(o) > 0 {
		if c.Extra, err = json.Marshal(o); err != nil { // unreachable: its values were parsed
			return Claims{}, invalidError("payload is not one strict JSON object")
		}
	}
	return c, nil
}

// namesAudience tells whether an aud claim is or lists audience (RFC 7519
// section 4.1.3). An empty audience is in none.
func namesAudience(aud json.RawMessage, audience string) bool {
	one, _ := text(aud)
	several, _ := textList(aud)
	return audience != "" && (one == audience || slices.Contains(several, audience))
}

// claimReader reads single claims, and remembers the name of one that is wrong.
type claimReader struct {
	object object
	wrong  string
}

// What RFC 9068 section 2.2 requires is required.
const required, optional = true, false

// text reads a string. An empty one identifies nobody.
func (r *claimReader) text(name string, required bool) string {
	raw, present := r.object[name]
	s, _ := text(raw)
	if s == "" && (present || required) {
		r.wrong = name
	}
	return s
}

// date reads a NumericDate (RFC 7519 section 2) in whole seconds up to the year
// 9999, in plain digits. Fractions and exponents are legal there, but no token
// of ours has them, and they are where parsers round differently.
func (r *claimReader) date(name string, required bool) time.Time {
	raw, present := r.object[name]
	if !present && !required {
		return time.Time{}
	}
	seconds, err := strconv.ParseUint(string(raw), 10, 64)
	if err != nil || seconds > maxDate {
		r.wrong = name
	}
	return time.Unix(int64(seconds), 0).UTC()
}

func (r *claimReader) list(name string, required bool) []string {
	raw, present := r.object[name]
	list, ok := textList(raw)
	if !ok && (present || required) {
		r.wrong = name
	}
	return list
}
