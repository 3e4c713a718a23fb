package db

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

func fail(t *testing.T, s *Store, g *Guess) (lockedNow bool) {
	t.Helper()
	lockedNow, err := s.FailGuess(t.Context(), g, origin)
	if err != nil {
		t.Fatal(err)
	}
	return lockedNow
}

func complete(t *testing.T, s *Store, g *Guess) LoginOutcome {
	t.Helper()
	id := NewSessionID()
	_, outcome, err := s.CompleteLogin(t.Context(), g, "", NewSession{ID: id, FamilyHash: hashed("f"), StepHash: hashed("s")}, origin)
	if err != nil {
		t.Fatal(err)
	}
	return outcome
}

func TestLockAfterThreshold(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	for name, p := range map[string]person{
		"known":   register(t, s),
		"unknown": {tenant: TenantID{newUUID()}, email: Email{"nobody@example.com"}},
	} {
		before := events(t, url)["auth.lockout"]
		for n := range 5 {
			r := reserve(t, s, p)
			if r.Outcome != GuessReserved || r.Guess.Known != (name == "known") {
				t.Fatalf("%s, guess %d: got %+v", name, n, r)
			}
			if got, want := fail(t, s, r.Guess), n == 4; got != want {
				t.Errorf("%s, guess %d: lockedNow %v", name, n, got)
			}
		}
		r := reserve(t, s, p)
		if r.Outcome != GuessLocked || r.RetryAfter < 14*time.Minute || r.RetryAfter > 15*time.Minute {
			t.Errorf("%s: got %s, %v; want locked for 15m", name, r.Outcome, r.RetryAfter)
		}
		want := 0
		if name == "known" {
			want = 1
		}
		if got := events(t, url)["auth.lockout"] - before; got != want {
			t.Errorf("%s: %d lockout events, want %d", name, got, want)
		}
		dbtest.Exec(t, url, `UPDATE guards SET locked_until = clock_timestamp() - interval '1 second'`)
		for range 4 { // after a lock the count starts at zero
			if fail(t, s, reserve(t, s, p).Guess) {
				t.Errorf("%s: locked again too early", name)
			}
		}
	}
}

func TestSuccessClearsTheCount(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	p := register(t, s)
	for range 3 {
		for range 4 {
			fail(t, s, reserve(t, s, p).Guess)
		}
		if got := complete(t, s, reserve(t, s, p).Guess); got != LoginCompleted {
			t.Fatalf("got %s", got)
		}
	}
	told := dbtest.Query[int64](t, url, `SELECT (data->>'failed_since_last_success')::bigint FROM outbox WHERE event_type = 'auth.user.logged_in' ORDER BY seq`)
	if fmt.Sprint(told) != "[4 4 4]" {
		t.Errorf("failed_since_last_success: %v", told)
	}
}

func TestOldFailuresDoNotCount(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	p := register(t, s)
	for range 4 {
		fail(t, s, reserve(t, s, p).Guess)
	}
	dbtest.Exec(t, url, `UPDATE guards SET failed = ARRAY(SELECT f - interval '15 minutes' FROM unnest(failed) AS f)`)
	for range 4 {
		if fail(t, s, reserve(t, s, p).Guess) {
			t.Fatal("locked by failures older than the duration")
		}
	}
	if !fail(t, s, reserve(t, s, p).Guess) {
		t.Error("the fifth recent failure did not lock")
	}
}

