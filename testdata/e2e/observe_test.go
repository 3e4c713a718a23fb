package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// series are the counters of the contract that stand at 0 from the start, with
// every value of their label.
var series = map[string][]string{
	"auth_register_total{result=%q}":                {"success", "weak_password", "conflict", "rate_limited", "hash_busy", "invalid", "unauthorized", "unavailable", "error"},
	"auth_login_total{result=%q}":                   {"success", "failure", "locked", "rate_limited", "hash_busy", "invalid", "unavailable", "error"},
	"auth_refresh_total{result=%q}":                 {"success", "replay", "expired", "revoked", "invalid", "rate_limited", "reused", "unavailable", "error"},
	"auth_logout_total{result=%q}":                  {"success", "invalid", "unavailable", "error"},
	"auth_password_change_total{result=%q}":         {"success", "failure", "weak_password", "locked", "hash_busy", "invalid", "unavailable", "error"},
	"auth_password_reset_total{result=%q}":          {"success", "weak_password", "invalid", "hash_busy", "unavailable", "error"},
	"auth_lockouts_total":                           nil,
	"auth_rate_limited_total{scope=%q}":             {"ip", "email", "session"},
	"auth_password_hash_duration_seconds_count":     nil,
	"auth_password_hash_wait_seconds_count":         nil,
	"auth_password_hashes_in_flight":                nil,
	"auth_outbox_pending":                           nil,
	"auth_outbox_oldest_seconds":                    nil,
	"auth_events_published_total{type=%q}":          eventTypes,
	"auth_events_publish_failures_total{type=%q}":   eventTypes,
	`auth_db_pool_connections{state=%q}`:            {"idle", "used", "max"},
	`auth_dependency_up{dep=%q}`:                    {"db", "nats"},
	`auth_jwt_key_info{kid="test-1",role="current"`: nil,
	"auth_build_info{":                              nil,
}

var eventTypes = []string{
	"auth.user.registered", "auth.user.logged_in", "auth.token.refreshed", "auth.user.logged_out", "auth.session.revoked",
	"auth.user.password_changed", "auth.user.password_reset_requested",
	"auth.user.disabled", "auth.user.enabled", "auth.user.deleted", "auth.user.email_changed", "auth.user.imported",
	"auth.lockout", "security.refresh_replay_detected",
}

// notZero are those that are something else on a service that is ready.
var notZero = []string{"auth_db_pool_connections", "auth_dependency_up", "auth_jwt_key_info", "auth_build_info"}

func TestMetricsOfAFreshServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited))
	a := s.get("/metrics")
	if got := a.header.Get("Content-Type"); !strings.HasPrefix(got, "text/plain; version=0.0.4") {
		t.Errorf("got Content-Type %q, want that of the text format", got)
	}
	got := samples(a)
	families := map[string]bool{"auth_http_request_duration_seconds": true}
	for form, values := range series {
		families[strings.TrimSuffix(regexp.MustCompile(`^\w+`).FindString(form), "_count")] = true
		names := []string{form}
		if values != nil {
			names = nil
			for _, value := range values {
				names = append(names, fmt.Sprintf(form, value))
			}
		}
		for _, name := range names {
			value, ok := got[name]
			if strings.Contains(form, "{") && values == nil { // a prefix: more labels follow
				for sample := range got {
					ok = ok || strings.HasPrefix(sample, name)
				}
			}
			zero := !slices.ContainsFunc(notZero, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
			if !ok || zero && value != 0 {
				t.Errorf("%s: got %v (present: %v), want it there at the start, at 0", name, value, ok)
			}
		}
	}
	for _, route := range routes() {
		method, path, _ := strings.Cut(route, " ")
		prefix := fmt.Sprintf(`auth_http_request_duration_seconds_count{method=%q,route=%q,status="2`, method, path)
		found := false
		for sample, value := range got {
			if strings.HasPrefix(sample, prefix) {
				found = true
				if path != "/health/ready" && value != 0 {
					t.Errorf("%s: got %v, want 0", sample, value)
				}
			}
		}
		if !found {
			t.Errorf("no sample %s..., want it there at the start", prefix)
		}
	}
	for _, dep := range []string{"db", "nats"} {
		if got := got[fmt.Sprintf("auth_dependency_up{dep=%q}", dep)]; got != 1 {
			t.Errorf("auth_dependency_up of %s on a service that is ready: got %v, want 1", dep, got)
		}
	}
	if got := got[`auth_db_pool_connections{state="max"}`]; got != 16 {
		t.Errorf("auth_db_pool_connections of max: got %v, want DATABASE_MAX_CONNECTIONS, 16", got)
	}
	for _, name := range []string{"go_goroutines", "process_resident_memory_bytes", "process_open_fds"} {
		if got[name] == 0 {
			t.Errorf("no sample %s", name)
		}
	}
	// What is not in the contract has no alert and no page in the manual.
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (auth_\w+) `).FindAllSubmatch(a.body, -1) {
		if !families[string(m[1])] {
			t.Errorf("a family %s that the contract does not have", m[1])
		}
	}
	problems, err := promlint.New(bytes.NewReader(a.body)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("promlint: %s: %s", p.Metric, p.Text)
	}

	// Parallel scrapes are answered like everything else.
	var all sync.WaitGroup
	for range 40 {
		all.Go(func() {
			if a, err := s.try("GET", "/metrics", nil); err != nil || a.status != 200 && a.status != 503 {
				t.Errorf("a scrape among others: got %d, %v", a.status, err)
			}
		})
	}
	all.Wait()
}

// samples reads the text format.
func samples(a answer) map[string]float64 {
	m := map[string]float64{}
	for line := range strings.Lines(string(a.body)) {
		line = strings.TrimSpace(line)
		if i := strings.LastIndexByte(line, ' '); i > 0 && line[0] != '#' {
			m[line[:i]], _ = strconv.ParseFloat(line[i+1:], 64)
		}
	}
	return m
}

// TestCountersMoveExactly: one request moves what it should and nothing else.
func TestCountersMoveExactly(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"LOCKOUT_THRESHOLD": "2", "IP_RATE_BURST": "1", "REGISTER_PER_MIN_PER_EMAIL": "2"}))
	p := newPerson()
	const wrong = "wrong battery staple horse"
	locked := newPerson()
	var spent, token string
	duration := func(method, path string, status int) string {
		return fmt.Sprintf(`auth_http_request_duration_seconds_count{method=%q,route=%q,status="%d"}`, method, path, status)
	}
	const hash, wait = "auth_password_hash_duration_seconds_count", "auth_password_hash_wait_seconds_count"
	result := func(family, result string) string { return fmt.Sprintf("%s{result=%q}", family, result) }
	for _, row := range []struct {
		name string
		do   func() answer
		want []string // each by 1
	}{
		{"register", func() answer { return s.post(registerPath, p) },
			[]string{result("auth_register_total", "success"), hash, wait, duration("POST", registerPath, 201)}},
		{"register again", func() answer { return s.post(registerPath, p) },
			[]string{result("auth_register_total", "conflict"), hash, wait, duration("POST", registerPath, 409)}},
		{"register a third time", func() answer { return s.post(registerPath, p) },
			[]string{result("auth_register_total", "rate_limited"), `auth_rate_limited_total{scope="email"}`, duration("POST", registerPath, 429)}},
		{"a weak password", func() answer { return s.post(registerPath, person{newUUID(), newUUID(), "a@example.com", "short"}) },
			[]string{result("auth_register_total", "weak_password"), duration("POST", registerPath, 400)}},
		{"register, malformed", func() answer { return s.do("POST", registerPath, []byte(`{}`)) },
			[]string{result("auth_register_total", "invalid"), duration("POST", registerPath, 400)}},
		{"login", func() answer {
			a := s.do("POST", loginPath, p.loginBody(password))
			spent = a.tokens(t).RefreshToken
			return a
		}, []string{result("auth_login_total", "success"), hash, wait, duration("POST", loginPath, 200)}},
		{"a wrong password", func() answer { return s.do("POST", loginPath, p.loginBody(wrong)) },
			[]string{result("auth_login_total", "failure"), hash, wait, duration("POST", loginPath, 401)}},
		{"an over-long password", func() answer { return s.do("POST", loginPath, newPerson().loginBody(strings.Repeat("x", 2000))) },
			[]string{result("auth_login_total", "failure"), hash, wait, duration("POST", loginPath, 401)}},
		{"an unknown e-mail", func() answer { return s.do("POST", loginPath, locked.loginBody(wrong)) },
			[]string{result("auth_login_total", "failure"), hash, wait, duration("POST", loginPath, 401)}},
		{"an unknown e-mail: the guess that locks", func() answer { return s.do("POST", loginPath, locked.loginBody(wrong)) },
			[]string{result("auth_login_total", "failure"), hash, wait, "auth_lockouts_total", duration("POST", loginPath, 401)}},
		{"locked", func() answer { return s.do("POST", loginPath, locked.loginBody(wrong)) },
			[]string{result("auth_login_total", "locked"), duration("POST", loginPath, 423)}},
		{"login, malformed", func() answer { return s.do("POST", loginPath, []byte(`{`)) },
			[]string{result("auth_login_total", "invalid"), duration("POST", loginPath, 400)}},
		{"login, too large", func() answer { return s.do("POST", loginPath, bytes.Repeat([]byte(" "), 65537)) },
			[]string{result("auth_login_total", "invalid"), duration("POST", loginPath, 413)}},
		{"login, no JSON", func() answer { return s.do("POST", loginPath, []byte(`x`), "Content-Type", "text/plain") },
			[]string{result("auth_login_total", "invalid"), duration("POST", loginPath, 415)}},
		{"refresh", func() answer {
			a := s.refresh(spent)
			token = a.tokens(t).RefreshToken
			return a
		}, []string{result("auth_refresh_total", "success"), duration("POST", refreshPath, 200)}},
		{"replay", func() answer { return s.refresh(spent) }, []string{result("auth_refresh_total", "replay"), duration("POST", refreshPath, 401)}},
		{"revoked", func() answer { return s.refresh(token) }, []string{result("auth_refresh_total", "revoked"), duration("POST", refreshPath, 401)}},
		{"a mangled token", func() answer { return s.refresh("x") }, []string{result("auth_refresh_total", "invalid"), duration("POST", refreshPath, 401)}},
		{"JWKS", func() answer { return s.get("/.well-known/jwks.json") }, []string{duration("GET", "/.well-known/jwks.json", 200)}},
		{"HEAD", func() answer { return s.do("HEAD", "/.well-known/jwks.json", nil) }, []string{duration("HEAD", "/.well-known/jwks.json", 200)}},
		{"wrong method", func() answer { return s.get(loginPath) }, []string{duration("GET", loginPath, 405)}},
		{"an invented method", func() answer { return s.do("BREW", loginPath, nil) }, []string{duration("other", loginPath, 405)}},
		{"unknown path", func() answer { return s.get("/coffee") }, []string{duration("GET", "unmatched", 404)}},
		{"unknown path, not clean", func() answer { return s.get("//api/auth/login") }, []string{duration("GET", "unmatched", 404)}},
	} {
		// Counted after the answer, so wait; and what else moves is found too.
		before := counters(s)
		row.do()
		moved := func() map[string]float64 {
			after := counters(s)
			for name, value := range before {
				if after[name] == value {
					delete(after, name)
				} else {
					after[name] -= value
				}
			}
			return after
		}
		want := map[string]float64{}
		for _, name := range row.want {
			want[name] = 1
		}
		got := moved()
		for deadline := time.Now().Add(5 * time.Second); !maps.Equal(got, want) && time.Now().Before(deadline); got = moved() {
			time.Sleep(20 * time.Millisecond)
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s moved\n%v\nwant\n%v", row.name, got, want)
		}
	}
}

// counters are the samples that only requests move, and not the scrape itself.
func counters(s *service) map[string]float64 {
	m := samples(s.get("/metrics"))
	maps.DeleteFunc(m, func(name string, _ float64) bool {
		family := regexp.MustCompile(`^\w+`).FindString(name)
		return !strings.HasPrefix(family, "auth_") || strings.HasPrefix(family, "auth_events_") ||
			!strings.HasSuffix(family, "_total") && !strings.HasSuffix(family, "_count") || strings.Contains(name, `route="/metrics"`)
	})
	return m
}

// TestLabelsHoldNoClientText: whatever a client sends, the set of series stays
// bounded and holds none of it.
func TestLabelsHoldNoClientText(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited))
	const mark = "zz9mark"
	for i := range 100 {
		text := fmt.Sprintf("%s%d", mark, i)
		s.get("/"+text, "User-Agent", text, "X-Trace-Id", text, "X-Forwarded-For", text, "Referer", text, "traceparent", text)
		s.do("Z"+strings.ToUpper(text), "/"+text, nil)
		s.do(strings.ToUpper(text), loginPath, nil)
		s.get("/health/live?" + text)
		s.post(loginPath, map[string]string{"tenant_id": text, "email": text, "password": text, text: text})
		s.post(loginPath, map[string]string{"tenant_id": newUUID(), "email": text + "@example.com"})
		s.refresh(text)
	}
	s.do("POST", loginPath, newPerson().loginBody(mark))
	body := strings.ToLower(string(s.get("/metrics").body))
	if i := strings.Index(body, mark); i >= 0 {
		t.Errorf("/metrics holds client text: %q", body[max(0, i-200):min(len(body), i+100)])
	}
	if n := len(samples(s.get("/metrics"))); n > 1500 {
		t.Errorf("got %d series, want a bounded number, below 1500", n)
	}
}

// operations are the requests that need PostgreSQL, as the person p whose
// tokens are tok.
func operations(p person, tok tokens) map[string]func(*service) (answer, error) {
	bearer := []string{"Authorization", "Bearer " + tok.AccessToken}
	body := func(m map[string]string) []byte { return toJSON(m) }
	return map[string]func(*service) (answer, error){
		"register": func(s *service) (answer, error) { return s.try("POST", registerPath, toJSON(newPerson())) },
		"login":    func(s *service) (answer, error) { return s.try("POST", loginPath, p.loginBody(password)) },
		"login with a wrong password": func(s *service) (answer, error) {
			return s.try("POST", loginPath, p.loginBody("wrong battery staple horse"))
		},
		"login of an unknown e-mail": func(s *service) (answer, error) { return s.try("POST", loginPath, newPerson().loginBody(password)) },
		"refresh": func(s *service) (answer, error) {
			return s.try("POST", refreshPath, body(map[string]string{"refresh_token": tok.RefreshToken}))
		},
		"logout": func(s *service) (answer, error) {
			return s.try("POST", "/api/auth/logout", body(map[string]string{"refresh_token": tok.RefreshToken}))
		},
		"logout-all": func(s *service) (answer, error) {
			return s.try("POST", "/api/auth/logout-all", []byte(`{}`), bearer...)
		},
		"password": func(s *service) (answer, error) {
			return s.try("POST", "/api/auth/password", body(map[string]string{"current_password": password, "new_password": "another battery staple horse"}), bearer...)
		},
		"forgot-password": func(s *service) (answer, error) {
			return s.try("POST", "/api/auth/forgot-password", body(map[string]string{"tenant_id": p.TenantID, "email": p.Email}))
		},
	}
}

// TestDatabaseOutages: every way in which PostgreSQL can be away is 503 within
// 5 seconds, never a 500, never "wrong password" or "bad token", and over by
// itself.
func TestDatabaseOutages(t *testing.T) {
	t.Parallel()
	pg := dbtest.Start(t)
	w := &world{t: t, db: pg.URL(), nats: natstest.New(t)}
	s := held(t, w.start(cheap, unlimited, env{"LOCKOUT_THRESHOLD": "100"}))
	p := s.register()

	for _, outage := range []struct {
		name       string
		begin, end func()
	}{
		{"killed", pg.Kill, pg.Restart},
		{"paused", pg.Pause, pg.Resume},
		{"read-only", func() {
			dbtest.Exec(t, w.db, `ALTER DATABASE identity_auth SET default_transaction_read_only = on`)
			dbtest.Exec(t, w.db, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()`)
		}, func() {
			dbtest.Exec(t, w.db, `BEGIN READ WRITE; ALTER DATABASE identity_auth RESET default_transaction_read_only; COMMIT`)
		}},
		{"shut down", pg.Stop, pg.Restart},
	} {
		t.Run(outage.name, func(t *testing.T) {
			tok := s.login(p)
			other := s.login(p)
			unavailable := map[string]func() float64{}
			for _, operation := range []string{"register", "login", "refresh"} {
				unavailable[operation] = s.growth("auth_" + operation + `_total{result="unavailable"}`)
			}
			outage.begin()
			begun := time.Now()
			var all sync.WaitGroup
			for name, operation := range operations(p, tok) {
				all.Go(func() {
					begun := time.Now()
					a, err := operation(s)
					took := time.Since(begun)
					if err != nil || a.status != 503 || a.code() != "unavailable" {
						t.Errorf("%s: got %d %s, %v, want 503 unavailable", name, a.status, a.body, err)
					}
					if took > 5*time.Second {
						t.Errorf("%s: answered after %v, want within 5 s", name, took)
					}
				})
			}
			wantNotReady(t, s, begun, "db")
			all.Wait()
			// What needs no database is as ever; a mangled token ends at its
			// checksum.
			wantCode(t, "a mangled refresh token", s.refresh(tok.RefreshToken[:50]), 401, "invalid_refresh_token")
			wantCode(t, "a malformed login", s.do("POST", loginPath, []byte(`{}`)), 400, "invalid_request")
			wantCode(t, "live", s.get("/health/live"), 200, "")
			wantCode(t, "JWKS", s.get("/.well-known/jwks.json"), 200, "")
			for operation, want := range map[string]float64{"register": 1, "login": 3, "refresh": 1} {
				if got := unavailable[operation](); got != want {
					t.Errorf("auth_%s_total of unavailable: got %v more, want %v", operation, got, want)
				}
			}

			outage.end()
			s.waitReady()
			if got := s.metric(`auth_dependency_up{dep="db"}`); got != 1 {
				t.Errorf("auth_dependency_up of db: got %v, want 1", got)
			}
			s.register()
			s.login(p)
			// PostgreSQL may have done what was asked while it was paused, so
			// the token that was presented then says nothing.
			if outage.name != "paused" {
				wantCode(t, "the session of before", s.refresh(tok.RefreshToken), 200, "")
				wantCode(t, "another session of before", s.refresh(other.RefreshToken), 200, "")
			}
		})
	}
	if got := s.metric(`auth_login_total{result="error"}`) + s.metric(`auth_register_total{result="error"}`) + s.metric(`auth_refresh_total{result="error"}`); got != 0 {
		t.Errorf("operations that ended in 500: got %v, want 0", got)
	}
	if got := s.logged("dependency.changed"); len(got) < 2*4 {
		t.Errorf("dependency.changed lines: got %d, want two for each outage", len(got))
	}
}

