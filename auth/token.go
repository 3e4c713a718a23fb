package auth

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
	"time"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/jwt"
)

// A refresh token is the prefix and, in base64url without padding,
//
//	session id (16) ‖ generation (8) ‖ family secret (32) ‖ step secret (32) ‖ CRC-32 (4)
//
// The family secret is the same for all tokens of a session, the step secret
// is new with each rotation. The row keeps SHA-256 of both: both have 256
// random bits, so a plain hash cannot be inverted and a copy of the database
// makes no token. Who knows the family secret but not the current step secret
// holds a spent token, whatever its age, and one row a session is enough to
// tell. The checksum is no secret; it keeps mangled tokens from the database.
type refreshToken struct {
	session    db.SessionID
	generation int64
	family     [32]byte
	step       [32]byte
}

const (
	refreshPrefix = "iar_" // for secret scanners
	refreshBytes  = 16 + 8 + 32 + 32
)

var errToken = errors.New("not a token of this kind")

// encodeToken writes a prefix, a body and its checksum in base64url.
func encodeToken(prefix string, body []byte) string {
	return prefix + base64.RawURLEncoding.EncodeToString(binary.BigEndian.AppendUint32(body, crc32.ChecksumIEEE(body)))
}

// decodeToken accepts exactly what encodeToken writes for a body of size bytes.
func decodeToken(prefix, s string, size int) ([]byte, error) {
	encoded, ok := strings.CutPrefix(s, prefix)
	if !ok || len(encoded) != base64.RawURLEncoding.EncodedLen(size+4) {
		return nil, errToken
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(b) != size+4 { // line breaks are skipped, so the length can differ
		return nil, errToken
	}
	body, sum := b[:size], b[size:]
	if binary.BigEndian.Uint32(sum) != crc32.ChecksumIEEE(body) {
		return nil, errToken
	}
	return body, nil
}

func newRefreshToken() refreshToken {
	t := refreshToken{session: db.NewSessionID()}
	rand.Read(t.family[:])
	rand.Read(t.step[:])
	return t
}

// String is the token as clients get it.
func (t refreshToken) String() string {
	b := make([]byte, 0, refreshBytes+4)
	id := t.session.Bytes()
	b = append(b, id[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(t.generation))
	b = append(b, t.family[:]...)
	b = append(b, t.step[:]...)
	return encodeToken(refreshPrefix, b)
}

// parseRefreshToken accepts exactly what String writes.
func parseRefreshToken(s string) (refreshToken, error) {
	body, err := decodeToken(refreshPrefix, s, refreshBytes)
	if err != nil {
		return refreshToken{}, err
	}
	generation := binary.BigEndian.Uint64(body[16:24])
	if generation >= 1<<62 {
		return refreshToken{}, errToken
	}
	t := refreshToken{session: db.SessionIDFromBytes([16]byte(body[:16])), generation: int64(generation)}
	copy(t.family[:], body[24:56])
	copy(t.step[:], body[56:88])
	return t, nil
}

// successor is the token after t. The seed is random; with the seed kept in
// the row, the successor can be made again from t and from nothing else.
func (t refreshToken) successor(seed []byte) refreshToken {
	mac := hmac.New(sha256.New, t.step[:])
	mac.Write([]byte("identity-auth refresh step\x00"))
	mac.Write(seed)
	next := t
	next.generation++
	copy(next.step[:], mac.Sum(nil))
	return next
}

// asNew is a session about to begin with t as its first token.
func (t refreshToken) asNew() db.NewSession {
	return db.NewSession{ID: t.session, FamilyHash: t.familyHash(), StepHash: t.stepHash()}
}

func (t refreshToken) familyHash() []byte { return sum256(t.family) }
func (t refreshToken) stepHash() []byte   { return sum256(t.step) }

func sum256(secret [32]byte) []byte {
	sum := sha256.Sum256(secret[:])
	return sum[:]
}

// tokenResponse is the answer of login and refresh (RFC 6749 5.1).
type tokenResponse struct {
	AccessToken      string `json:"access_token"`
	TokenType        string `json:"token_type"`
	ExpiresIn        int64  `json:"expires_in"`         // seconds
	ExpiresInSeconds int64  `json:"expires_in_seconds"` // the same, for clients of the first version
	RefreshToken     string `json:"refresh_token"`
	RefreshExpiresIn int64  `json:"refresh_expires_in"` // seconds
}

// issue signs an access token for a live session. It needs no database: the
// session was just written or read under its row's lock.
func (s *Server) issue(session db.Session, refresh refreshToken) (tokenResponse, error) {
	s.signing <- struct{}{}
	defer func() { <-s.signing }()
	now := time.Now()
	access, err := s.live.Load().keys.Signer.Sign(jwt.Claims{
		Issuer:    s.cfg.Issuer,
		Subject:   session.User.String(),
		Audience:  s.cfg.Audience,
		ClientID:  s.cfg.Audience,
		ID:        db.NewUUID(),
		IssuedAt:  now,
		ExpiresAt: now.Add(s.cfg.AccessTokenTTL),
		AuthTime:  session.AuthTime,
		TenantID:  session.Tenant.String(),
		SessionID: session.ID.String(),
		AMR:       []string{"pwd"}, // RFC 8176
		Extra:     session.Claims,
	})
	if err != nil {
		return tokenResponse{}, err
	}
	ttl := int64(s.cfg.AccessTokenTTL / time.Second)
	return tokenResponse{
		AccessToken: access, TokenType: "Bearer", ExpiresIn: ttl, ExpiresInSeconds: ttl,
		RefreshToken: refresh.String(), RefreshExpiresIn: max(0, int64(session.ExpiresIn/time.Second)),
	}, nil
}
