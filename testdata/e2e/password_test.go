package e2e

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
	"github.com/jackc/pgx/v5"
)

const (
	passwordPath = "/api/auth/password"
	forgotPath   = "/api/auth/forgot-password"
	resetPath    = "/api/auth/reset-password"
)

// TestPasswords is how people change their password, or get a new one.
func TestPasswords(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	blocklist := filepath.Join(t.TempDir(), "blocklist")
	if err := os.WriteFile(blocklist, []byte("seven wonders of the world\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := env{"PASSWORD_BLOCKLIST_FILE": blocklist, "FORGOT_PER_HOUR_PER_EMAIL": "3"}
	a := held(t, w.start(cheap, unlimited, e))
	b := held(t, w.start(cheap, unlimited, e))
	for _, group := range []struct {
		name string
		test func(t *testing.T, w *world, a, b *service)
	}{
		{"change", passwordChange},
		{"change, refused", passwordChangeRefused},
		{"change, locked", passwordChangeLocked},
		{"one policy", onePolicy},
		{"reset", passwordReset},
		{"reset, refused", passwordResetRefused},
		{"reset in parallel", passwordResetInParallel},
		{"reset of a disabled account", passwordResetDisabled},
		{"forgot", forgotPassword},
		{"hostile headers", hostileHeaders},
		{"forgot, beside an operator", forgotBesideOperator},
	} {
		t.Run(group.name, func(t *testing.T) { group.test(t, w, a, b) })
	}
}

func (s *service) changePassword(tok tokens, current, next string) answer {
	s.t.Helper()
	return s.post(passwordPath, map[string]string{"current_password": current, "new_password": next}, bearer(tok.AccessToken)...)
}

func (s *service) forgot(p person) {
	s.t.Helper()
	if a := s.post(forgotPath, map[string]string{"tenant_id": p.TenantID, "email": p.Email}); a.status != 202 {
		s.t.Fatalf("forgot-password: got %d %s, want 202", a.status, a.body)
	}
}

func (s *service) reset(token, next string) answer {
	s.t.Helper()
	return s.post(resetPath, map[string]string{"token": token, "new_password": next})
}

func (p person) with(password string) person { p.Password = password; return p }

// secretsOf are the messages for the mailer about a person.
func secretsOf(t *testing.T, w *world, p person) []message {
	t.Helper()
	return slices.DeleteFunc(messages(t, w, "AUTH_SECRETS"), func(m message) bool {
		return m.TenantID != p.TenantID || m.AggregateID != p.UserID
	})
}

// resetTokens waits until the mailer has n tokens for a person.
func resetTokens(t *testing.T, w *world, p person, n int) []string {
	t.Helper()
	var list []string
	eventually(t, fmt.Sprintf("%d reset tokens", n), 20*time.Second, func() bool {
		list = nil
		for _, m := range secretsOf(t, w, p) {
			token, _ := m.Data["token"].(string)
			list = append(list, token)
		}
		return len(list) >= n
	})
	if len(list) != n {
		t.Fatalf("reset tokens: got %d, want %d", len(list), n)
	}
	return list
}

func passwordChange(t *testing.T, w *world, a, b *service) {
	const next = "another horse, another battery"
	p := a.register()
	twin := a.twin(p)
	tok, other, twins := a.login(p), b.login(p), a.login(twin)
	before := a.refresh(tok.RefreshToken).tokens(t)
	a.forgot(p)
	reset := resetTokens(t, w, p, 1)[0]
	success := a.growth(`auth_password_change_total{result="success"}`)

	out := a.changePassword(before, p.Password, next)
	after := wantTokens(t, "change", out, 15*time.Minute, 14*24*time.Hour)
	was, is := claims(t, before.AccessToken), claims(t, after.AccessToken)
	if is["sid"] != was["sid"] || is["auth_time"] != was["auth_time"] || is["jti"] == was["jti"] {
		t.Errorf("claims: got %v after %v, want another token of the same session and login", is, was)
	}
	wantOver(t, "another session", other, b, a)
	wantCode(t, "the old password", b.do("POST", loginPath, p.loginBody(p.Password)), 401, "invalid_credentials")
	wantCode(t, "the open reset token", b.reset(reset, "a third horse, a third battery"), 400, "invalid_reset_token")
	wantLives(t, "the session, by its new access token", after, b)
	newer := b.refresh(after.RefreshToken).tokens(t)
	wantLives(t, "the session, after a refresh", newer, a)
	wantCode(t, "the refresh token before the change", b.refresh(before.RefreshToken), 401, "invalid_refresh_token")
	fresh := b.login(p.with(next))
	wantLives(t, "a session of the new password", fresh, a)
	wantLives(t, "the same user id in another tenant", twins, b)
	b.login(twin)

	if got := success(); got != 1 {
		t.Errorf("auth_password_change_total success: got %v more, want 1", got)
	}
	wantLogged(t, a, "auth.password_change", out, map[string]any{
		"result": "success", "tenant_id": p.TenantID, "user_id": p.UserID, "session_id": sessionID(t, after), "client_ip": "127.0.0.1",
	})
	for _, s := range []*service{a, b} {
		unlogged(t, s, next, reset)
	}
	in := "auth.user.logged_in"
	events := wantEvents(t, w, p, "auth.user.registered", in, in, "auth.token.refreshed", "auth.user.password_reset_requested",
		"auth.user.password_changed change", "auth.session.revoked password_change", "auth.token.refreshed", in)
	if got, want := events[5].Data, map[string]any{"user_id": p.UserID, "email": p.Email, "reason": "change", "client_ip": "127.0.0.1"}; !reflect.DeepEqual(got, want) {
		t.Errorf("data of auth.user.password_changed: got %v, want %v", got, want)
	}
	if got := events[6].Data["session_id"]; got != sessionID(t, other) {
		t.Errorf("auth.session.revoked: got session_id %v, want that of the other session", got)
	}
}

func passwordChangeRefused(t *testing.T, w *world, a, b *service) {
	p := a.register()
	tok, other := a.login(p), a.login(p)
	a.forgot(p)
	reset := resetTokens(t, w, p, 1)[0]
	const next = "another horse, another battery"
	body := func(current, next any) map[string]any {
		return map[string]any{"current_password": current, "new_password": next}
	}
	for _, row := range []struct {
		name   string
		body   map[string]any
		status int
		code   string
		reason string
	}{
		{"no members", map[string]any{}, 400, "invalid_request", ""},
		{"no current password", map[string]any{"new_password": next}, 400, "invalid_request", ""},
		{"null", body(nil, next), 400, "invalid_request", ""},
		{"a number", body(1, next), 400, "invalid_request", ""},
		{"a member too many", map[string]any{"current_password": p.Password, "new_password": next, "user_id": p.UserID}, 400, "invalid_request", ""},
		{"unchanged", body(p.Password, p.Password), 400, "weak_password", "unchanged"},
		{"unchanged and wrong", body(next, next), 400, "weak_password", "unchanged"},
		{"wrong", body("not the password", next), 401, "invalid_credentials", ""},
		{"empty", body("", next), 401, "invalid_credentials", ""},
		{"over-long", body(strings.Repeat("x", 1025), next), 401, "invalid_credentials", ""},
	} {
		out := a.post(passwordPath, row.body, bearer(tok.AccessToken)...)
		wantCode(t, row.name, out, row.status, row.code)
		if row.reason != "" && !reflect.DeepEqual(out.json(t)["reasons"], []any{row.reason}) {
			t.Errorf("%s: got reasons %v, want %s", row.name, out.json(t)["reasons"], row.reason)
		}
	}
	wantLives(t, "the session, after changes that were refused", tok, b)
	wantLives(t, "the other session", other, b)
	if out := a.refresh(tok.RefreshToken); out.status != 200 {
		t.Errorf("refresh after changes that were refused: got %d, want 200", out.status)
	}
	b.login(p)
	if out := b.reset(reset, next); out.status != 204 {
		t.Errorf("the reset token after changes that were refused: got %d %s, want 204", out.status, out.body)
	}
}

func passwordChangeLocked(t *testing.T, w *world, a, b *service) {
	const next, hashes = "another horse, another battery", "auth_password_hash_duration_seconds_count"
	p := a.register()
	tok := a.login(p)
	for i := range 5 { // as many as LOCKOUT_THRESHOLD, at both doors and on both replicas
		var out answer
		switch i % 3 {
		case 0:
			out = a.changePassword(tok, "wrong guess", next)
		case 1:
			out = b.changePassword(tok, "wrong guess", next)
		default:
			out = b.do("POST", loginPath, p.loginBody("wrong guess"))
		}
		wantCode(t, fmt.Sprintf("guess %d", i+1), out, 401, "invalid_credentials")
	}
	computed := b.growth(hashes)
	for _, current := range []string{p.Password, "wrong guess"} {
		out := b.changePassword(tok, current, next)
		wantCode(t, "change during the lock", out, 423, "locked")
		if n := retryAfter(out); n < 14*60 || n > 15*60 {
			t.Errorf("change during the lock: got Retry-After %d, want up to 15 minutes", n)
		}
	}
	if got := computed(); got != 0 {
		t.Errorf("hashes computed during the lock: got %v, want 0", got)
	}
	wantCode(t, "login during the lock", a.do("POST", loginPath, p.loginBody(p.Password)), 423, "locked")
	wantLives(t, "a session during the lock", tok, b)
	tok = a.refresh(tok.RefreshToken).tokens(t)
	wantEvents(t, w, p, "auth.user.registered", "auth.user.logged_in", "auth.lockout", "auth.token.refreshed")

	dbtest.Exec(t, w.db, `UPDATE guards SET locked_until = clock_timestamp() WHERE locked_until > clock_timestamp()`)
	if out := b.changePassword(tok, p.Password, next); out.status != 200 {
		t.Errorf("change after the lock: got %d %s, want 200", out.status, out.body)
	}
}

// onePolicy: what register refuses, change and reset refuse for the same
// reasons, and neither spends anything.
func onePolicy(t *testing.T, w *world, a, b *service) {
	p := a.register()
	tok := a.login(p)
	a.forgot(p)
	token := resetTokens(t, w, p, 1)[0]
	local, _, _ := strings.Cut(p.Email, "@")
	for _, row := range []struct {
		password string
		reasons  []any
	}{
		{"", []any{"too_short", "common"}},
		{"x7 kQ-9vMw2", []any{"too_short"}},
		{strings.Repeat("lorem ipsum ", 86), []any{"too_long"}},
		{"Password2024!", []any{"common"}},
		{"qwertyuiop12", []any{"common"}},
		{"my " + local + " pass", []any{"contains_email"}},
		{strings.ToUpper(p.Email), []any{"contains_email"}},
		{"Seven Wonders of the World", []any{"blocklisted"}},
	} {
		again := p.with(row.password)
		again.UserID = newUUID()
		for _, door := range []struct {
			name string
			out  answer
		}{
			{"register", a.post(registerPath, again)},
			{"change", b.changePassword(tok, p.Password, row.password)},
			{"reset", a.reset(token, row.password)},
		} {
			wantCode(t, fmt.Sprintf("%s: %.40q", door.name, row.password), door.out, 400, "weak_password")
			if got := door.out.json(t)["reasons"]; !reflect.DeepEqual(got, row.reasons) {
				t.Errorf("%s: %.40q: got reasons %v, want %v", door.name, row.password, got, row.reasons)
			}
		}
	}
	b.login(p)
	if out := b.reset(token, "another horse, another battery"); out.status != 204 {
		t.Errorf("the reset token after weak passwords: got %d %s, want 204", out.status, out.body)
	}
}

func passwordReset(t *testing.T, w *world, a, b *service) {
	const next = "another horse, another battery"
	p := a.register()
	twin := a.twin(p)
	tok, other, twins := a.login(p), b.login(p), a.login(twin)
	asked := time.Now()
	out := a.post(forgotPath, map[string]string{"tenant_id": strings.ToUpper(p.TenantID), "email": " " + strings.ToUpper(p.Email) + " "})
	if out.status != 202 {
		t.Fatalf("forgot-password: got %d %s, want 202", out.status, out.body)
	}
	wantLogged(t, a, "auth.password_forgot", out, map[string]any{"tenant_id": p.TenantID, "client_ip": "127.0.0.1"})
	token := resetTokens(t, w, p, 1)[0]
	secret := secretsOf(t, w, p)[0]
	if secret.Subject != "auth.secrets.password_reset" || secret.EventType != "auth.secrets.password_reset" || secret.Header.Get("Nats-Msg-Id") != secret.EventID || secret.TraceID != out.header.Get("X-Trace-Id") {
		t.Errorf("the mailer's message: got %s %v %s", secret.Subject, secret.Header, secret.Raw)
	}
	expires, err := time.Parse(time.RFC3339, fmt.Sprint(secret.Data["expires_at"]))
	if left := expires.Sub(asked); err != nil || left < 30*time.Minute-time.Second || left > 30*time.Minute+10*time.Second {
		t.Errorf("expires_at: got %v from the request, %v; want 30 minutes", left, err)
	}
	want := map[string]any{"user_id": p.UserID, "email": p.Email, "token": token, "expires_at": secret.Data["expires_at"]}
	if !reflect.DeepEqual(secret.Data, want) {
		t.Errorf("data for the mailer: got %v, want %v", secret.Data, want)
	}
	if raw, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token, "iap_")); err != nil || len(raw) < 32 {
		t.Errorf("got a token of %d bytes, %v; want at least 256 bits", len(raw), err)
	}

	for range 5 {
		b.do("POST", loginPath, p.loginBody("wrong guess"))
	}
	wantCode(t, "login, locked", b.do("POST", loginPath, p.loginBody(p.Password)), 423, "locked")
	success := b.growth(`auth_password_reset_total{result="success"}`)
	done := b.reset(token, next)
	if done.status != 204 || len(done.body) != 0 {
		t.Fatalf("reset: got %d %q, want 204 and nothing", done.status, done.body)
	}
	wantOver(t, "a session", tok, a, b)
	wantOver(t, "another session", other, a, b)
	fresh := a.login(p.with(next)) // the lock is gone
	wantLives(t, "a session of the new password", fresh, b)
	wantCode(t, "the old password", b.do("POST", loginPath, p.loginBody(p.Password)), 401, "invalid_credentials")
	wantCode(t, "the token again", a.reset(token, "a third horse, a third battery"), 400, "invalid_reset_token")
	wantLives(t, "a session of the new password, after the token again", fresh, b)
	wantLives(t, "the same user id in another tenant", twins, b)
	b.login(twin)

	if got := success(); got != 1 {
		t.Errorf("auth_password_reset_total success: got %v more, want 1", got)
	}
	wantLogged(t, b, "auth.password_reset", done, map[string]any{"result": "success", "tenant_id": p.TenantID, "user_id": p.UserID, "client_ip": "127.0.0.1"})
	for _, s := range []*service{a, b} {
		unlogged(t, s, next, token)
	}
	in, revoked := "auth.user.logged_in", "auth.session.revoked password_reset"
	events := wantEvents(t, w, p, "auth.user.registered", in, in, "auth.user.password_reset_requested", "auth.lockout",
		"auth.user.password_changed reset", revoked, revoked, in)
	if got, want := events[3].Data, map[string]any{"user_id": p.UserID, "expires_at": secret.Data["expires_at"]}; !reflect.DeepEqual(got, want) {
		t.Errorf("data of auth.user.password_reset_requested: got %v, want %v", got, want)
	}
	if got := events[8].Data["failed_since_last_success"]; got != 0.0 {
		t.Errorf("failed_since_last_success after a reset: got %v, want 0", got)
	}
}

