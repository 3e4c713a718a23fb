package e2e

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/golang-jwt/jwt/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	logoutPath    = "/api/auth/logout"
	logoutAllPath = "/api/auth/logout-all"
	sessionsPath  = "/api/auth/sessions"
)

// TestOwnSessions is how people see and end their sessions. What one replica
// has answered holds on the other at once.
func TestOwnSessions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := held(t, w.start(cheap, unlimited))
	b := held(t, w.start(cheap, unlimited))
	for _, group := range []struct {
		name string
		test func(t *testing.T, w *world, a, b *service)
	}{
		{"logout", logoutEndsOneSession},
		{"logout of sessions that are over", logoutOfWhatIsOver},
		{"the list", sessionList},
		{"revoke one", revokeOneSession},
		{"logout-all", logoutAll},
		{"bearer", bearerTokens},
	} {
		t.Run(group.name, func(t *testing.T) { group.test(t, w, a, b) })
	}
}

// bearer is the header that shows a token.
func bearer(token string) []string { return []string{"Authorization", "Bearer " + token} }

func (s *service) logout(token string) answer {
	s.t.Helper()
	return s.post(logoutPath, map[string]string{"refresh_token": token})
}

// wantInvalidToken fails unless a refuses the access token as RFC 6750 section
// 3 has it.
func wantInvalidToken(t *testing.T, what string, a answer) {
	t.Helper()
	wantCode(t, what, a, 401, "invalid_token")
	if got := a.header.Get("WWW-Authenticate"); !strings.HasPrefix(got, "Bearer") {
		t.Errorf("%s: got WWW-Authenticate %q, want Bearer", what, got)
	}
}

// wantOver fails unless neither token of a session is good on any replica.
func wantOver(t *testing.T, what string, tok tokens, replicas ...*service) {
	t.Helper()
	for i, s := range replicas {
		at := fmt.Sprintf("%s: on replica %d", what, i+1)
		wantInvalidToken(t, at+": access token", s.get(sessionsPath, bearer(tok.AccessToken)...))
		wantCode(t, at+": refresh token", s.refresh(tok.RefreshToken), 401, "invalid_refresh_token")
	}
}

// wantLives fails unless the access token's session is live.
func wantLives(t *testing.T, what string, tok tokens, s *service) {
	t.Helper()
	if a := s.get(sessionsPath, bearer(tok.AccessToken)...); a.status != 200 {
		t.Errorf("%s: a session that should live on: got %d %s", what, a.status, a.body)
	}
}

// twin registers the same user id and e-mail in another tenant.
func (s *service) twin(p person) person {
	s.t.Helper()
	p.TenantID = newUUID()
	if a := s.post(registerPath, p); a.status != 201 {
		s.t.Fatalf("register in a second tenant: %d %s", a.status, a.body)
	}
	return p
}

func sessionID(t *testing.T, tok tokens) string {
	t.Helper()
	id, _ := claims(t, tok.AccessToken)["sid"].(string)
	return id
}

// message is one message of a stream.
type message struct {
	Subject string
	Header  nats.Header
	Raw     []byte

	EventID       string         `json:"event_id"`
	EventType     string         `json:"event_type"`
	TenantID      string         `json:"tenant_id"`
	AggregateID   string         `json:"aggregate_id"`
	TraceID       string         `json:"trace_id"`
	CausationID   *string        `json:"causation_id"`
	OccurredAt    time.Time      `json:"occurred_at"`
	SchemaVersion string         `json:"schema_version"`
	Data          map[string]any `json:"data"`
}

