package db

import (
	"context"
	"encoding/json"
	"errors"

	"github.com/jackc/pgx/v5"
)

// ErrSessionOver answers a caller whose session was revoked or is over: its
// access token is no longer good.
var ErrSessionOver = errors.New("session is over")

// errResetToken ends a transaction on a token that is spent, void or expired.
const errResetToken = ownError("reset token not open")

// SealFunc makes what the outbox holds of a reset token until it is relayed.
type SealFunc func(user UserID, email, expires string) (json.RawMessage, error)

// RequestReset opens a password reset for the account of the e-mail, if there
// is one: any earlier token is void from now on. The event goes to everyone;
// seal makes the only copy of the token that leaves, for the mailer. ok is
// false when there is no account.
func (s *Store) RequestReset(ctx context.Context, tenant TenantID, email Email, tokenHash []byte, seal SealFunc, origin Origin) (ok bool, err error) {
	err = s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		ok, err = s.openReset(ctx, tx, tenant, email, tokenHash, seal, origin)
		return err
	})
	if ok && err == nil {
		s.wakeRelay()
	}
	return ok && err == nil, err
}

func (s *Store) openReset(ctx context.Context, tx pgx.Tx, tenant TenantID, email Email, tokenHash []byte, seal SealFunc, origin Origin) (ok bool, err error) {
	about := subject{tenant: tenant}
	var expires string
	err = tx.QueryRow(ctx, `
INSERT INTO reset_tokens AS r (tenant_id, user_id, token_hash, expires_at)
SELECT tenant_id, user_id, $3, clock_timestamp() + $4::interval FROM accounts WHERE tenant_id = $1 AND email = $2 FOR KEY SHARE
    ON CONFLICT (tenant_id, user_id) DO UPDATE SET token_hash = excluded.token_hash, expires_at = excluded.expires_at
RETURNING user_id, event_time(expires_at)`, tenant, email.String(), tokenHash, s.rules.ResetTTL).Scan(&about.user, &expires)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := addEvent(ctx, tx, EventResetRequested, about, origin, map[string]any{"expires_at": expires}); err != nil {
		return false, err
	}
	sealed, err := seal(about.user, email.s, expires)
	if err != nil {
		return false, err
	}
	_, err = tx.Exec(ctx, insertTransient+`VALUES ($1, $2, $3, $4, $5, true)`, EventPasswordResetSecret, about.tenant, about.user, origin.TraceID, sealed)
	return true, err
}

// ResetTarget is the account an open reset token belongs to.
type ResetTarget struct {
	tenant TenantID
	user   UserID
	Email  Email
}

// Subject names the account for logs.
func (r ResetTarget) Subject() (TenantID, UserID) { return r.tenant, r.user }

// FindReset looks an open token up; it spends nothing.
func (s *Store) FindReset(ctx context.Context, tokenHash []byte) (r ResetTarget, ok bool, err error) {
	err = s.queryRow(ctx, []any{&r.tenant, &r.user, &r.Email.s}, `
SELECT tenant_id, user_id, email FROM reset_tokens JOIN accounts USING (tenant_id, user_id)
 WHERE token_hash = $1 AND expires_at > clock_timestamp()`, tokenHash)
	if errors.Is(err, pgx.ErrNoRows) {
		return r, false, nil
	}
	return r, err == nil, err
}

// ResetPassword spends the token, sets the password, clears the lock and
// revokes every session, all or nothing. Of two parallel uses of one token one
// is ok. A disabled account stays disabled.
func (s *Store) ResetPassword(ctx context.Context, r ResetTarget, tokenHash []byte, newHash string, origin Origin) (ok bool, err error) {
	err = s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		about := subject{r.tenant, r.user}
		if err := clearGuard(ctx, tx, r.tenant, r.Email.String()); err != nil {
			return err
		}
		email, err := setPassword(ctx, tx, about, newHash)
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
DELETE FROM reset_tokens WHERE tenant_id = $1 AND user_id = $2 AND token_hash = $3 AND expires_at > clock_timestamp()`,
			r.tenant, r.user, tokenHash)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return errResetToken
		}
		if err := tellPasswordChanged(ctx, tx, about, email, "reset", origin); err != nil {
			return err
		}
		return s.revokeSessions(ctx, tx, about, SessionID{}, "password_reset", origin)
	})
	switch {
	case errors.Is(err, errResetToken), errors.Is(err, errChanged):
		return false, nil
	case err != nil:
		return false, err
	}
	s.wakeRelay()
	return true, nil
}

// setPassword replaces the hash and locks the account's row; errChanged when
// the account is gone.
func setPassword(ctx context.Context, tx pgx.Tx, about subject, newHash string) (email string, err error) {
	err = tx.QueryRow(ctx, `
UPDATE accounts SET password_hash = $3, password_changed_at = clock_timestamp(), failed_logins = 0
 WHERE tenant_id = $1 AND user_id = $2
RETURNING email`, about.tenant, about.user, newHash).Scan(&email)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", errChanged
	}
	return email, err
}

func tellPasswordChanged(ctx context.Context, tx pgx.Tx, about subject, email, reason string, origin Origin) error {
	return addEvent(ctx, tx, EventPasswordChanged, about, origin, map[string]any{"email": email, "reason": reason, "client_ip": origin.ClientIP})
}

// ChangePassword settles a guess whose password was right, sets the new one,
// gives the caller's session a new refresh token and revokes every other
// session and the open reset token, all or nothing. The outcomes are those of
// CompleteLogin; ErrSessionOver when the caller's session is over.
func (s *Store) ChangePassword(ctx context.Context, p Principal, g *Guess, newHash string, n NewSession, origin Origin) (Session, LoginOutcome, error) {
	session := Session{ID: p.session, Tenant: p.tenant, User: p.user}
	err := s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		about := subject{p.tenant, p.user}
		if about != (subject{g.tenant, g.Account.User}) {
			return errChanged // the e-mail the guess was made for is another account's by now
		}
		if err := settleGuess(ctx, tx, g); err != nil {
			return err
		}
		var err error
		if _, session.Claims, err = acceptPassword(ctx, tx, g, ""); err != nil {
			return err
		}
		email, err := setPassword(ctx, tx, about, newHash)
		if err != nil {
			return err
		}
		var left float64
		err = tx.QueryRow(ctx, `
UPDATE sessions
   SET prev_family_hash = family_hash, family_hash = $4, step_hash = $5, prev_step_hash = NULL, step_seed = NULL, generation = 0, outcome = 'rotated',
       used_at = clock_timestamp(), expires_at = least(clock_timestamp() + $6::interval, ends_at)
 WHERE id = $1 AND tenant_id = $2 AND user_id = $3 AND revoked_at IS NULL AND expires_at > clock_timestamp()
RETURNING created_at, extract(epoch FROM expires_at - clock_timestamp())::float8`,
			p.session, p.tenant, p.user, n.FamilyHash, n.StepHash, s.rules.RefreshTokenTTL).Scan(&session.AuthTime, &left)
		if errors.Is(err, pgx.ErrNoRows) {
			return ErrSessionOver
		}
		if err != nil {
			return err
		}
		session.ExpiresIn = seconds(left)
		if _, err := tx.Exec(ctx, `DELETE FROM reset_tokens WHERE tenant_id = $1 AND user_id = $2`, p.tenant, p.user); err != nil {
			return err
		}
		if err := tellPasswordChanged(ctx, tx, about, email, "change", origin); err != nil {
			return err
		}
		return s.revokeSessions(ctx, tx, about, p.session, "password_change", origin)
	})
	return s.loginOutcome(session, err)
}