func passwordResetRefused(t *testing.T, w *world, a, b *service) {
	const next = "another horse, another battery"
	p := a.register()
	tok := a.login(p)
	a.forgot(p)
	b.forgot(p)
	list := resetTokens(t, w, p, 2)
	voided, token := list[0], list[1]
	flipped := []byte(token)
	flipped[10] ^= 'A' ^ 'B'
	forged := "iap_" + base64.RawURLEncoding.EncodeToString(make([]byte, 36))
	for _, row := range []struct{ name, token string }{
		{"void by a second request", voided},
		{"empty", ""},
		{"prefix alone", "iap_"},
		{"garbage", "garbage"},
		{"mangled", string(flipped)},
		{"cut off", token[:len(token)-1]},
		{"with a line break", token + "\n"},
		{"in capitals", strings.ToUpper(token)},
		{"never given out", forged},
	} {
		wantCode(t, row.name, a.reset(row.token, next), 400, "invalid_reset_token")
	}
	for _, row := range []struct {
		name string
		body map[string]any
	}{
		{"no members", map[string]any{}},
		{"no password", map[string]any{"token": token}},
		{"null", map[string]any{"token": token, "new_password": nil}},
		{"a member too many", map[string]any{"token": token, "new_password": next, "user_id": p.UserID}},
	} {
		wantCode(t, row.name, a.post(resetPath, row.body), 400, "invalid_request")
	}
	wantLives(t, "the session, after resets that were refused", tok, b)
	b.login(p)

	if n := dbtest.Exec(t, w.db, `UPDATE reset_tokens SET expires_at = clock_timestamp() - interval '1 second' WHERE user_id = $1`, p.UserID); n != 1 {
		t.Fatalf("open reset tokens: got %d, want 1", n)
	}
	wantCode(t, "expired", a.reset(token, next), 400, "invalid_reset_token")
	wantLives(t, "the session, after an expired token", tok, b)
	b.login(p)
}