// wantNotReady waits until readiness and the gauge show that dep is down, at
// most 3 seconds after begun, and until the log says why.
func wantNotReady(t *testing.T, s *service, begun time.Time, dep string) {
	t.Helper()
	other := map[string]string{"db": "nats", "nats": "db"}[dep]
	for {
		a := s.get("/health/ready")
		gauge := s.metric(fmt.Sprintf("auth_dependency_up{dep=%q}", dep))
		if a.status == 503 && gauge == 0 {
			wantBody(t, "ready without "+dep, a, 503, map[string]any{"status": "not_ready", "checks": map[string]any{dep: "down", other: "up"}})
			eventually(t, "a line that says why "+dep+" is down", 5*time.Second, func() bool {
				lines := s.logged("dependency.changed")
				if len(lines) == 0 {
					return false
				}
				last := lines[len(lines)-1]
				why, _ := last["err"].(string)
				return last["dep"] == dep && last["up"] == false && last["level"] == "WARN" && why != ""
			})
			return
		}
		if since := time.Since(begun); since > 3*time.Second {
			t.Errorf("%v without %s: got ready %d and auth_dependency_up %v, want 503 and 0 within 3 s", since, dep, a.status, gauge)
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestPoolExhausted: connections that all wait for a lock are an outage too.
func TestPoolExhausted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"DATABASE_MAX_CONNECTIONS": "2"}))
	p := s.register()
	tok := s.login(p)
	conn, err := pgx.Connect(t.Context(), w.db)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), `BEGIN; LOCK TABLE identity_auth.accounts, identity_auth.sessions, identity_auth.guards, identity_auth.rate_windows, identity_auth.outbox`); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for name, operation := range operations(p, tok) {
		all.Go(func() {
			begun := time.Now()
			a, err := operation(s)
			if took := time.Since(begun); err != nil || a.status != 503 || a.code() != "unavailable" || took > 5*time.Second {
				t.Errorf("%s: got %d %s, %v after %v, want 503 unavailable within 5 s", name, a.status, a.body, err, took)
			}
		})
	}
	wantCode(t, "JWKS meanwhile", s.get("/.well-known/jwks.json"), 200, "")
	all.Wait()
	if _, err := conn.Exec(t.Context(), `ROLLBACK`); err != nil {
		t.Fatal(err)
	}
	s.waitReady()
	wantCode(t, "the session of before", s.refresh(tok.RefreshToken), 200, "")
}