func TestReservations(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())

	t.Run("full, and room again", func(t *testing.T) {
		p := register(t, s)
		var guesses []*Guess
		for range 5 {
			guesses = append(guesses, reserve(t, s, p).Guess)
		}
		if got := reserve(t, s, p).Outcome; got != GuessNoRoom {
			t.Fatalf("got %s, want no_room", got)
		}
		if err := s.ReleaseGuess(t.Context(), guesses[0]); err != nil {
			t.Fatal(err)
		}
		if got := reserve(t, s, p).Outcome; got != GuessReserved {
			t.Errorf("after a release: got %s, want reserved", got)
		}
		if got := complete(t, s, guesses[1]); got != LoginCompleted {
			t.Errorf("got %s", got)
		}
		if got := reserve(t, s, p).Outcome; got != GuessReserved {
			t.Errorf("after a success: got %s, want reserved", got)
		}
	})
	t.Run("dead owners have failed", func(t *testing.T) {
		p := register(t, s)
		var dead *Guess
		for range 5 {
			dead = reserve(t, s, p).Guess
		}
		before := events(t, url)["auth.lockout"]
		dbtest.Exec(t, url, `UPDATE guards SET pending = ARRAY(SELECT g - interval '16 seconds' FROM unnest(pending) AS g) WHERE key = $1`, dead.key)
		dead.ticket = dead.ticket.Add(-16 * time.Second)
		if got := complete(t, s, dead); got != LoginLapsed {
			t.Errorf("a success after the reservation: got %s, want lapsed", got)
		}
		if r := reserve(t, s, p); r.Outcome != GuessLockedNow || r.RetryAfter <= 0 {
			t.Errorf("got %s, want locked_now", r.Outcome)
		}
		if got := events(t, url)["auth.lockout"] - before; got != 1 {
			t.Errorf("lockout events: %d, want 1", got)
		}
		if fail(t, s, dead) {
			t.Error("a dead guess was counted twice")
		}
	})
	t.Run("no session on a lock that began meanwhile", func(t *testing.T) {
		p := register(t, s)
		g := reserve(t, s, p).Guess
		dbtest.Exec(t, url, `UPDATE guards SET locked_until = clock_timestamp() + interval '1 minute' WHERE key = $1`, g.key)
		if got := complete(t, s, g); got != LoginLapsed {
			t.Errorf("got %s, want lapsed", got)
		}
	})
	t.Run("no session with a password that was changed meanwhile", func(t *testing.T) {
		p := register(t, s)
		g := reserve(t, s, p).Guess
		dbtest.Exec(t, url, `UPDATE accounts SET password_hash = $2 WHERE user_id = $1`, p.user, hashB)
		if got := complete(t, s, g); got != LoginChanged {
			t.Errorf("got %s, want changed", got)
		}
		fail(t, s, g) // the guess was not spent by the attempt
		if n := dbtest.Value[int64](t, url, `SELECT cardinality(failed) FROM guards WHERE key = $1`, g.key); n != 1 {
			t.Errorf("failures: %d, want 1", n)
		}
	})
}

func TestLoginLimit(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.LoginPerMinute = 3
	s := open(t, url, r)
	p := register(t, s)
	for range 3 {
		complete(t, s, reserve(t, s, p).Guess)
	}
	if r := reserve(t, s, p); r.Outcome != GuessLimited || r.RetryAfter <= 0 || r.RetryAfter > time.Minute {
		t.Fatalf("got %s, %v", r.Outcome, r.RetryAfter)
	}
	again, err := s.ReserveGuess(t.Context(), p.tenant, p.email, p.email.String(), false, origin)
	if err != nil || again.Outcome != GuessReserved {
		t.Errorf("asking again without spending: got %s, %v", again.Outcome, err)
	}
	complete(t, s, again.Guess)
	dbtest.Exec(t, url, `UPDATE guards SET window_start = window_start - interval '1 minute'`)
	if got := reserve(t, s, p).Outcome; got != GuessReserved {
		t.Errorf("a minute later: got %s", got)
	}
}

func TestSpendLimit(t *testing.T) {
	url := dbtest.New(t)
	replicas := []*Store{open(t, url, rules()), open(t, url, rules())}
	tenant := TenantID{newUUID()}
	var allowed atomic.Int64
	var callers sync.WaitGroup
	for i := range 40 {
		callers.Go(func() {
			ok, wait, err := replicas[i%2].SpendLimit(context.Background(), ScopeRegister, tenant, "a@example.com", 5, time.Minute)
			if err != nil || !ok && (wait <= 0 || wait > time.Minute) {
				t.Error(ok, wait, err)
			}
			if ok {
				allowed.Add(1)
			}
		})
	}
	callers.Wait()
	if allowed.Load() != 5 {
		t.Errorf("allowed %d of 40, want 5", allowed.Load())
	}
	dbtest.Exec(t, url, `UPDATE rate_windows SET window_ends = clock_timestamp()`)
	if ok, _, err := replicas[0].SpendLimit(t.Context(), ScopeRegister, tenant, "a@example.com", 5, time.Minute); !ok || err != nil {
		t.Errorf("next window: %v %v", ok, err)
	}
}

