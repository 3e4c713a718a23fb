package auth

import (
	"context"
	"time"

	"github.com/7d-solutions/identity-auth/db"
)

type registerRequest struct{ TenantID, UserID, Email, Password string }

func (r *registerRequest) members() []member {
	return []member{
		{name: "tenant_id", text: &r.TenantID},
		{name: "user_id", text: &r.UserID},
		{name: "email", text: &r.Email},
		{name: "password", text: &r.Password},
	}
}

type registerResponse struct {
	TenantID db.TenantID `json:"tenant_id"`
	UserID   db.UserID   `json:"user_id"`
	Email    string      `json:"email"`
}

// register creates an account. The hash is computed only for what may be
// stored: allowed, well-formed, strong enough and within the limit.
func (s *Server) register(ctx context.Context, c caller, in registerRequest) (registerResponse, error) {
	var wrong []fieldError
	tenant, err := db.ParseTenantID(in.TenantID)
	if err != nil {
		wrong = append(wrong, fieldError{"tenant_id", "not_a_uuid"})
	}
	user, err := db.ParseUserID(in.UserID)
	if err != nil {
		wrong = append(wrong, fieldError{"user_id", "not_a_uuid"})
	}
	email, err := db.ParseEmail(in.Email)
	if err != nil {
		wrong = append(wrong, fieldError{"email", "not_an_email"})
	}
	c.rec.tenant, c.rec.user = tenant, user
	if len(wrong) > 0 {
		return registerResponse{}, invalidFields(wrong...)
	}
	if reasons := s.live.Load().policy.check(in.Password, email); len(reasons) > 0 {
		return registerResponse{}, &failure{problem: errWeakPassword, reasons: reasons}
	}
	place, err := s.hasher.queue()
	if err != nil {
		return registerResponse{}, err
	}
	defer place.leave()
	ok, wait, err := s.store.SpendLimit(ctx, db.ScopeRegister, tenant, email.String(), s.cfg.RegisterPerMinute, time.Minute)
	if err != nil {
		return registerResponse{}, err
	}
	if !ok {
		return registerResponse{}, rateLimited("email", wait)
	}
	phc, err := place.hash(ctx, in.Password)
	if err != nil {
		return registerResponse{}, err
	}
	created, err := s.store.Register(ctx, tenant, user, email, phc, c.origin)
	if err != nil {
		return registerResponse{}, err
	}
	if !created {
		return registerResponse{}, errConflict
	}
	return registerResponse{tenant, user, email.String()}, nil
}
