package auth

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/7d-solutions/identity-auth/db"
)

type loginRequest struct{ TenantID, Email, Password string }

func (r *loginRequest) members() []member {
	return []member{
		{name: "tenant_id", text: &r.TenantID},
		{name: "email", text: &r.Email},
		{name: "password", text: &r.Password},
	}
}

// login answers a right password with a new session. An unknown e-mail, a
// wrong or over-long password and a disabled account take the same statements,
// one hash and the same answer; only what is written at the end differs in a
// column.
func (s *Server) login(ctx context.Context, c caller, in loginRequest) (tokenResponse, error) {
	tenant, err := db.ParseTenantID(in.TenantID)
	if err != nil {
		return tokenResponse{}, invalidFields(fieldError{"tenant_id", "not_a_uuid"})
	}
	c.rec.tenant = tenant
	email, sent := db.LookupEmail(in.Email)
	token := newRefreshToken()
	var session db.Session
	err = s.checkPassword(ctx, c, passwordCheck{tenant: tenant, email: email, sent: sent, spend: true, password: in.Password},
		func(ctx context.Context, guess *db.Guess, rehash string) (outcome db.LoginOutcome, err error) {
			session, outcome, err = s.store.CompleteLogin(ctx, guess, rehash, token.asNew(), c.origin)
			return outcome, err
		})
	if err != nil {
		return tokenResponse{}, err
	}
	c.rec.session = session.ID
	return s.issue(session, token)
}

// passwordCheck is one password to check against an account's.
type passwordCheck struct {
	tenant      db.TenantID
	email       db.Email
	sent        string // the e-mail as it was sent: limits and locks count by it
	spend       bool   // whether it counts for LOGIN_PER_MIN_PER_EMAIL
	password    string
	newPassword string // to be hashed if the password is right; "" for none
}

// checkPassword checks one password under the lock, and when it is right calls
// complete, in whose transaction the guess is settled. fresh is the hash to
// store, as verify returns it.
func (s *Server) checkPassword(ctx context.Context, c caller, check passwordCheck, complete func(ctx context.Context, guess *db.Guess, fresh string) (db.LoginOutcome, error)) error {
	begun := time.Now()
	patience, cancel := context.WithTimeout(ctx, longestTurn)
	defer cancel()
	leave, err := s.turns.enter(patience, check.tenant.String()+check.sent)
	if err != nil {
		return err
	}
	defer leave()
	if time.Since(begun) > time.Second && !s.health.db.Load() {
		return db.ErrUnavailable // who has waited hears of an outage at once, not after another wait
	}

	// The token of LOGIN_FAILURES_PER_HOUR_PER_IP is taken before the check and
	// given back unless the password was wrong: parallel guesses cannot slip by.
	if ok, wait := s.ipFailures.take(c.addr); !ok {
		return rateLimited("ip", wait)
	}
	wrongPassword := false
	defer func() {
		if !wrongPassword {
			s.ipFailures.giveBack(c.addr)
		}
	}()
	place, err := s.hasher.queue()
	if err != nil {
		return err
	}
	defer place.leave()
	guess, err := s.reserveGuess(ctx, patience, c, check)
	if err != nil {
		return err
	}
	c.rec.user = guess.Account.User
	match, fresh, err := place.verify(ctx, guess.Account.PasswordHash, check.password, check.newPassword)

	// From here on the outcome is recorded even if the client hangs up: a guess
	// that was checked counts, whoever still listens.
	ctx = context.WithoutCancel(ctx)
	switch {
	case errors.Is(err, errHashForm), errors.Is(err, errHashCost):
		s.sampler.line(ctx, slog.LevelError, logHashBad, "", append(c.rec.attrs(c.origin), slog.String("err", err.Error()))...)
		match = false
	case err != nil: // no slot in time, or the client left the queue: never checked
		return errors.Join(err, s.store.ReleaseGuess(ctx, guess))
	}
	outcome := db.LoginChanged
	if match && !guess.Account.Disabled {
		outcome, err = complete(ctx, guess, fresh)
		if errors.Is(err, db.ErrSessionOver) { // rolled back, and no guess was wrong
			return errors.Join(err, s.store.ReleaseGuess(ctx, guess))
		}
		if err != nil {
			return err
		}
	}
	switch outcome {
	case db.LoginCompleted:
		return nil
	case db.LoginChanged: // wrong, or right for a password that is the account's no more
		wrongPassword = true
		return s.failGuess(ctx, c, guess)
	case db.LoginLapsed: // counted as wrong already, since it took too long
		return errHashBusy
	}
	return errInternal // unreachable: the outcomes are a closed list
}

// reserveGuess asks for the right to check one password. While other guesses
// under way could reach the threshold it waits for them, while patience lasts.
func (s *Server) reserveGuess(ctx, patience context.Context, c caller, check passwordCheck) (*db.Guess, error) {
	for spend := check.spend; ; spend = false {
		r, err := s.store.ReserveGuess(ctx, check.tenant, check.email, check.sent, spend, c.origin)
		if err != nil {
			return nil, err
		}
		switch r.Outcome {
		case db.GuessReserved:
			return r.Guess, nil
		case db.GuessLimited:
			return nil, rateLimited("email", r.RetryAfter)
		case db.GuessLockedNow:
			c.rec.user = r.User
			s.tellLockout(ctx, c)
			return nil, &failure{problem: errLocked, retryAfter: r.RetryAfter}
		case db.GuessLocked:
			return nil, &failure{problem: errLocked, retryAfter: r.RetryAfter}
		}
		// No room. Room comes when a guess of any replica is settled; asking
		// again costs less than a channel between replicas.
		again := time.NewTimer(30*time.Millisecond + rand.N(40*time.Millisecond))
		select {
		case <-again.C:
		case <-patience.Done():
			again.Stop()
			return nil, waitEnded(patience)
		}
	}
}

// failGuess counts a wrong guess and returns the answer. When the count could
// not be written the answer is an outage: it says nothing about the password.
func (s *Server) failGuess(ctx context.Context, c caller, guess *db.Guess) error {
	lockedNow, err := s.store.FailGuess(ctx, guess, c.origin)
	if err != nil {
		return err
	}
	if lockedNow {
		s.tellLockout(ctx, c)
	}
	return errInvalidCredentials
}

func (s *Server) tellLockout(ctx context.Context, c caller) {
	s.metrics.lockouts.Inc()
	s.sampler.line(ctx, slog.LevelWarn, logLockout, "", c.rec.attrs(c.origin)...)
}
