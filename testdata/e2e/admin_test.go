package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/golang-jwt/jwt/v5"
)

const adminToken = "a token that opens the admin API"

// adminPath is an account's path, or that of an action on it.
func adminPath(p person, action string) string {
	path := "/api/admin/tenants/" + p.TenantID + "/users/" + p.UserID
	if action != "" {
		path += "/" + action
	}
	return path
}

// command runs a subcommand of the binary with the world's configuration.
func (w *world) command(t *testing.T, more env, stdin []byte, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	path, err := plainBinary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = w.config(cheap, more).list()
	cmd.Stdin = bytes.NewReader(stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errOut.String()
}

// mustCommand is command that ends the test unless it exits 0.
func (w *world) mustCommand(t *testing.T, stdin []byte, args ...string) (stdout string) {
	t.Helper()
	code, stdout, stderr := w.command(t, nil, stdin, args...)
	if code != 0 {
		t.Fatalf("%q: got exit code %d: %s", args, code, stderr)
	}
	return stdout
}

// operator is one of the two doors to an account: what it answers and the
// audit line it wrote.
type operator struct {
	name string
	act  func(t *testing.T, action string, p person, value string) (account, audit map[string]any)
}

// offices are the things of an operator's test.
type offices struct {
	*world
	a, b      *service // replicas; the admin API is a's
	admin     *service
	operators []operator
}

// TestOperatingAccounts is each action by the command line and by the admin
// API of one replica, looked at from the other.
func TestOperatingAccounts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	port := freePort(t)
	e := env{"FORGOT_PER_HOUR_PER_EMAIL": "0"}
	a := held(t, w.start(cheap, unlimited, e, env{"ADMIN_ADDR": "127.0.0.1:" + port, "ADMIN_TOKEN": adminToken}))
	b := held(t, w.start(cheap, unlimited, e))
	o := offices{world: w, a: a, b: b, admin: &service{t: t, base: "http://127.0.0.1:" + port, client: a.client}}
	o.operators = []operator{
		{"command line", func(t *testing.T, action string, p person, value string) (account, audit map[string]any) {
			t.Helper()
			args := []string{"user", action, p.TenantID, p.UserID}
			if value != "" {
				args = append(args, value)
			}
			code, stdout, stderr := w.command(t, nil, nil, args...)
			if code != 0 {
				t.Fatalf("%q: got exit code %d: %s", args, code, stderr)
			}
			if err := json.Unmarshal([]byte(stdout), &account); err != nil {
				t.Fatalf("%q: no JSON: %s", args, stdout)
			}
			if err := json.Unmarshal([]byte(stderr), &audit); err != nil {
				t.Fatalf("%q: standard error is not one line: %s", args, stderr)
			}
			return account, audit
		}},
		{"admin API", func(t *testing.T, action string, p person, value string) (account, audit map[string]any) {
			t.Helper()
			method, path, body := "POST", adminPath(p, action), ""
			switch action {
			case "get":
				method, path = "GET", adminPath(p, "")
			case "delete":
				method, path = "DELETE", adminPath(p, "")
			case "export":
				method = "GET"
			case "set-email":
				body = string(toJSON(map[string]string{"email": value}))
			case "set-claims":
				body = `{"claims":` + value + `}`
			}
			out := o.admin.do(method, path, []byte(body), bearer(adminToken)...)
			if out.status != 200 {
				t.Fatalf("%s %s: got %d %s", method, path, out.status, out.body)
			}
			return out.json(t), lineOf(t, a, "admin.action", out.header.Get("X-Trace-Id"))
		}},
	}
	for _, group := range []struct {
		name string
		test func(*testing.T, offices)
	}{
		{"who may", adminAccess},
		{"get", operatorGets},
		{"disable and enable", operatorDisables},
		{"unlock", operatorUnlocks},
		{"revoke-sessions", operatorRevokes},
		{"set-email", operatorSetsEmail},
		{"set-claims", operatorSetsClaims},
		{"claims refused", claimsRefused},
		{"claims of odd values", claimsKeepTheirValues},
		{"force-reset", operatorForcesReset},
		{"delete", operatorDeletes},
		{"export", operatorExports},
		{"refused", operatorIsRefused},
		{"introspection", introspection},
	} {
		t.Run(group.name, func(t *testing.T) { group.test(t, o) })
	}
	unlogged(t, a, adminToken)
}

// each runs a test for both doors, each with an account of its own.
func (o offices) each(t *testing.T, test func(t *testing.T, act func(action, value string) map[string]any, p person)) {
	for _, operator := range o.operators {
		t.Run(operator.name, func(t *testing.T) {
			p := o.a.register()
			test(t, func(action, value string) map[string]any {
				t.Helper()
				account, audit := operator.act(t, action, p, value)
				for name, want := range map[string]any{"event": "admin.action", "level": "INFO", "action": action, "result": "success", "tenant_id": p.TenantID, "user_id": p.UserID} {
					if audit[name] != want {
						t.Errorf("audit line of %s: got %s %v, want %v", action, name, audit[name], want)
					}
				}
				return account
			}, p)
		})
	}
}

