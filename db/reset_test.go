package db

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

func principal(p person, id SessionID) Principal { return Principal{p.tenant, p.user, id} }

// tenants with the same user id and e-mail: nothing done in one shows in the
// other.
func twins(t *testing.T, s *Store) (a, b person) {
	t.Helper()
	a = register(t, s)
	b = a
	b.tenant = TenantID{newUUID()}
	if ok, err := s.Register(t.Context(), b.tenant, b.user, b.email, hashA, origin); !ok || err != nil {
		t.Fatal(ok, err)
	}
	return a, b
}

func live(t *testing.T, url string, p person) int64 {
	t.Helper()
	return dbtest.Value[int64](t, url, `SELECT count(*) FROM sessions WHERE tenant_id = $1 AND user_id = $2 AND revoked_at IS NULL AND expires_at > clock_timestamp()`, p.tenant, p.user)
}

func TestEndSession(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	p := register(t, s)
	id := login(t, s, p).ID
	rotate(t, s, step(id, 0))
	forged, other := step(id, 0), step(id, 0)
	forged.FamilyHash = hashed("guess")
	other.Tenant = &TenantID{newUUID()}
	for _, row := range []struct {
		name    string
		step    Step
		genuine bool
		live    int64
	}{
		{"forged family secret", forged, false, 1},
		{"another tenant", other, false, 1},
		{"a spent token of the session", step(id, 0), true, 0},
		{"already ended", step(id, 1), true, 0},
		{"no row any more", step(NewSessionID(), 0), true, 0},
	} {
		_, genuine, err := s.EndSession(t.Context(), row.step, origin)
		if err != nil || genuine != row.genuine || live(t, url, p) != row.live {
			t.Errorf("%s: got %v, %v, %d live; want %v, %d", row.name, genuine, err, live(t, url, p), row.genuine, row.live)
		}
	}
	if got := events(t, url); got["auth.user.logged_out"] != 1 || got["auth.session.revoked"] != 1 {
		t.Errorf("events: %v", got)
	}
	if got := rotate(t, s, step(id, 1)).Outcome; got != RotateRevoked {
		t.Errorf("refresh after logout: %s", got)
	}
}

func TestOwnSessions(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	a, b := twins(t, s)
	mine, second, theirs := login(t, s, a).ID, login(t, s, a).ID, login(t, s, b).ID
	me := principal(a, mine)

	list, err := s.ListSessions(t.Context(), me)
	if err != nil || len(list) != 2 || list[0].ID != second || !list[1].Current || list[1].ID != mine {
		t.Errorf("list: %+v, %v", list, err)
	}
	for _, row := range []struct {
		name  string
		id    SessionID
		found bool
	}{
		{"another tenant's", theirs, false},
		{"nobody's", NewSessionID(), false},
		{"own", second, true},
		{"own, again", second, true},
	} {
		if found, err := s.RevokeOwnSession(t.Context(), me, row.id, origin); err != nil || found != row.found {
			t.Errorf("%s: got %v, %v", row.name, found, err)
		}
	}
	if live(t, url, a) != 1 || live(t, url, b) != 1 {
		t.Errorf("live: %d and %d, want 1 and 1", live(t, url, a), live(t, url, b))
	}
	login(t, s, a)
	if err := s.RevokeOwnSessions(t.Context(), me, origin); err != nil || live(t, url, a) != 0 || live(t, url, b) != 1 {
		t.Errorf("all: %v, %d and %d live", err, live(t, url, a), live(t, url, b))
	}
	// The session is over: its access token speaks for nobody.
	_, listErr := s.ListSessions(t.Context(), me)
	_, oneErr := s.RevokeOwnSession(t.Context(), me, second, origin)
	_, emailErr := s.AccountEmail(t.Context(), me)
	for _, err := range []error{listErr, oneErr, emailErr, s.RevokeOwnSessions(t.Context(), me, origin)} {
		if !errors.Is(err, ErrSessionOver) {
			t.Errorf("got %v, want ErrSessionOver", err)
		}
	}
	if got := events(t, url)["auth.session.revoked"]; got != 3 {
		t.Errorf("revoked events: %d, want 3", got)
	}
}