func passwordResetInParallel(t *testing.T, w *world, a, b *service) {
	for round := range 10 {
		p := a.register()
		a.forgot(p)
		token := resetTokens(t, w, p, 1)[0]
		passwords := []string{"the first new battery", "the second new battery"}
		outs := make([]answer, 2)
		var uses sync.WaitGroup
		for i, s := range []*service{a, b} {
			uses.Go(func() {
				var err error
				if outs[i], err = s.try("POST", resetPath, toJSON(map[string]string{"token": token, "new_password": passwords[i]})); err != nil {
					t.Error(err)
				}
			})
		}
		uses.Wait()
		won := slices.IndexFunc(outs, func(out answer) bool { return out.status == 204 })
		if won < 0 {
			t.Fatalf("round %d: got %d and %d, want one 204", round, outs[0].status, outs[1].status)
		}
		wantCode(t, "the use that lost", outs[1-won], 400, "invalid_reset_token")
		a.login(p.with(passwords[won]))
		wantCode(t, "the password that lost", a.do("POST", loginPath, p.loginBody(passwords[1-won])), 401, "invalid_credentials")
	}
}

func passwordResetDisabled(t *testing.T, w *world, a, b *service) {
	const next = "another horse, another battery"
	p := a.register()
	w.mustCommand(t, nil, "user", "disable", p.TenantID, p.UserID)
	a.forgot(p)
	if out := b.reset(resetTokens(t, w, p, 1)[0], next); out.status != 204 {
		t.Fatalf("reset: got %d %s, want 204", out.status, out.body)
	}
	wantCode(t, "login, disabled still", a.do("POST", loginPath, p.loginBody(next)), 401, "invalid_credentials")
	w.mustCommand(t, nil, "user", "enable", p.TenantID, p.UserID)
	a.login(p.with(next))
}