func adminAccess(t *testing.T, o offices) {
	p := o.a.register()
	tok := o.a.login(p)
	type request struct{ method, path string }
	requests := []request{{"GET", adminPath(p, "")}, {"DELETE", adminPath(p, "")}, {"GET", adminPath(p, "export")}, {"POST", "/api/admin/introspect"}}
	for _, action := range []string{"disable", "enable", "unlock", "revoke-sessions", "set-email", "set-claims", "force-reset"} {
		requests = append(requests, request{"POST", adminPath(p, action)})
	}
	for _, r := range requests {
		for _, s := range []*service{o.a, o.b} { // PORT
			out, err := s.try(r.method, r.path, []byte("{}"), bearer(adminToken)...)
			if err != nil || out.status != 404 {
				t.Errorf("%s %s on PORT: got %d %s, want 404", r.method, r.path, out.status, out.body)
			}
		}
		for _, row := range []struct {
			name    string
			headers []string
		}{
			{"none", nil},
			{"an empty one", bearer("")},
			{"a wrong one", bearer(strings.Repeat("x", len(adminToken)))},
			{"cut off", bearer(adminToken[:len(adminToken)-1])},
			{"and more", bearer(adminToken + "x")},
			{"another case", bearer(strings.ToUpper(adminToken))},
			{"no scheme", []string{"Authorization", adminToken}},
			{"basic", []string{"Authorization", "Basic " + adminToken}},
			{"the account's own", bearer(tok.AccessToken)},
		} {
			out := o.admin.do(r.method, r.path, []byte("{}"), row.headers...)
			wantCode(t, r.method+" "+r.path+", token: "+row.name, out, 401, "unauthorized")
			if got := out.header.Get("WWW-Authenticate"); !strings.HasPrefix(got, "Bearer") {
				t.Errorf("%s %s: got WWW-Authenticate %q, want Bearer", r.method, r.path, got)
			}
		}
		wantCode(t, r.path+", token in the query", o.admin.do(r.method, r.path+"?access_token="+url.QueryEscape(adminToken), []byte("{}")), 401, "unauthorized")
	}
	wantLives(t, "after all that was refused", tok, o.b)
	var refused []map[string]any
	for _, line := range o.a.logged("admin.action") {
		if line["result"] == "unauthorized" && line["client_ip"] == "127.0.0.1" {
			refused = append(refused, line)
		}
	}
	if len(refused) == 0 {
		t.Error("no admin.action line of a caller without the token")
	}

	for _, row := range []struct {
		name string
		env  env
		want string
	}{
		{"31 bytes", env{"ADMIN_ADDR": "127.0.0.1:" + freePort(t), "ADMIN_TOKEN": adminToken[:31]}, "ADMIN_TOKEN"},
		{"no address", env{"ADMIN_TOKEN": adminToken}, "ADMIN_TOKEN"},
	} {
		code, stdout, stderr := o.command(t, row.env, nil)
		if code != 2 || !strings.Contains(stderr, row.want) || strings.Contains(stdout+stderr, adminToken[:31]) {
			t.Errorf("%s: got exit code %d, %s%s; want 2, naming %s and no value", row.name, code, stdout, stderr, row.want)
		}
	}
}

func operatorGets(t *testing.T, o offices) {
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		o.a.login(p)
		o.a.do("POST", loginPath, p.loginBody("wrong guess"))
		got := act("get", "")
		for _, name := range []string{"created_at", "password_changed_at"} {
			if at, err := time.Parse(time.RFC3339, fmt.Sprint(got[name])); err != nil || time.Since(at).Abs() > time.Minute {
				t.Errorf("%s: got %v, want a moment ago", name, got[name])
			}
			delete(got, name)
		}
		want := map[string]any{
			"tenant_id": p.TenantID, "user_id": p.UserID, "email": p.Email, "has_password": true, "disabled_at": nil,
			"locked_until": nil, "failed_logins": 1.0, "live_sessions": 1.0, "claims": map[string]any{},
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

func operatorDisables(t *testing.T, o offices) {
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		twin := o.a.twin(p)
		tok, twins := o.a.login(p), o.b.login(twin)
		if got := act("disable", ""); got["disabled_at"] == nil || got["live_sessions"] != 0.0 {
			t.Errorf("disable: got %v", got)
		}
		wantOver(t, "disabled", tok, o.b, o.a)
		refused := o.b.do("POST", loginPath, p.loginBody(p.Password))
		wantCode(t, "login, disabled", refused, 401, "invalid_credentials")
		wantLives(t, "the same user id in another tenant", twins, o.b)
		act("disable", "") // changes nothing
		if got := act("enable", ""); got["disabled_at"] != nil {
			t.Errorf("enable: got %v", got)
		}
		act("enable", "")
		wantOver(t, "of before, enabled again", tok, o.b, o.a)
		o.b.login(p)
		wantEvents(t, o.world, p, "auth.user.registered", "auth.user.logged_in", "auth.user.disabled", "auth.session.revoked disabled",
			"auth.user.enabled", "auth.user.logged_in")
	})
}

