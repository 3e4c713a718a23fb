package db

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"strings"

	"github.com/jackc/pgx/v5/pgtype"
)

// uuid is any RFC 9562 UUID, whatever its version. It is embedded in the id
// types, which only their parsers and constructors can make.
type uuid [16]byte

var errUUID = errors.New("not a UUID")

// parseUUID accepts the 36-character form in any case, nothing else (no
// braces, no urn:uuid:, no bare hex).
func parseUUID(s string) (uuid, error) {
	var u uuid
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, errUUID
	}
	digits := s[0:8] + s[9:13] + s[14:18] + s[19:23] + s[24:36]
	if _, err := hex.Decode(u[:], []byte(digits)); err != nil {
		return u, errUUID
	}
	return u, nil
}

func newUUID() uuid {
	var u uuid
	rand.Read(u[:]) // never fails: crypto/rand stops the program instead
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// String is the 36-character form in lower case.
func (u uuid) String() string {
	h := hex.EncodeToString(u[:])
	return h[0:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:32]
}

// MarshalText makes String the form in JSON and logs.
func (u uuid) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// Bytes are the 16 bytes of the UUID.
func (u uuid) Bytes() [16]byte { return u }

// UUIDValue lets pgx send the id.
func (u uuid) UUIDValue() (pgtype.UUID, error) { return pgtype.UUID{Bytes: u, Valid: true}, nil }

// ScanUUID lets pgx read the id. NULL is an error: no column of ours that is
// read into an id may be NULL.
func (u *uuid) ScanUUID(v pgtype.UUID) error {
	if !v.Valid {
		return errUUID
	}
	*u = v.Bytes
	return nil
}

// TenantID names a tenant.
type TenantID struct{ uuid }

// UserID names a person within a tenant.
type UserID struct{ uuid }

// SessionID names a session; it is unique over all tenants.
type SessionID struct{ uuid }

// EventID names an event.
type EventID struct{ uuid }

// ParseTenantID accepts a UUID in its 36-character form, in any case.
func ParseTenantID(s string) (TenantID, error) {
	u, err := parseUUID(s)
	return TenantID{u}, err
}

// ParseUserID accepts a UUID in its 36-character form, in any case.
func ParseUserID(s string) (UserID, error) {
	u, err := parseUUID(s)
	return UserID{u}, err
}

// ParseSessionID accepts a UUID in its 36-character form, in any case.
func ParseSessionID(s string) (SessionID, error) {
	u, err := parseUUID(s)
	return SessionID{u}, err
}

// SessionIDFromBytes is for ids that travel inside refresh tokens.
func SessionIDFromBytes(b [16]byte) SessionID { return SessionID{b} }

// NewSessionID is a fresh random id.
func NewSessionID() SessionID { return SessionID{newUUID()} }

// NewUUID is a fresh random UUID (version 4) in text form.
func NewUUID() string { return newUUID().String() }

// ValidUUID tells whether s has the 36-character form.
func ValidUUID(s string) bool {
	_, err := parseUUID(s)
	return err == nil
}

// Email is an address in the form in which it is stored and compared: ASCII,
// lower case, one addr-spec of at most 254 bytes (RFC 5321 4.5.3.1, RFC 5322
// 3.4.1), dot-atom before the @ and a host name of two labels or more behind it.
type Email struct{ s string }

// String is the stored form.
func (e Email) String() string { return e.s }

var errEmail = errors.New("not an e-mail address")

// ParseEmail is strict: what it accepts can be registered. White space around
// the address is cut off and ASCII letters are lowered; nothing else is
// changed, so two addresses that differ otherwise stay two accounts. Quoted
// local parts, comments, address literals and non-ASCII are refused.
func ParseEmail(s string) (Email, error) {
	s = foldEmail(s)
	local, domain, ok := strings.Cut(s, "@")
	if !ok || len(s) > 254 || len(local) > 64 || !dotAtom(local) || !hostName(domain) {
		return Email{}, errEmail
	}
	return Email{s}, nil
}

// LookupEmail is for login: whatever is no address gives an Email that no
// account has, so that the answer and its time say nothing. The guard and the
// limits count by what was sent all the same.
func LookupEmail(s string) (email Email, sent string) {
	email, _ = ParseEmail(s)
	return email, foldEmail(s)
}

// foldEmail lowers ASCII letters only: no Unicode case folding may make two
// addresses one.
func foldEmail(s string) string {
	return strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + ('a' - 'A')
		}
		return r
	}, strings.Trim(s, " \t\r\n"))
}

func dotAtom(s string) bool {
	for _, atom := range strings.Split(s, ".") {
		if atom == "" {
			return false
		}
		for i := range len(atom) {
			c := atom[i]
			if !isLetterDigit(c) && strings.IndexByte("!#$%&'*+-/=?^_`{|}~", c) < 0 {
				return false
			}
		}
	}
	return true
}

// hostName accepts letters, digits and hyphens (RFC 1123 2.1). A top label of
// digits only would be an IPv4 address, not a name.
func hostName(s string) bool {
	labels := strings.Split(s, ".")
	if len(labels) < 2 || strings.Trim(labels[len(labels)-1], "0123456789") == "" {
		return false
	}
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			if !isLetterDigit(label[i]) && label[i] != '-' {
				return false
			}
		}
	}
	return true
}

func isLetterDigit(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9'
}
