package db

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// Principal is who a verified access token speaks for. Every method that takes
// one acts within its tenant, user and session, and only while the session is
// live; else it returns ErrSessionOver.
type Principal struct {
	tenant  TenantID
	user    UserID
	session SessionID
}

// NewPrincipal takes the claims of a verified token.
func NewPrincipal(tenant, user, session string) (p Principal, err error) {
	var errs [3]error
	p.tenant, errs[0] = ParseTenantID(tenant)
	p.user, errs[1] = ParseUserID(user)
	p.session, errs[2] = ParseSessionID(session)
	return p, errors.Join(errs[:]...)
}

// Subject names the account and the session for logs.
func (p Principal) Subject() (TenantID, UserID, SessionID) { return p.tenant, p.user, p.session }

// liveSQL is true while the principal's session is live; the principal is $1
// to $3 in every statement that uses it.
const liveSQL = `EXISTS (SELECT FROM sessions
    WHERE tenant_id = $1 AND user_id = $2 AND id = $3 AND revoked_at IS NULL AND expires_at > clock_timestamp())`

// SessionInfo is a live session as its owner sees it.
type SessionInfo struct {
	ID        SessionID `json:"session_id"`
	CreatedAt time.Time `json:"created_at"`
	UsedAt    time.Time `json:"last_used_at"`
	ExpiresAt time.Time `json:"expires_at"`
	ClientIP  string    `json:"client_ip"`
	UserAgent string    `json:"user_agent"`
	Current   bool      `json:"current"`
}

// ListSessions returns the caller's live sessions, the last used first.
func (s *Store) ListSessions(ctx context.Context, p Principal) (list []SessionInfo, err error) {
	err = s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
SELECT id, created_at, used_at, expires_at, client_ip, user_agent, id = $3
  FROM sessions
 WHERE tenant_id = $1 AND user_id = $2 AND revoked_at IS NULL AND expires_at > clock_timestamp() AND `+liveSQL+`
 ORDER BY used_at DESC, id`, p.tenant, p.user, p.session)
		if err != nil {
			return err
		}
		list, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (SessionInfo, error) {
			var i SessionInfo
			err := row.Scan(&i.ID, &i.CreatedAt, &i.UsedAt, &i.ExpiresAt, &i.ClientIP, &i.UserAgent, &i.Current)
			return i, err
		})
		if err == nil && len(list) == 0 { // not even the caller's own
			return ErrSessionOver
		}
		return err
	})
	return list, err
}

// AccountEmail is the e-mail of the caller's account.
func (s *Store) AccountEmail(ctx context.Context, p Principal) (email Email, err error) {
	err = s.queryRow(ctx, []any{&email.s}, `SELECT email FROM accounts WHERE tenant_id = $1 AND user_id = $2 AND `+liveSQL, p.tenant, p.user, p.session)
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrSessionOver
	}
	return email, err
}

// RevokeOwnSession revokes one session of the caller's account. found is false
// when the account has no such session; one that is over already is found.
func (s *Store) RevokeOwnSession(ctx context.Context, p Principal, id SessionID, origin Origin) (found bool, err error) {
	err = s.asPrincipal(ctx, p, func(ctx context.Context, tx pgx.Tx, about subject) error {
		err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM sessions WHERE tenant_id = $1 AND user_id = $2 AND id = $3)`, p.tenant, p.user, id).Scan(&found)
		if err != nil || !found {
			return err
		}
		return s.revokeWhere(ctx, tx, about, "user", origin, `id = $6`, id)
	})
	return found && err == nil, err
}

// RevokeOwnSessions revokes every session of the caller's account.
func (s *Store) RevokeOwnSessions(ctx context.Context, p Principal, origin Origin) error {
	return s.asPrincipal(ctx, p, func(ctx context.Context, tx pgx.Tx, about subject) error {
		return s.revokeSessions(ctx, tx, about, SessionID{}, "logout_all", origin)
	})
}