func operatorUnlocks(t *testing.T, o offices) {
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		for range 5 {
			o.b.do("POST", loginPath, p.loginBody("wrong guess"))
		}
		wantCode(t, "login, locked", o.b.do("POST", loginPath, p.loginBody(p.Password)), 423, "locked")
		got := act("get", "")
		until, err := time.Parse(time.RFC3339, fmt.Sprint(got["locked_until"]))
		if left := time.Until(until); err != nil || left < 14*time.Minute || left > 15*time.Minute {
			t.Errorf("locked_until: got %v, want in up to 15 minutes", got["locked_until"])
		}
		if got := act("unlock", ""); got["locked_until"] != nil {
			t.Errorf("unlock: got %v", got)
		}
		for range 4 { // the count began at zero
			wantCode(t, "a guess", o.b.do("POST", loginPath, p.loginBody("wrong guess")), 401, "invalid_credentials")
		}
		o.b.login(p)
		wantEvents(t, o.world, p, "auth.user.registered", "auth.lockout", "auth.user.unlocked", "auth.user.logged_in")
	})
}

func operatorRevokes(t *testing.T, o offices) {
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		twin := o.a.twin(p)
		first, second, twins := o.a.login(p), o.b.login(p), o.b.login(twin)
		if got := act("revoke-sessions", ""); got["live_sessions"] != 0.0 {
			t.Errorf("got %v", got)
		}
		wantOver(t, "the first session", first, o.b, o.a)
		wantOver(t, "the second session", second, o.b, o.a)
		wantLives(t, "the same user id in another tenant", twins, o.b)
		o.b.login(p)
		in, out := "auth.user.logged_in", "auth.session.revoked admin"
		wantEvents(t, o.world, p, "auth.user.registered", in, in, out, out, in)
	})
}

func operatorSetsEmail(t *testing.T, o offices) {
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		tok := o.a.login(p)
		o.a.forgot(p)
		mailed := resetTokens(t, o.world, p, 1)[0]
		moved := p
		moved.Email = "moved." + p.Email
		if got := act("set-email", " "+strings.ToUpper(moved.Email)); got["email"] != moved.Email {
			t.Errorf("got %v, want %s", got["email"], moved.Email)
		}
		wantCode(t, "login with the old e-mail", o.b.do("POST", loginPath, p.loginBody(p.Password)), 401, "invalid_credentials")
		wantCode(t, "the reset token that went to the old e-mail", o.b.reset(mailed, "another horse, another battery"), 400, "invalid_reset_token")
		o.b.login(moved)
		wantLives(t, "a session of before", tok, o.b)
		next := newPerson()
		next.TenantID, next.Email = p.TenantID, p.Email
		if out := o.b.post(registerPath, next); out.status != 201 {
			t.Errorf("register with the e-mail that is free now: got %d %s, want 201", out.status, out.body)
		}
		events := wantEvents(t, o.world, p, "auth.user.registered", "auth.user.logged_in", "auth.user.password_reset_requested",
			"auth.user.email_changed", "auth.user.logged_in")
		if got := events[3].Data["email"]; got != moved.Email {
			t.Errorf("auth.user.email_changed: got email %v, want %s", got, moved.Email)
		}
	})
}

// platformClaims are what an API of the first version asks of its callers.
type platformClaims struct {
	jwt.RegisteredClaims
	TenantID  string   `json:"tenant_id"`
	Roles     []string `json:"roles"`
	Perms     []string `json:"perms"`
	ActorType string   `json:"actor_type"`
	Version   int      `json:"ver"`
}

func (c platformClaims) Validate() error {
	if c.TenantID == "" || !slices.Contains(c.Roles, "editor") || !slices.Contains(c.Perms, "articles:write") || c.ActorType != "user" || c.Version != 2 {
		return fmt.Errorf("roles %q, perms %q, actor_type %q, ver %d", c.Roles, c.Perms, c.ActorType, c.Version)
	}
	return nil
}

