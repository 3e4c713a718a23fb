package jwt

import (
	"context"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

const (
	maxJWKS  = 1 << 20 // bytes of a JWKS document
	maxKeys  = 64      // keys of a set
	maxKeyID = 128     // bytes of a kid
)

// Key is a public key and the kid that tokens name it by.
type Key struct {
	ID     string
	Public *rsa.PublicKey
}

// KeySet is the public keys of an issuer. It is immutable, as long as nobody
// modifies the keys it was made of.
type KeySet struct {
	keys []Key // as few as one can search in a row
}

// NewKeySet returns the set of one or more keys with different ids. Their order
// is kept.
func NewKeySet(keys ...Key) (*KeySet, error) {
	if len(keys) == 0 || len(keys) > maxKeys {
		return nil, errors.New("a key set needs 1 to 64 RS256 keys")
	}
	for i, k := range keys {
		if err := CheckKeyID(k.ID); err != nil {
			return nil, err
		}
		if err := checkPublicKey(k.Public); err != nil {
			return nil, err
		}
		// Which of two keys is meant would be for each verifier to guess.
		if slices.ContainsFunc(keys[:i], func(other Key) bool { return other.ID == k.ID }) {
			return nil, errors.New("two keys have the same key id")
		}
	}
	return &KeySet{slices.Clone(keys)}, nil
}

// CheckKeyID refuses ids that logs, headers or metric labels could choke on.
func CheckKeyID(kid string) error {
	odd := func(c rune) bool { return c < ' ' || c > '~' }
	if kid == "" || len(kid) > maxKeyID || strings.ContainsFunc(kid, odd) {
		return errors.New("a key id has 1 to 128 printable ASCII characters")
	}
	return nil
}

// Keys returns the keys in their order. They must not be modified.
func (s *KeySet) Keys() []Key { return slices.Clone(s.keys) }

// Key returns the key that kid names. It implements Keys.
func (s *KeySet) Key(_ context.Context, kid string) (*rsa.PublicKey, error) {
	if key := s.find(kid); key != nil {
		return key, nil
	}
	return nil, errUnknownKey
}

const errUnknownKey = invalidError("unknown kid")

// find returns nil when the set, which may be nil, does not have the key.
func (s *KeySet) find(kid string) *rsa.PublicKey {
	if s != nil {
		for _, k := range s.keys {
			if k.ID == kid {
				return k.Public
			}
		}
	}
	return nil
}

// jwk is a public RSA key as RFC 7517 section 4 and RFC 7518 section 6.3.1
// write it.
type jwk struct {
	Type      string `json:"kty"`
	Use       string `json:"use"`
	Algorithm string `json:"alg"`
	ID        string `json:"kid"`
	N         string `json:"n"`
	E         string `json:"e"`
}

// MarshalJSON writes the set as a JWKS document (RFC 7517 section 5). The same
// keys in the same order make the same bytes.
func (s *KeySet) MarshalJSON() ([]byte, error) {
	doc := struct {
		Keys []jwk `json:"keys"`
	}{make([]jwk, 0, len(s.keys))}
	for _, k := range s.keys {
		doc.Keys = append(doc.Keys, jwk{
			Type: "RSA", Use: "sig", Algorithm: algorithm, ID: k.ID,
			N: base64.RawURLEncoding.EncodeToString(k.Public.N.Bytes()),
			E: base64.RawURLEncoding.EncodeToString(big.NewInt(int64(k.Public.E)).Bytes()),
		})
	}
	return json.Marshal(doc)
}

// ParseJWKS returns the keys of a JWKS document that verify RS256 tokens. It
// passes over keys for something else, and refuses a document with no usable
// key, or with anything in it that its issuer cannot have meant.
func ParseJWKS(data []byte) (*KeySet, error) {
	if len(data) > maxJWKS {
		return nil, errors.New("JWKS: larger than 1 MiB")
	}
	doc, err := parseObject(data)
	if err != nil {
		return nil, fmt.Errorf("JWKS: %w", err)
	}
	var entries []json.RawMessage
	if json.Unmarshal(doc["keys"], &entries) != nil { // absent, or no array
		return nil, errors.New("JWKS: no array of keys")
	}
	var keys []Key
	for _, entry := range entries {
		key, usable, err := parseJWK(entry)
		if err != nil {
			return nil, fmt.Errorf("JWKS: %w", err)
		}
		if usable {
			keys = append(keys, key)
		}
	}
	set, err := NewKeySet(keys...)
	if err != nil {
		return nil, fmt.Errorf("JWKS: %w", err)
	}
	return set, nil
}

// parseJWK reads one key of a document that parseObject accepts. A key without
// an alg is not usable: a key is for one algorithm (RFC 8725 section 3.1).
func parseJWK(entry json.RawMessage) (key Key, usable bool, err error) {
	var o object
	if json.Unmarshal(entry, &o) != nil || o == nil {
		return Key{}, false, errors.New("a key is not an object")
	}
	// RFC 7518 sections 6.2.2, 6.3.2 and 6.4: everyone who can read the
	// document can sign with such a key, and its publisher is not in control.
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} {
		if _, present := o[name]; present {
			return Key{}, false, errors.New("a private or symmetric key")
		}
	}
	is := func(name, want string) bool { s, _ := text(o[name]); return s == want }
	absent := func(name string) bool { _, present := o[name]; return !present }
	ops, _ := textList(o["key_ops"])
	switch {
	case !is("kty", "RSA") || !is("alg", algorithm),
		!is("use", "sig") && !absent("use"),
		!slices.Contains(ops, "verify") && !absent("key_ops"),
		absent("kid"): // no token can name it
		return Key{}, false, nil
	}
	n, okN := parseUint(o["n"], maxBits/8)
	e, okE := parseUint(o["e"], 4)
	if !okN || !okE {
		return Key{}, false, errors.New("a malformed RSA key")
	}
	kid, _ := text(o["kid"]) // NewKeySet refuses what is no string
	return Key{kid, &rsa.PublicKey{N: n, E: int(e.Int64())}}, true, nil
}

// parseUint reads a Base64urlUInt of at most size bytes (RFC 7518 section 2),
// which has no leading zero bytes.
func parseUint(raw json.RawMessage, size int) (*big.Int, bool) {
	s, _ := text(raw)
	b, ok := decodeBase64(s)
	if !ok || len(b) == 0 || len(b) > size || b[0] == 0 {
		return nil, false
	}
	return new(big.Int).SetBytes(b), true
}
