package db

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// reservationTTL is how long a guess may take from ReserveGuess to its
// settlement. It is longer than a request may live (10 s), so only a guess
// whose owner died or was stopped outlives it. Such a guess counts as wrong.
const reservationTTL = 15 * time.Second

// Account is what login needs to know of an account.
type Account struct {
	User         UserID
	PasswordHash string // PHC string
	Disabled     bool
}

// Guess is the right to check one password of one (tenant, e-mail). It comes
// only from ReserveGuess and is settled by exactly one of FailGuess,
// ReleaseGuess and CompleteLogin; who never settles it has failed it.
type Guess struct {
	key     []byte
	ticket  time.Time
	tenant  TenantID
	email   Email
	Account Account
	Known   bool // false: no account has this e-mail; Account is empty
}

// GuessOutcome is what ReserveGuess decided.
type GuessOutcome string

// The outcomes of ReserveGuess. They are the texts of guards.outcome.
const (
	GuessReserved  GuessOutcome = "reserved"   // check the password, then settle
	GuessLimited   GuessOutcome = "limited"    // LOGIN_PER_MIN_PER_EMAIL is spent
	GuessLocked    GuessOutcome = "locked"     // no password is checked now
	GuessLockedNow GuessOutcome = "locked_now" // as GuessLocked, and this call began it: dead reservations were the last failures
	GuessNoRoom    GuessOutcome = "no_room"    // guesses under way could reach the threshold: ask again
)

// Reservation is the answer of ReserveGuess.
type Reservation struct {
	Outcome    GuessOutcome
	Guess      *Guess        // with GuessReserved
	User       UserID        // of the account; zero when there is none
	RetryAfter time.Duration // with GuessLimited and the locked ones
}

// reserveSQL: one row a (tenant, e-mail), one statement. PostgreSQL evaluates
// the SET of ON CONFLICT after it has locked the row and on its newest
// version, so concurrent calls on all replicas are decided one after the
// other. Reserved and failed guesses together never exceed the threshold,
// which is what bounds the number of wrong passwords ever checked. Known and
// unknown e-mails take the same path; only the lockout event needs an account.
const reserveSQL = `
WITH account AS (
    SELECT user_id, password_hash, disabled_at IS NOT NULL AS disabled
      FROM accounts WHERE tenant_id = $2 AND email = $3
), guard AS (
    INSERT INTO guards AS g (key, outcome, window_start, window_count, ticket, pending, touched_at)
    SELECT $1, 'reserved', t, 1, t, ARRAY[t], t FROM clock_timestamp() AS t
        ON CONFLICT (key) DO UPDATE
       SET (outcome, window_start, window_count, ticket, pending, failed, locked_until, touched_at) = (
           SELECT d.outcome, d.window_start,
                  least(d.window_count + CASE WHEN $5 THEN 1 ELSE 0 END, $4 + 1),
                  d.ticket,
                  CASE d.outcome WHEN 'reserved' THEN d.pending || d.ticket ELSE d.pending END,
                  CASE d.outcome WHEN 'locked_now' THEN '{}' ELSE d.failed END,
                  CASE d.outcome WHEN 'locked_now' THEN d.t + $7::interval ELSE g.locked_until END,
                  d.t
             FROM (SELECT *, CASE
                          WHEN $4 > 0 AND $5 AND n.window_count >= $4             THEN 'limited'
                          WHEN g.locked_until > n.t                               THEN 'locked'
                          WHEN cardinality(n.failed) >= $6                        THEN 'locked_now'
                          WHEN cardinality(n.failed) + cardinality(n.pending) >= $6 THEN 'no_room'
                          ELSE 'reserved' END AS outcome
                     FROM (SELECT t,
                                  greatest(t, g.ticket + interval '1 microsecond') AS ticket,
                                  CASE WHEN w.over THEN t ELSE g.window_start END  AS window_start,
                                  CASE WHEN w.over THEN 0 ELSE g.window_count END  AS window_count,
                                  ARRAY(SELECT p FROM unnest(g.pending) AS p WHERE p > t - $8::interval) AS pending,
                                  ARRAY(SELECT f FROM unnest(g.failed) AS f WHERE f > t - $7::interval
                                        UNION ALL
                                        SELECT p FROM unnest(g.pending) AS p WHERE p <= t - $8::interval AND p > t - $7::interval) AS failed
                             FROM clock_timestamp() AS t,
                                  LATERAL (SELECT g.window_start + interval '1 minute' <= t AS over) AS w) AS n) AS d)
    RETURNING outcome, ticket, window_start, locked_until
), lockout AS (` + insertEvents + `
    SELECT 'auth.lockout', $2, a.user_id, $9, NULL, jsonb_build_object('user_id', a.user_id, 'client_ip', $10::text)
      FROM guard, account AS a WHERE guard.outcome = 'locked_now'
)
SELECT g.outcome, g.ticket,
       extract(epoch FROM CASE g.outcome WHEN 'limited' THEN g.window_start + interval '1 minute' ELSE greatest(g.locked_until, g.ticket) END
                          - clock_timestamp())::float8,
       a.user_id IS NOT NULL, coalesce(a.user_id, '00000000-0000-0000-0000-000000000000'), coalesce(a.password_hash, ''), coalesce(a.disabled, false)
  FROM guard AS g LEFT JOIN account AS a ON true`