func operatorSetsClaims(t *testing.T, o offices) {
	keys := o.b.get("/.well-known/jwks.json").body
	verify := func(token string) (*platformClaims, error) {
		c := &platformClaims{}
		_, err := jwt.ParseWithClaims(token, c, func(token *jwt.Token) (any, error) { return keyNamed(keys, token.Header["kid"]) },
			jwt.WithValidMethods([]string{"RS256"}), jwt.WithIssuer("identity-auth"), jwt.WithAudience("identity-auth"), jwt.WithExpirationRequired())
		return c, err
	}
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		before := o.b.login(p)
		if _, err := verify(before.AccessToken); err == nil {
			t.Fatal("the verifier asks for nothing")
		}
		got := act("set-claims", `{"roles": ["editor", "reader"], "perms": ["articles:write"], "actor_type": "user", "ver": 2, "deep": {"sub": [1.50, null, "é"]}}`)
		want := map[string]any{"roles": []any{"editor", "reader"}, "perms": []any{"articles:write"}, "actor_type": "user", "ver": 2.0, "deep": map[string]any{"sub": []any{1.5, nil, "é"}}}
		if !reflect.DeepEqual(got["claims"], want) {
			t.Errorf("got claims %v, want %v", got["claims"], want)
		}
		login, refresh := o.b.login(p), o.b.refresh(before.RefreshToken).tokens(t)
		for name, token := range map[string]string{"login": login.AccessToken, "refresh": refresh.AccessToken} {
			c, err := verify(token)
			if err != nil || c.Subject != p.UserID {
				t.Errorf("after the next %s: the verifier refuses: %v", name, err)
			}
			all := claims(t, token)
			for member, value := range want {
				if !reflect.DeepEqual(all[member], value) {
					t.Errorf("after the next %s: got %s %v, want %v", name, member, all[member], value)
				}
			}
		}
		wantLives(t, "with claims of its own", login, o.a)
		changed := o.b.changePassword(login, p.Password, "another horse, another battery").tokens(t)
		if _, err := verify(changed.AccessToken); err != nil {
			t.Errorf("after a password change: the verifier refuses: %v", err)
		}
		act("set-claims", `{}`)
		bare := claims(t, o.a.refresh(changed.RefreshToken).tokens(t).AccessToken)
		for member := range want {
			if _, there := bare[member]; there {
				t.Errorf("claims taken away: %s is still in the token", member)
			}
		}
		events := wantEvents(t, o.world, p, "auth.user.registered", "auth.user.logged_in", "auth.user.claims_changed", "auth.user.logged_in",
			"auth.token.refreshed", "auth.user.password_changed change", "auth.session.revoked password_change", "auth.user.claims_changed", "auth.token.refreshed")
		if bytes.Contains(events[2].Raw, []byte("editor")) {
			t.Errorf("the event tells the claims: %s", events[2].Raw)
		}
	})
}

// padded is a claims object of n bytes.
func padded(n int) string { return `{"x":"` + strings.Repeat("x", n-len(`{"x":""}`)) + `"}` }

func claimsRefused(t *testing.T, o offices) {
	p := o.a.register()
	set := func(claims string) answer {
		return o.admin.do("POST", adminPath(p, "set-claims"), []byte(`{"claims":`+claims+`}`), bearer(adminToken)...)
	}
	if out := set(padded(4 << 10)); out.status != 200 {
		t.Errorf("4 KiB: got %d %s, want 200", out.status, out.body)
	}
	o.b.login(p)
	if out := set(`{"kept":true}`); out.status != 200 {
		t.Fatalf("set-claims: got %d %s", out.status, out.body)
	}
	rows := []struct{ name, claims string }{
		{"more than 4 KiB", padded(4<<10 + 1)},
		{"null", `null`},
		{"an array", `[]`},
		{"a string", `"roles"`},
		{"a duplicate", `{"roles":[],"roles":["admin"]}`},
		{"a duplicate, escaped", `{"roles":[],"r\u006fles":["admin"]}`},
		{"a duplicate, deep", `{"a":{"b":1,"b":2}}`},
		{"half a surrogate pair", `{"a":"\ud800"}`},
	}
	for _, name := range []string{
		"iss", "sub", "aud", "exp", "nbf", "iat", "jti", // RFC 7519
		"client_id", "auth_time", "acr", "amr", "scope", // RFC 9068
		"tenant_id", "sid", // ours
		"SUB", "Tenant_ID", "\u017fid", "\\u0073ub",
	} {
		rows = append(rows, struct{ name, claims string }{"reserved: " + name, `{"` + name + `":"x"}`})
	}
	for i, row := range rows {
		wantCode(t, row.name, set(row.claims), 400, "invalid_request")
		if i%5 != 0 {
			continue
		}
		if code, _, stderr := o.command(t, nil, nil, "user", "set-claims", p.TenantID, p.UserID, row.claims); code != 1 || !strings.Contains(stderr, "claims ") {
			t.Errorf("%s by command line: got exit code %d, %s; want 1, naming claims", row.name, code, stderr)
		}
	}
	if got := claims(t, o.b.login(p).AccessToken); got["kept"] != true {
		t.Errorf("claims after all that was refused: got %v, want those of before", got)
	}
}

