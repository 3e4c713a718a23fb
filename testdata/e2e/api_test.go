package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// cheap is the lowest cost of a hash that the service accepts: for tests of
// something else.
var cheap = env{"ARGON2_MEMORY_KIB": "19456", "ARGON2_ITERATIONS": "2"}

const (
	registerPath = "/api/auth/register"
	loginPath    = "/api/auth/login"
	refreshPath  = "/api/auth/refresh"
)

// wantCode fails unless a is the problem: status and code, "" for none.
func wantCode(t *testing.T, what string, a answer, status int, code string) {
	t.Helper()
	if a.status != status || a.code() != code {
		t.Errorf("%s: got %d %q, want %d %q: %s", what, a.status, a.code(), status, code, a.body)
	}
}

// wantBody fails unless a has the status and exactly the members of want.
func wantBody(t *testing.T, what string, a answer, status int, want map[string]any) {
	t.Helper()
	if got := a.json(t); a.status != status || !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %d %v, want %d %v", what, a.status, got, status, want)
	}
}

// wantTokens holds an answer of login or refresh to the contract, member by
// member. The rest of the session's life may have lost a moment on the way.
func wantTokens(t *testing.T, what string, a answer, access, session time.Duration) tokens {
	t.Helper()
	tok := a.tokens(t)
	members := slices.Sorted(maps.Keys(a.json(t)))
	if want := []string{"access_token", "expires_in", "expires_in_seconds", "refresh_expires_in", "refresh_token", "token_type"}; !slices.Equal(members, want) {
		t.Errorf("%s: got members %q, want %q", what, members, want)
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("%s: got Content-Type %q, want application/json", what, got)
	}
	if tok.TokenType != "Bearer" {
		t.Errorf("%s: got token_type %q, want Bearer", what, tok.TokenType)
	}
	if want := int(access.Seconds()); tok.ExpiresIn != want || tok.ExpiresInSeconds != want {
		t.Errorf("%s: got expires_in %d and expires_in_seconds %d, want %d", what, tok.ExpiresIn, tok.ExpiresInSeconds, want)
	}
	if want := int(session.Seconds()); tok.RefreshExpiresIn > want || tok.RefreshExpiresIn < want-5 {
		t.Errorf("%s: got refresh_expires_in %d, want %d or little less", what, tok.RefreshExpiresIn, want)
	}
	if !strings.HasPrefix(tok.RefreshToken, "iar_") {
		t.Errorf("%s: the refresh token does not begin with iar_", what)
	}
	if n := strings.Count(tok.AccessToken, "."); n != 2 {
		t.Errorf("%s: got an access token with %d dots, want 2", what, n)
	}
	return tok
}

// growth returns how much a sample of s has grown since the call.
func (s *service) growth(sample string) func() float64 {
	s.t.Helper()
	was := s.metric(sample)
	return func() float64 { s.t.Helper(); return s.metric(sample) - was }
}

// retryAfter is the header in seconds, 0 when there is none.
func retryAfter(a answer) int {
	n, _ := strconv.Atoi(a.header.Get("Retry-After"))
	return n
}

// TestAPI is what one service of the usual configuration shows.
func TestAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"LOCKOUT_THRESHOLD": "100"}))
	for _, group := range []struct {
		name string
		test func(*testing.T, *world, *service)
	}{
		{"register, login, refresh", registerLoginRefresh},
		{"spellings of ids and e-mails", spellings},
		{"accounts are apart", accountsAreApart},
		{"refused logins look alike", refusedLoginsLookAlike},
		{"common passwords", commonPasswords},
		{"a stored hash that costs too much", hashThatCostsTooMuch},
		{"a chain of refreshes", refreshChain},
		{"tenant_id of refresh", refreshTenant},
		{"mangled refresh tokens", mangledRefreshTokens},
		{"forged refresh tokens", forgedRefreshTokens},
	} {
		t.Run(group.name, func(t *testing.T) { group.test(t, w, s) })
	}
}

// TestSessions is how sessions end.
func TestSessions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{
		"MAX_SESSIONS_PER_USER": "2", "REFRESH_TOKEN_TTL": "24h", "SESSION_MAX_AGE": "72h",
	}))
	for _, group := range []struct {
		name string
		test func(*testing.T, *world, *service)
	}{
		{"refused refreshes look alike", refusedRefreshesLookAlike},
		{"expiry", sessionExpiry},
		{"MAX_SESSIONS_PER_USER", maxSessions},
	} {
		t.Run(group.name, func(t *testing.T) { group.test(t, w, s) })
	}
}

func registerLoginRefresh(t *testing.T, w *world, s *service) {
	p := newPerson()

	a := s.post(registerPath, p)
	wantBody(t, "register", a, 201, map[string]any{"tenant_id": p.TenantID, "user_id": p.UserID, "email": p.Email})
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("register: got Content-Type %q, want application/json", got)
	}
	first := wantTokens(t, "login", s.do("POST", loginPath, p.loginBody(p.Password)), 15*time.Minute, 14*24*time.Hour)
	second := wantTokens(t, "refresh", s.refresh(first.RefreshToken), 15*time.Minute, 14*24*time.Hour)
	if second.RefreshToken == first.RefreshToken || second.AccessToken == first.AccessToken {
		t.Error("a refresh answered a token that had been answered before")
	}
	other := s.login(p)
	if sid := claims(t, other.AccessToken)["sid"]; sid == claims(t, first.AccessToken)["sid"] {
		t.Errorf("two logins have one session %v", sid)
	}
	if got, want := claims(t, second.AccessToken)["sid"], claims(t, first.AccessToken)["sid"]; got != want {
		t.Errorf("sid after a refresh: got %v, want %v", got, want)
	}
}

func spellings(t *testing.T, w *world, s *service) {
	for _, row := range []struct {
		name  string
		spell func(p person) person
	}{
		{"as answered", func(p person) person { return p }},
		{"tenant_id in upper case", func(p person) person { p.TenantID = strings.ToUpper(p.TenantID); return p }},
		{"user_id in upper case", func(p person) person { p.UserID = strings.ToUpper(p.UserID); return p }},
		{"e-mail in upper case", func(p person) person { p.Email = strings.ToUpper(p.Email); return p }},
		{"e-mail with spaces around", func(p person) person { p.Email = "  " + p.Email + " "; return p }},
		{"e-mail with tabs and line breaks around", func(p person) person { p.Email = "\t\r\n" + p.Email + "\n\t"; return p }},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := newPerson()
			spelt := row.spell(p)
			wantBody(t, "register", s.post(registerPath, spelt), 201,
				map[string]any{"tenant_id": p.TenantID, "user_id": p.UserID, "email": p.Email})
			wantCode(t, "login as spelt", s.do("POST", loginPath, spelt.loginBody(p.Password)), 200, "")
			wantCode(t, "login as answered", s.do("POST", loginPath, p.loginBody(p.Password)), 200, "")

			again := spelt
			again.UserID = newUUID()
			wantCode(t, "the same e-mail again", s.post(registerPath, again), 409, "already_registered")
		})
	}
}

