package db

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// beginSession inserts the row of a new session. The caller holds the
// account's row lock.
func (s *Store) beginSession(ctx context.Context, tx pgx.Tx, about subject, n NewSession, origin Origin) (Session, error) {
	session := Session{ID: n.ID, Tenant: about.tenant, User: about.user}
	var left float64
	err := tx.QueryRow(ctx, `
INSERT INTO sessions (id, tenant_id, user_id, family_hash, step_hash, created_at, used_at, expires_at, ends_at, window_start, client_ip, user_agent)
SELECT $1, $2, $3, $4, $5, t, t, t + least($6::interval, $7::interval), t + $7::interval, t, $8, $9
  FROM clock_timestamp() AS t
RETURNING created_at, extract(epoch FROM expires_at - created_at)::float8`,
		n.ID, about.tenant, about.user, n.FamilyHash, n.StepHash,
		s.rules.RefreshTokenTTL, s.rules.SessionMaxAge, origin.ClientIP, origin.UserAgent).Scan(&session.AuthTime, &left)
	session.ExpiresIn = seconds(left)
	return session, err
}

// revokeBeyondLimit keeps the MaxSessions live sessions used last. The
// caller's lock on the account row makes logins of one account follow each
// other, so the count is exact.
func (s *Store) revokeBeyondLimit(ctx context.Context, tx pgx.Tx, about subject, origin Origin) error {
	if s.rules.MaxSessions == 0 {
		return nil
	}
	return s.revokeWhere(ctx, tx, about, "limit", origin, `
id IN (SELECT id FROM sessions
        WHERE tenant_id = $1 AND user_id = $2 AND revoked_at IS NULL AND expires_at > clock_timestamp()
        ORDER BY used_at DESC, id OFFSET $6)`, s.rules.MaxSessions)
}

// revokeSessions revokes every session of the account but one; a zero id
// spares none. The caller holds the account's row lock: no login of the
// account is under way, and two of these never wait for each other's rows.
func (s *Store) revokeSessions(ctx context.Context, tx pgx.Tx, about subject, spare SessionID, reason string, origin Origin) error {
	return s.revokeWhere(ctx, tx, about, reason, origin, `id <> $6`, spare)
}

// revokeWhere revokes the account's sessions that match and writes their
// events. A session that is over by itself is revoked too: it cannot come back
// under a longer REFRESH_TOKEN_TTL.
func (s *Store) revokeWhere(ctx context.Context, tx pgx.Tx, about subject, reason string, origin Origin, match string, arg any) error {
	_, err := tx.Exec(ctx, `
WITH revoked AS (
    UPDATE sessions SET revoked_at = t, revoked_reason = $3, expires_at = least(expires_at, t)
      FROM clock_timestamp() AS t
     WHERE tenant_id = $1 AND user_id = $2 AND revoked_at IS NULL AND `+match+`
    RETURNING id
)`+insertEvents+`
SELECT 'auth.session.revoked', $1, $2, $4, NULL,
       jsonb_build_object('user_id', $2::uuid, 'session_id', id, 'reason', $3::text, 'access_tokens_expire_at', event_time(clock_timestamp() + $5::interval))
  FROM revoked`, about.tenant, about.user, reason, origin.TraceID, s.rules.AccessTokenTTL, arg)
	return err
}

// Step is a refresh token as it was presented, and what the row becomes if the
// token is the current one. Secrets come hashed; the seed is worthless without
// the spent secret.
type Step struct {
	Session    SessionID
	Generation int64
	Tenant     *TenantID // nil: not given
	FamilyHash []byte
	StepHash   []byte
	NextHash   []byte
	NextSeed   []byte // kept with ReuseGrace only
}

// RotateOutcome is what RotateSession decided.
type RotateOutcome string

// The outcomes of RotateSession. All but RotateUnknown are texts of
// sessions.outcome.
const (
	Rotated       RotateOutcome = "rotated"
	Reused        RotateOutcome = "reused"       // the spent predecessor within the grace: hand out the same successor again
	RotateLimited RotateOutcome = "limited"      // REFRESH_PER_MIN_PER_TOKEN is spent; the token stays good
	Replay        RotateOutcome = "replay"       // a spent token; the session was revoked by this call
	ReplayAgain   RotateOutcome = "replay_again" // a spent token of a session that was revoked before
	RotateExpired RotateOutcome = "expired"      // the current token of a session that is over
	RotateRevoked RotateOutcome = "revoked"      // the current token of a revoked session
	RotateAhead   RotateOutcome = "ahead"        // a token newer than the row: a lagging standby was promoted
	RotateUnknown RotateOutcome = "unknown"      // no such session, or not its family secret, or another tenant's
)

// Rotation is the answer of RotateSession.
type Rotation struct {
	Outcome    RotateOutcome
	Session    Session       // but for RotateUnknown
	Generation int64         // of the row now
	Seed       []byte        // with Reused: what the successor was derived with
	RetryAfter time.Duration // with RotateLimited
}