// claimsKeepTheirValues: what is accepted stands in the token as it was set,
// and verifiers read it; what cannot be kept so is refused. No value shuts an
// account out.
func claimsKeepTheirValues(t *testing.T, o offices) {
	peers := verifiers(t, o.b, "identity-auth", "identity-auth")
	for _, value := range []string{
		`"a\u0000b"`, `"\u0000"`, `1e400`, `-1e-400`, `1e9000`, `1e131000`, `1e200000`, `[` + strings.Repeat(`1e9999,`, 400) + `0]`, `[` + strings.Repeat(`1e300,`, 600) + `0]`,
		`9007199254740993`, `0.1`, `1.0`, `-0`, `"<&>\u2028"`, `"\ud834\udd1e"`, `[[[[]]]]`, `{"":null}`, `true`, `""`,
	} {
		p := o.a.register()
		name := fmt.Sprintf("%.30s", value)
		out := o.admin.do("POST", adminPath(p, "set-claims"), []byte(`{"claims":{"v":`+value+`}}`), bearer(adminToken)...)
		if out.status != 200 {
			wantCode(t, name, out, 400, "invalid_request")
		}
		login := o.b.do("POST", loginPath, p.loginBody(p.Password))
		if login.status != 200 {
			t.Errorf("%s: login: got %d %s, want 200", name, login.status, login.body)
			continue
		}
		tok := login.tokens(t)
		wantLives(t, name, tok, o.a)
		if len(tok.AccessToken) > 8<<10 {
			t.Errorf("%s: got an access token of %d bytes", name, len(tok.AccessToken))
		}
		if out.status != 200 {
			continue
		}
		for _, peer := range peers {
			got, err := peer.verify(tok.AccessToken)
			var want any
			if err == nil {
				err = json.Unmarshal([]byte(value), &want)
			}
			if err != nil || !reflect.DeepEqual(got["v"], want) {
				t.Errorf("%s: %s reads %v, %v", name, peer.name, got["v"], err)
			}
		}
	}
}

func operatorForcesReset(t *testing.T, o offices) {
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		const next = "another horse, another battery"
		tok := o.a.login(p)
		o.a.forgot(p)
		resetTokens(t, o.world, p, 1)
		if got := act("force-reset", ""); got["has_password"] != false || got["live_sessions"] != 0.0 {
			t.Errorf("got %v", got)
		}
		wantOver(t, "a session of before", tok, o.b, o.a)
		wantCode(t, "login with the old password", o.b.do("POST", loginPath, p.loginBody(p.Password)), 401, "invalid_credentials")
		wantCode(t, "login with an empty password", o.b.do("POST", loginPath, p.loginBody("")), 401, "invalid_credentials")
		list := resetTokens(t, o.world, p, 2)
		wantCode(t, "the reset token of before", o.b.reset(list[0], next), 400, "invalid_reset_token")
		if out := o.b.reset(list[1], next); out.status != 204 {
			t.Errorf("reset: got %d %s, want 204", out.status, out.body)
		}
		o.b.login(p.with(next))
		requested := "auth.user.password_reset_requested"
		wantEvents(t, o.world, p, "auth.user.registered", "auth.user.logged_in", requested, "auth.session.revoked admin", requested,
			"auth.user.password_changed reset", "auth.user.logged_in")
	})
}

