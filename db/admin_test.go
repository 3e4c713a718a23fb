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

func byUser(p person) AccountRef { return AccountRef{Tenant: p.tenant, User: p.user} }

func TestOperations(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.ResetTTL = time.Hour
	s := open(t, url, r)
	a, b := twins(t, s)
	login(t, s, b)
	ctx := t.Context()

	if _, err := s.GetAccount(ctx, AccountRef{Tenant: TenantID{newUUID()}, User: a.user}); !errors.Is(err, ErrNoAccount) {
		t.Errorf("another tenant's user: %v", err)
	}
	byEmail := AccountRef{Tenant: a.tenant, Email: a.email}
	if got, err := s.GetAccount(ctx, byEmail); err != nil || got.UserID != a.user || !got.HasPassword || got.DisabledAt != nil || got.LiveSessions != 0 {
		t.Errorf("get: %+v, %v", got, err)
	}

	id := login(t, s, a).ID
	if got, err := s.SetDisabled(ctx, byUser(a), true, origin); err != nil || got.DisabledAt == nil || got.LiveSessions != 0 {
		t.Errorf("disable: %+v, %v", got, err)
	}
	if got := rotate(t, s, step(id, 0)).Outcome; got != RotateRevoked {
		t.Errorf("refresh of a disabled account: %s", got)
	}
	g := reserve(t, s, a).Guess
	if !g.Account.Disabled {
		t.Error("login does not learn that the account is disabled")
	}
	if got := complete(t, s, g); got != LoginChanged {
		t.Errorf("login of a disabled account: %s", got)
	}
	fail(t, s, g)
	s.SetDisabled(ctx, byUser(a), true, origin) // changes nothing
	if got, err := s.SetDisabled(ctx, byEmail, false, origin); err != nil || got.DisabledAt != nil {
		t.Errorf("enable: %+v, %v", got, err)
	}
	for range 4 {
		fail(t, s, reserve(t, s, a).Guess)
	}
	if got, err := s.GetAccount(ctx, byUser(a)); err != nil || got.LockedUntil == nil || got.FailedLogins != 5 {
		t.Errorf("locked: %+v, %v", got, err)
	}
	if got, err := s.Unlock(ctx, byUser(a), origin); err != nil || got.LockedUntil != nil {
		t.Errorf("unlock: %+v, %v", got, err)
	}
	login(t, s, a)
	if got, err := s.RevokeSessions(ctx, byUser(a), origin); err != nil || got.LiveSessions != 0 {
		t.Errorf("revoke sessions: %+v, %v", got, err)
	}
	if got, err := s.SetClaims(ctx, byUser(a), json.RawMessage(`{"roles":["x"]}`), origin); err != nil || string(got.Claims) != `{"roles":["x"]}` {
		t.Errorf("set claims: %s, %v", got.Claims, err)
	}
	if got := string(login(t, s, a).Claims); got != `{"roles":["x"]}` {
		t.Errorf("claims at the next login: %s", got)
	}
	other := register(t, s)
	if ok, err := s.Register(ctx, a.tenant, other.user, other.email, hashA, origin); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if _, err := s.SetEmail(ctx, byUser(a), other.email, origin); !errors.Is(err, ErrTaken) {
		t.Errorf("an e-mail that is taken: %v", err)
	}
	fresh, _ := ParseEmail("fresh@example.com")
	if got, err := s.SetEmail(ctx, byUser(a), fresh, origin); err != nil || got.Email != "fresh@example.com" {
		t.Errorf("set e-mail: %+v, %v", got, err)
	}
	a.email = fresh
	seal := func(UserID, string, string) (json.RawMessage, error) { return json.RawMessage(`{}`), nil }
	if got, err := s.ForceReset(ctx, byUser(a), hashed("forced"), seal, origin); err != nil || got.HasPassword || got.LiveSessions != 0 {
		t.Errorf("force reset: %+v, %v", got, err)
	}
	target, open, err := s.FindReset(ctx, hashed("forced"))
	if !open || err != nil {
		t.Fatalf("forced reset token: %v, %v", open, err)
	}
	if ok, err := s.ResetPassword(ctx, target, hashed("forced"), hashB, origin); !ok || err != nil {
		t.Errorf("reset with it: %v, %v", ok, err)
	}
	if live(t, url, b) != 1 {
		t.Error("the twin in another tenant lost its session")
	}
	for typ, want := range map[string]int{"auth.user.disabled": 1, "auth.user.enabled": 1, "auth.user.unlocked": 1, "auth.user.email_changed": 1, "auth.user.claims_changed": 1} {
		if got := events(t, url)[typ]; got != want {
			t.Errorf("%s: %d events, want %d", typ, got, want)
		}
	}
}

