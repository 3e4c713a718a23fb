package jwt

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
)

// Signer makes access tokens with one key. It is safe for concurrent use.
type Signer struct {
	kid    string
	key    *rsa.PrivateKey
	header string // of every token, encoded, with the dot after it
}

// NewSigner returns a Signer whose tokens name kid as their key. The key must
// not be modified afterwards.
func NewSigner(kid string, key *rsa.PrivateKey) (*Signer, error) {
	if err := CheckKeyID(kid); err != nil {
		return nil, err
	}
	if err := checkPrivateKey(key); err != nil {
		return nil, err
	}
	// RFC 9068 section 2.1. Of printable ASCII, %q makes a JSON string.
	header := fmt.Sprintf(`{"alg":%q,"typ":%q,"kid":%q}`, algorithm, tokenType, kid)
	return &Signer{kid, key, base64.RawURLEncoding.EncodeToString([]byte(header)) + "."}, nil
}

// KeyID is the kid of the tokens.
func (s *Signer) KeyID() string { return s.kid }

// Public is the key that verifies the tokens.
func (s *Signer) Public() *rsa.PublicKey { return &s.key.PublicKey }

// Sign returns the token of c, and an error when c is nothing that a Verifier
// of its issuer and audience would ever return: the caller has a mistake.
func (s *Signer) Sign(c Claims) (string, error) {
	payload, err := encodeClaims(c)
	if err != nil {
		return "", fmt.Errorf("jwt: cannot sign: %w", err)
	}
	b64 := base64.RawURLEncoding
	size := len(s.header) + b64.EncodedLen(len(payload)) + len(".") + b64.EncodedLen(s.key.Size())
	if size > maxToken {
		return "", errors.New("jwt: cannot sign: the token would exceed 16 KiB")
	}
	token := make([]byte, 0, size)
	token = append(token, s.header...)
	token = b64.AppendEncode(token, payload)
	digest := sha256.Sum256(token) // RFC 7515 section 5.1: over header "." payload
	// RSASSA-PKCS1-v1_5 (RFC 7518 section 3.3). crypto/rsa checks the result
	// with the public key, so a miscalculation cannot give the key away.
	signature, err := rsa.SignPKCS1v15(nil, s.key, crypto.SHA256, digest[:])
	if err != nil { // unreachable: NewSigner has checked the key
		return "", err
	}
	token = append(token, '.')
	token = b64.AppendEncode(token, signature)
	return string(token), nil
}

// tokenClaims are the members of a payload that Claims has a field for. Each
// of their names is reserved, so that Extra cannot repeat one.
type tokenClaims struct {
	Issuer    string   `json:"iss"`
	Subject   string   `json:"sub"`
	Audience  string   `json:"aud"`
	ClientID  string   `json:"client_id"`
	ID        string   `json:"jti"`
	IssuedAt  *int64   `json:"iat"`
	ExpiresAt *int64   `json:"exp"`
	NotBefore *int64   `json:"nbf,omitempty"`
	AuthTime  *int64   `json:"auth_time,omitempty"`
	TenantID  string   `json:"tenant_id,omitempty"`
	SessionID string   `json:"sid,omitempty"`
	AMR       []string `json:"amr,omitempty"`
}

// encodeClaims writes the payload of a token.
func encodeClaims(c Claims) ([]byte, error) {
	required := []string{c.Issuer, c.Subject, c.Audience, c.ClientID, c.ID}
	texts := append(append(required, c.TenantID, c.SessionID), c.AMR...)
	switch {
	case slices.Contains(required, ""):
		return nil, errors.New("iss, sub, aud, client_id and jti must not be empty")
	case !isText(strings.Join(texts, " ")):
		return nil, errors.New("a claim is not valid Unicode")
	case len(c.AMR) > maxList:
		return nil, errors.New("amr is too long")
	case c.IssuedAt.IsZero() || c.ExpiresAt.Unix() <= c.IssuedAt.Unix():
		return nil, errors.New("exp must be after iat")
	}
	for _, t := range []time.Time{c.IssuedAt, c.ExpiresAt, c.NotBefore, c.AuthTime} {
		if !t.IsZero() && (t.Unix() < 0 || t.Unix() > maxDate) {
			return nil, errors.New("a date is before 1970 or after 9999")
		}
	}
	payload, err := json.Marshal(tokenClaims{
		c.Issuer, c.Subject, c.Audience, c.ClientID, c.ID,
		seconds(c.IssuedAt), seconds(c.ExpiresAt), seconds(c.NotBefore), seconds(c.AuthTime),
		c.TenantID, c.SessionID, c.AMR,
	})
	if err != nil || len(c.Extra) == 0 { // err is nil: strings and integers
		return payload, err
	}
	if err := CheckExtra(c.Extra); err != nil {
		return nil, err
	}
	members := bytes.TrimSpace(bytes.TrimSpace(c.Extra)[1:]) // past the brace that opens it
	if members[0] == '}' {
		return payload, nil
	}
	payload[len(payload)-1] = ',' // for the closing brace; members brings its own
	return append(payload, members...), nil
}

// seconds is t as a NumericDate (RFC 7519 section 2), absent for the zero time.
func seconds(t time.Time) *int64 {
	if t.IsZero() {
		return nil
	}
	return new(t.Unix())
}

// CheckExtra tells why Sign would refuse extra as Claims.Extra, its size
// aside. Who stores claims calls it before storing them.
func CheckExtra(extra json.RawMessage) error {
	members, err := parseObject(extra)
	if err != nil {
		return fmt.Errorf("extra claims: %w", err)
	}
	for name := range members {
		if ReservedClaim(name) {
			return errors.New("extra claims: a member has a reserved name")
		}
	}
	return checkPlain(extra)
}

// checkPlain refuses what is valid JSON but what verifiers and stores in other
// languages stumble over: numbers beyond a float64, and NUL in text.
func checkPlain(extra json.RawMessage) error {
	dec := json.NewDecoder(bytes.NewReader(extra))
	dec.UseNumber()
	for {
		token, err := dec.Token()
		switch v := token.(type) {
		case json.Number:
			if _, err := v.Float64(); err != nil {
				return errors.New("extra claims: a number is too large")
			}
		case string:
			if strings.Contains(v, "\x00") {
				return errors.New("extra claims: a text has a NUL")
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil { // unreachable: parseObject has read it
			return err
		}
	}
}
