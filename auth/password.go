package auth

import (
	"context"
	"time"

	"github.com/7d-solutions/identity-auth/db"
)

type passwordRequest struct{ CurrentPassword, NewPassword string }

func (r *passwordRequest) members() []member {
	return []member{
		{name: "current_password", text: &r.CurrentPassword},
		{name: "new_password", text: &r.NewPassword},
	}
}

// changePassword checks the current password as a login does, under the same
// lock, and sets the new one. The caller's session goes on with new tokens.
func (s *Server) changePassword(ctx context.Context, c caller, p db.Principal, in passwordRequest) (tokenResponse, error) {
	email, err := s.store.AccountEmail(ctx, p)
	if err != nil {
		return tokenResponse{}, err
	}
	reasons := s.live.Load().policy.check(in.NewPassword, email)
	if in.NewPassword == in.CurrentPassword {
		reasons = append(reasons, "unchanged")
	}
	if len(reasons) > 0 {
		return tokenResponse{}, &failure{problem: errWeakPassword, reasons: reasons}
	}
	tenant, _, sessionID := p.Subject()
	token := newRefreshToken()
	token.session = sessionID
	var session db.Session
	err = s.checkPassword(ctx, c, passwordCheck{tenant: tenant, email: email, sent: email.String(), password: in.CurrentPassword, newPassword: in.NewPassword},
		func(ctx context.Context, guess *db.Guess, fresh string) (outcome db.LoginOutcome, err error) {
			session, outcome, err = s.store.ChangePassword(ctx, p, guess, fresh, token.asNew(), c.origin)
			return outcome, err
		})
	if err != nil {
		return tokenResponse{}, err
	}
	return s.issue(session, token)
}

type forgotRequest struct{ TenantID, Email string }

func (r *forgotRequest) members() []member {
	return []member{
		{name: "tenant_id", text: &r.TenantID},
		{name: "email", text: &r.Email},
	}
}

// forgotTime is the grain of forgot-password's answers: one or two statements
// of a millisecond vanish in it.
const forgotTime = 100 * time.Millisecond

// forgotPassword opens a reset for the account, if there is one, and answers
// the same after the same time if there is none or the limit is spent. The
// token goes to the mailer alone.
func (s *Server) forgotPassword(ctx context.Context, c caller, in forgotRequest) (nothing, error) {
	begun := time.Now()
	tenant, err := db.ParseTenantID(in.TenantID)
	if err != nil {
		return nothing{}, invalidFields(fieldError{"tenant_id", "not_a_uuid"})
	}
	c.rec.tenant = tenant
	email, sent := db.LookupEmail(in.Email)
	within, _, err := s.store.SpendLimit(ctx, db.ScopeForgot, tenant, sent, s.cfg.ForgotPerHour, time.Hour)
	if err != nil {
		return nothing{}, err
	}
	if within {
		token := newResetToken()
		if _, err := s.store.RequestReset(ctx, tenant, email, token.hash(), s.sealFor(tenant, token), c.origin); err != nil {
			return nothing{}, err
		}
	}
	c.rec.result = "requested"
	select {
	case <-time.After(forgotTime - time.Since(begun)%forgotTime):
	case <-ctx.Done():
	}
	return nothing{}, nil
}

type resetRequest struct{ Token, NewPassword string }

func (r *resetRequest) members() []member {
	return []member{
		{name: "token", text: &r.Token},
		{name: "new_password", text: &r.NewPassword},
	}
}

// resetPassword sets a new password for the account of an open token. A
// password that is refused leaves the token open.
func (s *Server) resetPassword(ctx context.Context, c caller, in resetRequest) (nothing, error) {
	token, err := parseResetToken(in.Token)
	if err != nil {
		return nothing{}, errInvalidReset
	}
	target, open, err := s.store.FindReset(ctx, token.hash())
	if err != nil {
		return nothing{}, err
	}
	if !open {
		return nothing{}, errInvalidReset
	}
	c.rec.tenant, c.rec.user = target.Subject()
	if reasons := s.live.Load().policy.check(in.NewPassword, target.Email); len(reasons) > 0 {
		return nothing{}, &failure{problem: errWeakPassword, reasons: reasons}
	}
	place, err := s.hasher.queue()
	if err != nil {
		return nothing{}, err
	}
	defer place.leave()
	phc, err := place.hash(ctx, in.NewPassword)
	if err != nil {
		return nothing{}, err
	}
	ok, err := s.store.ResetPassword(ctx, target, token.hash(), phc, c.origin)
	if err != nil {
		return nothing{}, err
	}
	if !ok {
		return nothing{}, errInvalidReset
	}
	return nothing{}, nil
}
