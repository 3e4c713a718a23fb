package db

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// Register creates an account and its event. ok is false when the user id or
// the e-mail is taken in the tenant; of concurrent calls one creates it.
func (s *Store) Register(ctx context.Context, tenant TenantID, user UserID, email Email, passwordHash string, origin Origin) (ok bool, err error) {
	err = s.queryRow(ctx, []any{&ok}, `
WITH account AS (
    INSERT INTO accounts (tenant_id, user_id, email, password_hash) VALUES ($1, $2, $3, $4)
        ON CONFLICT DO NOTHING
    RETURNING tenant_id, user_id, email
), event AS (`+insertEvents+`
    SELECT 'auth.user.registered', tenant_id, user_id, $5, NULL, jsonb_build_object('user_id', user_id, 'email', email)
      FROM account
)
SELECT EXISTS (SELECT FROM account)`,
		tenant, user, email.String(), passwordHash, origin.TraceID)
	if ok {
		s.wakeRelay()
	}
	return ok, err
}

// NewSession is a session about to begin: hashes of its first refresh token.
type NewSession struct {
	ID         SessionID
	FamilyHash []byte // 32 bytes
	StepHash   []byte // 32 bytes
}

// Session is a live session as it stands after a login or a refresh: what an
// access token is made of.
type Session struct {
	ID        SessionID
	Tenant    TenantID
	User      UserID
	AuthTime  time.Time       // the login
	ExpiresIn time.Duration   // idle life left
	Claims    json.RawMessage // the account's own claims, a JSON object
}

// LoginOutcome is what CompleteLogin decided.
type LoginOutcome string

// The outcomes of CompleteLogin.
const (
	LoginCompleted LoginOutcome = "completed"
	LoginLapsed    LoginOutcome = "lapsed"  // the guess outlived its reservation, or a lock began: no session
	LoginChanged   LoginOutcome = "changed" // password changed or account disabled since the guess was reserved: no session, settle with FailGuess
)

const (
	errLapsed  = ownError("guess lapsed")
	errChanged = ownError("account changed")
)

// CompleteLogin settles a guess whose password was right: it clears the count
// of failures, replaces the hash when newHash is not empty, begins the session
// and revokes the sessions used longest ago beyond MaxSessions, with their
// events, all or nothing. No session begins after a lock, with a password that
// is no longer the account's, or on a disabled account.
func (s *Store) CompleteLogin(ctx context.Context, g *Guess, newHash string, n NewSession, origin Origin) (Session, LoginOutcome, error) {
	var session Session
	err := s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		if err := settleGuess(ctx, tx, g); err != nil {
			return err
		}
		failed, claims, err := acceptPassword(ctx, tx, g, newHash)
		if err != nil {
			return err
		}
		about := subject{g.tenant, g.Account.User}
		session, err = s.beginSession(ctx, tx, about, n, origin)
		if err != nil {
			return err
		}
		session.Claims = claims
		err = addEvent(ctx, tx, EventLoggedIn, about, origin, map[string]any{
			"session_id": n.ID, "client_ip": origin.ClientIP, "user_agent": origin.UserAgent, "failed_since_last_success": failed,
		})
		if err != nil {
			return err
		}
		return s.revokeBeyondLimit(ctx, tx, about, origin)
	})
	return s.loginOutcome(session, err)
}

// loginOutcome tells what a transaction that began with settleGuess and
// acceptPassword came to.
func (s *Store) loginOutcome(session Session, err error) (Session, LoginOutcome, error) {
	switch {
	case errors.Is(err, errLapsed):
		return Session{}, LoginLapsed, nil
	case errors.Is(err, errChanged):
		return Session{}, LoginChanged, nil
	case err != nil:
		return Session{}, "", err
	}
	s.wakeRelay()
	return session, LoginCompleted, nil
}

// settleGuess removes the guess and the failures. The condition repeats what
// ReserveGuess promised: an owner that was stopped for longer than its
// reservation must not log in on a guess that was counted as wrong meanwhile.
func settleGuess(ctx context.Context, tx pgx.Tx, g *Guess) error {
	tag, err := tx.Exec(ctx, `
UPDATE guards
   SET outcome = 'cleared', failed = '{}', touched_at = clock_timestamp(),
       pending = ARRAY(SELECT p FROM unnest(pending) AS p WHERE p <> $2 AND p > clock_timestamp() - $3::interval)
 WHERE key = $1 AND $2 = ANY (pending) AND $2 > clock_timestamp() - $3::interval
   AND locked_until <= clock_timestamp()`, g.key, g.ticket, reservationTTL)
	if err == nil && tag.RowsAffected() == 0 {
		return errLapsed
	}
	return err
}

// acceptPassword locks the account while its hash and e-mail are still those
// that were verified. It returns the wrong guesses since the last good login, and the
// account's claims.
func acceptPassword(ctx context.Context, tx pgx.Tx, g *Guess, newHash string) (failed int, claims json.RawMessage, err error) {
	err = tx.QueryRow(ctx, `
SELECT failed_logins, claims FROM accounts
 WHERE tenant_id = $1 AND user_id = $2 AND password_hash = $3 AND email = $4 AND disabled_at IS NULL
   FOR NO KEY UPDATE`, g.tenant, g.Account.User, g.Account.PasswordHash, g.email.s).Scan(&failed, &claims)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, nil, errChanged
	}
	if err != nil || failed == 0 && newHash == "" {
		return failed, claims, err
	}
	_, err = tx.Exec(ctx, `
UPDATE accounts SET failed_logins = 0, password_hash = coalesce(nullif($3, ''), password_hash)
 WHERE tenant_id = $1 AND user_id = $2`, g.tenant, g.Account.User, newHash)
	return failed, claims, err
}