// asPrincipal runs f in a transaction that holds the account's row lock, while
// the caller's session is live.
func (s *Store) asPrincipal(ctx context.Context, p Principal, f func(context.Context, pgx.Tx, subject) error) error {
	err := s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT FROM accounts WHERE tenant_id = $1 AND user_id = $2 FOR NO KEY UPDATE`, p.tenant, p.user); err != nil {
			return err
		}
		// A statement of its own: it sees what the lock's last holder did.
		var live bool
		if err := tx.QueryRow(ctx, `SELECT `+liveSQL, p.tenant, p.user, p.session).Scan(&live); err != nil {
			return err
		}
		if !live {
			return ErrSessionOver
		}
		return f(ctx, tx, subject{p.tenant, p.user})
	})
	if err == nil {
		s.wakeRelay()
	}
	return err
}

// EndSession revokes the session of a refresh token, whichever of its tokens
// it is. genuine is false for a token that never was one of an existing
// session's; a session that is over, or whose row is gone, has ended already.
func (s *Store) EndSession(ctx context.Context, step Step, origin Origin) (p Principal, genuine bool, err error) {
	var tenant any
	if step.Tenant != nil {
		tenant = *step.Tenant
	}
	var known bool
	err = s.queryRow(ctx, []any{&known, &genuine, &p.tenant, &p.user}, `
WITH s AS (
    SELECT tenant_id, user_id, $2 IN (family_hash, prev_family_hash) AND ($3::uuid IS NULL OR tenant_id = $3) AS genuine FROM sessions WHERE id = $1
), ended AS (
    UPDATE sessions AS e SET revoked_at = t, revoked_reason = 'logout', expires_at = least(expires_at, t)
      FROM clock_timestamp() AS t, s
     WHERE e.id = $1 AND s.genuine AND e.revoked_at IS NULL
    RETURNING e.id, e.tenant_id, e.user_id
), out AS (`+insertEvents+`
    SELECT 'auth.user.logged_out', tenant_id, user_id, $4, NULL, jsonb_build_object('user_id', user_id, 'session_id', id) FROM ended
    RETURNING event_id
), event AS (`+insertEvents+`
    SELECT 'auth.session.revoked', tenant_id, user_id, $4, out.event_id,
           jsonb_build_object('user_id', user_id, 'session_id', id, 'reason', 'logout', 'access_tokens_expire_at', event_time(clock_timestamp() + $5::interval))
      FROM ended, out
)
SELECT EXISTS (SELECT FROM s), coalesce((SELECT genuine FROM s), false),
       coalesce((SELECT tenant_id FROM s WHERE genuine), '00000000-0000-0000-0000-000000000000'),
       coalesce((SELECT user_id FROM s WHERE genuine), '00000000-0000-0000-0000-000000000000')`,
		step.Session, step.FamilyHash, tenant, origin.TraceID, s.rules.AccessTokenTTL)
	if err != nil {
		return p, false, err
	}
	p.session = step.Session
	s.wakeRelay()
	return p, genuine || !known, nil
}

// SessionIsLive tells whether the principal's session is.
func (s *Store) SessionIsLive(ctx context.Context, p Principal) (live bool, err error) {
	err = s.queryRow(ctx, []any{&live}, `SELECT `+liveSQL, p.tenant, p.user, p.session)
	return live, err
}

// CheckRefresh tells, without spending it, whether a refresh token is the
// current one of a live session, and until when.
func (s *Store) CheckRefresh(ctx context.Context, step Step) (p Principal, expires time.Time, ok bool, err error) {
	p.session = step.Session
	err = s.queryRow(ctx, []any{&p.tenant, &p.user, &expires}, `
SELECT tenant_id, user_id, expires_at FROM sessions
 WHERE id = $1 AND family_hash = $2 AND generation = $3 AND step_hash = $4 AND revoked_at IS NULL AND expires_at > clock_timestamp()`,
		step.Session, step.FamilyHash, step.Generation, step.StepHash)
	if errors.Is(err, pgx.ErrNoRows) {
		return p, expires, false, nil
	}
	return p, expires, err == nil, err
}