// After a delete nothing of the person is in any table, and the same ids
// inherit nothing.
func TestDeleteLeavesNothing(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.ResetTTL = time.Hour
	s := open(t, url, r)
	a, b := twins(t, s)
	login(t, s, a)
	login(t, s, b)
	fail(t, s, reserve(t, s, a).Guess)
	requestReset(t, s, a, "token")
	if _, _, err := s.SpendLimit(t.Context(), ScopeForgot, a.tenant, a.email.String(), 5, time.Hour); err != nil {
		t.Fatal(err)
	}
	dbtest.Exec(t, url, `UPDATE outbox SET sent_at = clock_timestamp() WHERE event_type <> 'auth.session.revoked'`)
	if e, err := s.ExportAccount(t.Context(), byUser(a)); err != nil || len(e.Sessions) != 1 || len(e.Events) != 3 || strings.Contains(fmt.Sprint(e), hashA) {
		t.Errorf("export: %+v, %v", e, err)
	}
	if _, err := s.Delete(t.Context(), byUser(a), origin); err != nil {
		t.Fatal(err)
	}
	for _, table := range dbtest.Query[string](t, url, `SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'identity_auth'`) {
		rows := dbtest.Query[string](t, url, `SELECT t::text FROM `+table+` AS t`)
		for _, row := range rows {
			if strings.Contains(row, a.tenant.String()) && !(table == "outbox" && strings.HasSuffix(row, ",t)")) {
				t.Errorf("%s still holds %s", table, row)
			}
		}
	}
	for _, key := range [][]byte{emailKey(scopeLogin, a.tenant, a.email.String()), emailKey(ScopeForgot, a.tenant, a.email.String())} {
		if n := dbtest.Value[int64](t, url, `SELECT (SELECT count(*) FROM guards WHERE key = $1) + (SELECT count(*) FROM rate_windows WHERE key = $1)`, key); n != 0 {
			t.Error("a limit or lock of the person is still there")
		}
	}
	if got := dbtest.Query[string](t, url, `SELECT event_type FROM outbox WHERE tenant_id = $1 ORDER BY seq`, a.tenant); fmt.Sprint(got) != "[auth.session.revoked auth.user.deleted]" {
		t.Errorf("events on their way: %v", got)
	}
	if live(t, url, b) != 1 {
		t.Error("the twin in another tenant lost its session")
	}
	if ok, err := s.Register(t.Context(), a.tenant, a.user, a.email, hashA, origin); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if got, err := s.GetAccount(t.Context(), byUser(a)); err != nil || got.FailedLogins != 0 || got.LiveSessions != 0 || got.LockedUntil != nil {
		t.Errorf("registered again: %+v, %v", got, err)
	}
}

func TestImportAccounts(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	there := register(t, s)
	row := func(tenant TenantID, user UserID, email string) ImportRow {
		return ImportRow{Tenant: tenant, User: user, Email: Email{email}, PasswordHash: hashB, Claims: json.RawMessage(`{}`)}
	}
	u1, u2 := UserID{newUUID()}, UserID{newUUID()}
	off := row(there.tenant, UserID{newUUID()}, "off@example.com")
	off.Disabled = true
	batch := []ImportRow{
		row(there.tenant, u1, "one@example.com"),
		row(there.tenant, there.user, there.email.s),         // the same person
		row(there.tenant, there.user, "other@example.com"),   // the same user, another e-mail
		row(there.tenant, u2, there.email.s),                 // another user, the same e-mail
		row(there.tenant, u1, "one@example.com"),             // twice in one batch
		row(TenantID{newUUID()}, u1, "one@example.com"), off, // another tenant
	}
	want := "[created present conflict conflict present created created]"
	for _, want := range []string{want, strings.ReplaceAll(want, "created", "present")} {
		got, err := s.ImportAccounts(t.Context(), batch, "trace")
		if err != nil || fmt.Sprint(got) != want {
			t.Errorf("got %v, %v; want %s", got, err, want)
		}
	}
	if got := events(t, url)["auth.user.imported"]; got != 3 {
		t.Errorf("imported events: %d, want 3", got)
	}
	if hash := dbtest.Value[string](t, url, `SELECT password_hash FROM accounts WHERE user_id = $1`, there.user); hash != hashA {
		t.Error("an account that was there was changed")
	}
	if n := dbtest.Value[int64](t, url, `SELECT count(*) FROM accounts WHERE disabled_at IS NOT NULL`); n != 1 {
		t.Errorf("disabled accounts: %d, want 1", n)
	}
}