// messages reads a whole stream; one that is absent is empty.
func messages(t *testing.T, w *world, stream string) []message {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	js := w.jetStream()
	s, err := js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	state := s.CachedInfo().State
	var all []message
	for seq := max(state.FirstSeq, 1); seq <= state.LastSeq; seq++ {
		raw, err := s.GetMsg(ctx, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		m := message{Subject: raw.Subject, Header: raw.Header, Raw: raw.Data}
		if err := json.Unmarshal(raw.Data, &m); err != nil {
			t.Errorf("message %d of %s is no event: %v", seq, stream, err)
		}
		all = append(all, m)
	}
	return all
}

// eventsOf are the published events of a person, each once.
func eventsOf(t *testing.T, w *world, p person) []message {
	t.Helper()
	seen := map[string]bool{}
	return slices.DeleteFunc(messages(t, w, "AUTH_EVENTS"), func(m message) bool {
		again := seen[m.EventID]
		seen[m.EventID] = true
		return again || m.TenantID != p.TenantID || m.AggregateID != p.UserID
	})
}

// wantEvents waits until the published events of a person are these, in this
// order; a row is the type and, where the event has one, the reason.
func wantEvents(t *testing.T, w *world, p person, want ...string) []message {
	t.Helper()
	var found []message
	var got []string
	for deadline := time.Now().Add(15 * time.Second); ; {
		found, got = eventsOf(t, w, p), nil
		for _, m := range found {
			reason, _ := m.Data["reason"].(string)
			got = append(got, strings.TrimSpace(m.EventType+" "+reason))
		}
		if slices.Equal(got, want) {
			return found
		}
		if len(got) > len(want) || time.Now().After(deadline) {
			t.Fatalf("events of the account:\n got %q\nwant %q", got, want)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// wantLogged fails unless the line of the answered operation has the fields.
func wantLogged(t *testing.T, s *service, event string, a answer, want map[string]any) {
	t.Helper()
	line := lineOf(t, s, event, a.header.Get("X-Trace-Id"))
	want["level"] = "INFO"
	for name, value := range want {
		if line[name] != value {
			t.Errorf("%s: got %s %v, want %v", event, name, line[name], value)
		}
	}
}

// unlogged fails if s wrote one of the secrets anywhere.
func unlogged(t *testing.T, s *service, secrets ...string) {
	t.Helper()
	output := strings.Join(s.tail(1<<30), "\n") + s.errors()
	for _, secret := range secrets {
		if strings.Contains(output, secret) {
			t.Errorf("the log holds the secret %q", secret)
		}
	}
}

func logoutEndsOneSession(t *testing.T, w *world, a, b *service) {
	p := a.register()
	twin := a.twin(p)
	tok, other, twins := a.login(p), a.login(p), a.login(twin)
	success := a.growth(`auth_logout_total{result="success"}`)
	invalid := a.growth(`auth_logout_total{result="invalid"}`)

	refused := 0
	for _, row := range []struct {
		name   string
		body   map[string]any
		status int
		code   string
	}{
		{"garbage", map[string]any{"refresh_token": "garbage"}, 401, "invalid_refresh_token"},
		{"prefix alone", map[string]any{"refresh_token": "iar_"}, 401, "invalid_refresh_token"},
		{"mangled", map[string]any{"refresh_token": tok.RefreshToken[:50] + "AAAA" + tok.RefreshToken[54:]}, 401, "invalid_refresh_token"},
		{"cut off", map[string]any{"refresh_token": tok.RefreshToken[:len(tok.RefreshToken)-1]}, 401, "invalid_refresh_token"},
		{"an access token", map[string]any{"refresh_token": tok.AccessToken}, 401, "invalid_refresh_token"},
		{"another tenant", map[string]any{"refresh_token": tok.RefreshToken, "tenant_id": twin.TenantID}, 401, "invalid_refresh_token"},
		{"a tenant that is no UUID", map[string]any{"refresh_token": tok.RefreshToken, "tenant_id": "x"}, 400, "invalid_request"},
		{"no token", map[string]any{}, 400, "invalid_request"},
		{"null", map[string]any{"refresh_token": nil}, 400, "invalid_request"},
		{"a member too many", map[string]any{"refresh_token": tok.RefreshToken, "all": true}, 400, "invalid_request"},
	} {
		wantCode(t, row.name, a.post(logoutPath, row.body), row.status, row.code)
		refused++
	}
	wantCode(t, "no JSON", a.do("POST", logoutPath, []byte("refresh_token=x"), "Content-Type", "application/x-www-form-urlencoded"), 415, "unsupported_media_type")
	refused++
	wantLives(t, "after logouts that were refused", tok, b)
	if got := invalid(); got != float64(refused) {
		t.Errorf("auth_logout_total invalid: got %v more, want %d", got, refused)
	}

	out := a.post(logoutPath, map[string]any{"refresh_token": tok.RefreshToken, "tenant_id": strings.ToUpper(p.TenantID)})
	if out.status != 204 || len(out.body) != 0 {
		t.Fatalf("logout: got %d %q, want 204 and nothing", out.status, out.body)
	}
	wantOver(t, "after logout", tok, b, a)
	for i, s := range []*service{b, a} {
		if again := s.logout(tok.RefreshToken); again.status != 204 {
			t.Errorf("logout again on replica %d: got %d %s, want 204", 2-i, again.status, again.body)
		}
	}
	wantLives(t, "the other session", other, b)
	wantLives(t, "the same user id in another tenant", twins, b)
	if got := success(); got != 2 {
		t.Errorf("auth_logout_total success: got %v more, want 2", got)
	}
	wantLogged(t, a, "auth.logout", out, map[string]any{
		"result": "success", "tenant_id": p.TenantID, "user_id": p.UserID, "session_id": sessionID(t, tok), "client_ip": "127.0.0.1",
	})
	events := wantEvents(t, w, p, "auth.user.registered", "auth.user.logged_in", "auth.user.logged_in",
		"auth.user.logged_out", "auth.session.revoked logout")
	loggedOut, revoked := events[3], events[4]
	for _, m := range events[3:] {
		if m.Data["session_id"] != sessionID(t, tok) || m.Data["user_id"] != p.UserID || m.TraceID != out.header.Get("X-Trace-Id") {
			t.Errorf("%s is not of this session and request: %s", m.EventType, m.Raw)
		}
	}
	if revoked.CausationID == nil || *revoked.CausationID != loggedOut.EventID {
		t.Errorf("auth.session.revoked: got causation_id %v, want the logout's event", revoked.CausationID)
	}
	until, err := time.Parse(time.RFC3339, fmt.Sprint(revoked.Data["access_tokens_expire_at"]))
	if left := until.Sub(revoked.OccurredAt); err != nil || left < 15*time.Minute-time.Second || left > 15*time.Minute+time.Second {
		t.Errorf("access_tokens_expire_at: got %v after the revocation, %v; want ACCESS_TOKEN_TTL", left, err)
	}
}

// logoutOfWhatIsOver: who is logged out has what they asked for.
func logoutOfWhatIsOver(t *testing.T, w *world, a, b *service) {
	const aged = `UPDATE sessions SET expires_at = clock_timestamp() - interval '1 second' WHERE id = $1`
	for _, row := range []struct {
		name string
		end  func(p person, tok tokens)
	}{
		{"by its own end", func(_ person, tok tokens) { dbtest.Exec(t, w.db, aged, sessionID(t, tok)) }},
		{"by logout-all", func(_ person, tok tokens) { b.do("POST", logoutAllPath, nil, bearer(tok.AccessToken)...) }},
		{"by a replay", func(_ person, tok tokens) { b.refresh(tok.RefreshToken); b.refresh(tok.RefreshToken) }},
		{"long ago, so that its row is gone", func(_ person, tok tokens) {
			dbtest.Exec(t, w.db, `DELETE FROM sessions WHERE id = $1`, sessionID(t, tok))
		}},
	} {
		p := a.register()
		tok := a.login(p)
		row.end(p, tok)
		if out := a.logout(tok.RefreshToken); out.status != 204 {
			t.Errorf("over %s: got %d %s, want 204", row.name, out.status, out.body)
		}
		wantOver(t, "over "+row.name, tok, b)
	}

	// A spent token names its session as well as the current one.
	p := a.register()
	first := a.login(p)
	second := a.refresh(first.RefreshToken).tokens(t)
	if out := a.logout(first.RefreshToken); out.status != 204 {
		t.Errorf("logout with a spent token: got %d %s, want 204", out.status, out.body)
	}
	wantOver(t, "after logout with a spent token", second, b)
}

func (s *service) sessions(tok tokens) []map[string]any {
	s.t.Helper()
	a := s.get(sessionsPath, bearer(tok.AccessToken)...)
	var body struct{ Sessions []map[string]any }
	if err := json.Unmarshal(a.body, &body); err != nil || a.status != 200 {
		s.t.Fatalf("sessions: got %d %s", a.status, a.body)
	}
	return body.Sessions
}

func sessionList(t *testing.T, w *world, a, b *service) {
	p := a.register()
	twin := a.twin(p)
	a.login(twin)
	from := func(agent string) tokens {
		return a.do("POST", loginPath, p.loginBody(p.Password), "User-Agent", agent).tokens(t)
	}
	before := time.Now().Add(-time.Second)
	first, second, ended, expired := from("first/1.0"), from("second/1.0"), from("ended/1.0"), from("expired/1.0")
	a.logout(ended.RefreshToken)
	dbtest.Exec(t, w.db, `UPDATE sessions SET expires_at = clock_timestamp() - interval '1 second' WHERE id = $1`, sessionID(t, expired))
	first = b.do("POST", refreshPath, toJSON(map[string]string{"refresh_token": first.RefreshToken}), "User-Agent", "first/1.1").tokens(t)

	list := b.sessions(second)
	want := []struct {
		tok     tokens
		agent   string
		current bool
	}{{first, "first/1.1", false}, {second, "second/1.0", true}} // the last used first
	if len(list) != len(want) {
		t.Fatalf("got %d sessions, want %d: %v", len(list), len(want), list)
	}
	for i, row := range want {
		got := list[i]
		if members, want := slices.Sorted(maps.Keys(got)), []string{"client_ip", "created_at", "current", "expires_at", "last_used_at", "session_id", "user_agent"}; !slices.Equal(members, want) {
			t.Errorf("session %d: got members %q, want %q", i, members, want)
		}
		if got["session_id"] != sessionID(t, row.tok) || got["user_agent"] != row.agent || got["client_ip"] != "127.0.0.1" || got["current"] != row.current {
			t.Errorf("session %d: got %v, want %s, %s, 127.0.0.1, current %v", i, got, sessionID(t, row.tok), row.agent, row.current)
		}
		at := map[string]time.Time{}
		for _, name := range []string{"created_at", "last_used_at", "expires_at"} {
			var err error
			if at[name], err = time.Parse(time.RFC3339, fmt.Sprint(got[name])); err != nil {
				t.Errorf("session %d: %s: %v", i, name, err)
			}
		}
		used, life := at["last_used_at"], at["expires_at"].Sub(at["last_used_at"])
		if at["created_at"].Before(before) || used.After(time.Now().Add(time.Second)) || used.After(at["created_at"]) != (i == 0) || life != 14*24*time.Hour {
			t.Errorf("session %d: got %v: only the refreshed one was used after it was created, and it lives 336h from then", i, got)
		}
	}
	if a := b.do("HEAD", sessionsPath, nil, bearer(second.AccessToken)...); a.status != 200 || len(a.body) != 0 {
		t.Errorf("HEAD: got %d %q, want 200 and nothing", a.status, a.body)
	}
}

func revokeOneSession(t *testing.T, w *world, a, b *service) {
	p, stranger := a.register(), a.register()
	twin := a.twin(p)
	mine, other := a.login(p), a.login(p)
	twins, strangers := a.login(twin), a.login(stranger)
	revoke := func(s *service, tok tokens, id string) answer {
		return s.do("DELETE", sessionsPath+"/"+id, nil, bearer(tok.AccessToken)...)
	}
	for _, row := range []struct{ name, id string }{
		{"another user's", sessionID(t, strangers)},
		{"the same user id's in another tenant", sessionID(t, twins)},
		{"of nobody", newUUID()},
		{"garbage", "garbage"},
		{"quotes", "%27%20OR%20true--"},
		{"the nil UUID", "00000000-0000-0000-0000-000000000000"},
		{"a UUID without dashes", strings.ReplaceAll(sessionID(t, other), "-", "")},
		{"more than one segment", sessionID(t, other) + "/x"},
	} {
		wantCode(t, row.name, revoke(a, mine, row.id), 404, "not_found")
	}
	wantCode(t, "no id", revoke(a, mine, ""), 404, "not_found")
	for _, tok := range []tokens{mine, other, twins, strangers} {
		wantLives(t, "after revocations that found nothing", tok, b)
	}

	success := a.growth(`auth_logout_total{result="success"}`)
	out := revoke(a, mine, strings.ToUpper(sessionID(t, other)))
	if out.status != 204 || len(out.body) != 0 {
		t.Fatalf("revoke: got %d %q, want 204 and nothing", out.status, out.body)
	}
	wantOver(t, "a session that another one ended", other, b, a)
	wantLives(t, "the one that ended it", mine, b)
	if again := revoke(b, mine, sessionID(t, other)); again.status != 204 {
		t.Errorf("revoke again: got %d %s, want 204", again.status, again.body)
	}
	if out := revoke(a, mine, sessionID(t, mine)); out.status != 204 {
		t.Errorf("revoke the current one: got %d %s, want 204", out.status, out.body)
	}
	wantOver(t, "a session that ended itself", mine, b, a)
	for _, tok := range []tokens{twins, strangers} {
		wantLives(t, "after all of p's sessions were ended", tok, b)
	}
	if got := success(); got != 2 {
		t.Errorf("auth_logout_total success: got %v more, want 2", got)
	}
	wantLogged(t, a, "auth.session_revoke", out, map[string]any{"result": "success", "tenant_id": p.TenantID, "user_id": p.UserID})
	events := wantEvents(t, w, p, "auth.user.registered", "auth.user.logged_in", "auth.user.logged_in",
		"auth.session.revoked user", "auth.session.revoked user")
	if got := events[3].Data["session_id"]; got != sessionID(t, other) {
		t.Errorf("auth.session.revoked: got session_id %v, want that of the other session", got)
	}
}

func logoutAll(t *testing.T, w *world, a, b *service) {
	p, stranger := a.register(), a.register()
	twin := a.twin(p)
	twins, strangers := a.login(twin), a.login(stranger)
	all := func(tok tokens, body string, headers ...string) answer {
		return a.do("POST", logoutAllPath, []byte(body), append(bearer(tok.AccessToken), headers...)...)
	}
	tok := a.login(p)
	wantCode(t, "a member", all(tok, `{"all":true}`), 400, "invalid_request")
	wantCode(t, "an array", all(tok, `[]`), 400, "invalid_request")
	wantCode(t, "a body of another type", all(tok, `{}`, "Content-Type", "text/plain"), 415, "unsupported_media_type")
	wantLives(t, "after requests that were refused", tok, b)
	a.logout(tok.RefreshToken)

	for _, row := range []struct {
		name, body string
		headers    []string
	}{
		{"an empty body", "", nil},
		{"an empty body of no type", "", []string{"Content-Type", ""}},
		{"an empty object", "{}", nil},
	} {
		first, second := a.login(p), b.login(p)
		if out := all(first, row.body, row.headers...); out.status != 204 || len(out.body) != 0 {
			t.Fatalf("%s: got %d %q, want 204 and nothing", row.name, out.status, out.body)
		}
		wantOver(t, row.name+": the caller's", first, b, a)
		wantOver(t, row.name+": the other one", second, b, a)
	}
	wantLives(t, "the same user id in another tenant", twins, b)
	wantLives(t, "another user", strangers, b)
	in, out := "auth.user.logged_in", "auth.session.revoked logout_all"
	wantEvents(t, w, p, "auth.user.registered", in, "auth.user.logged_out", "auth.session.revoked logout",
		in, in, out, out, in, in, out, out, in, in, out, out)
}

// signed is a token of the service's own key and form with other claims.
func signed(t *testing.T, claims map[string]any) string {
	t.Helper()
	token := jwt.NewWithClaims(jwt.SigningMethodRS256, jwt.MapClaims(claims))
	token.Header["typ"], token.Header["kid"] = "at+jwt", "test-1"
	s, err := token.SignedString(keyPair().key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// bearerTokens: what is accepted at the endpoints that need a caller, and that
// what is refused there does nothing.
func bearerTokens(t *testing.T, w *world, a, b *service) {
	p, stranger := a.register(), a.register()
	tok, ended, expired, strangers := a.login(p), a.login(p), a.login(p), a.login(stranger)
	a.logout(ended.RefreshToken)
	dbtest.Exec(t, w.db, `UPDATE sessions SET expires_at = clock_timestamp() - interval '1 second' WHERE id = $1`, sessionID(t, expired))

	with := func(name string, value any) string {
		c := claims(t, tok.AccessToken)
		c[name] = value
		return signed(t, c)
	}
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none","typ":"at+jwt","kid":"test-1"}`))
	id := sessionID(t, tok)
	change := toJSON(map[string]string{"current_password": p.Password, "new_password": "another horse, another battery"})
	for _, row := range []struct {
		name    string
		headers []string
	}{
		{"none", nil},
		{"an empty one", []string{"Authorization", "Bearer "}},
		{"no scheme", []string{"Authorization", tok.AccessToken}},
		{"basic", []string{"Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte(p.Email+":"+p.Password))}},
		{"garbage", bearer("garbage")},
		{"of a session that was ended", bearer(ended.AccessToken)},
		{"of a session that is over", bearer(expired.AccessToken)},
		{"expired", bearer(with("exp", time.Now().Add(-31*time.Second).Unix()))},
		{"another user's session", bearer(with("sid", sessionID(t, strangers)))},
		{"another user, this session", bearer(with("sub", stranger.UserID))},
		{"another tenant, this session", bearer(with("tenant_id", stranger.TenantID))},
		{"no session", bearer(with("sid", nil))},
		{"a session that is no UUID", bearer(with("sid", "x"))},
		{"another audience", bearer(with("aud", "another"))},
		{"another issuer", bearer(with("iss", "another"))},
		{"no signature", bearer(none + "." + strings.Split(tok.AccessToken, ".")[1] + ".")},
		{"a payload of another token", bearer(strings.Split(tok.AccessToken, ".")[0] + "." + strings.Split(strangers.AccessToken, ".")[1] + "." + strings.Split(tok.AccessToken, ".")[2])},
	} {
		wantInvalidToken(t, row.name+": sessions", b.get(sessionsPath, row.headers...))
		wantInvalidToken(t, row.name+": revoke", b.do("DELETE", sessionsPath+"/"+id, nil, row.headers...))
		wantInvalidToken(t, row.name+": logout-all", b.do("POST", logoutAllPath, nil, row.headers...))
		wantInvalidToken(t, row.name+": password", b.do("POST", passwordPath, change, row.headers...))
	}

	wantLives(t, "after all that was refused", tok, b)
	wantLives(t, "the other user, after all that was refused", strangers, b)
	for _, scheme := range []string{"bearer ", "BEARER "} { // RFC 9110 section 11.1: in any case
		if a := b.get(sessionsPath, "Authorization", scheme+tok.AccessToken); a.status != 200 {
			t.Errorf("scheme %q: got %d %s, want 200", scheme, a.status, a.body)
		}
	}
	if a := b.do("POST", refreshPath, toJSON(map[string]string{"refresh_token": tok.RefreshToken}), bearer("garbage")...); a.status != 200 {
		t.Errorf("an endpoint that needs no caller, with a bad bearer token: got %d, want 200", a.status)
	}
}

// TestSessionLimit logs in over two replicas at once: the sessions used last
// are kept, to the number, and the others told of.
func TestSessionLimit(t *testing.T) {
	t.Parallel()
	const limit, logins = 5, 40
	w := newWorld(t)
	e := env{"MAX_SESSIONS_PER_USER": fmt.Sprint(limit)}
	replicas := []*service{w.start(cheap, unlimited, e), w.start(cheap, unlimited, e)}
	p := replicas[0].register()
	all := make([]answer, logins)
	var clients sync.WaitGroup
	next := make(chan int)
	for range 4 {
		clients.Go(func() {
			for i := range next {
				var err error
				if all[i], err = replicas[i%2].try("POST", loginPath, p.loginBody(p.Password)); err != nil {
					t.Errorf("login %d: %v", i, err)
				}
			}
		})
	}
	for i := range logins {
		next <- i
	}
	close(next)
	clients.Wait()

	const live = `SELECT id::text FROM sessions WHERE user_id = $1 AND revoked_at IS NULL ORDER BY used_at DESC`
	kept := dbtest.Query[string](t, w.db, live, p.UserID)
	if len(kept) != limit {
		t.Errorf("live sessions: got %d, want %d", len(kept), limit)
	}
	const byUse = `SELECT id::text FROM sessions WHERE user_id = $1 ORDER BY used_at DESC LIMIT $2`
	if last := dbtest.Query[string](t, w.db, byUse, p.UserID, limit); !slices.Equal(kept, last) {
		t.Errorf("live sessions: got %q, want those used last, %q", kept, last)
	}
	for i, login := range all {
		tok := login.tokens(t)
		want := 401
		if slices.Contains(kept, sessionID(t, tok)) {
			want = 200
		}
		if a := replicas[1].get(sessionsPath, bearer(tok.AccessToken)...); a.status != want {
			t.Errorf("access token of login %d: got %d, want %d", i, a.status, want)
		}
	}
	var told []any
	eventually(t, "an auth.session.revoked of every session beyond the limit", 15*time.Second, func() bool {
		told = nil
		for _, m := range eventsOf(t, w, p) {
			if m.EventType == "auth.session.revoked" && m.Data["reason"] == "limit" {
				told = append(told, m.Data["session_id"])
			}
		}
		return len(told) >= logins-limit
	})
	if slices.ContainsFunc(kept, func(id string) bool { return slices.Contains(told, any(id)) }) || len(told) != logins-limit {
		t.Errorf("auth.session.revoked with reason limit: got %d, want one of each of the %d that were revoked", len(told), logins-limit)
	}
}

// attempt is one refresh of TestRevocationIsFinal.
type attempt struct {
	status int
	begun  time.Time
	ended  time.Time
	access string
}

// contest is one round of TestRevocationIsFinal: sessions, each with clients
// that refresh it until they are refused.
type contest struct {
	t        *testing.T
	replicas []*service
	clients  sync.WaitGroup
	going    sync.WaitGroup // until every client has had an answer

	mu       sync.Mutex
	attempts map[string][]attempt // by the session's first token
}

// refresh lets n clients spread over the replicas present a token. Within the
// grace that is no replay while nobody uses the successor. A chain of one
// client goes on with what it gets.
func (c *contest) refresh(token string, n int, chain bool) {
	for i := range n {
		c.going.Add(1)
		c.clients.Go(func() {
			answered := sync.OnceFunc(c.going.Done)
			defer answered()
			unanswered := 0
			for current, step := token, i; ; step++ {
				try := attempt{begun: time.Now()}
				a, err := c.replicas[step%len(c.replicas)].try("POST", refreshPath, toJSON(map[string]string{"refresh_token": current}))
				try.ended = time.Now()
				if err != nil {
					// A connection that was opened and not used for 5 seconds is
					// closed, maybe at this moment.
					if unanswered++; chain || unanswered > 2 {
						c.t.Errorf("refresh: %v", err)
						return
					}
					continue
				}
				try.status = a.status
				if a.status == 200 {
					tok := a.tokens(c.t)
					try.access = tok.AccessToken
					if chain {
						current = tok.RefreshToken
					}
				} else if a.status != 401 || a.code() != "invalid_refresh_token" {
					c.t.Errorf("refresh: got %d %s, want 200 or 401 invalid_refresh_token", a.status, a.body)
				}
				c.mu.Lock()
				c.attempts[token] = append(c.attempts[token], try)
				c.mu.Unlock()
				answered()
				if a.status != 200 {
					return
				}
			}
		})
	}
}

// TestRevocationIsFinal races 64 clients that refresh over three replicas
// against what ends their sessions, 100 times. Once that was answered, and
// once any client was refused, no refresh begins that answers 200, and the
// access tokens answered before are worth nothing.
func TestRevocationIsFinal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	e := env{"REFRESH_REUSE_GRACE": "1m", "FORGOT_PER_HOUR_PER_EMAIL": "0", "ADMIN_TOKEN": adminToken, "MAX_SESSIONS_PER_USER": "0"}
	var replicas []*service
	port := ""
	for range 3 {
		port = freePort(t)
		replicas = append(replicas, w.startPlain(cheap, unlimited, e, env{"ADMIN_ADDR": "127.0.0.1:" + port}))
	}
	first, second, third := replicas[0], replicas[1], replicas[2]
	admin := &service{t: t, base: "http://127.0.0.1:" + port, client: third.client}
	var late atomic.Int64 // 200s that were under way when the revocation was answered

	for _, kind := range []struct {
		name   string
		rounds int
		status int
		// prepare runs before the race; what it returns ends both sessions, or
		// the one whose first token it is given.
		prepare func(p *person, round int) func(token string) answer
	}{
		{"logout", 22, 204, func(*person, int) func(string) answer {
			return func(token string) answer { return second.logout(token) }
		}},
		{"logout-all", 22, 204, func(p *person, _ int) func(string) answer {
			tok := first.login(*p)
			return func(string) answer { return third.do("POST", logoutAllPath, nil, bearer(tok.AccessToken)...) }
		}},
		{"password change", 10, 200, func(p *person, _ int) func(string) answer {
			tok, old := first.login(*p), p.Password
			p.Password = "changed to " + newUUID()
			body := toJSON(map[string]string{"current_password": old, "new_password": p.Password})
			return func(string) answer { return second.do("POST", passwordPath, body, bearer(tok.AccessToken)...) }
		}},
		{"reset", 10, 204, func(p *person, _ int) func(string) answer {
			n := len(secretsOf(t, w, *p))
			first.post(forgotPath, map[string]string{"tenant_id": p.TenantID, "email": p.Email})
			token := resetTokens(t, w, *p, n+1)[n]
			p.Password = "reset to " + newUUID()
			return func(string) answer {
				return third.post(resetPath, map[string]string{"token": token, "new_password": p.Password})
			}
		}},
		{"admin", 21, 200, func(p *person, round int) func(string) answer {
			action := "revoke-sessions"
			if round%3 == 0 {
				action = "disable" // and enabled again after the round
			}
			return func(string) answer { return admin.do("POST", adminPath(*p, action), nil, bearer(adminToken)...) }
		}},
		{"replay", 15, 401, func(*person, int) func(string) answer {
			return func(token string) answer {
				// The successor's use makes the shared token a spent one; a
				// chain is past its first token anyway.
				a := first.refresh(token)
				if a.status == 200 {
					first.refresh(a.tokens(t).RefreshToken)
				}
				return second.refresh(token)
			}
		}},
	} {
		t.Run(kind.name, func(t *testing.T) {
			p := first.register()
			for round := range kind.rounds {
				shared, chain := first.login(p), first.login(p)
				revoke := kind.prepare(&p, round)
				c := &contest{t: t, replicas: replicas, attempts: map[string][]attempt{}}
				c.refresh(shared.RefreshToken, 63, false)
				c.refresh(chain.RefreshToken, 1, true)
				c.going.Wait()
				ended := map[string]time.Time{}
				for _, tok := range []tokens{shared, chain} {
					if len(ended) > 0 && kind.name != "logout" && kind.name != "replay" {
						ended[tok.RefreshToken] = ended[shared.RefreshToken] // by the one call
						continue
					}
					if a := revoke(tok.RefreshToken); a.status != kind.status {
						t.Fatalf("round %d: got %d %s, want %d", round, a.status, a.body, kind.status)
					}
					ended[tok.RefreshToken] = time.Now()
				}
				c.clients.Wait()
				for token, attempts := range c.attempts {
					end := ended[token]
					for _, try := range attempts {
						if try.status == 401 && try.ended.Before(end) {
							end = try.ended
						}
					}
					slices.SortFunc(attempts, func(a, b attempt) int { return cmp.Compare(a.ended.UnixNano(), b.ended.UnixNano()) })
					last := ""
					for _, try := range attempts {
						if try.status != 200 {
							continue
						}
						last = try.access
						if try.begun.After(end) {
							t.Errorf("round %d: a refresh begun %v after the session was ended answered 200", round, try.begun.Sub(end))
						}
						if try.ended.After(ended[token]) {
							late.Add(1)
						}
					}
					if last != "" {
						wantInvalidToken(t, "the access token answered last", second.get(sessionsPath, bearer(last)...))
					}
				}
				if t.Failed() {
					return
				}
				admin.do("POST", adminPath(p, "enable"), nil, bearer(adminToken)...)
			}
		})
	}
	for _, s := range replicas {
		if got := len(s.logged("http.panic")); got != 0 {
			t.Errorf("http.panic lines: got %d, want 0", got)
		}
	}
	t.Logf("%d answers of 200 to refreshes that were committed before the revocation arrived after its answer", late.Load())
}