func accountsAreApart(t *testing.T, w *world, s *service) {
	p := s.register()
	for _, row := range []struct {
		name   string
		change func(person) person
		status int
		code   string
	}{
		{"everything the same", func(p person) person { return p }, 409, "already_registered"},
		{"user id taken", func(p person) person { p.Email = "other@example.com"; return p }, 409, "already_registered"},
		{"e-mail taken", func(p person) person { p.UserID = newUUID(); return p }, 409, "already_registered"},
		{"user id in another tenant", func(p person) person { p.TenantID, p.Email = newUUID(), "third@example.com"; return p }, 201, ""},
		{"e-mail in another tenant", func(p person) person { p.TenantID, p.UserID = newUUID(), newUUID(); return p }, 201, ""},
		{"both in another tenant", func(p person) person { p.TenantID = newUUID(); return p }, 201, ""},
	} {
		wantCode(t, row.name, s.post(registerPath, row.change(p)), row.status, row.code)
	}

	twin := p
	twin.TenantID, twin.Password = newUUID(), "another battery staple horse"
	wantCode(t, "twin", s.post(registerPath, twin), 201, "")
	wantCode(t, "the twin's password for the first", s.do("POST", loginPath, p.loginBody(twin.Password)), 401, "invalid_credentials")
	wantCode(t, "the first's password for the twin", s.do("POST", loginPath, twin.loginBody(p.Password)), 401, "invalid_credentials")
	if got := claims(t, s.login(twin).AccessToken)["tenant_id"]; got != twin.TenantID {
		t.Errorf("tenant of the twin's token: got %v, want %s", got, twin.TenantID)
	}
}

// refusedLoginsLookAlike: nothing tells an account that exists from one
// that does not.
func refusedLoginsLookAlike(t *testing.T, w *world, s *service) {
	p, disabled := s.register(), s.register()
	dbtest.Exec(t, w.db, `UPDATE accounts SET disabled_at = clock_timestamp() WHERE user_id = $1`, disabled.UserID)
	elsewhere := p
	elsewhere.TenantID = newUUID()
	unknown := newPerson()
	noAddress := p
	noAddress.Email = "no address"

	var first answer
	for i, row := range []struct {
		name     string
		p        person
		password string
	}{
		{"wrong password", p, "wrong battery staple horse"},
		{"right password in another case", p, strings.ToUpper(password)},
		{"right password with a space behind it", p, password + " "},
		{"empty password", p, ""},
		{"password of 1025 bytes", p, strings.Repeat("x", 1025)},
		{"password of 60000 bytes", p, strings.Repeat("x", 60000)},
		{"unknown e-mail", unknown, password},
		{"unknown e-mail, empty password", unknown, ""},
		{"unknown e-mail, password of 1025 bytes", unknown, strings.Repeat("x", 1025)},
		{"unknown tenant", elsewhere, password},
		{"no e-mail address at all", noAddress, password},
		{"disabled account, right password", disabled, password},
		{"disabled account, wrong password", disabled, "wrong battery staple horse"},
	} {
		a := s.do("POST", loginPath, row.p.loginBody(row.password))
		wantCode(t, row.name, a, 401, "invalid_credentials")
		a.body = []byte(strings.Replace(string(a.body), a.header.Get("X-Trace-Id"), "", 1))
		a.header.Del("X-Trace-Id")
		a.header.Del("Date")
		if i == 0 {
			first = a
			continue
		}
		if string(a.body) != string(first.body) {
			t.Errorf("%s: got body %s, want %s", row.name, a.body, first.body)
		}
		if !reflect.DeepEqual(a.header, first.header) {
			t.Errorf("%s: got header %v, want %v", row.name, a.header, first.header)
		}
	}
	wantCode(t, "the right password", s.do("POST", loginPath, p.loginBody(password)), 200, "")
}

