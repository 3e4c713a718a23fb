package db

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// ErrNoAccount answers an operator who names no account.
var ErrNoAccount = errors.New("no such account")

// ErrTaken answers an e-mail that another account of the tenant has.
var ErrTaken = errors.New("e-mail is taken in the tenant")

// AccountRef is how an operator names an account: by user id, or by e-mail.
type AccountRef struct {
	Tenant TenantID
	User   UserID
	Email  Email // when not empty, instead of User
}

// ParseAccountRef reads a tenant and a user id or an e-mail.
func ParseAccountRef(tenant, user string) (r AccountRef, err error) {
	if r.Tenant, err = ParseTenantID(tenant); err != nil {
		return r, err
	}
	if r.User, err = ParseUserID(user); err != nil {
		r.Email, err = ParseEmail(user)
	}
	return r, err
}

// AccountInfo is an account as operators see it. It holds no secret.
type AccountInfo struct {
	TenantID          TenantID        `json:"tenant_id"`
	UserID            UserID          `json:"user_id"`
	Email             string          `json:"email"`
	CreatedAt         time.Time       `json:"created_at"`
	PasswordChangedAt time.Time       `json:"password_changed_at"`
	HasPassword       bool            `json:"has_password"`
	DisabledAt        *time.Time      `json:"disabled_at"`
	LockedUntil       *time.Time      `json:"locked_until"`
	FailedLogins      int             `json:"failed_logins"`
	LiveSessions      int             `json:"live_sessions"`
	Claims            json.RawMessage `json:"claims"`
}

// GetAccount reads an account.
func (s *Store) GetAccount(ctx context.Context, ref AccountRef) (a AccountInfo, err error) {
	err = s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		a, err = readAccount(ctx, tx, ref)
		return err
	})
	return a, err
}

func readAccount(ctx context.Context, tx pgx.Tx, ref AccountRef) (a AccountInfo, err error) {
	err = tx.QueryRow(ctx, `
SELECT tenant_id, user_id, email, created_at, password_changed_at, password_hash <> '', disabled_at, failed_logins, claims,
       (SELECT count(*) FROM sessions AS s
         WHERE s.tenant_id = a.tenant_id AND s.user_id = a.user_id AND revoked_at IS NULL AND expires_at > clock_timestamp())
  FROM accounts AS a
 WHERE tenant_id = $1 AND ($3 = '' AND user_id = $2 OR email = $3)`, ref.Tenant, ref.User, ref.Email.s).
		Scan(&a.TenantID, &a.UserID, &a.Email, &a.CreatedAt, &a.PasswordChangedAt, &a.HasPassword, &a.DisabledAt, &a.FailedLogins, &a.Claims, &a.LiveSessions)
	if errors.Is(err, pgx.ErrNoRows) {
		return a, ErrNoAccount
	}
	if err != nil {
		return a, err
	}
	err = tx.QueryRow(ctx, `SELECT locked_until FROM guards WHERE key = $1 AND locked_until > clock_timestamp()`,
		emailKey(scopeLogin, a.TenantID, a.Email)).Scan(&a.LockedUntil)
	if errors.Is(err, pgx.ErrNoRows) {
		err = nil
	}
	return a, err
}

// operate runs f in a transaction that holds the rows of the account, in the
// package's order: its guard, made if there is none, then the account.
func (s *Store) operate(ctx context.Context, ref AccountRef, f func(context.Context, pgx.Tx, AccountInfo, subject) error) (a AccountInfo, err error) {
	err = s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		found, err := readAccount(ctx, tx, ref)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `
INSERT INTO guards (key, outcome, window_start, window_count, ticket, touched_at) SELECT $1, 'held', t, 0, t, t FROM clock_timestamp() AS t
    ON CONFLICT (key) DO UPDATE SET outcome = 'held'`, emailKey(scopeLogin, found.TenantID, found.Email))
		if err != nil {
			return err
		}
		// The e-mail is in the condition: the guard locked above is this account's.
		tag, err := tx.Exec(ctx, `SELECT FROM accounts WHERE tenant_id = $1 AND user_id = $2 AND email = $3 FOR UPDATE`, found.TenantID, found.UserID, found.Email)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return ErrNoAccount // gone, or renamed at this moment
		}
		byID := AccountRef{Tenant: found.TenantID, User: found.UserID}
		before, err := readAccount(ctx, tx, byID) // as the last holder of the lock left it
		if err != nil {
			return err
		}
		if err := f(ctx, tx, before, subject{before.TenantID, before.UserID}); err != nil {
			return err
		}
		a, err = readAccount(ctx, tx, byID)
		if errors.Is(err, ErrNoAccount) { // f deleted it
			a, err = before, nil
		}
		return err
	})
	if err == nil {
		s.wakeRelay()
	}
	return a, err
}