// forgotPassword: the answer tells nobody who has an account.
func forgotPassword(t *testing.T, w *world, a, b *service) {
	p := a.register()
	var first answer
	for i := range 5 {
		out := []*service{a, b}[i%2].post(forgotPath, map[string]string{"tenant_id": p.TenantID, "email": p.Email})
		if i == 0 {
			first = out
		}
		if out.status != 202 || !bytes.Equal(out.body, first.body) {
			t.Errorf("request %d: got %d %q, want 202 %q", i+1, out.status, out.body, first.body)
		}
	}
	var names []string
	for _, row := range []struct{ name, tenant, email string }{
		{"unknown", p.TenantID, "nobody@example.com"},
		{"of another tenant", newUUID(), p.Email},
		{"no e-mail", p.TenantID, "no e-mail"},
		{"empty", p.TenantID, ""},
	} {
		out := a.post(forgotPath, map[string]string{"tenant_id": row.tenant, "email": row.email})
		if out.status != 202 || !bytes.Equal(out.body, first.body) {
			t.Errorf("%s: got %d %q, want 202 %q", row.name, out.status, out.body, first.body)
		}
		if names == nil {
			names = slices.Sorted(maps.Keys(first.header))
		}
		if got := slices.Sorted(maps.Keys(out.header)); !slices.Equal(got, names) {
			t.Errorf("%s: got headers %q, want %q", row.name, got, names)
		}
	}
	for _, row := range []struct {
		name string
		body map[string]any
	}{
		{"no members", map[string]any{}},
		{"no e-mail", map[string]any{"tenant_id": p.TenantID}},
		{"a tenant that is no UUID", map[string]any{"tenant_id": "x", "email": p.Email}},
		{"a member too many", map[string]any{"tenant_id": p.TenantID, "email": p.Email, "url": "https://example.com"}},
	} {
		wantCode(t, row.name, a.post(forgotPath, row.body), 400, "invalid_request")
	}
	requested := "auth.user.password_reset_requested"
	wantEvents(t, w, p, "auth.user.registered", requested, requested, requested) // FORGOT_PER_HOUR_PER_EMAIL
	list := resetTokens(t, w, p, 3)
	if out := a.reset(list[2], "another horse, another battery"); out.status != 204 {
		t.Errorf("the last token within the limit: got %d %s, want 204", out.status, out.body)
	}
}

