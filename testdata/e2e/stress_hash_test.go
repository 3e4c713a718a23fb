package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

const mib = 1 << 20

// The contract's bounds with ARGON2_MEMORY_KIB=65536 and MAX_CONCURRENT_HASHES=2.
const (
	idleRSS = 25 * mib
	peakRSS = 2*64*mib + 64*mib
	restRSS = 32 * mib // above idle, 30 s after a burst
)

// accounts makes n accounts as import does: with the hash that one has.
func accounts(t *testing.T, w *world, like person, n int) []person {
	t.Helper()
	ps := make([]person, n)
	users := make([]string, n)
	for i := range ps {
		user := newUUID()
		ps[i] = person{like.TenantID, user, "n" + user[:13] + "@example.com", like.Password}
		users[i] = user
	}
	dbtest.Exec(t, w.db, `
WITH a AS (
    INSERT INTO accounts (tenant_id, user_id, email, password_hash)
    SELECT tenant_id, u, 'n' || left(u::text, 13) || '@example.com', password_hash
      FROM accounts, unnest($3::uuid[]) AS u WHERE tenant_id = $1 AND user_id = $2
    RETURNING tenant_id, user_id, email
)
INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
SELECT 'auth.user.imported', tenant_id, user_id, gen_random_uuid(), jsonb_build_object('user_id', user_id, 'email', email) FROM a`,
		like.TenantID, like.UserID, users)
	return ps
}

// median of durations, which it sorts.
func median(ds []time.Duration) time.Duration {
	if len(ds) == 0 {
		return 0
	}
	slices.Sort(ds)
	return ds[len(ds)/2]
}

// bystander uses the service beside a flood; nothing it asks needs a hash.
type bystander struct {
	pause time.Duration // between its rounds

	mu   sync.Mutex
	took map[string][]time.Duration
	bad  map[string]int
}

// watch asks for refresh, JWKS and health in turn until stop is closed.
func (b *bystander) watch(s *service, token string, stop <-chan struct{}) {
	b.took, b.bad = map[string][]time.Duration{}, map[string]int{}
	ask := func(method, path string, body []byte) answer {
		begun := time.Now()
		a, err := s.try(method, path, body)
		b.mu.Lock()
		defer b.mu.Unlock()
		b.took[path] = append(b.took[path], time.Since(begun))
		if err != nil || a.status != 200 {
			b.bad[fmt.Sprintf("%s: %d %s %v", path, a.status, a.code(), err)]++
		}
		return a
	}
	for {
		select {
		case <-stop:
			return
		default:
		}
		var got tokens
		if a := ask("POST", "/api/auth/refresh", refreshBody(token)); json.Unmarshal(a.body, &got) == nil && got.RefreshToken != "" {
			token = got.RefreshToken
		}
		ask("GET", "/.well-known/jwks.json", nil)
		ask("GET", "/health/live", nil)
		ask("GET", "/health/ready", nil)
		time.Sleep(b.pause)
	}
}

// flood logs everyone in at once, holds the answers to the contract, and
// returns how long the served and the refused waited.
func flood(t *testing.T, s *service, ps []person) (served, refused []time.Duration) {
	t.Helper()
	guesses := make([]guess, len(ps))
	together(len(ps), func(i int) {
		g := &guesses[i]
		g.sent = time.Now()
		g.answer, g.err = s.try("POST", "/api/auth/login", ps[i].loginBody(ps[i].Password))
		g.answered = time.Now()
	})
	n := tally(t, guesses)
	if n[200]+n[401]+n[503] != len(ps) {
		t.Errorf("answers: got %v, want 200, 401 or 503", n)
	}
	for _, g := range guesses {
		switch took := g.answered.Sub(g.sent); g.status {
		case 200, 401:
			served = append(served, took)
		case 503:
			refused = append(refused, took)
		}
	}
	return served, refused
}

// after counts the durations longer than limit.
func after(ds []time.Duration, limit time.Duration) (n int) {
	for _, d := range ds {
		if d > limit {
			n++
		}
	}
	return n
}

// acquireTimeout is the default of HASH_ACQUIRE_TIMEOUT.
const acquireTimeout = 2 * time.Second

