package auth

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/7d-solutions/identity-auth/db"
)

func TestResetTokenRoundTrip(t *testing.T) {
	token := newResetToken()
	s := token.String()
	if got, err := parseResetToken(s); err != nil || got != token || !strings.HasPrefix(s, "iap_") {
		t.Errorf("got %v, %v", got, err)
	}
	for i := range len(s) {
		b := []byte(s)
		b[i] ^= 1
		if _, err := parseResetToken(string(b)); err == nil {
			t.Errorf("byte %d changed: accepted", i)
		}
	}
	if _, err := parseResetToken(newRefreshToken().String()); err == nil {
		t.Error("a refresh token is taken for a reset token")
	}
}

func FuzzResetToken(f *testing.F) {
	f.Add(newResetToken().String())
	f.Fuzz(func(t *testing.T, s string) {
		if token, err := parseResetToken(s); err == nil && token.String() != s {
			t.Fatalf("%q parses but is written %q", s, token.String())
		}
	})
}

func TestSealedResetToken(t *testing.T) {
	private, public := keyPEMs(t)
	env := goodEnv(t)
	cfg, err := LoadConfig(env.lookup)
	if err != nil {
		t.Fatal(err)
	}
	store, err := db.Open(env["DATABASE_URL"], 2, db.Rules{}) // never connects
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	s := New(cfg, store, nil, Build{}, NewLogger(&strings.Builder{}, 0))
	tenant, _ := db.ParseTenantID("11111111-1111-4111-8111-111111111111")
	user, _ := db.ParseUserID("22222222-2222-4222-8222-222222222222")
	token := newResetToken()
	sealed, err := s.sealFor(tenant, token)(user, "ada@example.com", "2030-01-01T00:00:00.000000Z")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(sealed), token.String()[5:20]) || strings.Contains(string(sealed), "ada@") {
		t.Errorf("in clear: %s", sealed)
	}
	row := db.OutboxRow{Tenant: tenant, User: user, Data: sealed}
	open := func() string {
		data, err := s.UnsealReset(row)
		if err != nil {
			return err.Error()
		}
		var secret struct{ Email, Token string }
		if err := json.Unmarshal(data, &secret); err != nil {
			t.Fatal(err)
		}
		return secret.Email + " " + secret.Token
	}
	if got, want := open(), "ada@example.com "+token.String(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}

	// The keys are rotated while the row waits.
	env["JWT_PREV_PUBLIC_KEY_PEM"], env["JWT_PREV_KID"] = env["JWT_PUBLIC_KEY_PEM"], env["JWT_KID"]
	env["JWT_PRIVATE_KEY_PEM"], env["JWT_PUBLIC_KEY_PEM"], env["JWT_KID"] = private, public, "k2"
	rotated, err := LoadConfig(env.lookup)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(rotated, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if got := open(); !strings.HasSuffix(got, token.String()) {
		t.Errorf("after a rotation: %s", got)
	}

	row.User, _ = db.ParseUserID("33333333-3333-4333-8333-333333333333")
	if got := open(); got != errUnseal.Error() {
		t.Errorf("moved to another account: %s", got)
	}
}