func TestLock(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	conf := []env{cheap, unlimited, {"LOCKOUT_THRESHOLD": "3", "LOCKOUT_DURATION": "15m"}}
	s, replica := held(t, w.start(conf...)), held(t, w.start(conf...))
	const wrong = "wrong battery staple horse"
	login := func(p person, password string) answer { return s.do("POST", loginPath, p.loginBody(password)) }
	wantLocked := func(t *testing.T, what string, a answer) {
		t.Helper()
		wantCode(t, what, a, 423, "locked")
		if got := retryAfter(a); got < 840 || got > 900 {
			t.Errorf("%s: got Retry-After %q, want little less than 900", what, a.header.Get("Retry-After"))
		}
	}
	lockouts := func() int {
		return dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM outbox WHERE event_type = 'auth.lockout'`)
	}
	endLocks := func() {
		dbtest.Exec(t, w.db, `UPDATE guards SET locked_until = clock_timestamp() WHERE locked_until > clock_timestamp()`)
	}

	t.Run("an account", func(t *testing.T) {
		p := s.register()
		session := s.login(p)
		twin := p
		twin.TenantID = newUUID()
		wantCode(t, "the same e-mail in another tenant", s.post(registerPath, twin), 201, "")
		for i := range 3 {
			wantCode(t, fmt.Sprintf("wrong password %d", i+1), login(p, wrong), 401, "invalid_credentials")
		}
		wantLocked(t, "wrong password 4", login(p, wrong))
		wantLocked(t, "the right password", login(p, password))
		wantLocked(t, "the right password on another replica", replica.do("POST", loginPath, p.loginBody(password)))
		wantLocked(t, "another spelling of the e-mail", login(person{TenantID: strings.ToUpper(p.TenantID), Email: " " + strings.ToUpper(p.Email)}, password))
		wantCode(t, "a session of before", s.refresh(session.RefreshToken), 200, "")
		wantCode(t, "the same e-mail in another tenant", login(twin, password), 200, "")
		if got := lockouts(); got != 1 {
			t.Errorf("lockout events: got %d, want 1", got)
		}

		endLocks()
		wantCode(t, "wrong password 1 after the lock", login(p, wrong), 401, "invalid_credentials")
		wantCode(t, "wrong password 2 after the lock", login(p, wrong), 401, "invalid_credentials")
		wantCode(t, "the right password after the lock", login(p, password), 200, "")
	})

	t.Run("an unknown e-mail", func(t *testing.T) {
		before := lockouts()
		p := newPerson()
		for i := range 3 {
			wantCode(t, fmt.Sprintf("guess %d", i+1), login(p, wrong), 401, "invalid_credentials")
		}
		wantLocked(t, "guess 4", login(p, wrong))
		wantLocked(t, "guess 5 on another replica", replica.do("POST", loginPath, p.loginBody(wrong)))
		if got := lockouts(); got != before {
			t.Errorf("lockout events: got %d more, want none", got-before)
		}
	})

	t.Run("a success clears the count", func(t *testing.T) {
		p := s.register()
		for range 3 {
			login(p, wrong)
			login(p, wrong)
			wantCode(t, "the right password after two wrong ones", login(p, password), 200, "")
		}
	})

	t.Run("failures older than LOCKOUT_DURATION do not count", func(t *testing.T) {
		p := s.register()
		for range 2 {
			login(p, wrong)
			login(p, wrong)
			dbtest.Exec(t, w.db, `UPDATE guards SET failed = ARRAY(SELECT f - interval '15 minutes' FROM unnest(failed) AS f)`)
		}
		wantCode(t, "the right password after four old failures", login(p, password), 200, "")
	})

	t.Run("each lock is counted and told once", func(t *testing.T) {
		if got := s.metric("auth_lockouts_total") + replica.metric("auth_lockouts_total"); got != 2 {
			t.Errorf("auth_lockouts_total over both replicas: got %v, want 2", got)
		}
		if got := len(s.logged("auth.lockout")) + len(replica.logged("auth.lockout")); got != 2 {
			t.Errorf("auth.lockout lines: got %d, want 2", got)
		}
	})
}

// TestLimitsByEmailAndSession: limits are N calls in a minute, over all
// replicas, and the window passes.
func TestLimitsByEmailAndSession(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	conf := []env{cheap, unlimited, {"LOGIN_PER_MIN_PER_EMAIL": "2", "REGISTER_PER_MIN_PER_EMAIL": "2", "REFRESH_PER_MIN_PER_TOKEN": "2"}}
	s, replica := held(t, w.start(conf...)), held(t, w.start(conf...))

	p := s.register()
	login := func(s *service) answer { return s.do("POST", loginPath, p.loginBody(password)) }
	unknown := newPerson()
	guess := func(s *service) answer { return s.do("POST", loginPath, unknown.loginBody(password)) }
	once := newPerson()
	register := func(s *service) answer {
		once.UserID = newUUID()
		return s.post(registerPath, once)
	}
	token := s.login(s.register()).RefreshToken
	refresh := func(s *service) answer {
		a := s.refresh(token)
		if a.status == 200 {
			token = a.tokens(t).RefreshToken
		}
		return a
	}
	const ageGuards = `UPDATE guards SET window_start = window_start - interval '1 minute'`
	for _, row := range []struct {
		name, metric, scope string
		call                func(*service) answer
		within              [2]int // the answers within the limit
		age                 string
		after               int // the answer once the minute is over
	}{
		{"login", "auth_login_total", "email", login, [2]int{200, 200}, ageGuards, 200},
		{"login of an unknown e-mail", "auth_login_total", "email", guess, [2]int{401, 401}, ageGuards, 401},
		{"register", "auth_register_total", "email", register, [2]int{201, 409}, `UPDATE rate_windows SET window_ends = clock_timestamp()`, 409},
		{"refresh", "auth_refresh_total", "session", refresh, [2]int{200, 200}, `UPDATE sessions SET window_start = window_start - interval '1 minute'`, 200},
	} {
		t.Run(row.name, func(t *testing.T) {
			limited, byScope := row.metric+`{result="rate_limited"}`, fmt.Sprintf("auth_rate_limited_total{scope=%q}", row.scope)
			newlyLimited, newlyByScope := s.growth(limited), s.growth(byScope)
			for i, want := range row.within {
				if a := row.call([]*service{s, replica}[i]); a.status != want {
					t.Fatalf("call %d: got %d %s, want %d", i+1, a.status, a.body, want)
				}
			}
			last := 60
			for i := range 3 {
				a := row.call(s)
				wantCode(t, fmt.Sprintf("call %d", i+3), a, 429, "rate_limited")
				if got := retryAfter(a); got < 1 || got > last {
					t.Errorf("call %d: got Retry-After %d, want 1 to %d", i+3, got, last)
				} else {
					last = got
				}
			}
			wantCode(t, "a call to another replica", row.call(replica), 429, "rate_limited")
			if got := newlyLimited(); got != 3 {
				t.Errorf("%s: got %v more, want 3", limited, got)
			}
			if got := newlyByScope(); got != 3 {
				t.Errorf("%s: got %v more, want 3", byScope, got)
			}
			dbtest.Exec(t, w.db, row.age)
			if a := row.call(s); a.status != row.after {
				t.Errorf("a minute later: got %d %s, want %d", a.status, a.body, row.after)
			}
		})
	}
	other := p
	other.TenantID = newUUID()
	wantCode(t, "the limit of an e-mail does not reach into another tenant", s.post(registerPath, other), 201, "")
}

// TestLimitByAddress: a client address has burst calls and a few each second,
// on POST endpoints only, decided before any query or hash.
func TestLimitByAddress(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const burst = 3
	s := held(t, w.start(cheap, unlimited, env{
		"IP_RATE_PER_SECOND": "1", "IP_RATE_BURST": strconv.Itoa(burst),
		"TRUSTED_PROXIES": "127.0.0.1/32, 10.0.0.0/8,fd00::/8",
	}))
	post := func(client string) answer {
		return s.do("POST", refreshPath, []byte(`{"refresh_token":"none"}`), "X-Forwarded-For", client)
	}
	// exhaust spends what an address has and returns the first refusal.
	exhaust := func(t *testing.T, client string) answer {
		begun := time.Now()
		for allowed := 0; ; allowed++ {
			a := post(client)
			if most := burst + int(time.Since(begun).Seconds()); a.status != 429 && allowed >= most {
				t.Fatalf("%s: call %d was let in, want at most %d", client, allowed+1, most)
			}
			if a.status == 429 {
				if allowed < burst {
					t.Errorf("%s: got %d calls, want the burst of %d", client, allowed, burst)
				}
				return a
			}
		}
	}
	for _, row := range []struct {
		name, spent, next string
		same              bool
	}{
		{"the address itself", "198.51.100.1", "198.51.100.1", true},
		{"another address", "198.51.100.2", "198.51.100.3", false},
		{"behind a second proxy", "198.51.100.4", "198.51.100.4, 10.1.2.3", true},
		{"behind a third, IPv6", "198.51.100.5", "198.51.100.5, fd00::1,10.1.2.3", true},
		{"entries on the left are the client's word", "198.51.100.6", "203.0.113.9, 198.51.100.6", true},
		{"garbage on the left", "198.51.100.7", "'; DROP TABLE accounts, 198.51.100.7", true},
		{"IPv4 in IPv6", "198.51.100.8", "::ffff:198.51.100.8", true},
		{"the same IPv6 /64", "2001:db8:0:1::1", "2001:db8:0:1:ffff:ffff:ffff:ffff", true},
		{"the next IPv6 /64", "2001:db8:0:2::1", "2001:db8:0:3::1", false},
	} {
		t.Run(row.name, func(t *testing.T) {
			a := exhaust(t, row.spent)
			wantCode(t, "past the burst", a, 429, "rate_limited")
			if got := retryAfter(a); got != 1 {
				t.Errorf("got Retry-After %q, want 1", a.header.Get("Retry-After"))
			}
			// A fresh address has its burst; the spent one has what came back
			// meanwhile.
			limited := false
			for range burst {
				limited = limited || post(row.next).status == 429
			}
			if limited != row.same {
				t.Errorf("%s after %s was spent: got limited=%v, want %v", row.next, row.spent, limited, row.same)
			}
		})
	}

	t.Run("before any query or hash", func(t *testing.T) {
		p := newPerson()
		client := "198.51.100.20"
		wantCode(t, "register", s.do("POST", registerPath, toJSON(p), "X-Forwarded-For", "198.51.100.21"), 201, "")
		exhaust(t, client)
		newHashes, newLimits := s.growth("auth_password_hash_duration_seconds_count"), s.growth(`auth_rate_limited_total{scope="ip"}`)
		refused := 0
		for range 5 {
			if s.do("POST", loginPath, p.loginBody("wrong battery staple horse"), "X-Forwarded-For", client).status == 429 {
				refused++
			}
		}
		checked := int(newHashes())
		if refused == 0 || refused+checked != 5 {
			t.Errorf("5 logins of a spent address: got %d refused and %d hashes, want 5 together and some refused", refused, checked)
		}
		if got := int(newLimits()); got != refused {
			t.Errorf("auth_rate_limited_total by ip: got %d more, want %d", got, refused)
		}
		const failures = `SELECT coalesce(sum(cardinality(failed)), 0)::int FROM guards`
		if got := dbtest.Value[int](t, w.db, failures); got != checked {
			t.Errorf("failures counted in the database: got %d, want %d", got, checked)
		}
	})

	for _, name := range []string{"IP_RATE_PER_SECOND", "IP_RATE_BURST"} {
		t.Run("off by "+name, func(t *testing.T) {
			off := held(t, w.start(cheap, unlimited, env{"IP_RATE_PER_SECOND": "1", "IP_RATE_BURST": "1", name: "0"}))
			for range 20 {
				wantCode(t, "a call", off.refresh("none"), 401, "invalid_refresh_token")
			}
		})
	}

	t.Run("not on GET", func(t *testing.T) {
		client := "198.51.100.30"
		exhaust(t, client)
		for range 2 * burst {
			for _, path := range []string{"/health/live", "/health/ready", "/.well-known/jwks.json", "/metrics"} {
				if a := s.get(path, "X-Forwarded-For", client); a.status != 200 {
					t.Errorf("GET %s of a spent address: got %d, want 200", path, a.status)
				}
			}
		}
	})
}

func TestLimitOfFailuresByAddress(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"LOGIN_FAILURES_PER_HOUR_PER_IP": "3", "TRUSTED_PROXIES": "127.0.0.0/8"}))
	p := s.register()
	login := func(p person, password, client string) answer {
		return s.do("POST", loginPath, p.loginBody(password), "X-Forwarded-For", client)
	}
	for i := range 6 {
		wantCode(t, fmt.Sprintf("good login %d", i+1), login(p, password, "198.51.100.1"), 200, "")
	}
	for i := range 3 {
		wantCode(t, fmt.Sprintf("failure %d, each of another e-mail", i+1), login(newPerson(), password, "198.51.100.1"), 401, "invalid_credentials")
	}
	a := login(p, password, "198.51.100.1")
	wantCode(t, "then", a, 429, "rate_limited")
	if got := retryAfter(a); got < 60 || got > 1200 {
		t.Errorf("got Retry-After %d, want most of 1200: a third of an hour", got)
	}
	wantCode(t, "from another address", login(p, password, "198.51.100.2"), 200, "")
	if got := s.metric(`auth_rate_limited_total{scope="ip"}`); got != 1 {
		t.Errorf("auth_rate_limited_total by ip: got %v, want 1", got)
	}
}

func TestWeakPasswords(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	list := filepath.Join(t.TempDir(), "blocklist")
	if err := os.WriteFile(list, []byte("unix line ending\nwindows line ending\r\n\nMixed Case Entry\nno line ending at all"), 0o600); err != nil {
		t.Fatal(err)
	}
	s := held(t, w.start(cheap, unlimited, env{"PASSWORD_BLOCKLIST_FILE": list}))
	p := newPerson()
	p.Email = "wilhelmine@mail.example.org"
	var long string // without a pattern
	for i := range 30 {
		long += fmt.Sprintf("%x", sha256.Sum256([]byte{byte(i)}))
	}
	for _, row := range []struct {
		name, password string
		reasons        []string
	}{
		{"11 characters", "kT9#vQ2!xLm", []string{"too_short"}},
		{"11 characters of 4 bytes", "🐎🔋📎🌊🎈🧦🪁🧲🪜🧵🪡", []string{"too_short"}},
		{"empty", "", []string{"common", "too_short"}},
		{"short and common", "password", []string{"common", "too_short"}},
		{"1025 bytes", long[:1025], []string{"too_long"}},
		{"1024 bytes and one character too many in UTF-8", long[:1023] + "é", []string{"too_long"}},
		{"common", "Password2024", []string{"common"}},
		{"the e-mail", "wilhelmine@mail.example.org", []string{"contains_email"}},
		{"the e-mail in another case, within", "xx-WILHELMINE@mail.example.ORG-xx", []string{"contains_email"}},
		{"the part before the @", "Wilhelmine-is-great", []string{"contains_email"}},
		{"blocklisted", "unix line ending", []string{"blocklisted"}},
		{"blocklisted, CR LF", "windows line ending", []string{"blocklisted"}},
		{"blocklisted, last line", "no line ending at all", []string{"blocklisted"}},
		{"blocklisted, in another case", "MIXED case ENTRY", []string{"blocklisted"}},
	} {
		p.Password = row.password
		a := s.post(registerPath, p)
		wantCode(t, row.name, a, 400, "weak_password")
		var got struct{ Reasons []string }
		if err := json.Unmarshal(a.body, &got); err != nil {
			t.Fatal(err)
		}
		if slices.Sort(got.Reasons); !slices.Equal(got.Reasons, row.reasons) {
			t.Errorf("%s: got reasons %q, want %q", row.name, got.Reasons, row.reasons)
		}
	}
	for _, row := range []struct{ name, password string }{
		{"12 characters", "kT9#vQ2!xLm4"},
		{"12 characters of 4 bytes", "🐎🔋📎🌊🎈🧦🪁🧲🪜🧵🪡🪢"},
		{"1024 bytes", long[:1024]},
		{"spaces around", "  kT9#vQ2!xLm4  "},
		{"the documented example", "StrongPassword123"},
		{"a part of a blocklisted one", "unix line endings"},
		{"NUL", "kT9#vQ2!\x00xLm4"},
	} {
		fresh := newPerson()
		fresh.Password = row.password
		if a := s.post(registerPath, fresh); a.status != 201 {
			t.Errorf("%s: got %d %s, want 201", row.name, a.status, a.body)
			continue
		}
		wantCode(t, row.name+": login", s.do("POST", loginPath, fresh.loginBody(row.password)), 200, "")
		wantCode(t, row.name+": login with spaces cut off or added", s.do("POST", loginPath, fresh.loginBody(strings.TrimSpace(row.password)+" ")), 401, "invalid_credentials")
	}
	if got := s.metric(`auth_register_total{result="weak_password"}`); got != 14 {
		t.Errorf("auth_register_total of weak passwords: got %v, want 14", got)
	}
}

func TestPasswordMinLength(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"PASSWORD_MIN_LENGTH": "8"}))
	for password, want := range map[string]int{"kT9#vQ2": 400, "kT9#vQ2!": 201} {
		p := newPerson()
		p.Password = password
		if a := s.post(registerPath, p); a.status != want {
			t.Errorf("%d characters with PASSWORD_MIN_LENGTH=8: got %d %s, want %d", len(password), a.status, a.body, want)
		}
	}
}

// commonPasswords: what guessers try first is refused, and what they do
// not is not.
func commonPasswords(t *testing.T, w *world, s *service) {
	register := func(password string) answer {
		p := newPerson()
		p.Password = password
		return s.post(registerPath, p)
	}
	for _, password := range []string{
		// Repeated.
		"aaaaaaaaaaaa", "000000000000", "abababababab", "abcabcabcabc", "abc123abc123", "aaaaaabbbbbb", "112233445566", "xyzxyzxyzxyz!",
		// Along the keyboard, the digits, the alphabet.
		"123456789012", "1234567890123", "098765432109", "abcdefghijkl", "ABCDEFGHIJKLMNOP", "qwertyuiop12", "qwertyuiopasdfghjkl",
		"1qaz2wsx3edc", "1q2w3e4r5t6y", "zxcvbnm12345", "asdfghjkl123", "poiuytrewq123", "qazwsxedcrfv", "qwerty123456", "!@#$%^&*()12",
		"147258369147", "a1b2c3d4e5f6",
		// A frequent word with digits, years or signs around it.
		"password1234", "Password2024", "Password2024!", "1234password", "PASSWORD!!!!", "passwordpassword", "welcome12345", "Welcome2023!!",
		"letmein12345", "iloveyou1234", "sunshine2020", "football1999", "1999baseball", "administrator", "Administrator1", "dragon123456",
		"monkey!!!!!!", "princess2010", "changeme1234", "Summer2024!!!", "december2023", "superman1978", "starwars1977!",
		// With the usual letter swaps.
		"P@ssw0rd1234", "p4ssw0rd2024", "Pa$$w0rd2024", "w3lc0me12345", "1l0v3y0u1234", "l3tm31n12345", "adm1n1str4t0r", "pa55word1234", "Passw0rd!Passw0rd!",
	} {
		a := register(password)
		var got struct{ Reasons []string }
		json.Unmarshal(a.body, &got)
		if a.status != 400 || !slices.Contains(got.Reasons, "common") {
			t.Errorf("%q: got %d %q, want 400 with reason common", password, a.status, got.Reasons)
		}
	}
	for _, password := range []string{
		"StrongPassword123", "correct horse battery staple", "correcthorsebatterystaple", "Tr0ub4dor&3-and-more", "purple monkey dishwasher",
		"my dog eats blue shoes", "I like long walks!", "winter in lisbon 1987", "four random words here", "nobody expects this",
		"kT9#vQ2!xLm4", "xK8pLm2qRt7v", "9f86d081884c", "b3JkZXItbm93", "u7-tt2-kq9-w", "zebra-anvil-crane", "quiet.river.stone",
		"Gr33n!Tr4ct0r%Hill", "7 samurai, 1 rice field", "meet me at the 3rd bench", "ocean breeze lantern", "tofu&lemon&rice", "LisbonTramLine28",
		"blue-whale-plankton", "a sentence is enough", "eleven llamas knit", "hG5$kk0-pqZ2", "vexing waltz jumps", "MyCatIsCalledFrodo",
		"соленый огурец", "пароль на завтра 7", "一只黑猫坐在屋顶上看月亮", "さくらの下で待っている人", "Frühlingsgefühle im Mai", "ça-va-très-bien", "kahvaltıda çay",
		"🐎🔋📎🌊🎈🧦🪁🧲🪜🧵🪡🪢", "1 + 1 = window", "the password is not password", "dragons fear mondays",
	} {
		if a := register(password); a.status != 201 {
			t.Errorf("%q: got %d %s, want 201", password, a.status, a.body)
		}
	}
}

func TestRegisterToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const token = "a-token-for-the-registering-backend"
	s := held(t, w.start(cheap, unlimited, env{"REGISTER_TOKEN": token}))
	for _, row := range []struct {
		name, authorization string
		status              int
	}{
		{"none", "", 401},
		{"another", "Bearer " + strings.Repeat("x", len(token)), 401},
		{"a prefix", "Bearer " + token[:len(token)-1], 401},
		{"an extension", "Bearer " + token + "x", 401},
		{"in upper case", "Bearer " + strings.ToUpper(token), 401},
		{"without scheme", token, 401},
		{"of another scheme", "Basic " + token, 401},
		{"empty", "Bearer ", 401},
		{"the token", "Bearer " + token, 201},
		{"the scheme in lower case (RFC 9110 11.1)", "bearer " + token, 201},
	} {
		a := s.do("POST", registerPath, toJSON(newPerson()), "Authorization", row.authorization)
		if row.status == 201 {
			wantCode(t, row.name, a, 201, "")
			continue
		}
		wantCode(t, row.name, a, 401, "unauthorized")
		if got := a.header.Get("WWW-Authenticate"); got != "Bearer" {
			t.Errorf("%s: got WWW-Authenticate %q, want Bearer", row.name, got)
		}
	}
	if got := s.metric(`auth_register_total{result="unauthorized"}`); got != 8 {
		t.Errorf("auth_register_total of unauthorized: got %v, want 8", got)
	}
	if got := len(s.logged("config.register_open")); got != 0 {
		t.Errorf("config.register_open lines: got %d, want 0", got)
	}
	open := held(t, w.start(cheap, unlimited))
	open.register()
	if got := len(open.logged("config.register_open")); got != 1 {
		t.Errorf("config.register_open lines without REGISTER_TOKEN: got %d, want 1", got)
	}
}

func TestAdminAddress(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	port := freePort(t)
	s := held(t, w.start(cheap, unlimited, env{"ADMIN_ADDR": "127.0.0.1:" + port}))
	admin := &service{t: t, base: "http://127.0.0.1:" + port, client: s.client}
	for _, row := range []struct {
		s      *service
		path   string
		status int
	}{
		{s, "/metrics", 404},
		{s, "/health/live", 200},
		{s, "/.well-known/jwks.json", 200},
		{admin, "/metrics", 200},
		{admin, "/health/live", 404},
		{admin, "/.well-known/jwks.json", 404},
		{admin, "/debug/pprof/", 404},
		{admin, "/debug/vars", 404},
		{s, "/debug/pprof/", 404},
		{s, "/debug/vars", 404},
	} {
		a := row.s.get(row.path)
		if a.status != row.status {
			t.Errorf("GET %s%s: got %d, want %d", row.s.base, row.path, a.status, row.status)
		}
	}
	wantCode(t, "login on the admin address", admin.do("POST", loginPath, newPerson().loginBody(password)), 404, "not_found")
	s.register()
	if got := admin.metric(`auth_register_total{result="success"}`); got != 1 {
		t.Errorf("auth_register_total on the admin address: got %v, want 1", got)
	}
}

func TestCORS(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	with := held(t, w.start(cheap, unlimited, env{"CORS_ORIGINS": "https://app.example.com, http://localhost:3000"}))
	without := held(t, w.start(cheap, unlimited))
	preflight := []string{"Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "content-type"}
	for _, row := range []struct {
		name    string
		s       *service
		method  string
		origin  string
		headers []string
		status  int
		allowed bool
	}{
		{"listed", with, "POST", "https://app.example.com", nil, 400, true},
		{"listed, the second", with, "POST", "http://localhost:3000", nil, 400, true},
		{"listed, preflight", with, "OPTIONS", "https://app.example.com", preflight, 204, true},
		{"listed, OPTIONS that is no preflight", with, "OPTIONS", "https://app.example.com", nil, 405, true},
		{"not listed", with, "POST", "https://evil.example.com", nil, 400, false},
		{"not listed, preflight", with, "OPTIONS", "https://evil.example.com", preflight, 405, false},
		{"another scheme", with, "POST", "http://app.example.com", nil, 400, false},
		{"another port", with, "POST", "https://app.example.com:8443", nil, 400, false},
		{"a longer name", with, "POST", "https://app.example.com.evil.com", nil, 400, false},
		{"another case", with, "POST", "https://APP.example.com", nil, 400, false},
		{"null", with, "POST", "null", nil, 400, false},
		{"no origin", with, "POST", "", nil, 400, false},
		{"no origins configured", without, "POST", "https://app.example.com", nil, 400, false},
		{"no origins configured, preflight", without, "OPTIONS", "https://app.example.com", preflight, 405, false},
	} {
		a := row.s.do(row.method, loginPath, []byte(`{}`), append([]string{"Origin", row.origin, "Content-Type", "application/json"}, row.headers...)...)
		if a.status != row.status {
			t.Errorf("%s: got %d, want %d", row.name, a.status, row.status)
		}
		want := ""
		if row.allowed {
			want = row.origin
		}
		if got := a.header.Get("Access-Control-Allow-Origin"); got != want {
			t.Errorf("%s: got Access-Control-Allow-Origin %q, want %q", row.name, got, want)
		}
		if a.header.Get("Access-Control-Allow-Credentials") != "" {
			t.Errorf("%s: credentials are allowed: there are no cookies", row.name)
		}
		if row.status == 204 {
			if got := a.header.Get("Access-Control-Allow-Methods"); !strings.Contains(got, "POST") {
				t.Errorf("%s: got Access-Control-Allow-Methods %q, want POST among them", row.name, got)
			}
			if got := strings.ToLower(a.header.Get("Access-Control-Allow-Headers")); !strings.Contains(got, "content-type") || !strings.Contains(got, "authorization") {
				t.Errorf("%s: got Access-Control-Allow-Headers %q, want Content-Type and Authorization among them", row.name, got)
			}
		}
		// A cache must not give one origin's answer to another, nor to none.
		if varies := slices.Contains(a.header.Values("Vary"), "Origin"); varies != (row.s == with) {
			t.Errorf("%s: got Vary %q, want Origin there: %v", row.name, a.header.Values("Vary"), row.s == with)
		}
		if row.s == without {
			for name := range a.header {
				if strings.HasPrefix(name, "Access-Control-") {
					t.Errorf("%s: got a header %s, want no CORS header ever", row.name, name)
				}
			}
		}
	}
}

// TestRehash: the first good login after a change of costs replaces the hash.
func TestRehash(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	old := held(t, w.start(cheap, unlimited))
	p := old.register()
	phc := func() string {
		return dbtest.Value[string](t, w.db, `SELECT password_hash FROM accounts WHERE user_id = $1`, p.UserID)
	}
	first := phc()
	if want := "$argon2id$v=19$m=19456,t=2,p=1$"; !strings.HasPrefix(first, want) {
		t.Fatalf("stored hash: got %s, want it to begin with %s", first, want)
	}
	old.login(p)
	if phc() != first {
		t.Error("a login with unchanged costs replaced the hash")
	}

	s := held(t, w.start(cheap, unlimited, env{"ARGON2_ITERATIONS": "4", "ARGON2_MEMORY_KIB": "20480"}))
	wantCode(t, "a wrong password", s.do("POST", loginPath, p.loginBody("wrong battery staple horse")), 401, "invalid_credentials")
	if phc() != first {
		t.Error("a failed login replaced the hash")
	}
	hashes := s.growth("auth_password_hash_duration_seconds_count")
	s.login(p)
	second := phc()
	if want := "$argon2id$v=19$m=20480,t=4,p=1$"; !strings.HasPrefix(second, want) {
		t.Errorf("stored hash after the login: got %s, want it to begin with %s", second, want)
	}
	if got := hashes(); got != 2 {
		t.Errorf("hashes observed for a login that rehashes: got %v, want 2: one observation for every hash computed", got)
	}
	s.login(p)
	if phc() != second {
		t.Error("the second login replaced the hash again")
	}
	wantCode(t, "a wrong password afterwards", s.do("POST", loginPath, p.loginBody("wrong battery staple horse")), 401, "invalid_credentials")

	// A lower cost is a change too, within four times today's memory.
	old.login(p)
	if third := phc(); !strings.HasPrefix(third, "$argon2id$v=19$m=19456,t=2,p=1$") {
		t.Errorf("stored hash after a login on the first: got %s", third)
	}
}

// hashThatCostsTooMuch: who can write into the database cannot make the
// service spend any memory it likes.
func hashThatCostsTooMuch(t *testing.T, w *world, s *service) {
	for _, row := range []struct {
		name, hash string
		status     int
	}{
		{"four times today's memory and one KiB", "$argon2id$v=19$m=77825,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", 401},
		{"a terabyte", "$argon2id$v=19$m=1073741824,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", 401},
		{"two billion iterations", "$argon2id$v=19$m=19456,t=2000000000,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", 401},
		{"nothing of a hash", "x", 401},
		{"no hash", "", 401},
	} {
		p := s.register()
		dbtest.Exec(t, w.db, `UPDATE accounts SET password_hash = $2 WHERE user_id = $1`, p.UserID, row.hash)
		if a := s.do("POST", loginPath, p.loginBody(password)); a.status != row.status {
			t.Errorf("%s: got %d, want %d", row.name, a.status, row.status)
		}
	}
}

func refreshChain(t *testing.T, w *world, s *service) {
	const length = 10
	// chain is a session's refresh tokens, the current one last.
	chain := func() []string {
		list := []string{s.login(s.register()).RefreshToken}
		for len(list) <= length {
			list = append(list, s.refresh(list[len(list)-1]).tokens(t).RefreshToken)
		}
		return list
	}
	rows := func(sql string) int { return dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM `+sql) }
	const events = `outbox WHERE event_type = 'security.refresh_replay_detected'`
	sessions, published := rows(`sessions`), rows(events)
	replays, revoked := s.growth(`auth_refresh_total{result="replay"}`), s.growth(`auth_refresh_total{result="revoked"}`)
	logged := len(s.logged("security.refresh_replay_detected"))

	list := chain()
	if slices.Sort(list); len(slices.Compact(list)) != length+1 {
		t.Error("a chain of refreshes repeats a token")
	}
	if got := rows(`sessions`) - sessions; got != 1 {
		t.Errorf("rows of a session refreshed %d times: got %d, want 1", length, got)
	}

	// However old the spent token is: replay, and the session is over at once.
	for age := 1; age <= length; age++ {
		list := chain()
		wantCode(t, fmt.Sprintf("the token spent %d refreshes ago", age), s.refresh(list[length-age]), 401, "invalid_refresh_token")
		wantCode(t, fmt.Sprintf("the current token after a replay of age %d", age), s.refresh(list[length]), 401, "invalid_refresh_token")
		if replays() != float64(age) || revoked() != float64(age) {
			t.Errorf("auth_refresh_total: got %v replays and %v revoked more, want %d of each", replays(), revoked(), age)
		}
	}
	if got := rows(events) - published; got != length {
		t.Errorf("replay events: got %d, want %d", got, length)
	}

	// The first replay is published; each is logged and counted.
	spent := chain()[3]
	for range 3 {
		s.refresh(spent)
	}
	if got := rows(events) - published; got != length+1 {
		t.Errorf("replay events after three replays of one session: got %d, want %d", got, length+1)
	}
	if got := replays(); got != length+3 {
		t.Errorf("auth_refresh_total of replays: got %v more, want %d", got, length+3)
	}
	eventually(t, "a line for each replay", 5*time.Second, func() bool {
		return len(s.logged("security.refresh_replay_detected"))-logged == length+3
	})
}