// TestNATSOutages: register, login and refresh go on, what they tell waits.
func TestNATSOutages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	strict := held(t, w.start(cheap, unlimited))
	lenient := held(t, w.start(cheap, unlimited, env{"READY_REQUIRES_NATS": "false"}))
	const unsent = `SELECT count(*)::int FROM outbox WHERE sent_at IS NULL`
	for _, outage := range []struct {
		name       string
		begin, end func()
	}{
		{"killed", w.nats.Kill, w.nats.Restart},
		{"paused", w.nats.Pause, w.nats.Resume},
		{"its store gone", func() { w.nats.Stop(); w.nats.DeleteStore() }, w.nats.Restart},
	} {
		t.Run(outage.name, func(t *testing.T) {
			outage.begin()
			begun := time.Now()
			wantNotReady(t, strict, begun, "nats")
			eventually(t, "the replica that does not need NATS notices too", 5*time.Second, func() bool {
				return lenient.metric(`auth_dependency_up{dep="nats"}`) == 0
			})
			wantBody(t, "ready with READY_REQUIRES_NATS=false", lenient.get("/health/ready"), 200,
				map[string]any{"status": "ready", "checks": map[string]any{"db": "up", "nats": "down"}})
			for _, s := range []*service{strict, lenient} {
				p := s.register()
				tok := s.login(p)
				wantCode(t, "refresh", s.refresh(tok.RefreshToken), 200, "")
			}
			if got := dbtest.Value[int](t, w.db, unsent); got < 6 {
				t.Errorf("events that wait: got %d, want at least the 6 of the outage", got)
			}
			outage.end()
			strict.waitReady()
			eventually(t, "the backlog drains", 30*time.Second, func() bool { return dbtest.Value[int](t, w.db, unsent) == 0 })
			eventually(t, "nats is up on both", 10*time.Second, func() bool {
				return strict.metric(`auth_dependency_up{dep="nats"}`) == 1 && lenient.metric(`auth_dependency_up{dep="nats"}`) == 1
			})
		})
	}
}