// One service of two slots through everything that parallel logins can do to
// its memory: it peaks within the contract's bound and comes back.
func TestMemoryOfLoginFloods(t *testing.T) {
	w := newWorld(t)
	s := w.startPlain(unlimited)
	var idle int
	eventually(t, "idle RSS of at most 25 MiB", 15*time.Second, func() bool {
		idle, _ = s.rss()
		return idle <= idleRSS
	})
	first := s.register()
	many := accounts(t, w, first, 1000)
	one := slices.Repeat([]person{many[0]}, 1000)
	for _, f := range []struct {
		name   string
		people []person
	}{{"1,000 e-mails", many}, {"one e-mail", one}, {"1,000 e-mails again", many}} {
		t.Run(f.name, func(t *testing.T) {
			stop, stopped := make(chan struct{}), make(chan struct{})
			token := s.login(first).RefreshToken
			var b bystander
			go func() { defer close(stopped); b.watch(s, token, stop) }()
			sum, count := s.metric("auth_password_hash_duration_seconds_sum"), s.metric("auth_password_hash_duration_seconds_count")
			served, refused := flood(t, s, f.people)
			close(stop)
			<-stopped
			busy := s.metric("auth_password_hash_duration_seconds_sum") - sum
			mean := busy / (s.metric("auth_password_hash_duration_seconds_count") - count)

			now, peak := s.rss()
			t.Logf("served %d (median %v, %.2f s a hash), refused %d (median %v, later than 2 s: %d); RSS now %.1f MiB, peak %.1f MiB",
				len(served), median(served), mean, len(refused), median(refused), after(refused, acquireTimeout), float64(now)/mib, float64(peak)/mib)
			for path, took := range b.took {
				t.Logf("meanwhile %s: %d answers, median %v, slowest %v", path, len(took), median(took), slices.Max(took))
				// Whoever waited for a slot would take as long as the served.
				if m := median(took); m > median(served)/4 {
					t.Errorf("median of %s during the flood: got %v, want at most a quarter of the served logins' %v", path, m, median(served))
				}
			}
			for what, n := range b.bad {
				t.Errorf("during the flood: got %d times %s, want 200", n, what)
			}
			// Two slots for 2 s could do hashes of 4 s.
			if busy < 2 {
				t.Errorf("time spent hashing: got %.1f s, want at least half of what the slots offer in HASH_ACQUIRE_TIMEOUT", busy)
			}
			if m := median(refused); m > acquireTimeout*3/4 {
				t.Errorf("median wait of the refused: got %v, want far less than HASH_ACQUIRE_TIMEOUT", m)
			}
			if peak > peakRSS {
				t.Errorf("peak RSS: got %.1f MiB, want at most %d", float64(peak)/mib, peakRSS/mib)
			}
		})
	}
	s.client.CloseIdleConnections() // the load is gone, not only quiet
	burst := time.Now()
	eventually(t, "RSS back to idle + 32 MiB", 30*time.Second, func() bool {
		now, _ := s.rss()
		return now <= idle+restRSS
	})
	now, peak := s.rss()
	t.Logf("RSS: idle %.1f MiB, peak %.1f, %v after the bursts %.1f", float64(idle)/mib, float64(peak)/mib, time.Since(burst).Round(time.Second), float64(now)/mib)
}

// A service that has not hashed yet is as good at telling who cannot be served
// in HASH_ACQUIRE_TIMEOUT, also where hashes take long: of the few that it lets
// into the queue at least a third are served before that is over.
func TestRefusedAtOnce(t *testing.T) {
	w := newWorld(t)
	s := w.startPlain(unlimited, env{"ARGON2_ITERATIONS": "12"})
	strangers := make([]person, 100)
	for i := range strangers {
		strangers[i] = newPerson()
	}
	served, refused := flood(t, s, strangers)
	late := after(refused, acquireTimeout)
	t.Logf("served %d, refused %d (median %v), %d of them after %v", len(served), len(refused), median(refused), late, acquireTimeout)
	if late > 2*len(served) {
		t.Errorf("let into the queue: %d were served and %d refused after HASH_ACQUIRE_TIMEOUT, want at most twice as many", len(served), late)
	}
	if m := median(refused); m > acquireTimeout*3/4 {
		t.Errorf("median wait of the refused: got %v, want far less than HASH_ACQUIRE_TIMEOUT", m)
	}
}