// refusedRefreshesLookAlike: one body, whatever the reason.
func refusedRefreshesLookAlike(t *testing.T, w *world, s *service) {

	p := s.register()
	current := s.login(p).RefreshToken
	mangled := current[:len(current)-1]

	spent := s.login(s.register()).RefreshToken
	s.refresh(spent)

	expired := s.login(s.register()).RefreshToken
	dbtest.Exec(t, w.db, `UPDATE sessions SET expires_at = clock_timestamp() WHERE id = $1`, newestSession(t, w))

	disabled := s.register()
	disabledToken := s.login(disabled).RefreshToken
	dbtest.Exec(t, w.db, `
WITH account AS (UPDATE accounts SET disabled_at = clock_timestamp() WHERE user_id = $1),
     session AS (UPDATE sessions SET revoked_at = t, revoked_reason = 'disabled', expires_at = t FROM clock_timestamp() AS t WHERE user_id = $1
                 RETURNING tenant_id, user_id, id)
INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
SELECT 'auth.session.revoked', tenant_id, user_id, gen_random_uuid()::text,
       jsonb_build_object('user_id', user_id, 'session_id', id, 'reason', 'disabled', 'access_tokens_expire_at', identity_auth.event_time(clock_timestamp())) FROM session`, disabled.UserID)

	crowded := s.register()
	pushedOut := s.login(crowded).RefreshToken
	kept := s.login(crowded).RefreshToken
	s.login(crowded)

	grown := map[string]func() float64{}
	for _, result := range []string{"invalid", "replay", "expired", "revoked"} {
		grown[result] = s.growth(fmt.Sprintf("auth_refresh_total{result=%q}", result))
	}
	var first string
	for i, row := range []struct{ name, token, tenant string }{
		{"nonsense", "nonsense", ""},
		{"empty", "", ""},
		{"an access token", s.login(p).AccessToken, ""},
		{"mangled", mangled, ""},
		{"another tenant", current, newUUID()},
		{"spent", spent, ""},
		{"spent, again", spent, ""},
		{"expired", expired, ""},
		{"disabled account", disabledToken, ""},
		{"beyond MAX_SESSIONS_PER_USER", pushedOut, ""},
	} {
		body := map[string]string{"refresh_token": row.token}
		if row.tenant != "" {
			body["tenant_id"] = row.tenant
		}
		a := s.post(refreshPath, body)
		wantCode(t, row.name, a, 401, "invalid_refresh_token")
		got := strings.Replace(string(a.body), a.header.Get("X-Trace-Id"), "", 1)
		if i == 0 {
			first = got
		}
		if got != first {
			t.Errorf("%s: got body %s, want %s", row.name, got, first)
		}
	}
	for _, row := range []struct{ name, token string }{
		{"the token that was presented mangled and for another tenant", current},
		{"the second session of three", kept},
	} {
		wantCode(t, row.name, s.refresh(row.token), 200, "")
	}
	for result, want := range map[string]float64{"invalid": 5, "replay": 2, "expired": 1, "revoked": 2} {
		if got := grown[result](); got != want {
			t.Errorf("auth_refresh_total of %s: got %v more, want %v", result, got, want)
		}
	}
}

