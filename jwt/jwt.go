// Package jwt signs and verifies the access tokens of identity-auth: RS256
// JWTs after RFC 9068, by the rules of RFC 8725. It serves the issuer itself
// and Go resource servers, and needs the standard library only.
//
// It guarantees:
//   - Verify returns Claims only of a token that a known key has signed, whose
//     type is at+jwt, that names this issuer and this audience, that is within
//     its time and, with WithRevocations, whose session is not known to be
//     revoked. A caller that gets an error gets no claims.
//   - The algorithm is the verifier's choice, never the token's: a key is used
//     for RS256 and nothing else (RFC 8725 section 3.1), and no key, URL or
//     certificate out of a token is ever looked at.
//   - A token is read in one way only. Whatever two parsers could disagree
//     about (repeated members, stray base64 bits, text that is not Unicode) is
//     refused, so no one downstream sees other claims than Verify did.
//   - Work is bounded: 16 KiB a token before anything is decoded, 1 MiB a key
//     set, one fetch of it at a time. No input makes it panic.
//   - No error contains any part of a token or a private key.
//
// It trusts the keys it is given, the host behind a JWKS URL as far as TLS
// vouches for it, the clock, and the feed of revocation events.
//
// It leaves to the caller: who may call NewSigner, what a subject may do, and
// the status code (ErrInvalid is a 401, ErrUnavailable a 503).
package jwt

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"
)

// Leeway is how far the clocks of issuer and verifier may differ: a token is
// accepted until so long after exp, and from so long before iat and nbf.
const Leeway = 30 * time.Second

const (
	maxToken = 16 << 10     // bytes of a token, made or accepted
	maxDate  = 253402300799 // the last second of the year 9999, which time.Time and RFC 3339 still write
)

// ErrInvalid is the kind of every error that says: this token is not good. The
// text adds one of a fixed set of reasons.
var ErrInvalid = errors.New("jwt: invalid token")

// ErrUnavailable is the kind of every error that says: whether the token is
// good could not be found out, because its key could not be fetched.
var ErrUnavailable = errors.New("jwt: key not available")

// invalidError is a reason of ErrInvalid, made of constants: tokens are bearer
// secrets, and error texts end in logs.
type invalidError string

func (e invalidError) Error() string        { return "jwt: invalid token: " + string(e) }
func (e invalidError) Is(target error) bool { return target == ErrInvalid }

// Claims are the contents of an access token. Times count in whole seconds;
// Sign cuts off what is below.
type Claims struct {
	Issuer   string // iss
	Subject  string // sub
	Audience string // aud; of several, the verifier's own
	ClientID string // client_id (RFC 9068 section 2.2)
	ID       string // jti

	IssuedAt  time.Time // iat
	ExpiresAt time.Time // exp
	NotBefore time.Time // nbf; zero: absent
	AuthTime  time.Time // auth_time, of the login and not of the refresh; zero: absent

	TenantID  string   // tenant_id; empty: absent
	SessionID string   // sid; empty: absent
	AMR       []string // amr (RFC 8176)

	// Extra is nil or one JSON object whose members stand at the token's top
	// level beside those above: an account's roles, for one. Verify returns it
	// compact, its members sorted by name.
	Extra json.RawMessage
}

// reserved are the names that have a meaning to someone who decides by the
// token, and so are never an account's own claims: RFC 7519 section 4.1,
// RFC 9068 section 2.2, OpenID Connect, proof of possession (RFC 7800),
// delegation (RFC 8693) and our own. Authorization attributes such as roles
// and groups (RFC 9068 section 2.2.3.1) are not among them.
var reserved = []string{
	"iss", "sub", "aud", "exp", "nbf", "iat", "jti",
	"client_id", "scope", "auth_time", "acr", "amr",
	"azp", "nonce", "sid", "at_hash", "c_hash",
	"cnf", "act", "may_act",
	"tenant_id",
}

// ReservedClaim tells whether name cannot be a member of Claims.Extra. Case
// does not matter: decoders that fold it, such as encoding/json, would read
// "SUB" as sub. EqualFold folds as they do, "ſub" included.
func ReservedClaim(name string) bool {
	return slices.ContainsFunc(reserved, func(r string) bool { return strings.EqualFold(r, name) })
}
