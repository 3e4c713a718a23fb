package auth

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"

	"github.com/7d-solutions/identity-auth/db"
)

// A reset token is the prefix and 256 random bits with a checksum. The
// database keeps SHA-256 of the bits.
type resetToken [32]byte

const resetPrefix = "iap_"

func newResetToken() (t resetToken) {
	rand.Read(t[:])
	return t
}

func (t resetToken) String() string { return encodeToken(resetPrefix, t[:]) }

func (t resetToken) hash() []byte { return sum256(t) }

// parseResetToken accepts exactly what String writes.
func parseResetToken(s string) (t resetToken, err error) {
	body, err := decodeToken(resetPrefix, s, len(t))
	copy(t[:], body)
	return t, err
}

// resetSealer keeps a reset token out of the database, its log and its backups
// between the request and the mailer: AES-256-GCM under a key derived from the
// JWT private key, which the database never sees. The account is bound in, so
// a sealed token cannot be moved to another one's row.
type resetSealer struct{ aead cipher.AEAD }

func newResetSealer(key *rsa.PrivateKey) resetSealer {
	derived, err := hkdf.Key(sha256.New, key.D.Bytes(), nil, "identity-auth reset token sealing", 32)
	if err != nil { // unreachable: 32 bytes are within RFC 5869's bound
		panic(err)
	}
	block, err := aes.NewCipher(derived)
	if err != nil { // unreachable: the key has 32 bytes
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil { // unreachable: AES has the block size GCM needs
		panic(err)
	}
	return resetSealer{aead}
}

// resetSecret is what the mailer gets, as the data of an event of its own.
type resetSecret struct {
	UserID    db.UserID `json:"user_id"`
	Email     string    `json:"email"`
	Token     string    `json:"token"`
	ExpiresAt string    `json:"expires_at"`
}

// sealedSecret is what the outbox holds of it until it is relayed.
type sealedSecret struct {
	KeyID  string `json:"kid"`
	Sealed []byte `json:"sealed"`
}

func sealAccount(tenant db.TenantID, user db.UserID) []byte {
	return []byte(tenant.String() + user.String())
}

// sealFor seals the token for an account of the tenant under the current key.
func (s *Server) sealFor(tenant db.TenantID, token resetToken) db.SealFunc {
	return func(user db.UserID, email, expires string) (json.RawMessage, error) {
		l := s.live.Load()
		kid := l.keys.Signer.KeyID()
		plain, err := json.Marshal(resetSecret{user, email, token.String(), expires})
		if err != nil { // unreachable: strings
			return nil, err
		}
		return json.Marshal(sealedSecret{kid, l.sealers[kid].aead.Seal(nil, nil, plain, sealAccount(tenant, user))})
	}
}

var errUnseal = errors.New("no key to open the sealed secret")

// UnsealReset opens the data of an EventPasswordResetSecret for the relay. A
// key that this process has had is enough; a row that no one can open is
// deleted when its token is over.
func (s *Server) UnsealReset(row db.OutboxRow) (json.RawMessage, error) {
	var sealed sealedSecret
	if err := json.Unmarshal(row.Data, &sealed); err != nil {
		return nil, errUnseal
	}
	sealer, ok := s.live.Load().sealers[sealed.KeyID]
	if !ok {
		return nil, errUnseal
	}
	plain, err := sealer.aead.Open(nil, nil, sealed.Sealed, sealAccount(row.Tenant, row.User))
	if err != nil {
		return nil, errUnseal
	}
	return plain, nil
}