func refreshTenant(t *testing.T, w *world, s *service) {
	p := s.register()
	token := s.login(p).RefreshToken
	for _, row := range []struct {
		name   string
		tenant any
		status int
		code   string
	}{
		{"another", newUUID(), 401, "invalid_refresh_token"},
		{"the user's id", p.UserID, 401, "invalid_refresh_token"},
		{"no UUID", "x", 400, "invalid_request"},
		{"empty", "", 400, "invalid_request"},
		{"the right one", p.TenantID, 200, ""},
		{"in upper case", strings.ToUpper(p.TenantID), 200, ""},
		{"null", nil, 200, ""},
	} {
		a := s.post(refreshPath, map[string]any{"refresh_token": token, "tenant_id": row.tenant})
		wantCode(t, row.name, a, row.status, row.code)
		if a.status == 200 {
			token = a.tokens(t).RefreshToken
		}
	}
}

// mangledRefreshTokens: every prefix, extension and single flipped bit of
// a token is refused and touches no row.
func mangledRefreshTokens(t *testing.T, w *world, s *service) {
	token := s.login(s.register()).RefreshToken
	id := newestSession(t, w)
	version := func() string {
		return dbtest.Value[string](t, w.db, `SELECT xmin::text FROM sessions WHERE id = $1`, id)
	}
	before, replays := version(), s.growth(`auth_refresh_total{result="replay"}`)

	refresh := func(what string, token string) {
		t.Helper()
		if a := s.refresh(token); a.status != 401 || a.code() != "invalid_refresh_token" {
			t.Errorf("%s: got %d %s, want 401 invalid_refresh_token", what, a.status, a.body)
		}
	}
	for n := range len(token) {
		refresh(fmt.Sprintf("the first %d bytes", n), token[:n])
	}
	for _, c := range "A=. \n\x00iZ-_" {
		refresh(fmt.Sprintf("with %q behind", c), token+string(c))
		refresh(fmt.Sprintf("with %q before", c), string(c)+token)
	}
	refresh("twice", token+token)
	refresh("in upper case", strings.ToUpper(token))
	refresh("with another prefix", "iat_"+token[4:])
	refresh("with a line break within", token[:40]+"\n"+token[40:])
	for i := range len(token) {
		for bit := range 7 { // the eighth makes it no text: see members in input_test.go
			flipped := []byte(token)
			flipped[i] ^= 1 << bit
			refresh(fmt.Sprintf("bit %d of byte %d flipped", bit, i), string(flipped))
		}
	}
	if version() != before {
		t.Error("a mangled token wrote to the session's row")
	}
	if got := replays(); got != 0 {
		t.Errorf("replays: got %v, want 0", got)
	}
	wantCode(t, "the token itself", s.refresh(token), 200, "")
}