// hostileHeaders: a mail must not lead where an attacker's headers point.
func hostileHeaders(t *testing.T, w *world, a, b *service) {
	p := a.register()
	body := string(toJSON(map[string]string{"tenant_id": p.TenantID, "email": p.Email}))
	request := strings.Join([]string{
		"POST " + forgotPath + " HTTP/1.1", "Host: evil.example", "X-Forwarded-Host: evil.example", "X-Forwarded-Proto: evil",
		"X-Forwarded-Server: evil.example", "X-Host: evil.example", "X-Original-URL: https://evil.example/", "X-Rewrite-URL: /evil",
		"Forwarded: for=192.0.2.1;host=evil.example;proto=https", "Origin: https://evil.example", "Referer: https://evil.example/",
		"User-Agent: evil", "Content-Type: application/json", "Connection: close", fmt.Sprintf("Content-Length: %d", len(body)), "", body,
	}, "\r\n")
	if out := raw(t, a, request); out.status != 202 {
		t.Fatalf("forgot-password: got %d %s, want 202", out.status, out.body)
	}
	token := resetTokens(t, w, p, 1)[0]
	found := append(secretsOf(t, w, p), wantEvents(t, w, p, "auth.user.registered", "auth.user.password_reset_requested")...)
	for _, m := range found {
		if text := strings.ToLower(fmt.Sprintf("%s %v %s", m.Subject, m.Header, m.Raw)); strings.Contains(text, "evil") || strings.Contains(text, "192.0.2.1") {
			t.Errorf("a header of the request got into a message: %s", text)
		}
	}
	if got, want := slices.Sorted(maps.Keys(found[0].Data)), []string{"email", "expires_at", "token", "user_id"}; !slices.Equal(got, want) {
		t.Errorf("members for the mailer: got %q, want %q", got, want)
	}
	if out := b.reset(token, "another horse, another battery"); out.status != 204 {
		t.Errorf("reset: got %d %s, want 204", out.status, out.body)
	}
}

// forgotBesideOperator: who deletes an account, or forces a reset, while its
// owner asks for one, makes nobody see an error.
func forgotBesideOperator(t *testing.T, w *world, a, b *service) {
	waiting := func(n int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d transactions wait for the account", n), 20*time.Second, func() bool {
			return dbtest.Value[int](t, w.db, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) == n
		})
	}
	for _, action := range []string{"delete", "force-reset"} {
		p := a.register()
		release := hold(t, w, `SELECT FROM accounts WHERE user_id = $1 FOR UPDATE`, p.UserID)
		var both sync.WaitGroup
		var code int
		var stderr string
		both.Go(func() { code, _, stderr = w.command(t, nil, nil, "user", action, p.TenantID, p.UserID) })
		waiting(1)
		var out answer
		var err error
		both.Go(func() {
			out, err = a.try("POST", forgotPath, toJSON(map[string]string{"tenant_id": p.TenantID, "email": p.Email}))
		})
		waiting(2)
		release()
		both.Wait()
		if err != nil || out.status != 202 {
			t.Errorf("forgot-password beside %s: got %d %s, %v; want 202", action, out.status, out.body, err)
		}
		if code != 0 {
			t.Errorf("%s beside forgot-password: got exit code %d, %s; want 0", action, code, stderr)
		}
	}
}

func TestResetTurnedOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	port := freePort(t)
	s := held(t, w.start(cheap, unlimited, env{"PASSWORD_RESET_TTL": "0", "ADMIN_ADDR": "127.0.0.1:" + port}))
	p := s.register()
	body := map[string]string{"tenant_id": p.TenantID, "email": p.Email}
	wantCode(t, "forgot-password", s.post(forgotPath, body), 404, "not_found")
	wantCode(t, "reset-password", s.reset("iap_x", password), 404, "not_found")
	off := env{"PASSWORD_RESET_TTL": "0"}
	if code, _, stderr := w.command(t, off, nil, "user", "force-reset", p.TenantID, p.UserID); code != 1 || !strings.Contains(stderr, "password_reset_is_off") {
		t.Errorf("force-reset: got exit code %d, %s; want 1", code, stderr)
	}
	wantLives(t, "after a force-reset that was refused", s.login(p), s)
	wantEvents(t, w, p, "auth.user.registered", "auth.user.logged_in")
	if got := messages(t, w, "AUTH_SECRETS"); len(got) != 0 {
		t.Errorf("messages for the mailer: got %d, want 0", len(got))
	}
	// Without ADMIN_TOKEN there is no admin API either.
	admin := &service{t: t, base: "http://127.0.0.1:" + port, client: s.client}
	wantCode(t, "admin API without a token configured", admin.get(adminPath(p, ""), bearer(adminToken)...), 404, "not_found")
}