// After a change of costs every good login makes two hashes in its slot.
func TestMemoryOfRehashing(t *testing.T) {
	w := newWorld(t)
	old := w.startPlain(unlimited, env{"ARGON2_ITERATIONS": "2"})
	many := accounts(t, w, old.register(), 100)
	s := w.startPlain(unlimited, env{"HASH_ACQUIRE_TIMEOUT": "6s"})
	served, refused := flood(t, s, many)
	_, peak := s.rss()
	t.Logf("served %d, refused %d, peak RSS %.1f MiB", len(served), len(refused), float64(peak)/mib)
	if peak > peakRSS {
		t.Errorf("peak RSS: got %.1f MiB, want at most %d", float64(peak)/mib, peakRSS/mib)
	}
	rehashed := dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM accounts WHERE password_hash LIKE '$argon2id$v=19$m=65536,t=3,p=1$%'`)
	if rehashed != len(served) {
		t.Errorf("accounts with a hash of today's cost: got %d, want the %d that logged in", rehashed, len(served))
	}
	if n := hashes(s); n != 2*len(served) {
		t.Errorf("hashes observed: got %d, want 2 for each of %d logins", n, len(served))
	}
}

// Clients that hang up leave the queue: nobody computes their hashes, nothing
// of them counts, and the next client does not wait for them.
func TestHangingUpLeavesTheQueue(t *testing.T) {
	const waiting = 8
	w := newWorld(t)
	s := w.start(unlimited, env{"MAX_CONCURRENT_HASHES": "1", "HASH_ACQUIRE_TIMEOUT": "10s"})
	first := s.register()
	many := accounts(t, w, first, waiting)
	one := slices.Repeat([]person{many[0]}, waiting)
	for _, c := range []struct {
		name   string
		people []person
		queued int // guesses reserved: those of one e-mail wait for their turn, a few at a time
	}{{"several e-mails", many, waiting}, {"one e-mail", one, 2}} {
		t.Run(c.name, func(t *testing.T) {
			reserved := func() int {
				return dbtest.Value[int](t, w.db, `SELECT coalesce(sum(cardinality(pending)), 0)::int FROM guards`)
			}
			before := hashes(s)
			ctx, hangUp := context.WithCancel(t.Context())
			defer hangUp()
			var answered, served atomic.Int64
			var clients sync.WaitGroup
			for _, p := range c.people {
				clients.Go(func() {
					req, err := http.NewRequestWithContext(ctx, "POST", s.base+"/api/auth/login", strings.NewReader(string(p.loginBody(p.Password))))
					if err != nil {
						t.Error(err)
						return
					}
					req.Header.Set("Content-Type", "application/json")
					if resp, err := s.client.Do(req); err == nil {
						resp.Body.Close()
						if answered.Add(1); resp.StatusCode == 200 {
							served.Add(1)
						}
					}
				})
			}
			eventually(t, "all are in the queue", 10*time.Second, func() bool { return reserved()+int(answered.Load()) >= c.queued })
			hangUp()
			clients.Wait()
			begun := time.Now()
			eventually(t, "the next client is served", 10*time.Second, func() bool {
				return s.do("POST", "/api/auth/login", first.loginBody(first.Password)).status == 200
			})
			took := time.Since(begun)
			eventually(t, "no guess is reserved", 10*time.Second, func() bool { return reserved() == 0 })
			computed := hashes(s) - before - 1 - int(served.Load())
			mean := s.metric("auth_password_hash_duration_seconds_sum") / s.metric("auth_password_hash_duration_seconds_count")
			t.Logf("%d were answered, %d hung up, %d hashes were computed for these; the next login took %v with %.2f s a hash", answered.Load(), waiting-answered.Load(), computed, took, mean)
			if computed > 1 {
				t.Errorf("hashes computed for clients that had gone: got %d, want at most the one under way", computed)
			}
			if failed := dbtest.Value[int](t, w.db, `SELECT coalesce(sum(cardinality(failed)), 0)::int FROM guards`); failed != 0 {
				t.Errorf("guesses counted as wrong: got %d, want 0", failed)
			}
		})
	}
}
