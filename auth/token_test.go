package auth

import (
	"bytes"
	"strings"
	"testing"
)

func TestRefreshTokenRoundTrip(t *testing.T) {
	token := newRefreshToken()
	token.generation = 7
	s := token.String()
	got, err := parseRefreshToken(s)
	if err != nil || got != token {
		t.Fatalf("got %v, %v", got, err)
	}
	if !strings.HasPrefix(s, "iar_") || len(s) != 127 {
		t.Errorf("form: %d bytes, %.4s", len(s), s)
	}
	if other := newRefreshToken(); other == token {
		t.Error("two tokens are the same")
	}
}

func TestMangledRefreshTokens(t *testing.T) {
	s := newRefreshToken().String()
	for i := range len(s) {
		if _, err := parseRefreshToken(s[:i]); err == nil {
			t.Errorf("prefix of %d bytes accepted", i)
		}
		for bit := range 8 {
			b := []byte(s)
			b[i] ^= 1 << bit
			if _, err := parseRefreshToken(string(b)); err == nil {
				t.Errorf("bit %d of byte %d flipped: accepted", bit, i)
			}
		}
		if _, err := parseRefreshToken(s[:i] + "\n" + s[i:]); err == nil {
			t.Errorf("line break at %d accepted", i)
		}
	}
	for _, bad := range []string{"", "iar_", s + "A", s + "=", " " + s, strings.ToUpper(s), strings.TrimPrefix(s, "iar_"), strings.Repeat("A", 1<<20)} {
		if _, err := parseRefreshToken(bad); err == nil {
			t.Errorf("%.20q accepted", bad)
		}
	}
}

func TestSuccessor(t *testing.T) {
	token, seed := newRefreshToken(), bytes.Repeat([]byte{1}, 32)
	next := token.successor(seed)
	if next != token.successor(seed) {
		t.Error("the same seed made another successor")
	}
	if next.session != token.session || next.family != token.family || next.generation != token.generation+1 || next.step == token.step {
		t.Error("a successor is the same family, one generation on, with another step secret")
	}
	if next.step == token.successor(bytes.Repeat([]byte{2}, 32)).step {
		t.Error("another seed made the same successor")
	}
}

func FuzzRefreshToken(f *testing.F) {
	f.Add(newRefreshToken().String())
	f.Add("iar_")
	f.Fuzz(func(t *testing.T, s string) {
		if token, err := parseRefreshToken(s); err == nil && token.String() != s {
			t.Fatalf("%q parses but is written %q", s, token.String())
		}
	})
}