// TestStreamDeleted: the socket is up all the time, but it is the stream that
// counts.
func TestStreamDeleted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited))
	s.register()
	js := w.jetStream()
	if err := js.DeleteStream(t.Context(), "AUTH_EVENTS"); err != nil {
		t.Fatal(err)
	}
	s.register()
	const unsent = `SELECT count(*)::int FROM outbox WHERE sent_at IS NULL`
	eventually(t, "the stream is there again with both events", 30*time.Second, func() bool {
		stream, err := js.Stream(t.Context(), "AUTH_EVENTS")
		return err == nil && stream.CachedInfo().State.Msgs == 2 && dbtest.Value[int](t, w.db, unsent) == 0
	})
	s.waitReady()
	if got := s.logged("nats.stream_created"); len(got) != 3 { // AUTH_EVENTS twice, AUTH_SECRETS
		t.Errorf("nats.stream_created lines: got %d, want 3", len(got))
	}
}

// TestStartWithNothing: dependencies may come later than the service.
func TestStartWithNothing(t *testing.T) {
	t.Parallel()
	pg := dbtest.Start(t)
	w := &world{t: t, db: pg.URL(), nats: natstest.New(t)}
	pg.Stop()
	w.nats.Stop()
	s := held(t, w.launch(racyBinary, w.config(cheap, unlimited)))
	eventually(t, "the process answers", 30*time.Second, func() bool {
		a, err := s.try("GET", "/health/live", nil)
		return err == nil && a.status == 200
	})
	wantBody(t, "live", s.get("/health/live"), 200, map[string]any{"status": "live"})
	wantBody(t, "ready", s.get("/health/ready"), 503, map[string]any{"status": "not_ready", "checks": map[string]any{"db": "down", "nats": "down"}})
	wantCode(t, "register", s.post(registerPath, newPerson()), 503, "unavailable")
	wantCode(t, "JWKS", s.get("/.well-known/jwks.json"), 200, "")
	pg.Restart()
	eventually(t, "db is up", 30*time.Second, func() bool { return s.metric(`auth_dependency_up{dep="db"}`) == 1 })
	wantBody(t, "ready without NATS", s.get("/health/ready"), 503, map[string]any{"status": "not_ready", "checks": map[string]any{"db": "up", "nats": "down"}})
	p := s.register()
	w.nats.Restart()
	s.waitReady()
	wantBody(t, "ready", s.get("/health/ready"), 200, map[string]any{"status": "ready", "checks": map[string]any{"db": "up", "nats": "up"}})
	s.login(p)
}