// operatorDeletes makes a person leave a trace everywhere, some of it not yet
// relayed, and then looks for it in every table.
func operatorDeletes(t *testing.T, o offices) {
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		twin := newPerson() // the same user id, in another tenant
		twin.UserID = p.UserID
		if out := o.a.post(registerPath, twin); out.status != 201 {
			t.Fatalf("register: got %d %s", out.status, out.body)
		}
		twins := o.b.login(twin)
		// What p leaves here from now on is all there is.
		dbtest.Exec(t, o.db, `DELETE FROM guards; DELETE FROM rate_windows`)
		old := p
		tok, spent := o.a.login(p), o.a.login(p)
		o.a.refresh(spent.RefreshToken)
		o.a.refresh(spent.RefreshToken)
		o.a.do("POST", loginPath, p.loginBody("wrong guess"))
		act("set-claims", `{"roles":["editor"],"mail":"`+p.Email+`"}`)
		p.Email = "moved." + p.Email
		act("set-email", p.Email)
		for range 5 {
			o.b.do("POST", loginPath, p.loginBody("wrong guess"))
		}
		limited := p
		limited.UserID = newUUID()
		o.a.post(registerPath, limited)
		o.a.forgot(p)
		reset := resetTokens(t, o.world, p, 1)[0]
		o.nats.Stop()
		o.b.forgot(p)
		sessions := dbtest.Value[int](t, o.db, `SELECT count(*) FROM sessions WHERE user_id = $1 AND tenant_id = $2`, p.UserID, p.TenantID)
		if sessions != 2 {
			t.Fatalf("sessions: got %d, want 2", sessions)
		}

		act("delete", "")
		for _, table := range []string{"guards", "rate_windows"} { // the addresses stand there as hashes
			if n := dbtest.Value[int](t, o.db, `SELECT count(*) FROM `+table); n != 0 {
				t.Errorf("%s: got %d rows of the deleted, want 0", table, n)
			}
		}
		wantOver(t, "deleted", tok, o.b, o.a)
		wantCode(t, "login, deleted", o.b.do("POST", loginPath, p.loginBody(p.Password)), 401, "invalid_credentials")
		wantCode(t, "delete again", o.admin.do("DELETE", adminPath(p, ""), nil, bearer(adminToken)...), 404, "not_found")
		o.nats.Restart()
		eventually(t, "the events of the deleted are relayed and gone", 30*time.Second, func() bool {
			return dbtest.Value[int](t, o.db, `SELECT count(*) FROM outbox WHERE user_id = $1 AND tenant_id = $2`, p.UserID, p.TenantID) == 0
		})
		// The twin has the same user id, so look for all else.
		trace := strings.Join([]string{p.TenantID, strings.ReplaceAll(p.TenantID, "-", ""), strings.ReplaceAll(old.Email, ".", "\\.")}, "|")
		for _, table := range tables(t, o.world) {
			for _, row := range dbtest.Query[string](t, o.db, `SELECT t::text FROM `+table+` AS t WHERE t::text ~* $1`, trace) {
				t.Errorf("%s still has %s", table, row)
			}
		}
		wantLives(t, "the same user id in another tenant", twins, o.b)
		events := eventsOf(t, o.world, p)
		var types []string
		for _, m := range events {
			types = append(types, m.EventType)
		}
		if last := types[len(types)-1]; last != "auth.user.deleted" || len(events) != len(slices.Compact(slices.Sorted(slices.Values(eventIDs(events))))) {
			t.Errorf("events: got %q, want auth.user.deleted at the end, each once", types)
		}
		if n := len(secretsOf(t, o.world, p)); n != 1 {
			t.Errorf("reset tokens for the mailer: got %d, want the one from before the delete alone", n)
		}

		// The same ids again.
		if out := o.b.post(registerPath, old); out.status != 201 {
			t.Fatalf("register again: got %d %s, want 201", out.status, out.body)
		}
		wantOver(t, "registered again", tok, o.b, o.a)
		wantCode(t, "the old reset token", o.b.reset(reset, "another horse, another battery"), 400, "invalid_reset_token")
		again := o.b.login(old)
		if list := o.a.sessions(again); len(list) != 1 {
			t.Errorf("sessions of the new account: got %d, want 1", len(list))
		}
		if got := claims(t, again.AccessToken); got["roles"] != nil || got["mail"] != nil {
			t.Errorf("claims of the new account: got %v", got)
		}
		if got := act("get", ""); got["email"] != old.Email || got["failed_logins"] != 0.0 || got["locked_until"] != nil || got["live_sessions"] != 1.0 || !reflect.DeepEqual(got["claims"], map[string]any{}) {
			t.Errorf("the new account: got %v", got)
		}
	})
}

func eventIDs(events []message) (ids []string) {
	for _, m := range events {
		ids = append(ids, m.EventID)
	}
	return ids
}

func operatorExports(t *testing.T, o offices) {
	o.each(t, func(t *testing.T, act func(action, value string) map[string]any, p person) {
		tok := o.a.do("POST", loginPath, p.loginBody(p.Password), "User-Agent", "exported/1.0").tokens(t)
		ended := o.a.login(p)
		o.a.logout(ended.RefreshToken)
		o.a.forgot(p)
		token := resetTokens(t, o.world, p, 1)[0]
		act("set-claims", `{"roles":["editor"]}`)
		got := act("export", "")
		text := string(toJSON(got))
		account, _ := got["account"].(map[string]any)
		if account["email"] != p.Email || account["user_id"] != p.UserID || !reflect.DeepEqual(account["claims"], map[string]any{"roles": []any{"editor"}}) {
			t.Errorf("account: got %v", account)
		}
		var sessions []string
		for _, s := range got["sessions"].([]any) {
			sessions = append(sessions, s.(map[string]any)["session_id"].(string))
		}
		if want := []string{sessionID(t, tok), sessionID(t, ended)}; !slices.Equal(sessions, want) || !strings.Contains(text, "exported/1.0") {
			t.Errorf("sessions: got %q, want %q", sessions, want)
		}
		var types []string
		for _, e := range got["events"].([]any) {
			types = append(types, e.(map[string]any)["event_type"].(string))
		}
		in := "auth.user.logged_in"
		if want := []string{"auth.user.registered", in, in, "auth.user.logged_out", "auth.session.revoked", "auth.user.password_reset_requested", "auth.user.claims_changed"}; !slices.Equal(types, want) {
			t.Errorf("events: got %q, want %q", types, want)
		}
		for _, secret := range []string{"$argon2", "_hash", "sealed", token, tok.RefreshToken, p.Password} {
			if strings.Contains(text, secret) {
				t.Errorf("the export holds %q", secret)
			}
		}
	})
}