func changePassword(t *testing.T, s *Store, p person, id SessionID, newHash string) (LoginOutcome, error) {
	t.Helper()
	_, outcome, err := s.ChangePassword(t.Context(), principal(p, id), reserve(t, s, p).Guess, newHash,
		NewSession{ID: id, FamilyHash: hashed("newfamily"), StepHash: hashed("newstep")}, origin)
	return outcome, err
}

func TestChangePassword(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.ResetTTL = time.Hour
	s := open(t, url, r)
	a, b := twins(t, s)
	mine, second := login(t, s, a).ID, login(t, s, a).ID
	login(t, s, b)
	requestReset(t, s, a, "token")
	if outcome, err := changePassword(t, s, a, mine, hashB); err != nil || outcome != LoginCompleted {
		t.Fatalf("got %s, %v", outcome, err)
	}
	if got := rotate(t, s, step(mine, 0)).Outcome; got != RotateUnknown {
		t.Errorf("the old refresh token: %s, want unknown", got)
	}
	if got := rotate(t, s, Step{Session: mine, FamilyHash: hashed("newfamily"), StepHash: hashed("newstep"), NextHash: hashed("n"), NextSeed: hashed("s")}).Outcome; got != Rotated {
		t.Errorf("the new refresh token: %s, want rotated", got)
	}
	if got := rotate(t, s, step(second, 0)).Outcome; got != RotateRevoked {
		t.Errorf("another session: %s, want revoked", got)
	}
	if _, open, err := s.FindReset(t.Context(), hashed("token")); open || err != nil {
		t.Errorf("the open reset token: %v, %v", open, err)
	}
	if live(t, url, b) != 1 {
		t.Error("the other tenant's session is gone")
	}
	for user, want := range map[person]string{a: hashB, b: hashA} {
		if got := dbtest.Value[string](t, url, `SELECT password_hash FROM accounts WHERE tenant_id = $1`, user.tenant); got != want {
			t.Errorf("hash: %s, want %s", got, want)
		}
	}
	// A guess verified against the old hash is worth nothing now.
	stale := reserve(t, s, b).Guess
	dbtest.Exec(t, url, `UPDATE accounts SET password_hash = 'other' WHERE tenant_id = $1`, b.tenant)
	if got := complete(t, s, stale); got != LoginChanged {
		t.Errorf("got %s, want changed", got)
	}
	fail(t, s, stale)
	// With the session over nothing changes.
	g := reserve(t, s, a).Guess
	_, _, err := s.ChangePassword(t.Context(), principal(a, second), g, hashA, NewSession{ID: second, FamilyHash: hashed("x"), StepHash: hashed("y")}, origin)
	if !errors.Is(err, ErrSessionOver) {
		t.Errorf("got %v, want ErrSessionOver", err)
	}
	if got := dbtest.Value[string](t, url, `SELECT password_hash FROM accounts WHERE tenant_id = $1`, a.tenant); got != hashB {
		t.Errorf("hash after a refused change: %s", got)
	}
}

func requestReset(t *testing.T, s *Store, p person, token string) {
	t.Helper()
	seal := func(user UserID, email, expires string) (json.RawMessage, error) {
		return json.Marshal(map[string]string{"sealed": token + "-sealed"})
	}
	if ok, err := s.RequestReset(t.Context(), p.tenant, p.email, hashed(token), seal, origin); !ok || err != nil {
		t.Fatalf("reset request: %v, %v", ok, err)
	}
}