// wrongLine tells what is wrong with the form of a log line.
func wrongLine(line string) string {
	var m map[string]any
	if err := json.Unmarshal([]byte(line), &m); err != nil {
		return "no JSON object"
	}
	stamp, _ := m["time"].(string)
	if at, err := time.Parse(time.RFC3339Nano, stamp); err != nil || !strings.HasSuffix(stamp, "Z") || time.Since(at).Abs() > time.Hour {
		return "time is not now in RFC 3339, UTC"
	}
	level, _ := m["level"].(string)
	if !slices.Contains([]string{"DEBUG", "INFO", "WARN", "ERROR"}, level) {
		return "level is none of DEBUG, INFO, WARN, ERROR"
	}
	if event, _ := m["event"].(string); !regexp.MustCompile(`^[a-z]+\.[a-z_]+$`).MatchString(event) {
		return "event is no event name"
	}
	if _, ok := m["msg"]; ok {
		return "a member msg beside event"
	}
	// The members come in this order, for eyes.
	if !regexp.MustCompile(`^\{"time":"[^"]*","level":"[A-Z]+","event":"`).MatchString(line) {
		return "does not begin with time, level and event"
	}
	return ""
}

// lineOf waits for the line of an event with a trace id: a line may come after
// the answer it tells of.
func lineOf(t *testing.T, s *service, event, trace string) (line map[string]any) {
	t.Helper()
	eventually(t, "a line "+event+" of "+trace, 5*time.Second, func() bool {
		for _, m := range s.logged(event) {
			if m["trace_id"] == trace {
				line = m
			}
		}
		return line != nil
	})
	return line
}

