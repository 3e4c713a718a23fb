package e2e

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// logins begins n sessions of one account, three at a time.
func logins(t *testing.T, rs []*service, p person, n int) []tokens {
	t.Helper()
	begun := make([]tokens, n)
	together(3, func(worker int) {
		for i := worker; i < n; i += 3 {
			a, err := rs[i%len(rs)].try("POST", "/api/auth/login", p.loginBody(p.Password))
			if err != nil || a.status != 200 {
				t.Errorf("login: got %d %s, %v", a.status, a.body, err)
				return
			}
			json.Unmarshal(a.body, &begun[i])
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	return begun
}

// sessionOf is the sid of the access token, unverified. It may be called from
// any goroutine.
func sessionOf(t *testing.T, got tokens) string {
	t.Helper()
	var claims struct{ Sid string }
	parts := strings.Split(got.AccessToken, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[len(parts)/2])
	if err != nil || json.Unmarshal(payload, &claims) != nil || claims.Sid == "" {
		t.Errorf("no sid in access token %q", got.AccessToken)
	}
	return claims.Sid
}

func refreshBody(token string) []byte { return toJSON(map[string]string{"refresh_token": token}) }

// presentAll sends one refresh token n times at once, spread over the
// replicas. It returns how often each new refresh token was handed out, and
// how often each other answer.
func presentAll(rs []*service, token string, n int) (successors, others map[string]int) {
	successors, others = map[string]int{}, map[string]int{}
	var mu sync.Mutex
	together(n, func(i int) {
		a, err := rs[i%len(rs)].try("POST", "/api/auth/refresh", refreshBody(token))
		var got tokens
		mu.Lock()
		defer mu.Unlock()
		switch {
		case err != nil:
			others[err.Error()]++
		case a.status == 200 && json.Unmarshal(a.body, &got) == nil:
			successors[got.RefreshToken]++
		default:
			others[fmt.Sprintf("%d %s", a.status, a.code())]++
		}
	})
	return successors, others
}

func TestParallelRefreshesRotateOnce(t *testing.T) {
	const rounds, callers = 200, 64
	w := newWorld(t)
	rs := w.replicas(3, unlimited, cheapHashes, env{"MAX_SESSIONS_PER_USER": "0"})
	p := rs[0].register()
	for _, begun := range logins(t, rs, p, rounds) {
		successors, others := presentAll(rs, begun.RefreshToken, callers)
		if len(successors) != 1 || others["401 invalid_refresh_token"] != callers-1 {
			t.Fatalf("%d refreshes with one token: got %d new tokens and %v, want 1 and %d times 401 invalid_refresh_token", callers, len(successors), others, callers-1)
		}
		for token, n := range successors {
			if n != 1 {
				t.Errorf("answers with the new token: got %d, want 1", n)
			}
			if a := rs[0].refresh(token); a.status != 401 || a.code() != "invalid_refresh_token" {
				t.Fatalf("the new token after a replay: got %d %s, want 401 invalid_refresh_token", a.status, a.body)
			}
		}
	}
	count := func(what, query string) {
		t.Helper()
		if n := dbtest.Value[int](t, w.db, query, p.UserID); n != rounds {
			t.Errorf("%s: got %d, want %d", what, n, rounds)
		}
	}
	count("sessions revoked as replayed after one rotation", `SELECT count(*)::int FROM sessions WHERE user_id = $1 AND revoked_reason = 'replay' AND generation = 1`)
	for _, event := range []string{"security.refresh_replay_detected", "auth.session.revoked", "auth.token.refreshed"} {
		count(event+" events", `SELECT count(*)::int FROM outbox WHERE user_id = $1 AND event_type = '`+event+`'`)
		count("sessions with such an event", `SELECT count(DISTINCT data->>'session_id')::int FROM outbox WHERE user_id = $1 AND event_type = '`+event+`'`)
	}
	replays := 0
	for _, s := range rs {
		replays += int(s.metric(`auth_refresh_total{result="replay"}`))
	}
	if want := rounds * (callers - 1); replays != want {
		t.Errorf("replays counted: got %d, want %d", replays, want)
	}
}

func TestReuseGraceGivesOneSuccessor(t *testing.T) {
	const rounds, callers = 40, 64
	w := newWorld(t)
	rs := w.replicas(3, unlimited, cheapHashes, env{"REFRESH_REUSE_GRACE": "10s"})
	p := rs[0].register()
	state := func() string {
		return dbtest.Value[string](t, w.db, `SELECT generation || ' ' || coalesce(revoked_reason, 'live') FROM sessions WHERE user_id = $1`, p.UserID)
	}
	spent := ""
	token := rs[0].login(p).RefreshToken
	for round := range rounds {
		successors, others := presentAll(rs, token, callers)
		if len(successors) != 1 || len(others) != 0 {
			t.Fatalf("round %d: got %d new tokens and %v, want 1 for all", round, len(successors), others)
		}
		if got, want := state(), fmt.Sprint(round+1, " live"); got != want {
			t.Fatalf("rotations after round %d: got %s, want %s", round, got, want)
		}
		spent = token
		for token = range successors {
		}
	}
	token = rs[1].refresh(token).tokens(t).RefreshToken
	// Spent before the last one: no grace, and nothing is left of the session.
	if a := rs[2].refresh(spent); a.status != 401 {
		t.Errorf("a token spent earlier: got %d %s, want 401", a.status, a.body)
	}
	if got, want := state(), fmt.Sprint(rounds+1, " replay"); got != want {
		t.Errorf("session after the replay: got %s, want %s", got, want)
	}
	if a := rs[0].refresh(token); a.status != 401 {
		t.Errorf("the current token after the replay: got %d %s, want 401", a.status, a.body)
	}
}

// fleet is replicas that die and come back while clients use them.
type fleet struct {
	w    *world
	more []env

	mu       sync.RWMutex
	replicas []*service
	settled  chan struct{} // closed when nothing of a dead replica is at work any more
}

func (w *world) fleet(n int, more ...env) *fleet {
	f := &fleet{w: w, more: more, settled: make(chan struct{})}
	close(f.settled)
	for i := range n {
		f.replicas = append(f.replicas, f.start(i))
	}
	return f
}

func (f *fleet) start(i int) *service {
	start := f.w.startPlain
	if i == 0 {
		start = f.w.start
	}
	return start(append(f.more[:len(f.more):len(f.more)], env{"DATABASE_URL": f.w.db + "&application_name=" + f.name(i)})...)
}

func (f *fleet) name(i int) string { return fmt.Sprint("replica-", i) }

// pick returns n different replicas.
func (f *fleet) pick(n int) []*service {
	f.mu.RLock()
	defer f.mu.RUnlock()
	picked := make([]*service, n)
	for i, at := range rand.Perm(len(f.replicas))[:n] {
		picked[i] = f.replicas[at]
	}
	return picked
}

// crash kills one replica and starts another in its place. PostgreSQL ends
// the statements that a dead client has sent; until then they are at work.
func (f *fleet) crash(i int) {
	f.w.t.Helper()
	settled := make(chan struct{})
	f.mu.Lock()
	f.settled = settled
	f.replicas[i].kill()
	f.mu.Unlock()
	eventually(f.w.t, "PostgreSQL has left the dead replica", 30*time.Second, func() bool {
		return dbtest.Value[int](f.w.t, f.w.db, `SELECT count(*)::int FROM pg_stat_activity WHERE application_name = $1`, f.name(i)) == 0
	})
	close(settled)
	fresh := f.start(i)
	f.mu.Lock()
	f.replicas[i] = fresh
	f.mu.Unlock()
}

// afterCrash waits until a request that a dead replica left without an answer
// has happened or will never happen.
func (f *fleet) afterCrash() {
	f.mu.RLock()
	settled := f.settled
	f.mu.RUnlock()
	<-settled
}

// Clients present each token to two replicas at once while replicas die. With
// a grace no chain ever forks, and none ends: the answer that was lost is had
// again.
func TestChainsNeverForkWhenReplicasDie(t *testing.T) {
	w := newWorld(t)
	f := w.fleet(3, unlimited, cheapHashes, env{"REFRESH_REUSE_GRACE": "1h"})
	p := f.replicas[0].register()
	begun := logins(t, f.replicas, p, 9)
	stop := make(chan struct{})
	steps, lost := make([]int, len(begun)), make([]int, len(begun))
	var clients sync.WaitGroup
	for i, b := range begun {
		clients.Go(func() {
			token := b.RefreshToken
			for {
				select {
				case <-stop:
					return
				default:
				}
				answers := make([]answer, 2)
				errs := make([]error, 2)
				replicas := f.pick(2)
				together(2, func(j int) {
					answers[j], errs[j] = replicas[j].try("POST", "/api/auth/refresh", refreshBody(token))
				})
				successors := map[string]bool{}
				for j, a := range answers {
					var got tokens
					if errs[j] != nil {
						f.afterCrash()
					} else if a.status != 200 || json.Unmarshal(a.body, &got) != nil {
						t.Errorf("chain %d, step %d: got %d %s, want 200", i, steps[i], a.status, a.body)
						return
					} else {
						successors[got.RefreshToken] = true
					}
				}
				if len(successors) > 1 {
					t.Errorf("chain %d, step %d: two different successors", i, steps[i])
					return
				}
				if len(successors) == 0 {
					lost[i]++
					continue
				}
				steps[i]++
				for token = range successors {
				}
			}
		})
	}
	for i := range 3 {
		f.crash(i)
	}
	close(stop)
	clients.Wait()
	t.Logf("steps %v, asked again after no answer %v", steps, lost)
	for i, b := range begun {
		want := fmt.Sprint(steps[i], " live")
		got := dbtest.Value[string](t, w.db, `SELECT generation || ' ' || coalesce(revoked_reason, 'live') FROM sessions WHERE id = $1`, sessionOf(t, b))
		if got != want {
			t.Errorf("chain %d in the database: got %s, want %s", i, got, want)
		}
	}
}

// Without a grace a lost answer may end a session, but a token is spent once
// all the same: whoever gets 200 from a second try was the first.
func TestTokensAreSpentOnceWhenReplicasDie(t *testing.T) {
	w := newWorld(t)
	f := w.fleet(3, unlimited, cheapHashes)
	p := f.replicas[0].register()
	begun := logins(t, f.replicas, p, 24)
	stop := make(chan struct{})
	want := make([]string, len(begun))
	steps, retries := make([]int, len(begun)), make([]int, len(begun))
	var clients sync.WaitGroup
	for i, b := range begun {
		clients.Go(func() {
			token, unsure := b.RefreshToken, false
			for {
				select {
				case <-stop:
					want[i] = fmt.Sprint(steps[i], " live")
					if !unsure {
						return
					}
				default:
				}
				a, err := f.pick(1)[0].try("POST", "/api/auth/refresh", refreshBody(token))
				var got tokens
				switch {
				case err != nil:
					f.afterCrash()
					retries[i]++
					unsure = true
				case a.status == 200 && json.Unmarshal(a.body, &got) == nil:
					steps[i]++
					token, unsure = got.RefreshToken, false
				case a.status == 401 && unsure:
					want[i] = fmt.Sprint(steps[i]+1, " replay")
					return
				default:
					t.Errorf("chain %d, step %d: got %d %s, want 200", i, steps[i], a.status, a.body)
					return
				}
			}
		})
	}
	for i := range 3 {
		f.crash(i)
	}
	close(stop)
	clients.Wait()
	t.Logf("steps %v, asked again after no answer %v", steps, retries)
	for i, b := range begun {
		got := dbtest.Value[string](t, w.db, `SELECT generation || ' ' || coalesce(revoked_reason, 'live') FROM sessions WHERE id = $1`, sessionOf(t, b))
		if got != want[i] {
			t.Errorf("chain %d in the database: got %s, want %s", i, got, want[i])
		}
	}
}

func TestTenThousandRefreshesAreOneRow(t *testing.T) {
	t.Parallel() // nothing of it depends on time
	const steps = 10000
	w := newWorld(t)
	s := w.startPlain(unlimited, cheapHashes)
	p := s.register()
	token := s.login(p).RefreshToken
	for range steps {
		token = s.refresh(token).tokens(t).RefreshToken
	}
	got := dbtest.Value[string](t, w.db, `SELECT count(*) || ' with generation ' || max(generation) FROM sessions`)
	if want := fmt.Sprint("1 with generation ", steps); got != want {
		t.Errorf("rows of sessions: got %s, want %s", got, want)
	}
	if kib := dbtest.Value[int](t, w.db, `SELECT (pg_relation_size('sessions') / 1024)::int`); kib > 512 {
		t.Errorf("size of sessions after %d refreshes of one: got %d KiB, want at most 512", steps, kib)
	}
}

// Five thousand logins of one account, most of them as rows that a service
// without the limit would have left.
func TestLoginsLeaveBoundedSessions(t *testing.T) {
	t.Parallel() // nothing of it depends on time
	const before, n, limit = 4500, 500, 100
	w := newWorld(t)
	rs := []*service{w.startPlain(unlimited, cheapHashes), w.startPlain(unlimited, cheapHashes)}
	p := rs[0].register()
	dbtest.Exec(t, w.db, `
WITH s AS (
    INSERT INTO sessions (id, tenant_id, user_id, family_hash, step_hash, created_at, used_at, expires_at, ends_at, window_start, client_ip, user_agent)
    SELECT gen_random_uuid(), $1, $2, sha256('f'), sha256('s'), t, t, t + interval '1 day', t + interval '2 days', t, '', ''
      FROM generate_series(1, $3) AS i, LATERAL (SELECT clock_timestamp() - interval '1 hour' - i * interval '1 s' AS t) AS past
    RETURNING id
)
INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
SELECT 'auth.user.logged_in', $1, $2, gen_random_uuid(), jsonb_build_object('user_id', $2::uuid, 'session_id', id, 'client_ip', '127.0.0.1', 'user_agent', '', 'failed_since_last_success', 0) FROM s`,
		p.TenantID, p.UserID, before)
	begun := logins(t, rs, p, n)
	check := func(what string, want int, query string) {
		t.Helper()
		if got := dbtest.Value[int](t, w.db, query, p.UserID); got != want {
			t.Errorf("%s: got %d, want %d", what, got, want)
		}
	}
	check("live sessions", limit, `SELECT count(*)::int FROM sessions WHERE user_id = $1 AND revoked_at IS NULL AND expires_at > clock_timestamp()`)
	check("sessions revoked for the limit", before+n-limit, `SELECT count(*)::int FROM sessions WHERE user_id = $1 AND revoked_reason = 'limit'`)
	check("auth.session.revoked events", before+n-limit, `SELECT count(*)::int FROM outbox WHERE user_id = $1 AND event_type = 'auth.session.revoked'`)
	check("live sessions begun before the last 100", 0, `
SELECT count(*)::int FROM sessions WHERE user_id = $1 AND revoked_at IS NULL
   AND created_at < (SELECT created_at FROM sessions WHERE user_id = $1 ORDER BY created_at DESC OFFSET 99 LIMIT 1)`)
	rs[0].refresh(begun[n-1].RefreshToken).tokens(t)
	if a := rs[1].refresh(begun[0].RefreshToken); a.status != 401 {
		t.Errorf("refresh of a session beyond the limit: got %d %s, want 401", a.status, a.body)
	}
}