func sessionExpiry(t *testing.T, w *world, s *service) {
	expired := s.growth(`auth_refresh_total{result="expired"}`)
	token := s.login(s.register()).RefreshToken
	age := func(by string) {
		dbtest.Exec(t, w.db, `UPDATE sessions SET created_at = created_at - $1::interval, used_at = used_at - $1::interval,
			expires_at = expires_at - $1::interval, ends_at = ends_at - $1::interval`, by)
	}
	for _, row := range []struct {
		age  string
		left time.Duration
	}{
		{"0", 24 * time.Hour},
		{"23 hours", 24 * time.Hour},
		{"23 hours", 24 * time.Hour},
		{"20 hours", 6 * time.Hour}, // never past SESSION_MAX_AGE
		{"5 hours", time.Hour},
	} {
		age(row.age)
		token = wantTokens(t, "after another "+row.age, s.refresh(token), 15*time.Minute, row.left).RefreshToken
	}
	age("1 hour")
	wantCode(t, "after SESSION_MAX_AGE", s.refresh(token), 401, "invalid_refresh_token")

	token = s.login(s.register()).RefreshToken
	age("24 hours")
	wantCode(t, "unused for REFRESH_TOKEN_TTL", s.refresh(token), 401, "invalid_refresh_token")
	if got := expired(); got != 2 {
		t.Errorf("auth_refresh_total of expired: got %v more, want 2", got)
	}
}