// rotateSQL decides and acts in one UPDATE. PostgreSQL evaluates its WHERE and
// SET on the newest version of the row while it holds the row's lock, so of N
// concurrent calls with one token exactly one finds it current; the others
// find it spent. The list of WHENs is the contract of refresh, in order: who
// does not know the family secret changes nothing (the WHERE); a spent token
// is a replay whatever its age; revoked and expired sessions are never rescued.
const rotateSQL = `
WITH s AS (
    UPDATE sessions AS s
       SET (outcome, generation, step_hash, prev_step_hash, step_seed, used_at, expires_at,
            revoked_at, revoked_reason, window_start, window_count, client_ip, user_agent) = (
           SELECT d.outcome,
                  CASE WHEN d.rotated THEN s.generation + 1 ELSE s.generation END,
                  CASE WHEN d.rotated THEN $5 ELSE s.step_hash END,
                  CASE WHEN d.rotated THEN s.step_hash ELSE s.prev_step_hash END,
                  CASE WHEN d.rotated THEN $6 ELSE s.step_seed END,
                  CASE WHEN d.rotated THEN d.t ELSE s.used_at END,
                  CASE WHEN d.rotated THEN least(d.t + $8::interval, s.ends_at)
                       WHEN d.outcome = 'replay' THEN least(s.expires_at, d.t)
                       ELSE s.expires_at END,
                  CASE d.outcome WHEN 'replay' THEN d.t ELSE s.revoked_at END,
                  CASE d.outcome WHEN 'replay' THEN 'replay' ELSE s.revoked_reason END,
                  CASE WHEN d.counts AND d.new_window THEN d.t ELSE s.window_start END,
                  CASE WHEN NOT d.counts THEN s.window_count WHEN d.new_window THEN 1 ELSE s.window_count + 1 END,
                  CASE WHEN d.rotated THEN $11 ELSE s.client_ip END,
                  CASE WHEN d.rotated THEN $12 ELSE s.user_agent END
             FROM (SELECT *, o.outcome = 'rotated' AS rotated, o.outcome IN ('rotated', 'reused') AS counts
                     FROM (SELECT *, CASE
                          WHEN s.generation < $3                       THEN 'ahead'
                          WHEN n.current AND s.revoked_at IS NOT NULL  THEN 'revoked'
                          WHEN n.current AND s.expires_at <= n.t       THEN 'expired'
                          WHEN n.current AND n.limited                 THEN 'limited'
                          WHEN n.current                               THEN 'rotated'
                          WHEN s.revoked_at IS NOT NULL                THEN 'replay_again'
                          WHEN n.in_grace AND n.limited                THEN 'limited'
                          WHEN n.in_grace                              THEN 'reused'
                          ELSE 'replay' END AS outcome
                     FROM (SELECT t,
                                  s.generation = $3 AND s.step_hash = $4 AS current,
                                  s.generation = $3 + 1 AND s.prev_step_hash = $4 AND s.step_seed IS NOT NULL
                                      AND t < s.used_at + $7::interval AND t < s.expires_at AS in_grace,
                                  s.window_start + interval '1 minute' <= t AS new_window,
                                  $9 > 0 AND s.window_count >= $9 AND t < s.window_start + interval '1 minute' AS limited
                             FROM clock_timestamp() AS t) AS n) AS o) AS d)
     WHERE id = $1 AND family_hash = $2 AND ($13::uuid IS NULL OR tenant_id = $13)
    RETURNING id, tenant_id, user_id, outcome, generation, step_seed, created_at, expires_at, revoked_reason, window_start, used_at
), replay AS (` + insertEvents + `
    SELECT 'security.refresh_replay_detected', tenant_id, user_id, $10, NULL,
           jsonb_build_object('user_id', user_id, 'session_id', id, 'client_ip', $11::text, 'user_agent', $12::text)
      FROM s WHERE outcome = 'replay'
    RETURNING event_id
), event AS (` + insertEvents + `
    SELECT 'auth.token.refreshed', tenant_id, user_id, $10, NULL, jsonb_build_object('user_id', user_id, 'session_id', id)
      FROM s WHERE outcome = 'rotated'
    UNION ALL
    SELECT 'auth.session.revoked', tenant_id, user_id, $10, replay.event_id,
           jsonb_build_object('user_id', user_id, 'session_id', id, 'reason', revoked_reason,
               'access_tokens_expire_at', event_time(clock_timestamp() + $14::interval))
      FROM s, replay WHERE outcome = 'replay'
)
SELECT s.tenant_id, s.user_id, s.outcome, s.generation, s.step_seed, s.created_at,
       extract(epoch FROM s.expires_at - CASE s.outcome WHEN 'rotated' THEN s.used_at ELSE clock_timestamp() END)::float8,
       extract(epoch FROM s.window_start + interval '1 minute' - clock_timestamp())::float8,
       a.claims
  FROM s JOIN accounts AS a USING (tenant_id, user_id)`

// RotateSession spends the step secret of a refresh token in one round trip.
// Of N concurrent calls with the same token exactly one returns Rotated. Once
// a revocation has been answered, no call returns Rotated or Reused.
func (s *Store) RotateSession(ctx context.Context, step Step, origin Origin) (Rotation, error) {
	var tenant any
	if step.Tenant != nil {
		tenant = *step.Tenant
	}
	seed := step.NextSeed
	if s.rules.ReuseGrace == 0 {
		seed = nil
	}
	var r Rotation
	var left, wait float64
	err := s.queryRow(ctx, []any{&r.Session.Tenant, &r.Session.User, &r.Outcome, &r.Generation, &r.Seed, &r.Session.AuthTime, &left, &wait, &r.Session.Claims},
		rotateSQL, step.Session, step.FamilyHash, step.Generation, step.StepHash, step.NextHash, seed,
		s.rules.ReuseGrace, s.rules.RefreshTokenTTL, s.rules.RefreshPerMinute, origin.TraceID, origin.ClientIP, origin.UserAgent,
		tenant, s.rules.AccessTokenTTL)
	if errors.Is(err, pgx.ErrNoRows) {
		return Rotation{Outcome: RotateUnknown}, nil
	}
	if err != nil {
		return Rotation{}, err
	}
	r.Session.ID = step.Session
	r.Session.ExpiresIn = seconds(left)
	r.RetryAfter = seconds(wait)
	if r.Outcome == Rotated || r.Outcome == Replay {
		s.wakeRelay()
	}
	return r, nil
}
