package auth

import (
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/7d-solutions/identity-auth/jwt"
)

// KeyRing is the JWT keys of one moment: one that signs, and all that are
// published and accepted. It is replaced whole, never changed.
type KeyRing struct {
	Signer *jwt.Signer
	Public *jwt.KeySet
	Roles  map[string]string // kid to current, previous or next
	JWKS   []byte            // the published document
	ETag   string            // strong validator of JWKS

	sealer resetSealer // derived from the private key
}

// newKeyRing builds the ring from the JWT_* variables. The names in its errors
// are the variables that are wrong.
func newKeyRing(pems map[string]string) (KeyRing, []error) {
	ring := KeyRing{Roles: map[string]string{}}
	var errs []error
	var keys []jwt.Key
	add := func(role, keyName, kidName string) (jwt.Key, bool) {
		pem, kid := pems[keyName], pems[kidName]
		if (pem == "") != (kid == "") && role != "current" { // a missing required variable is named already
			errs = append(errs, fmt.Errorf("%s, %s: set both or none", keyName, kidName))
		}
		var public *rsa.PublicKey
		var pemErr, kidErr error
		if pem != "" {
			if public, pemErr = jwt.ParsePublicKeyPEM(pemBytes(pem)); pemErr != nil {
				errs = append(errs, fmt.Errorf("%s: %w", keyName, pemErr))
			}
		}
		if kid != "" {
			if kidErr = jwt.CheckKeyID(kid); kidErr != nil {
				errs = append(errs, fmt.Errorf("%s: %w", kidName, kidErr))
			}
		}
		if pem == "" || kid == "" || pemErr != nil || kidErr != nil {
			return jwt.Key{}, false
		}
		key := jwt.Key{ID: kid, Public: public}
		if _, taken := ring.Roles[kid]; taken {
			errs = append(errs, fmt.Errorf("%s: names another key already", kidName))
			return jwt.Key{}, false
		}
		ring.Roles[kid] = role
		keys = append(keys, key)
		return key, true
	}
	current, ok := add("current", "JWT_PUBLIC_KEY_PEM", "JWT_KID")
	add("previous", "JWT_PREV_PUBLIC_KEY_PEM", "JWT_PREV_KID")
	add("next", "JWT_NEXT_PUBLIC_KEY_PEM", "JWT_NEXT_KID")

	if pem := pems["JWT_PRIVATE_KEY_PEM"]; pem != "" {
		private, err := jwt.ParsePrivateKeyPEM(pemBytes(pem))
		if err != nil {
			errs = append(errs, fmt.Errorf("JWT_PRIVATE_KEY_PEM: %w", err))
		} else if ok && !private.PublicKey.Equal(current.Public) {
			errs = append(errs, errors.New("JWT_PRIVATE_KEY_PEM, JWT_PUBLIC_KEY_PEM: not a pair"))
		} else if ok {
			if ring.Signer, err = jwt.NewSigner(current.ID, private); err != nil {
				errs = append(errs, fmt.Errorf("JWT_PRIVATE_KEY_PEM: %w", err))
			}
			ring.sealer = newResetSealer(private)
		}
	}
	if len(errs) > 0 || !ok {
		return KeyRing{}, errs
	}
	set, err := jwt.NewKeySet(keys...)
	if err != nil { // unreachable: each key was accepted alone and kids differ
		return KeyRing{}, []error{fmt.Errorf("JWT_KID: %w", err)}
	}
	ring.Public = set
	if ring.JWKS, err = json.Marshal(set); err != nil { // unreachable: integers and checked kids
		return KeyRing{}, []error{fmt.Errorf("JWT_KID: %w", err)}
	}
	sum := sha256.Sum256(ring.JWKS)
	ring.ETag = `"` + base64.RawURLEncoding.EncodeToString(sum[:16]) + `"`
	return ring, nil
}

// pemBytes lets a PEM value stand on one line with literal \n.
func pemBytes(v string) []byte { return []byte(strings.ReplaceAll(v, `\n`, "\n")) }

// succeeds tells whether the ring may follow old without a restart. A kid that
// named another key before would make verifiers that have cached the old set
// refuse good tokens.
func (r KeyRing) succeeds(old KeyRing) error {
	for _, was := range old.Public.Keys() {
		for _, is := range r.Public.Keys() {
			if is.ID == was.ID && !is.Public.Equal(was.Public) {
				return errors.New("JWT_KID: the key changed, its kid did not")
			}
		}
	}
	return nil
}
