package db

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

func TestMain(m *testing.M) { os.Exit(dbtest.Main(m)) }

// rules are the contract's defaults, without limits that a test does not want.
func rules() Rules {
	return Rules{
		LockoutThreshold: 5, LockoutDuration: 15 * time.Minute, AccessTokenTTL: 15 * time.Minute,
		RefreshTokenTTL: 336 * time.Hour, SessionMaxAge: 720 * time.Hour, MaxSessions: 100,
		SessionRetention: 720 * time.Hour, OutboxRetention: 72 * time.Hour,
	}
}

// open gives a Store on the database; several on one database are replicas.
func open(t *testing.T, url string, r Rules) *Store {
	t.Helper()
	s, err := Open(url, 20, r)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

var origin = Origin{ClientIP: "192.0.2.1", UserAgent: "test", TraceID: "0af7651916cd43dd8448eb211c80319c"}

const hashA, hashB = "$argon2id$test$A", "$argon2id$test$B"

type person struct {
	tenant TenantID
	user   UserID
	email  Email
}

func register(t *testing.T, s *Store) person {
	t.Helper()
	p := person{tenant: TenantID{newUUID()}, user: UserID{newUUID()}}
	var err error
	if p.email, err = ParseEmail("u" + p.user.String() + "@example.com"); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.Register(t.Context(), p.tenant, p.user, p.email, hashA, origin); !ok || err != nil {
		t.Fatalf("register: ok=%v err=%v", ok, err)
	}
	return p
}

func reserve(t *testing.T, s *Store, p person) Reservation {
	t.Helper()
	r, err := s.ReserveGuess(t.Context(), p.tenant, p.email, p.email.String(), true, origin)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// secretOf makes test secrets; hashes are what the store sees.
func hashed(s string) []byte {
	sum := sha256.Sum256([]byte(s))
	return sum[:]
}

func login(t *testing.T, s *Store, p person) Session {
	t.Helper()
	r := reserve(t, s, p)
	if r.Outcome != GuessReserved {
		t.Fatalf("reserve: %s", r.Outcome)
	}
	id := NewSessionID()
	session, outcome, err := s.CompleteLogin(t.Context(), r.Guess, "", NewSession{ID: id, FamilyHash: hashed("family" + id.String()), StepHash: hashed("0" + id.String())}, origin)
	if err != nil || outcome != LoginCompleted {
		t.Fatalf("login: %s %v", outcome, err)
	}
	return session
}

// step is the rotation from generation n of a session to n+1.
func step(id SessionID, n int64) Step {
	return Step{
		Session: id, Generation: n, FamilyHash: hashed("family" + id.String()),
		StepHash: hashed(fmt.Sprint(n) + id.String()), NextHash: hashed(fmt.Sprint(n+1) + id.String()), NextSeed: hashed("seed"),
	}
}

func rotate(t *testing.T, s *Store, st Step) Rotation {
	t.Helper()
	r, err := s.RotateSession(t.Context(), st, origin)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func events(t *testing.T, url string) map[string]int {
	t.Helper()
	counts := map[string]int{}
	for _, typ := range EventTypes {
		counts[string(typ)] = int(dbtest.Value[int64](t, url, `SELECT count(*) FROM outbox WHERE event_type = $1`, string(typ)))
	}
	return counts
}

func TestRegisterTakesUserAndEmailOnce(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	p := register(t, s)
	other, _ := ParseEmail("other@example.com")
	for _, row := range []struct {
		name   string
		tenant TenantID
		user   UserID
		email  Email
		ok     bool
	}{
		{"same again", p.tenant, p.user, p.email, false},
		{"same user, other e-mail", p.tenant, p.user, other, false},
		{"same e-mail, other user", p.tenant, UserID{newUUID()}, p.email, false},
		{"other tenant", TenantID{newUUID()}, p.user, p.email, true},
	} {
		ok, err := s.Register(t.Context(), row.tenant, row.user, row.email, hashA, origin)
		if err != nil || ok != row.ok {
			t.Errorf("%s: got %v, %v; want %v", row.name, ok, err, row.ok)
		}
	}
	if got := events(t, url)["auth.user.registered"]; got != 2 {
		t.Errorf("registered events: got %d, want 2", got)
	}
}

func TestRotationOutcomes(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	p := register(t, s)
	otherTenant := TenantID{newUUID()}

	t.Run("forged family secret changes nothing", func(t *testing.T) {
		id := login(t, s, p).ID
		forged := step(id, 0)
		forged.FamilyHash = hashed("guess")
		if got := rotate(t, s, forged).Outcome; got != RotateUnknown {
			t.Errorf("got %s", got)
		}
		if got := rotate(t, s, step(id, 0)).Outcome; got != Rotated {
			t.Errorf("the session afterwards: got %s, want rotated", got)
		}
	})
	t.Run("tenant must match when given", func(t *testing.T) {
		id := login(t, s, p).ID
		st := step(id, 0)
		st.Tenant = &otherTenant
		if got := rotate(t, s, st).Outcome; got != RotateUnknown {
			t.Errorf("other tenant: got %s", got)
		}
		st.Tenant = &p.tenant
		if got := rotate(t, s, st).Outcome; got != Rotated {
			t.Errorf("right tenant: got %s", got)
		}
	})
	t.Run("a spent token of any age revokes", func(t *testing.T) {
		id := login(t, s, p).ID
		before := events(t, url)
		for n := range int64(5) {
			if got := rotate(t, s, step(id, n)).Outcome; got != Rotated {
				t.Fatalf("rotation %d: %s", n, got)
			}
		}
		for i, want := range []RotateOutcome{Replay, ReplayAgain, ReplayAgain} {
			if got := rotate(t, s, step(id, int64(i))).Outcome; got != want {
				t.Errorf("spent %d: got %s, want %s", i, got, want)
			}
		}
		if got := rotate(t, s, step(id, 5)).Outcome; got != RotateRevoked {
			t.Errorf("current after replay: got %s, want revoked", got)
		}
		after := events(t, url)
		for typ, want := range map[string]int{"auth.token.refreshed": 5, "security.refresh_replay_detected": 1, "auth.session.revoked": 1} {
			if got := after[typ] - before[typ]; got != want {
				t.Errorf("%s: got %d, want %d", typ, got, want)
			}
		}
	})
	t.Run("newer than the row revokes nothing", func(t *testing.T) {
		id := login(t, s, p).ID
		if got := rotate(t, s, step(id, 3)).Outcome; got != RotateAhead {
			t.Errorf("got %s, want ahead", got)
		}
		if got := rotate(t, s, step(id, 0)).Outcome; got != Rotated {
			t.Errorf("afterwards: got %s, want rotated", got)
		}
	})
	t.Run("expired", func(t *testing.T) {
		id := login(t, s, p).ID
		dbtest.Exec(t, url, `UPDATE sessions SET expires_at = clock_timestamp() - interval '1 second' WHERE id = $1`, id)
		if got := rotate(t, s, step(id, 0)).Outcome; got != RotateExpired {
			t.Errorf("got %s, want expired", got)
		}
	})
	t.Run("never past the end of the session", func(t *testing.T) {
		id := login(t, s, p).ID
		dbtest.Exec(t, url, `UPDATE sessions SET ends_at = clock_timestamp() + interval '1 hour', expires_at = clock_timestamp() + interval '1 minute' WHERE id = $1`, id)
		if r := rotate(t, s, step(id, 0)); r.Outcome != Rotated || r.Session.ExpiresIn > time.Hour || r.Session.ExpiresIn < 59*time.Minute {
			t.Errorf("got %s, %v; want rotated, an hour", r.Outcome, r.Session.ExpiresIn)
		}
	})
}

func TestRefreshLimitKeepsTheToken(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.RefreshPerMinute = 2
	s := open(t, url, r)
	id := login(t, s, register(t, s)).ID
	for n, want := range []RotateOutcome{Rotated, Rotated, RotateLimited, RotateLimited} {
		got := rotate(t, s, step(id, int64(min(n, 2))))
		if got.Outcome != want || want == RotateLimited && (got.RetryAfter <= 0 || got.RetryAfter > time.Minute) {
			t.Errorf("refresh %d: got %s, %v; want %s", n, got.Outcome, got.RetryAfter, want)
		}
	}
	dbtest.Exec(t, url, `UPDATE sessions SET window_start = window_start - interval '1 minute'`)
	if got := rotate(t, s, step(id, 2)).Outcome; got != Rotated {
		t.Errorf("a minute later: got %s, want rotated", got)
	}
	// A limited session still tells a replay.
	dbtest.Exec(t, url, `UPDATE sessions SET window_start = clock_timestamp(), window_count = 2`)
	if got := rotate(t, s, step(id, 0)).Outcome; got != Replay {
		t.Errorf("spent token while limited: got %s, want replay", got)
	}
}

func TestReuseGrace(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.ReuseGrace = time.Minute
	s := open(t, url, r)
	p := register(t, s)

	id := login(t, s, p).ID
	first := step(id, 0)
	rotate(t, s, first)
	second := first
	second.NextHash, second.NextSeed = hashed("another"), hashed("another seed")
	got := rotate(t, s, second)
	if got.Outcome != Reused || !bytes.Equal(got.Seed, first.NextSeed) || got.Generation != 1 {
		t.Fatalf("within the grace: got %s with seed %x, generation %d", got.Outcome, got.Seed, got.Generation)
	}
	if got := rotate(t, s, step(id, 1)).Outcome; got != Rotated {
		t.Fatalf("the successor: got %s, want rotated", got)
	}
	if got := rotate(t, s, first).Outcome; got != Replay {
		t.Errorf("after the successor was used: got %s, want replay", got)
	}

	id = login(t, s, p).ID
	rotate(t, s, step(id, 0))
	dbtest.Exec(t, url, `UPDATE sessions SET used_at = used_at - interval '61 seconds' WHERE id = $1`, id)
	if got := rotate(t, s, step(id, 0)).Outcome; got != Replay {
		t.Errorf("after the grace: got %s, want replay", got)
	}

	id = login(t, s, p).ID
	rotate(t, s, step(id, 0))
	rotate(t, s, step(id, 1))
	if got := rotate(t, s, step(id, 0)).Outcome; got != Replay {
		t.Errorf("older than the last spent: got %s, want replay", got)
	}
	if got := rotate(t, s, step(id, 1)).Outcome; got != ReplayAgain {
		t.Errorf("within the grace of a revoked session: got %s, want replay_again", got)
	}
}

func TestSeedIsKeptWithGraceOnly(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	id := login(t, s, register(t, s)).ID
	rotate(t, s, step(id, 0))
	if n := dbtest.Value[int64](t, url, `SELECT count(*) FROM sessions WHERE step_seed IS NOT NULL`); n != 0 {
		t.Errorf("seeds kept without a grace: %d", n)
	}
}

// One token, 64 callers on three replicas: one rotates, and since the others
// show a spent token, the session is revoked exactly once.
func TestConcurrentRotation(t *testing.T) {
	url := dbtest.New(t)
	replicas := []*Store{open(t, url, rules()), open(t, url, rules()), open(t, url, rules())}
	p := register(t, replicas[0])
	for range 20 {
		id := login(t, replicas[0], p).ID
		counts := map[RotateOutcome]int{}
		var mu sync.Mutex
		var callers sync.WaitGroup
		start := make(chan struct{})
		for i := range 64 {
			callers.Go(func() {
				st := step(id, 0)
				st.NextHash = hashed(fmt.Sprint("next", i))
				<-start
				r, err := replicas[i%3].RotateSession(context.Background(), st, origin)
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					t.Error(err)
				}
				counts[r.Outcome]++
			})
		}
		close(start)
		callers.Wait()
		if counts[Rotated] != 1 || counts[Replay] != 1 || counts[ReplayAgain] != 62 {
			t.Fatalf("got %v, want one rotated, one replay, 62 replay_again", counts)
		}
	}
	if got := events(t, url); got["security.refresh_replay_detected"] != 20 || got["auth.token.refreshed"] != 20 {
		t.Errorf("events: %v", got)
	}
}

func TestRefreshesStayHOT(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	id := login(t, s, register(t, s)).ID
	const refreshes = 200
	for n := range int64(refreshes) {
		if got := rotate(t, s, step(id, n)).Outcome; got != Rotated {
			t.Fatal(got)
		}
	}
	s.Close() // a backend reports its counts at the latest when it ends
	for range 100 {
		if dbtest.Value[int64](t, url, `SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'sessions'`) >= refreshes {
			break
		}
		dbtest.Exec(t, url, `SELECT pg_sleep(0.05)`)
	}
	updates := dbtest.Value[int64](t, url, `SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'sessions'`)
	hot := dbtest.Value[int64](t, url, `SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'sessions'`)
	if updates < refreshes || hot < updates*9/10 {
		t.Errorf("of %d updates %d were HOT", updates, hot)
	}
	if rows := dbtest.Value[int64](t, url, `SELECT count(*) FROM sessions`); rows != 1 {
		t.Errorf("rows: %d, want 1", rows)
	}
}
