package auth

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/crypto/bcrypt"
)

var today = Argon2Params{MemoryKiB: 65536, Iterations: 3, Parallelism: 1}

// Known answers from public documents: the argon2 reference implementation's
// tests, RFC 7914 (scrypt and PBKDF2-HMAC-SHA-256, re-encoded), the crypt_blowfish
// tests, and the documentation of passlib, Django and Werkzeug.
var storedHashes = []struct{ name, hash, password string }{
	{"argon2id", "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc", "password"},
	{"argon2i", "$argon2i$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$wWKIMhR9lyDFvRz9YTZweHKfbftvj+qf+YFY4NeBbtA", "password"},
	{"bcrypt 2a", "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW", "U*U"},
	{"bcrypt 2b", "$2b$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW", "U*U"},
	{"bcrypt 2y", "$2y$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW", "U*U"},
	// RFC 7914 section 12: scrypt("pleaseletmein", "SodiumChloride", 16384, 8, 1, 64).
	{"scrypt PHC", "$scrypt$ln=14,r=8,p=1$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf046/2o+7qQT44+qbVD9lRdofLVQylVYT8Pz2LUlwUkKpr55h6F3A1lHkDfzwF7RVdYhw", "pleaseletmein"},
	{"scrypt Werkzeug", "scrypt:16384:8:1$SodiumChloride$7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887", "pleaseletmein"},
	// RFC 7914 section 11: PBKDF2-HMAC-SHA-256 ("Password", "NaCl", 80000, 64).
	{"PBKDF2 Werkzeug", "pbkdf2:sha256:80000$NaCl$4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56a1d425a1225833549adb841b51c9b3176a272bdebba1d078478f62b397f33c8d", "Password"},
	{"PBKDF2 passlib", "$pbkdf2-sha256$6400$0ZrzXitFSGltTQnBWOsdAw$Y11AchqV4b0sUisdZd0Xr97KWoymNE0LNNrnEgY4H9M", "password"},
	{"PBKDF2 PHC", "$pbkdf2-sha256$i=6400$0ZrzXitFSGltTQnBWOsdAw$Y11AchqV4b0sUisdZd0Xr97KWoymNE0LNNrnEgY4H9M", "password"},
	{"PBKDF2 Django", "pbkdf2_sha256$10000$seasalt$CWWFdHOWwPnki7HvkcqN9iA2T3KLW1cf2uZ5kvArtVY=", "lètmein"},
	{"PBKDF2-SHA512 Werkzeug", "pbkdf2:sha512:1000$SodiumChloride$5f7e949365a818ec5259876d0ce488b744a83854fc5188ce826197be3f425151a9d6ee9f99a9a29bc20c312d6f255fd68339c607d4cf7543fcad4c4f8a1fc13a", "pleaseletmein"},
	{"PBKDF2-SHA512 passlib", "$pbkdf2-sha512$1000$U29kaXVtQ2hsb3JpZGU$X36Uk2WoGOxSWYdtDOSIt0SoOFT8UYjOgmGXvj9CUVGp1u6fmamim8IMMS1vJV/WgznGB9TPdUP8rUxPih/BOg", "pleaseletmein"},
}

func TestStoredHashes(t *testing.T) {
	for _, row := range storedHashes {
		h, err := parseHash(row.hash, today)
		if err != nil {
			t.Errorf("%s: %v", row.name, err)
			continue
		}
		if !h.matches(row.password) {
			t.Errorf("%s: the right password does not match", row.name)
		}
		if h.matches(row.password+"x") || h.matches("") {
			t.Errorf("%s: a wrong password matches", row.name)
		}
		if (h.params != Argon2Params{}) != (row.name == "argon2id") {
			t.Errorf("%s: params %v", row.name, h.params)
		}
	}
}