func operatorIsRefused(t *testing.T, o offices) {
	p, other := o.a.register(), o.a.register()
	other.TenantID = p.TenantID
	if out := o.a.post(registerPath, other); out.status != 201 {
		t.Fatalf("register: got %d %s", out.status, out.body)
	}
	nobody := newPerson()
	elsewhere := p
	elsewhere.TenantID = newUUID()
	for _, target := range []struct {
		name string
		p    person
	}{
		{"nobody", nobody},
		{"a user of another tenant", elsewhere},
		{"ids that are none", person{TenantID: "x", UserID: "y"}},
	} {
		for _, action := range []string{"get", "disable", "enable", "unlock", "revoke-sessions", "force-reset", "delete", "export"} {
			method, path := "POST", adminPath(target.p, action)
			switch action {
			case "get":
				method, path = "GET", adminPath(target.p, "")
			case "delete":
				method, path = "DELETE", adminPath(target.p, "")
			case "export":
				method = "GET"
			}
			out := o.admin.do(method, path, nil, bearer(adminToken)...)
			wantCode(t, action+": "+target.name, out, 404, "not_found")
			if line := lineOf(t, o.a, "admin.action", out.header.Get("X-Trace-Id")); line["action"] != action || line["result"] == "success" {
				t.Errorf("audit line of %s: got %v", action, line)
			}
		}
	}
	code, stdout, stderr := o.command(t, nil, nil, "user", "get", nobody.TenantID, nobody.UserID)
	if code != 1 || stdout != "" || !strings.Contains(stderr, "identity-auth: ") || !strings.Contains(stderr, `"action":"get"`) {
		t.Errorf("get of nobody: got exit code %d, %q, %q; want 1, the audit line and why", code, stdout, stderr)
	}
	for _, row := range []struct {
		action, body string
		status       int
		code         string
	}{
		{"set-email", `{"email":"no e-mail"}`, 400, "invalid_request"},
		{"set-email", `{}`, 400, "invalid_request"},
		{"set-email", `{"email":null}`, 400, "invalid_request"},
		{"set-email", `{"email":"` + other.Email + `"}`, 409, "already_registered"},
		{"set-claims", `{}`, 400, "invalid_request"},
		{"set-claims", `{"claims":{},"more":1}`, 400, "invalid_request"},
		{"disable", `{"user":"x"}`, 400, "invalid_request"},
		{"disable", `[]`, 400, "invalid_request"},
		{"rename", ``, 404, "not_found"},
	} {
		wantCode(t, row.action+" "+row.body, o.admin.do("POST", adminPath(p, row.action), []byte(row.body), bearer(adminToken)...), row.status, row.code)
	}
	wantCode(t, "disable by GET", o.admin.get(adminPath(p, "disable"), bearer(adminToken)...), 405, "method_not_allowed")
	o.b.login(p)
	if code, _, stderr := o.command(t, nil, nil, "user", "set-email", p.TenantID, p.UserID, other.Email); code != 1 || strings.Contains(stderr, other.Email) {
		t.Errorf("set-email to one that is taken: got exit code %d, %s; want 1, without the e-mail", code, stderr)
	}
	for _, args := range [][]string{
		{}, {"get"}, {"get", p.TenantID}, {"get", p.TenantID, "--email"}, {"get", p.TenantID, p.UserID, "more"},
		{"set-email", p.TenantID, p.UserID}, {"set-claims", p.TenantID, p.UserID, "{}", "more"}, {"rename", p.TenantID, p.UserID},
	} {
		if code, _, stderr := o.command(t, nil, nil, append([]string{"user"}, args...)...); code != 2 || !strings.Contains(stderr, "usage:") {
			t.Errorf("user %q: got exit code %d, %s; want 2 and the usage", args, code, stderr)
		}
	}
	// By e-mail, in any case.
	var found map[string]any
	stdout = o.mustCommand(t, nil, "user", "get", strings.ToUpper(p.TenantID), "--email", strings.ToUpper(p.Email))
	if err := json.Unmarshal([]byte(stdout), &found); err != nil || found["user_id"] != p.UserID {
		t.Errorf("get by e-mail: got %s", stdout)
	}
	byEmail := "/api/admin/tenants/" + p.TenantID + "/users/" + url.PathEscape(p.Email)
	if out := o.admin.get(byEmail, bearer(adminToken)...); out.status != 200 || out.json(t)["user_id"] != p.UserID {
		t.Errorf("GET by e-mail: got %d %s", out.status, out.body)
	}
}

