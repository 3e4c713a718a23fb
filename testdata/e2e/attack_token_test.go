package e2e

import (
	"net/url"
	"strings"
	"testing"

	"github.com/golang-jwt/jwt/v5"
)

// TestTokensOfOneKindAsAnother: each secret that the service gives or knows
// opens what it is for and nothing else, wherever it is shown.
func TestTokensOfOneKindAsAnother(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	port, registerToken := freePort(t), "a token that lets people register"
	s := w.startPlain(cheap, unlimited, env{
		"ADMIN_ADDR": "127.0.0.1:" + port, "ADMIN_TOKEN": adminToken, "REGISTER_TOKEN": registerToken, "LOCKOUT_THRESHOLD": "100",
	})
	admin := &service{t: t, base: "http://127.0.0.1:" + port, client: s.client}
	p := newPerson()
	wantCode(t, "register", s.do("POST", registerPath, toJSON(p), bearer(registerToken)...), 201, "")
	tok := s.login(p)
	s.forgot(p)
	reset := resetTokens(t, w, p, 1)[0]
	// signedAs is the access token's claims under another type of token.
	signedAs := func(typ string) string {
		token := jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.MapClaims(claims(t, tok.AccessToken)))
		token.Header["typ"], token.Header["kid"] = typ, "test-1"
		text, err := token.SignedString(keyPair().key)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	kinds := map[string]string{
		"access token": tok.AccessToken, "refresh token": tok.RefreshToken, "reset token": reset,
		"admin token": adminToken, "register token": registerToken, "password": p.Password,
		"session id": sessionID(t, tok), "user id": p.UserID, "jti": claims(t, tok.AccessToken)["jti"].(string),
		"ID token": signedAs("JWT"), "logout token": signedAs("logout+jwt"), "DPoP proof": signedAs("dpop+jwt"), "token of no type": signedAs(""),
		"reset token with the prefix of another": "iar_" + reset, "refresh token without its prefix": strings.TrimPrefix(tok.RefreshToken, "iar_"),
	}
	newPassword := "another horse, another battery"
	refused := func(status int, code string) func(*testing.T, string, answer) {
		return func(t *testing.T, what string, a answer) { t.Helper(); wantCode(t, what, a, status, code) }
	}
	for _, place := range []struct {
		name  string
		good  string // the kind that is for it
		show  func(secret string) answer
		check func(*testing.T, string, answer)
	}{
		{"Bearer to list sessions", "access token", func(x string) answer { return s.get(sessionsPath, bearer(x)...) }, wantInvalidToken},
		{"Bearer to end a session", "access token", func(x string) answer {
			return s.do("DELETE", sessionsPath+"/"+sessionID(t, tok), nil, bearer(x)...)
		}, wantInvalidToken},
		{"Bearer to end all", "access token", func(x string) answer { return s.do("POST", logoutAllPath, nil, bearer(x)...) }, wantInvalidToken},
		{"Bearer to change the password", "access token", func(x string) answer {
			return s.do("POST", passwordPath, toJSON(map[string]string{"current_password": p.Password, "new_password": newPassword}), bearer(x)...)
		}, wantInvalidToken},
		{"Bearer to register", "register token", func(x string) answer { return s.do("POST", registerPath, toJSON(newPerson()), bearer(x)...) }, refused(401, "unauthorized")},
		{"Bearer to the admin API", "admin token", func(x string) answer { return admin.get(adminPath(p, ""), bearer(x)...) }, refused(401, "unauthorized")},
		{"Bearer to disable", "admin token", func(x string) answer { return admin.do("POST", adminPath(p, "disable"), nil, bearer(x)...) }, refused(401, "unauthorized")},
		{"Bearer to introspect", "admin token", func(x string) answer {
			return admin.do("POST", "/api/admin/introspect", []byte("token="+url.QueryEscape(tok.AccessToken)), "Authorization", "Bearer "+x, "Content-Type", "application/x-www-form-urlencoded")
		}, refused(401, "unauthorized")},
		{"refresh", "refresh token", s.refresh, refused(401, "invalid_refresh_token")},
		{"logout", "refresh token", s.logout, refused(401, "invalid_refresh_token")},
		{"reset", "reset token", func(x string) answer { return s.reset(x, newPassword) }, refused(400, "invalid_reset_token")},
		{"login", "password", func(x string) answer { return s.do("POST", loginPath, p.loginBody(x)) }, refused(401, "invalid_credentials")},
		{"the current password", "password", func(x string) answer { return s.changePassword(tok, x, newPassword) }, refused(401, "invalid_credentials")},
	} {
		for kind, secret := range kinds {
			if kind != place.good {
				place.check(t, "a "+kind+" for "+place.name, place.show(secret))
			}
		}
	}
	introspect := func(x string) answer {
		return admin.do("POST", "/api/admin/introspect", []byte("token="+url.QueryEscape(x)), "Authorization", "Bearer "+adminToken, "Content-Type", "application/x-www-form-urlencoded")
	}
	for kind, secret := range kinds {
		if a := introspect(secret); kind == "access token" || kind == "refresh token" {
			if a.status != 200 || a.json(t)["active"] != true {
				t.Errorf("introspection of a %s: got %d %s, want it active", kind, a.status, a.body)
			}
		} else {
			wantBody(t, "introspection of a "+kind, a, 200, map[string]any{"active": false})
		}
	}

	// Nothing of that did anything, and each is good for its own purpose.
	wantCode(t, "the access token", s.get(sessionsPath, bearer(tok.AccessToken)...), 200, "")
	wantCode(t, "the refresh token", s.refresh(tok.RefreshToken), 200, "")
	wantCode(t, "the password", s.do("POST", loginPath, p.loginBody(p.Password)), 200, "")
	wantCode(t, "the admin token", admin.get(adminPath(p, ""), bearer(adminToken)...), 200, "")
	wantCode(t, "the register token", s.do("POST", registerPath, toJSON(newPerson()), bearer(registerToken)...), 201, "")
	wantCode(t, "the reset token", s.reset(reset, newPassword), 204, "")
	unlogged(t, s, adminToken, registerToken, reset, tok.RefreshToken, tok.AccessToken)
}