func TestHashesRefused(t *testing.T) {
	const ok = "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc"
	for _, row := range []struct {
		hash string
		want error
	}{
		{"", errHashForm},
		{"plain", errHashForm},
		{"pbkdf2_sha256$1000$ab\x00cd$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", errHashForm},
		{"$1$salt$hash", errHashForm},
		{ok[:len(ok)-1], errHashForm},
		{ok + "$", errHashForm},
		{strings.Replace(ok, "m=65536", "m=065536", 1), errHashForm},
		{strings.Replace(ok, "m=65536", "m=+65536", 1), errHashForm},
		{strings.Replace(ok, "m=65536,t=2", "t=2,m=65536", 1), errHashForm},
		{strings.Replace(ok, "v=19", "v=16", 1), errHashForm},
		{strings.Replace(ok, "RPPc", "RPPd", 1), errHashForm}, // stray bits
		{strings.Replace(ok, "argon2id", "argon2d", 1), errHashForm},
		{strings.Replace(ok, "m=65536", "m=262145", 1), errHashCost},
		{strings.Replace(ok, "t=2", "t=25", 1), errHashCost},
		{strings.Replace(ok, "p=1", "p=256", 1), errHashCost},
		{"$2a$15$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW", errHashCost},
		{"$2a$05$CCCC", errHashForm},
		{"$scrypt$ln=19,r=8,p=1$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf045w", errHashCost},
		{"$scrypt$ln=14,r=8,p=128$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf045w", errHashCost},
		{"scrypt:16383:8:1$SodiumChloride$7023bdcb3afd7348461c06cd81fd38eb", errHashForm},
		{"scrypt:4294967296:8:1$SodiumChloride$7023bdcb3afd7348461c06cd81fd38eb", errHashForm},
		{"pbkdf2:sha256:5000001$saltsalt$7023bdcb3afd7348461c06cd81fd38eb", errHashCost},
		{"pbkdf2:md5:5000$saltsalt$7023bdcb3afd7348461c06cd81fd38eb", errHashForm},
		{"pbkdf2:", errHashForm},
		{"pbkdf2:$$", errHashForm},
		{"pbkdf2_sha256:1000$salt$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", errHashForm}, // half Werkzeug, half Django
		{"pbkdf2:1$saltsalt$7023bdcb3afd7348461c06cd81fd38eb", errHashForm},
		{"$pbkdf2-$1$$", errHashForm},
	} {
		if _, err := parseHash(row.hash, today); !errors.Is(err, row.want) {
			t.Errorf("%.60s: got %v, want %v", row.hash, err, row.want)
		}
	}
}

func FuzzParseHash(f *testing.F) {
	for _, row := range storedHashes {
		f.Add(row.hash)
	}
	f.Add("$argon2id$v=19$m=065536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc")
	// RFC 9106 section 5, its tags without the secret and the associated data that no PHC string holds.
	f.Add("$argon2id$v=19$m=32,t=3,p=4$AgICAgICAgICAgICAgICAg$DWQN9Y14dmwIwDejSotTydAe8EUtdbZetSUg6WsB5lk")
	f.Add("$argon2i$v=19$m=32,t=3,p=4$AgICAgICAgICAgICAgICAg$yBTZ0dx/N6oT8NIRX2LdfR6WbPUL2xOJGOUz9Ab1XLU")
	f.Add("$argon2d$v=19$m=32,t=3,p=4$AgICAgICAgICAgICAgICAg$USs5G282YpdTcdMJGXNCNwE+yIGRgEkQfQ0EGgsiSyE")
	f.Add("pbkdf2_sha256$1000$salt$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")
	f.Fuzz(func(t *testing.T, s string) {
		h, err := parseHash(s, today)
		if err == nil && h.matches == nil {
			t.Fatalf("%q: accepted without a check", s)
		}
		if err == nil && uint64(h.params.MemoryKiB) > 4*uint64(today.MemoryKiB) {
			t.Fatalf("%q: %v", s, h.params)
		}
	})
}

// bcrypt sees 72 bytes and no NUL: another password must not match by that.
func TestBcryptIsNotCutShort(t *testing.T) {
	long := strings.Repeat("a", 72)
	hash, err := bcrypt.GenerateFromPassword([]byte(long), 4)
	if err != nil {
		t.Fatal(err)
	}
	h, err := parseHash(string(hash), today)
	if err != nil {
		t.Fatal(err)
	}
	if !h.matches(long) || h.matches(long+"junk") || h.matches(long[:71]+"\x00") {
		t.Error("a password matches that is not the one")
	}
}