// TestForgotTakesOneTime measures forgot-password from many clients at once.
// It runs beside no other test of this package.
func TestForgotTakesOneTime(t *testing.T) {
	const calls, clients = 200, 20
	w := newWorld(t)
	s := w.startPlain(cheap, unlimited, env{"FORGOT_PER_HOUR_PER_EMAIL": "1"})
	tenant := newUUID()
	email := func(kind string, i int) string { return fmt.Sprintf("%s%d@example.com", kind, i) }
	var file bytes.Buffer
	for i := range calls {
		for _, kind := range []string{"existing", "disabled", "limited"} {
			json.NewEncoder(&file).Encode(map[string]any{
				"tenant_id": tenant, "user_id": newUUID(), "email": email(kind, i), "password_hash": aBcryptHash, "disabled": kind == "disabled",
			})
		}
	}
	w.mustCommand(t, file.Bytes(), "import", "-")
	ask := func(email string) (time.Duration, error) {
		begun := time.Now()
		a, err := s.try("POST", forgotPath, toJSON(map[string]string{"tenant_id": tenant, "email": email}))
		if err == nil && a.status != 202 {
			err = fmt.Errorf("got %d %s, want 202", a.status, a.body)
		}
		return time.Since(begun), err
	}
	each := func(f func(i int)) {
		var all sync.WaitGroup
		for c := range clients {
			all.Go(func() {
				for i := c; i < calls; i += clients {
					f(i)
				}
			})
		}
		all.Wait()
	}
	each(func(i int) {
		if _, err := ask(email("limited", i)); err != nil {
			t.Error(err)
		}
	})
	kinds := []string{"existing", "unknown", "limited", "disabled"}
	var report string
	for round := range 3 { // a leak shows in each; a busy machine does not
		var mu sync.Mutex
		total := map[string]time.Duration{}
		each(func(i int) {
			for k := range kinds { // in turn, each client from another one on
				kind := kinds[(i+k)%len(kinds)]
				took, err := ask(email(kind, i))
				mu.Lock()
				total[kind] += took
				mu.Unlock()
				if err != nil {
					t.Error(err)
				}
			}
		})
		least, most := math.Inf(1), 0.0
		report = ""
		for _, kind := range kinds {
			mean := total[kind].Seconds() * 1000 / calls
			least, most = min(least, mean), max(most, mean)
			report += fmt.Sprintf(" %s %.2f ms", kind, mean)
		}
		t.Logf("round %d: mean of %d calls:%s", round, calls, report)
		if most/least < 1.03 {
			return
		}
		// Those that had an account have spent their limit now: give it back.
		if n := dbtest.Exec(t, w.db, `DELETE FROM rate_windows WHERE key IN (SELECT sha256('\x666f72676f7400'::bytea || uuid_send(tenant_id) || convert_to(email, 'UTF8'))
			FROM accounts WHERE email NOT LIKE 'limited%')`); n != 2*calls {
			t.Fatalf("limits given back: got %d, want %d", n, 2*calls)
		}
	}
	t.Errorf("mean times differ by 3 %% or more:%s", report)
}

// spellingsOf are the ways in which a token could stand in some bytes: its
// text, its secret bytes, and either in hexadecimal or in base64 at any place
// of a longer text. Halves are looked for too.
func spellingsOf(t *testing.T, token string) map[string][]byte {
	t.Helper()
	_, body, ok := strings.Cut(token, "_")
	secret, err := base64.RawURLEncoding.DecodeString(body)
	if !ok || err != nil || len(secret) < 32 {
		t.Fatalf("a token of another form than this test believes: %v", err)
	}
	all := map[string][]byte{}
	for name, part := range map[string][]byte{
		"first half of the text": []byte(body[:len(body)/2]), "second half of the text": []byte(body[len(body)/2:]),
		"first half of the secret": secret[:16], "second half of the secret": secret[16:32],
	} {
		all[name] = part
		all[name+" in hex"] = []byte(hex.EncodeToString(part))
		all[name+" in capital hex"] = []byte(strings.ToUpper(hex.EncodeToString(part)))
		for before := range 3 { // bytes in front, of a group of three
			for kind, enc := range map[string]*base64.Encoding{"base64": base64.RawStdEncoding, "base64url": base64.RawURLEncoding} {
				text := enc.EncodeToString(append(make([]byte, before), part...))
				if before > 0 {
					text = text[before+1:] // these characters depend on what is in front
				}
				if (before+len(part))%3 > 0 {
					text = text[:len(text)-1] // this one on what comes after
				}
				all[fmt.Sprintf("%s in %s after %d bytes", name, kind, before)] = []byte(text)
			}
		}
	}
	return all
}