// TestLinesOfOperations: each operation has one line, with all that is known.
func TestLinesOfOperations(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"LOCKOUT_THRESHOLD": "2", "REFRESH_PER_MIN_PER_TOKEN": "3", "LOG_LEVEL": "debug"}))
	p, unknown := newPerson(), newPerson()
	const agent = "Mozilla/5.0 (X11; Linux x86_64) test"
	const wrong = "wrong battery staple horse"
	var first, second, third tokens
	var sid string
	login := func(p person, password string) func() []byte { return func() []byte { return p.loginBody(password) } }
	refresh := func(tok *tokens) func() []byte {
		return func() []byte { return toJSON(map[string]string{"refresh_token": tok.RefreshToken}) }
	}
	known := map[string]any{"tenant_id": p.TenantID, "user_id": p.UserID}
	stranger := map[string]any{"tenant_id": unknown.TenantID}
	session := func() map[string]any {
		return map[string]any{"tenant_id": p.TenantID, "user_id": p.UserID, "session_id": sid}
	}
	for _, row := range []struct {
		name, path string
		body       func() []byte
		into       *tokens
		events     map[string]string // event to level
		result     string
		fields     func() map[string]any
	}{
		{"register", registerPath, func() []byte { return toJSON(p) }, nil, map[string]string{"auth.register": "INFO"}, "success", func() map[string]any { return known }},
		{"register again", registerPath, func() []byte { return toJSON(p) }, nil, map[string]string{"auth.register": "INFO"}, "conflict", func() map[string]any { return known }},
		{"register, malformed", registerPath, func() []byte { return []byte(`{}`) }, nil, map[string]string{"auth.register": "INFO"}, "invalid", func() map[string]any { return nil }},
		{"login", loginPath, login(p, password), &first, map[string]string{"auth.login": "INFO"}, "success", session},
		{"wrong password", loginPath, login(p, wrong), nil, map[string]string{"auth.login": "INFO"}, "failure", func() map[string]any { return known }},
		{"the guess that locks", loginPath, login(p, wrong), nil, map[string]string{"auth.login": "INFO", "auth.lockout": "WARN"}, "failure", func() map[string]any { return known }},
		{"locked", loginPath, login(p, password), nil, map[string]string{"auth.login": "INFO"}, "locked", func() map[string]any { return map[string]any{"tenant_id": p.TenantID} }},
		{"unknown e-mail", loginPath, login(unknown, wrong), nil, map[string]string{"auth.login": "INFO"}, "failure", func() map[string]any { return stranger }},
		{"refresh", refreshPath, refresh(&first), &second, map[string]string{"auth.refresh": "INFO"}, "success", session},
		{"refresh again", refreshPath, refresh(&second), &third, map[string]string{"auth.refresh": "INFO"}, "success", session},
		{"replay", refreshPath, refresh(&first), nil, map[string]string{"auth.refresh": "INFO", "security.refresh_replay_detected": "WARN"}, "replay", session},
		{"revoked", refreshPath, refresh(&third), nil, map[string]string{"auth.refresh": "INFO"}, "revoked", session},
		{"nonsense", refreshPath, func() []byte { return []byte(`{"refresh_token":"iar_nonsense"}`) }, nil, map[string]string{"auth.refresh": "INFO"}, "invalid", func() map[string]any { return nil }},
	} {
		trace := newUUID()
		a := s.do("POST", row.path, row.body(), "User-Agent", agent, "X-Trace-Id", trace)
		if row.into != nil {
			*row.into = a.tokens(t)
			sid, _ = claims(t, row.into.AccessToken)["sid"].(string)
		}
		for event, level := range row.events {
			got := lineOf(t, s, event, trace)
			want := map[string]any{"time": got["time"], "level": level, "event": event, "client_ip": "127.0.0.1", "user_agent": agent, "trace_id": trace}
			if level == "INFO" {
				want["result"] = row.result
			} else {
				delete(got, "result") // may be there
			}
			maps.Copy(want, row.fields())
			if !maps.Equal(got, want) {
				t.Errorf("%s: %s: got\n%v\nwant\n%v", row.name, event, got, want)
			}
		}
		lines := 0
		for _, line := range s.tail(1 << 30) {
			if strings.Contains(line, trace) {
				lines++
			}
		}
		if lines != len(row.events) {
			t.Errorf("%s: got %d lines, want %d", row.name, lines, len(row.events))
		}
	}
}

