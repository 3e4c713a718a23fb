package auth

import (
	"crypto/pbkdf2"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"strings"

	"golang.org/x/crypto/argon2"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/crypto/scrypt"
)

// Stored password hashes. New ones are argon2id PHC strings; imported ones may
// be of these forms, and are replaced at the next good login:
//
//	$argon2id$v=19$m=M,t=T,p=P$salt$hash     $argon2i$v=19$...
//	$2a$, $2b$, $2y$                         bcrypt
//	$scrypt$ln=L,r=R,p=P$salt$hash           PHC, passlib
//	scrypt:N:R:P$salt$hex                    Werkzeug
//	$pbkdf2-sha256$i=I$salt$hash             PHC; also -sha512
//	$pbkdf2-sha256$I$salt$hash               passlib; also -sha512
//	pbkdf2_sha256$I$salt$hash                Django; also _sha512
//	pbkdf2:sha256:I$salt$hex                 Werkzeug; also sha512
//
// Each has a ceiling of cost, so that an imported hash cannot eat the host:
// four times today's memory, and the iterations below.
const (
	saltBytes = 16 // RFC 9106 3.1
	hashBytes = 32

	maxArgonWork        = 8 // times memory x iterations of today
	maxBcryptCost       = 14
	maxPBKDF2Iterations = 5_000_000
	maxScryptWork       = 1 << 23 // N x r x p
)

// Errors of parseHash: the stored hash cannot be checked. The answer to the
// client is that of a wrong password.
var (
	errHashForm = errors.New("password hash is of no known form, or not canonical")
	errHashCost = errors.New("password hash asks for too much memory or time")
)

// storedHash is a hash that can be checked.
type storedHash struct {
	params  Argon2Params // of argon2id; zero for other algorithms
	matches func(password string) bool
}

// derived is a storedHash that compares a derived key in constant time.
func derived(want []byte, derive func(password []byte) ([]byte, error)) storedHash {
	return storedHash{matches: func(password string) bool {
		got, err := derive([]byte(password))
		return err == nil && subtle.ConstantTimeCompare(got, want) == 1
	}}
}

// parseHash reads a stored hash within its ceilings. today bounds the memory.
func parseHash(s string, today Argon2Params) (storedHash, error) {
	maxKiB := 4 * uint64(today.MemoryKiB)
	switch {
	case len(s) > 512, strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }):
	case strings.HasPrefix(s, "$argon2id$"), strings.HasPrefix(s, "$argon2i$"):
		return parseArgon2(s, maxKiB, today)
	case strings.HasPrefix(s, "$2a$"), strings.HasPrefix(s, "$2b$"), strings.HasPrefix(s, "$2y$"):
		return parseBcrypt(s)
	case strings.HasPrefix(s, "$scrypt$"), strings.HasPrefix(s, "scrypt:"):
		return parseScrypt(s, maxKiB)
	case strings.HasPrefix(s, "$pbkdf2-"), strings.HasPrefix(s, "pbkdf2_"), strings.HasPrefix(s, "pbkdf2:"):
		return parsePBKDF2(s)
	}
	return storedHash{}, errHashForm
}

func formatPHC(algorithm string, a Argon2Params, salt, key []byte) string {
	b64 := base64.RawStdEncoding
	return fmt.Sprintf("$%s$v=%d$m=%d,t=%d,p=%d$%s$%s", algorithm, argon2.Version, a.MemoryKiB, a.Iterations, a.Parallelism,
		b64.EncodeToString(salt), b64.EncodeToString(key))
}

// parseArgon2 accepts exactly what formatPHC writes.
func parseArgon2(s string, maxKiB uint64, today Argon2Params) (storedHash, error) {
	parts := strings.Split(s, "$")
	if len(parts) != 6 {
		return storedHash{}, errHashForm
	}
	n, ok := parameters(parts[3], "m=", "t=", "p=")
	salt, key, bytesOK := saltAndKey(base64.RawStdEncoding, parts[4], parts[5])
	if !ok || !bytesOK {
		return storedHash{}, errHashForm
	}
	if n[0] > maxKiB || n[0]*n[1] > maxArgonWork*uint64(today.MemoryKiB)*uint64(today.Iterations) || n[2] > 255 {
		return storedHash{}, errHashCost
	}
	a := Argon2Params{uint32(n[0]), uint32(n[1]), uint32(n[2])}
	if formatPHC(parts[1], a, salt, key) != s {
		return storedHash{}, errHashForm
	}
	derive := argon2.IDKey
	if parts[1] == "argon2i" {
		derive = argon2.Key
	}
	h := derived(key, func(password []byte) ([]byte, error) {
		return derive(password, salt, a.Iterations, a.MemoryKiB, uint8(a.Parallelism), uint32(len(key))), nil
	})
	if parts[1] == "argon2id" {
		h.params = a
	}
	return h, nil
}

func parseBcrypt(s string) (storedHash, error) {
	cost, err := bcrypt.Cost([]byte(s))
	if err != nil || len(s) != 60 {
		return storedHash{}, errHashForm
	}
	if cost > maxBcryptCost {
		return storedHash{}, errHashCost
	}
	return storedHash{matches: func(password string) bool {
		// bcrypt cuts at 72 bytes and ends at NUL: then another password would
		// match, and be kept from then on.
		return len(password) <= 72 && !strings.Contains(password, "\x00") && bcrypt.CompareHashAndPassword([]byte(s), []byte(password)) == nil
	}}, nil
}