// SetDisabled ends every session of the account and lets none begin, or takes
// that back; sessions stay ended. What is so already changes nothing.
func (s *Store) SetDisabled(ctx context.Context, ref AccountRef, disabled bool, origin Origin) (AccountInfo, error) {
	return s.operate(ctx, ref, func(ctx context.Context, tx pgx.Tx, a AccountInfo, about subject) error {
		if disabled == (a.DisabledAt != nil) {
			return nil
		}
		event := EventEnabled
		if disabled {
			event = EventDisabled
		}
		_, err := tx.Exec(ctx, `UPDATE accounts SET disabled_at = CASE WHEN $3 THEN clock_timestamp() END WHERE tenant_id = $1 AND user_id = $2`,
			about.tenant, about.user, disabled)
		if err != nil {
			return err
		}
		if err := addEvent(ctx, tx, event, about, origin, map[string]any{}); err != nil || !disabled {
			return err
		}
		return s.revokeSessions(ctx, tx, about, SessionID{}, "disabled", origin)
	})
}

// Unlock ends a lock and forgets the failures counted so far.
func (s *Store) Unlock(ctx context.Context, ref AccountRef, origin Origin) (AccountInfo, error) {
	return s.operate(ctx, ref, func(ctx context.Context, tx pgx.Tx, a AccountInfo, about subject) error {
		if err := clearGuard(ctx, tx, a.TenantID, a.Email); err != nil {
			return err
		}
		return addEvent(ctx, tx, EventUnlocked, about, origin, map[string]any{})
	})
}

// clearGuard ends a lock. Guesses under way stay counted as under way.
func clearGuard(ctx context.Context, tx pgx.Tx, tenant TenantID, email string) error {
	_, err := tx.Exec(ctx, `
UPDATE guards SET outcome = 'cleared', failed = '{}', locked_until = '-infinity', touched_at = clock_timestamp() WHERE key = $1`,
		emailKey(scopeLogin, tenant, email))
	return err
}

// RevokeSessions ends every session of the account.
func (s *Store) RevokeSessions(ctx context.Context, ref AccountRef, origin Origin) (AccountInfo, error) {
	return s.operate(ctx, ref, func(ctx context.Context, tx pgx.Tx, _ AccountInfo, about subject) error {
		return s.revokeSessions(ctx, tx, about, SessionID{}, "admin", origin)
	})
}

// SetEmail gives the account another e-mail, or returns ErrTaken. Whoever reads
// the old mailbox has no way in any more: open resets are void, and a login
// under way with the old e-mail does not complete.
func (s *Store) SetEmail(ctx context.Context, ref AccountRef, email Email, origin Origin) (AccountInfo, error) {
	return s.operate(ctx, ref, func(ctx context.Context, tx pgx.Tx, a AccountInfo, about subject) error {
		if a.Email == email.s {
			return nil
		}
		_, err := tx.Exec(ctx, `UPDATE accounts SET email = $3 WHERE tenant_id = $1 AND user_id = $2`, about.tenant, about.user, email.s)
		if isUniqueViolation(err) {
			return ErrTaken
		}
		if err != nil {
			return err
		}
		if err := voidResets(ctx, tx, about); err != nil {
			return err
		}
		if err := forgetEmail(ctx, tx, a.TenantID, a.Email); err != nil {
			return err
		}
		return addEvent(ctx, tx, EventEmailChanged, about, origin, map[string]any{"email": email.s})
	})
}

// SetClaims replaces the account's own claims, a JSON object the caller has
// checked. They show in tokens from the next login or refresh.
func (s *Store) SetClaims(ctx context.Context, ref AccountRef, claims json.RawMessage, origin Origin) (AccountInfo, error) {
	return s.operate(ctx, ref, func(ctx context.Context, tx pgx.Tx, _ AccountInfo, about subject) error {
		if _, err := tx.Exec(ctx, `UPDATE accounts SET claims = $3 WHERE tenant_id = $1 AND user_id = $2`, about.tenant, about.user, claims); err != nil {
			return err
		}
		return addEvent(ctx, tx, EventClaimsChanged, about, origin, map[string]any{})
	})
}