// TestReuseGrace: the token spent last, again, within the grace and before its
// successor was used, gets the same successor; anything else spent is replay.
func TestReuseGrace(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"REFRESH_REUSE_GRACE": "1h"}))
	expires := func() string {
		return dbtest.Value[string](t, w.db, `SELECT expires_at::text FROM sessions WHERE id = $1`, newestSession(t, w))
	}
	// begin returns a token that was spent and its successor.
	begin := func() (spent, next string) {
		spent = s.login(s.register()).RefreshToken
		return spent, s.refresh(spent).tokens(t).RefreshToken
	}
	gone := func(t *testing.T, token string) {
		t.Helper()
		wantCode(t, "the current token afterwards", s.refresh(token), 401, "invalid_refresh_token")
	}

	t.Run("again", func(t *testing.T) {
		spent, next := begin()
		until := expires()
		reused := s.metric(`auth_refresh_total{result="reused"}`)
		for range 3 {
			if got := s.refresh(spent).tokens(t).RefreshToken; got != next {
				t.Error("a reuse within the grace got another token, want the same successor")
			}
		}
		if got := s.metric(`auth_refresh_total{result="reused"}`) - reused; got != 3 {
			t.Errorf("auth_refresh_total of reused: got %v more, want 3", got)
		}
		if got := expires(); got != until {
			t.Errorf("expiry after reuse: got %s, want %s as before", got, until)
		}
		wantCode(t, "the successor", s.refresh(next), 200, "")
	})
	t.Run("after the successor was used", func(t *testing.T) {
		spent, next := begin()
		current := s.refresh(next).tokens(t).RefreshToken
		wantCode(t, "the token spent before last", s.refresh(spent), 401, "invalid_refresh_token")
		gone(t, current)
	})
	t.Run("after the grace", func(t *testing.T) {
		spent, next := begin()
		dbtest.Exec(t, w.db, `UPDATE sessions SET used_at = used_at - interval '1 hour' WHERE id = $1`, newestSession(t, w))
		wantCode(t, "the token spent last", s.refresh(spent), 401, "invalid_refresh_token")
		gone(t, next)
	})
	t.Run("of a session that expired", func(t *testing.T) {
		spent, next := begin()
		dbtest.Exec(t, w.db, `UPDATE sessions SET expires_at = clock_timestamp() WHERE id = $1`, newestSession(t, w))
		wantCode(t, "the token spent last", s.refresh(spent), 401, "invalid_refresh_token")
		gone(t, next)
	})
	t.Run("of a session that was revoked", func(t *testing.T) {
		first, second := begin()
		third := s.refresh(second).tokens(t).RefreshToken
		s.refresh(first) // revokes
		wantCode(t, "the token spent last", s.refresh(second), 401, "invalid_refresh_token")
		gone(t, third)
	})
	t.Run("reuses count towards REFRESH_PER_MIN_PER_TOKEN", func(t *testing.T) {
		limited := held(t, w.start(cheap, unlimited, env{"REFRESH_REUSE_GRACE": "1h", "REFRESH_PER_MIN_PER_TOKEN": "3"}))
		spent, next := begin() // the first of the minute
		limited.refresh(spent)
		limited.refresh(spent)
		wantCode(t, "the third reuse", limited.refresh(spent), 429, "rate_limited")
		wantCode(t, "the successor on a replica without the limit", s.refresh(next), 200, "")
	})
}