// set-email is what an operator does when a mailbox is lost: whoever reads the
// old one, or is logging in with it, has no way in after the answer.
func TestSetEmailShutsTheOldMailboxOut(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.ResetTTL = time.Hour
	s := open(t, url, r)
	a := register(t, s)
	mine := login(t, s, a).ID
	requestReset(t, s, a, "mailed")
	underWay, change := reserve(t, s, a).Guess, reserve(t, s, a).Guess
	fresh, _ := ParseEmail("fresh@example.com")
	if _, err := s.SetEmail(t.Context(), byUser(a), fresh, origin); err != nil {
		t.Fatal(err)
	}
	if _, open, err := s.FindReset(t.Context(), hashed("mailed")); open || err != nil {
		t.Errorf("the mailed reset token: open %v, %v", open, err)
	}
	if got := events(t, url)["auth.secrets.password_reset"]; got != 0 {
		t.Errorf("%d secrets on their way to the old mailbox", got)
	}
	if got := complete(t, s, underWay); got != LoginLapsed && got != LoginChanged {
		t.Errorf("a login under way with the old e-mail: %s", got)
	}
	// The old e-mail is free, and another account takes it: a guess made for
	// that account changes nobody else's password.
	b := person{tenant: a.tenant, user: UserID{newUUID()}, email: a.email}
	if ok, err := s.Register(t.Context(), b.tenant, b.user, b.email, hashB, origin); !ok || err != nil {
		t.Fatal(ok, err)
	}
	for _, g := range []*Guess{change, reserve(t, s, b).Guess} {
		_, outcome, err := s.ChangePassword(t.Context(), principal(a, mine), g, "stolen", NewSession{ID: mine, FamilyHash: hashed("f"), StepHash: hashed("s")}, origin)
		if err != nil || outcome == LoginCompleted {
			t.Errorf("a password changed on another account's guess: %s, %v", outcome, err)
		}
	}
	if n := dbtest.Value[int64](t, url, `SELECT count(*) FROM accounts WHERE password_hash = 'stolen'`); n != 0 {
		t.Error("the password is the thief's")
	}
}

// Resets beside deletes and forced resets of the same account neither deadlock
// nor fail.
func TestResetRacesOperators(t *testing.T) {
	url := dbtest.New(t)
	r := rules()
	r.ResetTTL = time.Hour
	s := open(t, url, r)
	seal := func(UserID, string, string) (json.RawMessage, error) { return json.RawMessage(`{}`), nil }
	for i := range 40 {
		p := register(t, s)
		var callers sync.WaitGroup
		callers.Go(func() {
			if _, err := s.RequestReset(context.Background(), p.tenant, p.email, hashed(fmt.Sprint("r", i)), seal, origin); err != nil {
				t.Errorf("reset: %v", err)
			}
		})
		callers.Go(func() {
			var err error
			if i%2 == 0 {
				_, err = s.Delete(context.Background(), byUser(p), origin)
			} else {
				_, err = s.ForceReset(context.Background(), byUser(p), hashed(fmt.Sprint("f", i)), seal, origin)
			}
			if err != nil {
				t.Errorf("operator: %v", err)
			}
		})
		callers.Wait()
	}
}

func TestDisablingTwiceIsOneEvent(t *testing.T) {
	url := dbtest.New(t)
	s := open(t, url, rules())
	p := register(t, s)
	var callers sync.WaitGroup
	for range 5 {
		callers.Go(func() {
			if _, err := s.SetDisabled(context.Background(), byUser(p), true, origin); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if got := events(t, url)["auth.user.disabled"]; got != 1 {
		t.Errorf("%d events, want 1", got)
	}
}