// ForceReset takes the password away, ends every session and opens a reset, as
// RequestReset does: the only way back in is the mailed token.
func (s *Store) ForceReset(ctx context.Context, ref AccountRef, tokenHash []byte, seal SealFunc, origin Origin) (AccountInfo, error) {
	return s.operate(ctx, ref, func(ctx context.Context, tx pgx.Tx, a AccountInfo, about subject) error {
		if _, err := tx.Exec(ctx, `UPDATE accounts SET password_hash = '' WHERE tenant_id = $1 AND user_id = $2`, about.tenant, about.user); err != nil {
			return err
		}
		if err := s.revokeSessions(ctx, tx, about, SessionID{}, "admin", origin); err != nil {
			return err
		}
		_, err := s.openReset(ctx, tx, about.tenant, Email{a.Email}, tokenHash, seal, origin)
		return err
	})
}

// Delete removes every row of the person, but for events on their way: those
// go with their acknowledgement. The same ids may be registered again and
// inherit nothing.
func (s *Store) Delete(ctx context.Context, ref AccountRef, origin Origin) (AccountInfo, error) {
	return s.operate(ctx, ref, func(ctx context.Context, tx pgx.Tx, a AccountInfo, about subject) error {
		if err := s.revokeSessions(ctx, tx, about, SessionID{}, "admin", origin); err != nil {
			return err
		}
		if err := addEvent(ctx, tx, EventDeleted, about, origin, map[string]any{}); err != nil {
			return err
		}
		if err := forgetEmail(ctx, tx, a.TenantID, a.Email); err != nil {
			return err
		}
		if err := voidResets(ctx, tx, about); err != nil {
			return err
		}
		for _, sql := range []string{
			`DELETE FROM accounts WHERE tenant_id = $1 AND user_id = $2`, // and, by cascade, sessions and reset tokens
			// Marked first: an acknowledgement recorded in between deletes the row itself.
			`UPDATE outbox SET transient = true WHERE tenant_id = $1 AND user_id = $2`,
			`DELETE FROM outbox WHERE tenant_id = $1 AND user_id = $2 AND sent_at IS NOT NULL`,
		} {
			if _, err := tx.Exec(ctx, sql, about.tenant, about.user); err != nil {
				return err
			}
		}
		return nil
	})
}

// voidResets closes the account's open reset, also one that is on its way to
// the mailer.
func voidResets(ctx context.Context, tx pgx.Tx, about subject) error {
	_, err := tx.Exec(ctx, `
WITH r AS (DELETE FROM reset_tokens WHERE tenant_id = $1 AND user_id = $2)
DELETE FROM outbox WHERE tenant_id = $1 AND user_id = $2 AND event_type = $3`, about.tenant, about.user, EventPasswordResetSecret)
	return err
}

// forgetEmail removes the lock and the limits of an e-mail.
func forgetEmail(ctx context.Context, tx pgx.Tx, tenant TenantID, email string) error {
	for _, scope := range []Scope{scopeLogin, ScopeRegister, ScopeForgot} {
		key := emailKey(scope, tenant, email)
		if _, err := tx.Exec(ctx, `WITH g AS (DELETE FROM guards WHERE key = $1) DELETE FROM rate_windows WHERE key = $1`, key); err != nil {
			return err
		}
	}
	return nil
}

// Export is everything the database holds of a person, but for hashes.
type Export struct {
	Account  AccountInfo       `json:"account"`
	Sessions []json.RawMessage `json:"sessions"`
	Events   []json.RawMessage `json:"events"`
}

// ExportAccount reads it at one moment.
func (s *Store) ExportAccount(ctx context.Context, ref AccountRef) (e Export, err error) {
	err = s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY`); err != nil {
			return err
		}
		if e.Account, err = readAccount(ctx, tx, ref); err != nil {
			return err
		}
		e.Sessions, err = jsonRows(ctx, tx, e.Account, `
SELECT json_build_object('session_id', id, 'created_at', created_at, 'last_used_at', used_at, 'expires_at', expires_at,
           'revoked_at', revoked_at, 'revoked_reason', revoked_reason, 'client_ip', client_ip, 'user_agent', user_agent)
  FROM sessions WHERE tenant_id = $1 AND user_id = $2 ORDER BY created_at`)
		if err != nil {
			return err
		}
		e.Events, err = jsonRows(ctx, tx, e.Account, `
SELECT json_build_object('event_id', event_id, 'event_type', event_type, 'occurred_at', occurred_at, 'trace_id', trace_id, 'data', data)
  FROM outbox WHERE tenant_id = $1 AND user_id = $2 AND event_type <> 'auth.secrets.password_reset' ORDER BY seq`)
		return err
	})
	return e, err
}

func jsonRows(ctx context.Context, tx pgx.Tx, a AccountInfo, sql string) ([]json.RawMessage, error) {
	rows, err := tx.Query(ctx, sql, a.TenantID, a.UserID)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[json.RawMessage])
}