// introspection is RFC 7662.
func introspection(t *testing.T, o offices) {
	form := func(values url.Values, headers ...string) answer {
		t.Helper()
		headers = append(append(bearer(adminToken), "Content-Type", "application/x-www-form-urlencoded"), headers...)
		return o.admin.do("POST", "/api/admin/introspect", []byte(values.Encode()), headers...)
	}
	ask := func(token string) answer { t.Helper(); return form(url.Values{"token": {token}}) }
	inactive := func(what, token string) {
		t.Helper()
		wantBody(t, what, ask(token), 200, map[string]any{"active": false}) // section 2.2: and nothing more
	}
	p := o.a.register()
	first := o.b.login(p)
	tok := o.b.refresh(first.RefreshToken).tokens(t)

	c := claims(t, tok.AccessToken)
	want := map[string]any{"active": true, "token_type": "access_token"}
	for _, name := range []string{"iss", "sub", "aud", "client_id", "jti", "iat", "exp", "tenant_id", "sid"} {
		want[name] = c[name]
	}
	wantBody(t, "an access token", ask(tok.AccessToken), 200, want)
	wantBody(t, "the access token of before the refresh", ask(first.AccessToken), 200, func() map[string]any {
		w, c := maps.Clone(want), claims(t, first.AccessToken)
		w["jti"], w["iat"], w["exp"] = c["jti"], c["iat"], c["exp"]
		return w
	}())
	wantBody(t, "with a hint", form(url.Values{"token": {tok.AccessToken}, "token_type_hint": {"refresh_token"}}), 200, want)
	refresh := ask(tok.RefreshToken)
	got := refresh.json(t)
	exp, _ := got["exp"].(float64)
	if left := time.Until(time.Unix(int64(exp), 0)); left < 14*24*time.Hour-time.Minute || left > 14*24*time.Hour {
		t.Errorf("exp of a refresh token: got in %v, want in 336h", left)
	}
	delete(got, "exp")
	if want := map[string]any{"active": true, "token_type": "refresh_token", "iss": c["iss"], "sub": p.UserID, "client_id": c["client_id"], "tenant_id": p.TenantID, "sid": c["sid"]}; !reflect.DeepEqual(got, want) {
		t.Errorf("a refresh token: got %v, want %v", got, want)
	}
	if out := o.b.refresh(tok.RefreshToken); out.status != 200 {
		t.Errorf("refresh after introspection: got %d, want 200: to look is not to use", out.status)
	} else {
		tok = out.tokens(t)
	}

	inactive("a spent refresh token", first.RefreshToken)
	wantLives(t, "after the introspection of a spent token: it was not presented by its holder", tok, o.b)
	expired := maps.Clone(c)
	expired["exp"] = time.Now().Add(-31 * time.Second).Unix()
	o.a.forgot(p)
	for _, row := range []struct{ name, token string }{
		{"an expired access token", signed(t, expired)},
		{"empty", ""},
		{"garbage", "garbage"},
		{"a mangled refresh token", tok.RefreshToken[:len(tok.RefreshToken)-1]},
		{"a mangled access token", tok.AccessToken[:len(tok.AccessToken)-1]},
		{"no signature", strings.Join(strings.Split(tok.AccessToken, ".")[:2], ".") + "."},
		{"a reset token", resetTokens(t, o.world, p, 1)[0]},
		{"the admin token", adminToken},
		{"longer than any token", strings.Repeat("x", 60<<10)},
	} {
		inactive(row.name, row.token)
	}
	dbtest.Exec(t, o.db, `UPDATE sessions SET expires_at = clock_timestamp() - interval '1 second' WHERE id = $1`, sessionID(t, tok))
	inactive("an access token of a session that is over", tok.AccessToken)
	inactive("a refresh token of a session that is over", tok.RefreshToken)
	revoked := o.b.login(p)
	o.b.logout(revoked.RefreshToken)
	inactive("an access token of a revoked session", revoked.AccessToken)
	inactive("a refresh token of a revoked session", revoked.RefreshToken)

	wantCode(t, "JSON", o.admin.post("/api/admin/introspect", map[string]string{"token": "x"}, bearer(adminToken)...), 415, "unsupported_media_type")
	wantCode(t, "no type", form(url.Values{"token": {"x"}}, "Content-Type", ""), 415, "unsupported_media_type")
	wantCode(t, "no token", form(url.Values{}), 400, "invalid_request")
	wantCode(t, "two tokens", form(url.Values{"token": {"x", "y"}}), 400, "invalid_request")
	wantCode(t, "a broken form", o.admin.do("POST", "/api/admin/introspect", []byte("token=%zz"), append(bearer(adminToken), "Content-Type", "application/x-www-form-urlencoded")...), 400, "invalid_request")
	wantCode(t, "too large", form(url.Values{"token": {strings.Repeat("x", 65<<10)}}), 413, "body_too_large")
	wantCode(t, "by GET", o.admin.get("/api/admin/introspect?token=x", bearer(adminToken)...), 405, "method_not_allowed")
	wantCode(t, "the token in the query", o.admin.do("POST", "/api/admin/introspect?token=x", nil, append(bearer(adminToken), "Content-Type", "application/x-www-form-urlencoded")...), 400, "invalid_request")
	unlogged(t, o.a, tok.AccessToken, tok.RefreshToken, revoked.AccessToken, revoked.RefreshToken)
}