// TestSessionsOutliveKeys: another JWT key ends no session.
func TestSessionsOutliveKeys(t *testing.T) {
	w := newWorld(t)
	before := held(t, w.start(cheap, unlimited))
	token := before.login(before.register()).RefreshToken
	before.stop()
	keys := newKeyPair()
	after := held(t, w.start(cheap, unlimited, env{
		"JWT_PRIVATE_KEY_PEM": keys.private, "JWT_PUBLIC_KEY_PEM": keys.public, "JWT_KID": "test-2",
		"JWT_PREV_PUBLIC_KEY_PEM": keyPair().public, "JWT_PREV_KID": "test-1",
	}))
	tok := after.refresh(token).tokens(t)
	if got := header(t, tok.AccessToken)["kid"]; got != "test-2" {
		t.Errorf("kid of the new access token: got %v, want test-2", got)
	}
}

func maxSessions(t *testing.T, w *world, s *service) {
	p := s.register()
	first, second := s.login(p).RefreshToken, s.login(p).RefreshToken
	first = s.refresh(first).tokens(t).RefreshToken // now the second was used longest ago
	third := s.login(p).RefreshToken
	for _, row := range []struct {
		name, token string
		status      int
	}{
		{"used longest ago", second, 401},
		{"used before the last login", first, 200},
		{"the last login", third, 200},
	} {
		if a := s.refresh(row.token); a.status != row.status {
			t.Errorf("%s: got %d, want %d", row.name, a.status, row.status)
		}
	}
	const reasons = `SELECT data->>'reason' FROM outbox WHERE event_type = 'auth.session.revoked' AND user_id = $1`
	if got := dbtest.Query[string](t, w.db, reasons, p.UserID); !slices.Equal(got, []string{"limit"}) {
		t.Errorf("reasons of auth.session.revoked: got %q, want one limit", got)
	}
}

// forgedRefreshTokens: tokens with a right checksum that were never given
// out. Their layout stands in auth/token.go.
func forgedRefreshTokens(t *testing.T, w *world, s *service) {
	const session, generation, family, step, checksum = 0, 16, 24, 56, 88
	forge := func(token string, change func(b []byte)) string {
		b, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token, "iar_"))
		if err != nil || len(b) != checksum+4 || binary.BigEndian.Uint32(b[checksum:]) != crc32.ChecksumIEEE(b[:checksum]) {
			t.Fatal("refresh tokens are laid out in another way than this test believes")
		}
		change(b)
		binary.BigEndian.PutUint32(b[checksum:], crc32.ChecksumIEEE(b[:checksum]))
		return "iar_" + base64.RawURLEncoding.EncodeToString(b)
	}
	for _, row := range []struct {
		name   string
		change func(b []byte)
		result string // of auth_refresh_total
		lives  bool   // the session, afterwards
	}{
		{"another session id", func(b []byte) { b[session] ^= 1 }, "invalid", true},
		{"another family secret", func(b []byte) { b[family] ^= 1 }, "invalid", true},
		{"no secrets", func(b []byte) { clear(b[family:checksum]) }, "invalid", true},
		{"the secrets exchanged", func(b []byte) { copy(b[family:], append(bytes.Clone(b[step:checksum]), b[family:step]...)) }, "invalid", true},
		{"the generation after the row's: a lagging standby was promoted", func(b []byte) { b[generation+7]++ }, "invalid", true},
		{"the highest generation", func(b []byte) { copy(b[generation:], "\x3f\xff\xff\xff\xff\xff\xff\xff") }, "invalid", true},
		{"a generation beyond the highest", func(b []byte) { b[generation] = 0xff }, "invalid", true},
		{"another step secret: who knows the family secret has had a token", func(b []byte) { b[step] ^= 1 }, "replay", false},
		{"the current step secret with the generation before", func(b []byte) { b[generation+7]-- }, "replay", false},
	} {
		token := s.refresh(s.login(s.register()).RefreshToken).tokens(t).RefreshToken
		result := fmt.Sprintf("auth_refresh_total{result=%q}", row.result)
		was := s.metric(result)
		wantCode(t, row.name, s.refresh(forge(token, row.change)), 401, "invalid_refresh_token")
		if got := s.metric(result) - was; got != 1 {
			t.Errorf("%s: %s: got %v more, want 1", row.name, result, got)
		}
		want := map[bool]int{true: 200, false: 401}[row.lives]
		if a := s.refresh(token); a.status != want {
			t.Errorf("%s: the real token afterwards: got %d, want %d", row.name, a.status, want)
		}
	}
}

// newestSession is the id of the session that was begun last.
func newestSession(t *testing.T, w *world) string {
	t.Helper()
	return dbtest.Value[string](t, w.db, `SELECT id::text FROM sessions ORDER BY created_at DESC LIMIT 1`)
}