func parseScrypt(s string, maxKiB uint64) (storedHash, error) {
	var n []uint64
	var salt, key []byte
	var ok, bytesOK bool
	if rest, isPHC := strings.CutPrefix(s, "$scrypt$"); isPHC {
		parts := strings.Split(rest, "$")
		if len(parts) != 3 {
			return storedHash{}, errHashForm
		}
		if n, ok = parameters(parts[0], "ln=", "r=", "p="); ok && n[0] < 32 {
			n[0] = 1 << n[0]
		}
		salt, key, bytesOK = saltAndKey(base64.RawStdEncoding, parts[1], parts[2])
	} else {
		parts := strings.Split(s, "$")
		if len(parts) != 3 {
			return storedHash{}, errHashForm
		}
		n, ok = parameters(strings.ReplaceAll(strings.TrimPrefix(parts[0], "scrypt:"), ":", ","), "", "", "")
		salt, key, bytesOK = saltAndHex(parts[1], parts[2])
	}
	if !ok || !bytesOK || n[0] < 2 || n[0]&(n[0]-1) != 0 {
		return storedHash{}, errHashForm
	}
	if n[0] > 1<<31 || n[1] > 1<<10 || n[2] > 1<<10 || n[0]*n[1]/8 > maxKiB || n[0]*n[1]*n[2] > maxScryptWork {
		return storedHash{}, errHashCost
	}
	return derived(key, func(password []byte) ([]byte, error) {
		return scrypt.Key(password, salt, int(n[0]), int(n[1]), int(n[2]), len(key))
	}), nil
}

func parsePBKDF2(s string) (storedHash, error) {
	parts := strings.Split(strings.TrimPrefix(s, "$"), "$") // algorithm, iterations, salt, hash
	if strings.HasPrefix(s, "pbkdf2:") {
		colon := strings.LastIndex(parts[0], ":")
		parts = append([]string{parts[0][:colon], parts[0][colon+1:]}, parts[1:]...)
	}
	if len(parts) != 4 {
		return storedHash{}, errHashForm
	}
	var digest func() hash.Hash
	switch parts[0] {
	case "pbkdf2-sha256", "pbkdf2_sha256", "pbkdf2:sha256":
		digest = sha256.New
	case "pbkdf2-sha512", "pbkdf2_sha512", "pbkdf2:sha512":
		digest = sha512.New
	default:
		return storedHash{}, errHashForm
	}
	var salt, key []byte
	var bytesOK bool
	switch parts[0][len("pbkdf2")] {
	case '-': // passlib writes . for + in base64
		plus := strings.NewReplacer(".", "+")
		salt, key, bytesOK = saltAndKey(base64.RawStdEncoding, plus.Replace(parts[2]), plus.Replace(parts[3]))
	case '_':
		_, key, bytesOK = saltAndKey(base64.StdEncoding, "AAAAAAAAAAA=", parts[3])
		salt = []byte(parts[2]) // Django's salt is text
	case ':':
		salt, key, bytesOK = saltAndHex(parts[2], parts[3])
	}
	n, ok := parameters(strings.TrimPrefix(parts[1], "i="), "")
	if !ok || !bytesOK || len(salt) < 4 || len(salt) > 64 {
		return storedHash{}, errHashForm
	}
	if n[0] > maxPBKDF2Iterations {
		return storedHash{}, errHashCost
	}
	return derived(key, func(password []byte) ([]byte, error) {
		return pbkdf2.Key(digest, string(password), salt, int(n[0]), len(key))
	}), nil
}

// parameters reads comma-separated positive numbers with the given prefixes,
// in canonical decimal.
func parameters(s string, prefixes ...string) (n []uint64, ok bool) {
	fields := strings.Split(s, ",")
	if len(fields) != len(prefixes) {
		return nil, false
	}
	for i, prefix := range prefixes {
		digits, ok := strings.CutPrefix(fields[i], prefix)
		v, err := strconv.ParseUint(digits, 10, 32)
		if !ok || err != nil || v == 0 || strconv.FormatUint(v, 10) != digits {
			return nil, false
		}
		n = append(n, v)
	}
	return n, true
}

// saltAndKey decodes 8 to 64 bytes of salt and 16 to 64 of key.
func saltAndKey(b64 *base64.Encoding, saltText, keyText string) (salt, key []byte, ok bool) {
	salt, saltErr := b64.Strict().DecodeString(saltText)
	key, keyErr := b64.Strict().DecodeString(keyText)
	ok = saltErr == nil && keyErr == nil && len(salt) >= 8 && len(salt) <= 64 && len(key) >= 16 && len(key) <= 64
	return salt, key, ok
}

// saltAndHex is for Werkzeug: the salt is text, the key lower-case hex.
func saltAndHex(saltText, keyText string) (salt, key []byte, ok bool) {
	key, err := hex.DecodeString(keyText)
	ok = err == nil && len(saltText) >= 4 && len(saltText) <= 64 && len(key) >= 16 && len(key) <= 64
	return []byte(saltText), key, ok
}