// ReserveGuess spends one login of the e-mail's limit (when spend is set; a
// caller that asks again after GuessNoRoom does not spend twice) and reserves
// one guess. At most LockoutThreshold guesses that turn out wrong are reserved
// per lock period, over all replicas and restarts.
func (s *Store) ReserveGuess(ctx context.Context, tenant TenantID, email Email, sent string, spend bool, origin Origin) (Reservation, error) {
	g := Guess{key: emailKey(scopeLogin, tenant, sent), tenant: tenant, email: email}
	var r Reservation
	var wait float64
	err := s.queryRow(ctx, []any{&r.Outcome, &g.ticket, &wait, &g.Known, &g.Account.User, &g.Account.PasswordHash, &g.Account.Disabled},
		reserveSQL, g.key, tenant, email.String(), s.rules.LoginPerMinute, spend,
		s.rules.LockoutThreshold, s.rules.LockoutDuration, reservationTTL, origin.TraceID, origin.ClientIP)
	if err != nil {
		return Reservation{}, err
	}
	r.User = g.Account.User
	switch r.Outcome {
	case GuessReserved:
		r.Guess = &g
	case GuessLimited, GuessLocked, GuessLockedNow:
		r.RetryAfter = seconds(wait)
	}
	if r.Outcome == GuessLockedNow && g.Known {
		s.wakeRelay()
	}
	return r, nil
}

const failSQL = `
WITH guard AS (
    UPDATE guards AS g
       SET (outcome, pending, failed, locked_until, touched_at) = (
           SELECT CASE WHEN n.full THEN 'locked_now' ELSE 'failed' END,
                  array_remove(g.pending, $2),
                  CASE WHEN n.full THEN '{}' ELSE n.failed END,
                  CASE WHEN n.full THEN n.t + $4::interval ELSE g.locked_until END,
                  n.t
             FROM (SELECT t, failed, cardinality(failed) >= $3 AS full
                     FROM clock_timestamp() AS t,
                          LATERAL (SELECT ARRAY(SELECT f FROM unnest(g.failed) AS f WHERE f > t - $4::interval) || $2 AS failed) AS f) AS n)
     WHERE key = $1 AND $2 = ANY (pending)
    RETURNING outcome
), account AS (
    UPDATE accounts SET failed_logins = failed_logins + 1
     WHERE tenant_id = $5 AND user_id = $6 AND $9 AND EXISTS (SELECT FROM guard)
), lockout AS (` + insertEvents + `
    SELECT 'auth.lockout', $5, $6, $7, NULL, jsonb_build_object('user_id', $6::uuid, 'client_ip', $8::text)
      FROM guard WHERE guard.outcome = 'locked_now' AND $9
)
SELECT outcome FROM guard`

// FailGuess counts the guess as wrong. lockedNow tells that it was the one
// that began a lock.
func (s *Store) FailGuess(ctx context.Context, g *Guess, origin Origin) (lockedNow bool, err error) {
	var outcome string
	err = s.queryRow(ctx, []any{&outcome}, failSQL, g.key, g.ticket, s.rules.LockoutThreshold, s.rules.LockoutDuration,
		g.tenant, g.Account.User, origin.TraceID, origin.ClientIP, g.Known)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil // outlived reservationTTL: counted as wrong already
	}
	if err != nil {
		return false, err
	}
	if outcome == "locked_now" && g.Known {
		s.wakeRelay()
	}
	return outcome == "locked_now", nil
}

// ReleaseGuess takes back a guess whose password was never checked.
func (s *Store) ReleaseGuess(ctx context.Context, g *Guess) error {
	_, err := s.exec(ctx, `UPDATE guards SET outcome = 'released', pending = array_remove(pending, $2) WHERE key = $1`, g.key, g.ticket)
	return err
}