// TestResetTokenIsNowhere looks for a reset token in all that PostgreSQL
// writes, before and after it was relayed and used, and in AUTH_EVENTS.
func TestResetTokenIsNowhere(t *testing.T) {
	t.Parallel()
	server := dbtest.Start(t)
	w := &world{t: t, db: server.URL(), nats: natstest.New(t)}
	s := w.start(cheap, unlimited)
	p := s.register()
	const next = "another horse, another battery"

	w.nats.Stop() // the sealed token stays in the outbox
	s.forgot(p)
	places := map[string][]byte{"pg_dump before the relay": pgDump(t, w), "the tables before the relay": tablesAsText(t, w)}
	if !bytes.Contains(places["the tables before the relay"], []byte("auth.secrets.password_reset")) {
		t.Error("the secret is not in the outbox while NATS is away")
	}
	w.nats.Restart()
	token := resetTokens(t, w, p, 1)[0]
	if out := s.reset(token, next); out.status != 204 {
		t.Fatalf("reset: got %d %s, want 204", out.status, out.body)
	}
	s.login(p.with(next))
	s.forgot(p)
	second := resetTokens(t, w, p, 2)[1]
	wantEvents(t, w, p, "auth.user.registered", "auth.user.password_reset_requested", "auth.user.password_changed reset",
		"auth.user.logged_in", "auth.user.password_reset_requested")

	dbtest.Exec(t, w.db, `CHECKPOINT`)
	places["pg_dump"], places["the tables"] = pgDump(t, w), tablesAsText(t, w)
	data := dbtest.Value[string](t, w.db, `SELECT current_setting('data_directory')`)
	err := filepath.WalkDir(data, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if err == nil {
			places[strings.TrimPrefix(path, data)] = b
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if places["the server's log"], err = os.ReadFile(filepath.Join(filepath.Dir(data), "log")); err != nil {
		t.Fatal(err)
	}
	var events bytes.Buffer
	for _, m := range messages(t, w, "AUTH_EVENTS") {
		fmt.Fprintf(&events, "%s %v %s\n", m.Subject, m.Header, m.Raw)
	}
	places["AUTH_EVENTS"], places["the service's output"] = events.Bytes(), []byte(strings.Join(s.tail(1<<30), "\n")+s.errors())

	// That the search finds what is there: the address, in all of them.
	in := func(part string, text []byte) (found []string) {
		for place, b := range places {
			if strings.Contains(place, part) && bytes.Contains(b, text) {
				found = append(found, place)
			}
		}
		return found
	}
	for _, place := range []string{"pg_dump before", "tables before", "pg_dump", "the tables", "/pg_wal/", "/base/", "AUTH_EVENTS"} {
		if len(in(place, []byte(p.Email))) == 0 {
			t.Errorf("the search does not find the e-mail in %s, so it would not find a token", place)
		}
	}
	for _, secret := range []string{token, second} {
		for spelling, text := range spellingsOf(t, secret) {
			if found := in("", text); len(found) > 0 {
				t.Errorf("%s of a reset token is in %q", spelling, found)
			}
		}
	}
	for _, secret := range []string{next, p.Password} {
		if found := in("", []byte(secret)); len(found) > 0 {
			t.Errorf("a password is in %q", found)
		}
	}
}

func pgDump(t *testing.T, w *world) []byte {
	t.Helper()
	bin := dbtest.Value[string](t, w.db, `SELECT setting FROM pg_config WHERE name = 'BINDIR'`)
	out, err := exec.Command(filepath.Join(bin, "pg_dump"), "-d", w.db).Output()
	if err != nil {
		t.Fatalf("pg_dump: %v", err)
	}
	return out
}

// tablesAsText is every row of every table of the service.
func tablesAsText(t *testing.T, w *world) []byte {
	t.Helper()
	var all bytes.Buffer
	for _, table := range tables(t, w) {
		for _, row := range dbtest.Query[string](t, w.db, `SELECT t::text FROM `+table+` AS t`) {
			all.WriteString(table + " " + row + "\n")
		}
	}
	return all.Bytes()
}

// tables are the service's own tables.
func tables(t *testing.T, w *world) []string {
	t.Helper()
	return dbtest.Query[string](t, w.db, `SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'identity_auth' ORDER BY 1`)
}

// hold runs SQL in a transaction and keeps it open until release is called.
func hold(t *testing.T, w *world, sql string, args ...any) (release func()) {
	t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, w.db)
	if err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{`SET search_path = identity_auth`, `BEGIN`} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Exec(ctx, sql, args...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	release = sync.OnceFunc(func() { conn.Close(ctx) })
	t.Cleanup(release)
	return release
}

const connections = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1`

// account is what TestKilledAtPasswords looks at: all of it is from before a change, or
// all of it from after.
type account struct {
	Hash     string
	Sessions []string // live ones
	Open     int      // reset tokens
	Changed  int      // auth.user.password_changed
	Failures int      // counted for the lock
}

func accountNow(t *testing.T, w *world, p person) (a account) {
	t.Helper()
	text := dbtest.Value[string](t, w.db, `
SELECT json_build_object('Hash', password_hash,
       'Sessions', (SELECT coalesce(json_agg(id ORDER BY id), '[]') FROM sessions AS s WHERE s.tenant_id = a.tenant_id AND s.user_id = a.user_id AND revoked_at IS NULL),
       'Open', (SELECT count(*) FROM reset_tokens AS r WHERE r.tenant_id = a.tenant_id AND r.user_id = a.user_id),
       'Changed', (SELECT count(*) FROM outbox AS o WHERE o.tenant_id = a.tenant_id AND o.user_id = a.user_id AND event_type = 'auth.user.password_changed'),
       'Failures', (SELECT cardinality(failed) FROM guards WHERE key = sha256('\x6c6f67696e00'::bytea || uuid_send(a.tenant_id) || convert_to(a.email, 'UTF8'))))::text
  FROM accounts AS a WHERE tenant_id = $1 AND user_id = $2`, p.TenantID, p.UserID)
	if err := json.Unmarshal([]byte(text), &a); err != nil {
		t.Fatal(err)
	}
	return a
}

// TestKilledAtPasswords kills the service in the midst of a password change and of a
// reset: the new hash, the revocations, the token's end, the lock's and the
// event are there together or not at all.
func TestKilledAtPasswords(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	limits := env{"FORGOT_PER_HOUR_PER_EMAIL": "0", "LOCKOUT_THRESHOLD": "100", "HASH_ACQUIRE_TIMEOUT": "10s"}
	other := w.startPlain(cheap, unlimited, limits) // prepares, relays, and is not killed
	const victim = "the one to be killed"
	c := w.config(cheap, unlimited, limits, env{"DATABASE_URL": w.db + "&application_name=" + strings.ReplaceAll(victim, " ", "%20")})
	var s *service
	begin := func() { s = w.launch(plainBinary, c); s.waitReady() }
	// end kills it and waits until PostgreSQL has noticed.
	end := func() {
		s.kill()
		eventually(t, "PostgreSQL has ended the transactions of a killed process", 20*time.Second, func() bool {
			return dbtest.Value[int](t, w.db, connections, victim) == 0
		})
	}
	type subject struct {
		person
		tok   tokens
		token string // of a reset
		was   account
	}
	prepare := func(t *testing.T, n int) []*subject {
		t.Helper()
		subjects := make([]*subject, n)
		var all sync.WaitGroup
		for i := range subjects {
			subjects[i] = &subject{person: newPerson()}
			all.Go(func() {
				p := subjects[i].person
				for _, call := range []struct {
					path   string
					body   []byte
					status int
				}{
					{registerPath, toJSON(p), 201},
					{loginPath, p.loginBody(p.Password), 200},
					{loginPath, p.loginBody(p.Password), 200},
					{loginPath, p.loginBody("wrong guess"), 401},
					{forgotPath, toJSON(map[string]string{"tenant_id": p.TenantID, "email": p.Email}), 202},
				} {
					a, err := other.try("POST", call.path, call.body)
					if err != nil || a.status != call.status {
						t.Errorf("%s: %v, got %d %s", call.path, err, a.status, a.body)
						return
					}
					if a.status == 200 {
						json.Unmarshal(a.body, &subjects[i].tok)
					}
				}
			})
		}
		all.Wait()
		eventually(t, "the mailer has all tokens", 20*time.Second, func() bool {
			tokens := map[string]string{}
			for _, m := range messages(t, w, "AUTH_SECRETS") {
				tokens[m.AggregateID], _ = m.Data["token"].(string)
			}
			return !slices.ContainsFunc(subjects, func(sub *subject) bool {
				sub.token = tokens[sub.UserID]
				return sub.token == ""
			})
		})
		for _, sub := range subjects {
			sub.was = accountNow(t, w, sub.person)
			if sub.was.Open != 1 || len(sub.was.Sessions) != 2 || sub.was.Failures != 1 {
				t.Fatalf("before: got %+v", sub.was)
			}
		}
		return subjects
	}
	const next = "another horse, another battery"
	kinds := []struct {
		name    string
		status  int
		request func(sub *subject) (answer, error)
		kept    func(sub *subject) []string // sessions that live on
		locks   []string                    // rows that the transaction comes to, in the order in which it does; $1 is the user, $2 their session
	}{
		{"change", 200, func(sub *subject) (answer, error) {
			return s.try("POST", passwordPath, toJSON(map[string]string{"current_password": password, "new_password": next}), bearer(sub.tok.AccessToken)...)
		}, func(sub *subject) []string { return []string{sessionID(t, sub.tok)} }, []string{
			`SELECT FROM accounts WHERE user_id = $1 AND $2 <> '' FOR UPDATE`,
			`SELECT FROM sessions WHERE user_id = $1 AND id = $2::text::uuid FOR UPDATE`,
			`SELECT FROM reset_tokens WHERE user_id = $1 AND $2 <> '' FOR UPDATE`,
			`SELECT FROM sessions WHERE user_id = $1 AND id <> $2::text::uuid FOR UPDATE`,
		}},
		{"reset", 204, func(sub *subject) (answer, error) {
			return s.try("POST", resetPath, toJSON(map[string]string{"token": sub.token, "new_password": next}))
		}, func(*subject) []string { return []string{} }, []string{
			`SELECT FROM accounts WHERE user_id = $1 AND $2 <> '' FOR UPDATE`,
			`SELECT FROM reset_tokens WHERE user_id = $1 AND $2 <> '' FOR UPDATE`,
			`SELECT FROM sessions WHERE user_id = $1 AND id = $2::text::uuid FOR UPDATE`,
			`SELECT FROM sessions WHERE user_id = $1 AND id <> $2::text::uuid FOR UPDATE`,
		}},
	}
	for _, kind := range kinds {
		// whole fails unless the account is as before or wholly changed.
		whole := func(t *testing.T, sub *subject) (changed bool) {
			t.Helper()
			got := accountNow(t, w, sub.person)
			if got.Hash == sub.was.Hash {
				if !reflect.DeepEqual(got, sub.was) {
					t.Errorf("the old hash, but not all else as before:\n got %+v\nwas %+v", got, sub.was)
				}
				return false
			}
			want := account{Hash: got.Hash, Sessions: kind.kept(sub), Changed: sub.was.Changed + 1}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("the new hash, but not all else with it:\n got %+v\nwant %+v", got, want)
			}
			return true
		}
		t.Run(kind.name+", stopped at a lock", func(t *testing.T) {
			for i, lock := range kind.locks {
				begin()
				sub := prepare(t, 1)[0]
				release := hold(t, w, lock, sub.UserID, sessionID(t, sub.tok))
				var request sync.WaitGroup
				request.Go(func() { kind.request(sub) })
				eventually(t, "the transaction waits for the lock: "+lock, 20*time.Second, func() bool {
					return dbtest.Value[int](t, w.db, connections+` AND wait_event_type = 'Lock'`, victim) > 0
				})
				s.cmd.Process.Kill()
				request.Wait()
				release()
				end()
				if whole(t, sub) {
					t.Errorf("lock %d: the change is there although its transaction was cut off", i)
				}
				begin()
				if a, err := kind.request(sub); err != nil || a.status != kind.status {
					t.Fatalf("the same again after the restart: got %d %s, %v; want %d", a.status, a.body, err, kind.status)
				}
				end()
				if !whole(t, sub) {
					t.Errorf("lock %d: the change was answered and is not there", i)
				}
				other.login(sub.person.with(next))
			}
		})
		t.Run(kind.name+", many at once", func(t *testing.T) {
			const many = 10
			for _, answered := range []int{1, 3, 5, 7, 9} { // then it is killed, with the others under way
				subjects := prepare(t, many)
				begin()
				ok := make([]bool, many)
				enough := make(chan struct{}, many)
				var requests sync.WaitGroup
				for i, sub := range subjects {
					requests.Go(func() {
						a, err := kind.request(sub)
						ok[i] = err == nil && a.status == kind.status
						enough <- struct{}{}
					})
				}
				for range answered {
					<-enough
				}
				end()
				requests.Wait()
				done := 0
				for i, sub := range subjects {
					changed := whole(t, sub)
					if ok[i] && !changed {
						t.Error("a change was answered and is not there")
					}
					if changed {
						done++
					}
				}
				t.Logf("killed after %d answers: %d of %d were done", answered, done, many)
			}
		})
	}
}