// 500 parallel wrong guesses over three replicas, the right password among
// them: never more than the threshold are checked in a lock period.
func TestParallelGuesses(t *testing.T) {
	url := dbtest.New(t)
	replicas := []*Store{open(t, url, rules()), open(t, url, rules()), open(t, url, rules())}
	p := register(t, replicas[0])
	var wrong, locked atomic.Int64
	var callers sync.WaitGroup
	for i := range 500 {
		callers.Go(func() {
			s := replicas[i%3]
			for {
				r, err := s.ReserveGuess(context.Background(), p.tenant, p.email, p.email.String(), false, origin)
				if err != nil {
					t.Error(err)
					return
				}
				switch r.Outcome {
				case GuessNoRoom:
					continue
				case GuessReserved:
					wrong.Add(1)
					if _, err := s.FailGuess(context.Background(), r.Guess, origin); err != nil {
						t.Error(err)
					}
				case GuessLocked:
					locked.Add(1)
				}
				return
			}
		})
	}
	callers.Wait()
	if wrong.Load() != 5 || locked.Load() != 495 {
		t.Errorf("checked %d, locked %d; want 5 and 495", wrong.Load(), locked.Load())
	}
	if got := events(t, url)["auth.lockout"]; got != 1 {
		t.Errorf("lockout events: %d, want 1", got)
	}
}

func TestSessionLimitRevokesTheLeastRecentlyUsed(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.MaxSessions = 3
	s := open(t, url, r)
	p := register(t, s)
	first := login(t, s, p).ID
	second := login(t, s, p).ID
	login(t, s, p)
	rotate(t, s, step(first, 0)) // used later than the second
	login(t, s, p)
	if got := rotate(t, s, step(second, 0)).Outcome; got != RotateRevoked {
		t.Errorf("least recently used: got %s, want revoked", got)
	}
	if got := rotate(t, s, step(first, 1)).Outcome; got != Rotated {
		t.Errorf("recently used: got %s, want rotated", got)
	}
	if reason := dbtest.Value[string](t, url, `SELECT data->>'reason' FROM outbox WHERE event_type = 'auth.session.revoked'`); reason != "limit" {
		t.Errorf("reason: %q", reason)
	}
	// Parallel logins of one account never leave more.
	var callers sync.WaitGroup
	for range 5 {
		g := reserve(t, s, p).Guess
		callers.Go(func() {
			id := NewSessionID()
			if _, _, err := s.CompleteLogin(context.Background(), g, "", NewSession{ID: id, FamilyHash: hashed("f"), StepHash: hashed("s")}, origin); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if n := dbtest.Value[int64](t, url, `SELECT count(*) FROM sessions WHERE revoked_at IS NULL`); n != 3 {
		t.Errorf("live sessions: %d, want 3", n)
	}
}

func TestPrune(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	p := register(t, s)
	login(t, s, p)
	gone := login(t, s, p).ID
	fail(t, s, reserve(t, s, person{tenant: p.tenant, email: Email{"nobody@example.com"}}).Guess)
	if _, _, err := s.SpendLimit(t.Context(), ScopeRegister, p.tenant, "x@example.com", 5, time.Minute); err != nil {
		t.Fatal(err)
	}
	dbtest.Exec(t, url, `UPDATE guards SET touched_at = touched_at - interval '18 minutes' WHERE failed <> '{}'`)
	dbtest.Exec(t, url, `UPDATE rate_windows SET window_ends = clock_timestamp()`)
	dbtest.Exec(t, url, `UPDATE sessions SET expires_at = clock_timestamp() - interval '721 hours' WHERE id = $1`, gone)
	if err := s.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	for table, want := range map[string]int64{"guards": 1, "rate_windows": 0, "sessions": 1, "accounts": 1} {
		if got := dbtest.Value[int64](t, url, `SELECT count(*) FROM `+table); got != want {
			t.Errorf("%s: %d rows left, want %d", table, got, want)
		}
	}
}