// TestHashBusy: who finds no slot in time is refused, logged and counted.
func TestHashBusy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(unlimited, env{"MAX_CONCURRENT_HASHES": "1", "HASH_ACQUIRE_TIMEOUT": "1ms", "LOCKOUT_THRESHOLD": "100"}))
	p := newPerson()
	eventually(t, "the hash by which the service learns its pace has left the slot", 30*time.Second, func() bool {
		return s.post(registerPath, p).status == 201
	})
	refused := s.growth(`auth_login_total{result="hash_busy"}`)
	const agent = "the one who was refused"
	busy := 0
	// Of eight at once one is served; how many of the others meet it is the
	// scheduler's affair, so again until one did.
	for attempt := 0; busy == 0 && attempt < 50; attempt++ {
		answers := make(chan answer, 8)
		for range cap(answers) {
			go func() {
				a, err := s.try("POST", loginPath, p.loginBody(password), "User-Agent", agent)
				if err != nil {
					t.Error(err)
				}
				answers <- a
			}()
		}
		for range cap(answers) {
			if a := <-answers; a.status == 503 {
				wantCode(t, "a login beside others", a, 503, "hash_busy")
				busy++
			} else {
				wantCode(t, "a login beside others", a, 200, "")
			}
		}
	}
	if got := refused(); busy == 0 || got != float64(busy) {
		t.Errorf("got %d answers hash_busy and %v counted, want some and as many", busy, got)
	}
	var warned []map[string]any
	eventually(t, "a WARN auth.hash_busy for each", 5*time.Second, func() bool {
		// The preparation above may have been refused as well.
		warned = slices.DeleteFunc(s.logged("auth.hash_busy"), func(line map[string]any) bool { return line["user_agent"] != agent })
		return len(warned) == busy
	})
	for _, line := range warned {
		if line["level"] != "WARN" || line["tenant_id"] != p.TenantID || line["client_ip"] != "127.0.0.1" || line["trace_id"] == nil {
			t.Errorf("got %v, want WARN with tenant_id, client_ip and trace_id", line)
		}
	}
	p = newPerson()
	for a := s.post(registerPath, p); a.status != 201; a = s.post(registerPath, p) {
		wantCode(t, "register beside others", a, 503, "hash_busy")
	}
}

// TestFloodIsSampled: lines of failures repeat at most so often, and those that
// were left out are told of; counters count them all.
func TestFloodIsSampled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited))
	const flood, senders = 3000, 8
	invalid := s.growth(`auth_refresh_total{result="invalid"}`)
	quick := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: senders}}
	defer quick.CloseIdleConnections()
	var all sync.WaitGroup
	for range senders {
		all.Go(func() {
			for range flood / senders {
				resp, err := quick.Post(s.base+refreshPath, "application/json", strings.NewReader(`{"refresh_token":"none"}`))
				if err != nil {
					t.Error(err)
					return
				}
				resp.Body.Close()
			}
		})
	}
	begun := time.Now()
	all.Wait()
	took := time.Since(begun)
	if got := invalid(); got != flood {
		t.Errorf("auth_refresh_total of invalid: got %v more, want %d", got, flood)
	}
	p := s.register()
	if code := s.stop(); code != 0 { // tells of what is still untold
		t.Errorf("exit code: got %d, want 0", code)
	}
	lines, dropped := len(s.logged("auth.refresh")), 0
	for _, m := range s.logged("log.sampled") {
		n, _ := m["dropped"].(float64)
		dropped += int(n)
	}
	if lines+dropped != flood {
		t.Errorf("of %d failures got %d lines and %d dropped, want all accounted for", flood, lines, dropped)
	}
	if rate := flood / took.Seconds(); rate > 500 && lines > flood/2 {
		t.Errorf("of %d failures in %v got %d lines, want a sample", flood, took, lines)
	}
	if got := s.logged("auth.register"); len(got) != 1 || got[0]["user_id"] != p.UserID {
		t.Errorf("auth.register lines: got %v, want the one success: changes are never left out", got)
	}
}

// TestLogLevel: warn leaves INFO out; what must be watched stays.
func TestLogLevel(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"LOG_LEVEL": "warn"}))
	tok := s.login(s.register())
	s.refresh(tok.RefreshToken)
	s.refresh(tok.RefreshToken)
	s.stop()
	if got := s.logged("security.refresh_replay_detected"); len(got) != 1 {
		t.Errorf("security.refresh_replay_detected lines: got %d, want 1", len(got))
	}
	for _, line := range s.tail(1 << 30) {
		if !strings.Contains(line, `"level":"WARN"`) && !strings.Contains(line, `"level":"ERROR"`) {
			t.Errorf("with LOG_LEVEL=warn got %s", line)
		}
	}
}