func TestReset(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.ResetTTL = time.Hour
	s := open(t, url, r)
	a, b := twins(t, s)
	login(t, s, a)
	login(t, s, b)
	for range 5 {
		fail(t, s, reserve(t, s, a).Guess)
	}
	requestReset(t, s, a, "first")
	requestReset(t, s, a, "second")
	if _, open, _ := s.FindReset(t.Context(), hashed("first")); open {
		t.Error("the earlier token is still open")
	}
	target, open, err := s.FindReset(t.Context(), hashed("second"))
	if !open || err != nil || target.Email != a.email {
		t.Fatalf("the later token: %v, %v", open, err)
	}
	var wins int
	var mu sync.Mutex
	var callers sync.WaitGroup
	for i := range 8 {
		callers.Go(func() {
			ok, err := s.ResetPassword(context.Background(), target, hashed("second"), fmt.Sprint("hash", i), origin)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				t.Error(err)
			}
			if ok {
				wins++
			}
		})
	}
	callers.Wait()
	if wins != 1 {
		t.Errorf("%d parallel uses won, want 1", wins)
	}
	if live(t, url, a) != 0 || live(t, url, b) != 1 {
		t.Errorf("live: %d and %d, want 0 and 1", live(t, url, a), live(t, url, b))
	}
	if got := reserve(t, s, a).Outcome; got != GuessReserved {
		t.Errorf("after the reset: %s, want the lock cleared", got)
	}
	if hash := dbtest.Value[string](t, url, `SELECT password_hash FROM accounts WHERE tenant_id = $1`, a.tenant); !strings.HasPrefix(hash, "hash") {
		t.Errorf("hash: %s", hash)
	}
	if got := events(t, url); got["auth.user.password_reset_requested"] != 2 || got["auth.user.password_changed"] != 1 || got["auth.secrets.password_reset"] != 2 {
		t.Errorf("events: %v", got)
	}

	requestReset(t, s, b, "third")
	dbtest.Exec(t, url, `UPDATE reset_tokens SET expires_at = clock_timestamp()`)
	if _, open, _ := s.FindReset(t.Context(), hashed("third")); open {
		t.Error("an expired token is open")
	}
	if ok, _ := s.RequestReset(t.Context(), b.tenant, Email{"nobody@example.com"}, hashed("x"), nil, origin); ok {
		t.Error("a reset for nobody")
	}
	dbtest.Exec(t, url, `UPDATE outbox SET occurred_at = occurred_at - interval '1 hour' WHERE event_type = 'auth.secrets.password_reset'`)
	if err := s.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := events(t, url)["auth.secrets.password_reset"]; got != 0 {
		t.Errorf("%d secrets kept beyond the life of their tokens", got)
	}
	if n := dbtest.Value[int64](t, url, `SELECT count(*) FROM reset_tokens`); n != 0 {
		t.Errorf("%d expired tokens kept", n)
	}
}

// Refreshes race a revocation of each kind over three replicas: none that
// begins after the revocation was answered rotates.
func TestRevocationIsLinearizable(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.ResetTTL = time.Hour
	replicas := []*Store{open(t, url, r), open(t, url, r), open(t, url, r)}
	s := replicas[0]
	ways := map[string]func(p person, id SessionID) error{
		"logout": func(p person, id SessionID) error {
			_, _, err := s.EndSession(context.Background(), step(id, 0), origin)
			return err
		},
		"logout-all": func(p person, id SessionID) error {
			return s.RevokeOwnSessions(context.Background(), principal(p, id), origin)
		},
		"password change": func(p person, id SessionID) error {
			r, err := s.ReserveGuess(context.Background(), p.tenant, p.email, p.email.String(), false, origin)
			if err == nil {
				_, _, err = s.ChangePassword(context.Background(), principal(p, id), r.Guess, hashB, NewSession{ID: id, FamilyHash: hashed("f"), StepHash: hashed("s")}, origin)
			}
			return err
		},
		"reset": func(p person, id SessionID) error {
			target, _, err := s.FindReset(context.Background(), hashed("t"+id.String()))
			if err == nil {
				_, err = s.ResetPassword(context.Background(), target, hashed("t"+id.String()), hashB, origin)
			}
			return err
		},
	}
	for name, revoke := range ways {
		for range 10 {
			p := register(t, s)
			id := login(t, s, p).ID
			requestReset(t, s, p, "t"+id.String())
			revoked := make(chan struct{})
			var client sync.WaitGroup
			client.Go(func() { // one client that refreshes as fast as it can, on any replica
				for n := int64(0); n < 1000; n++ {
					var answered bool
					select {
					case <-revoked:
						answered = true
					default:
					}
					r, err := replicas[n%3].RotateSession(context.Background(), step(id, n), origin)
					if err != nil {
						t.Error(err)
					}
					if answered && r.Outcome == Rotated {
						t.Errorf("%s: a refresh begun after the answer rotated", name)
					}
					if r.Outcome != Rotated {
						return
					}
				}
			})
			if err := revoke(p, id); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			close(revoked)
			client.Wait()
			if got := rotate(t, s, step(id, dbtest.Value[int64](t, url, `SELECT generation FROM sessions WHERE id = $1`, id))).Outcome; got == Rotated {
				t.Errorf("%s: a refresh after the answer rotated", name)
			}
		}
	}
}
