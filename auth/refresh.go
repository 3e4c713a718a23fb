package auth

import (
	"context"
	"crypto/rand"
	"log/slog"

	"github.com/7d-solutions/identity-auth/db"
)

type refreshRequest struct{ RefreshToken, TenantID string }

func (r *refreshRequest) members() []member {
	return []member{
		{name: "refresh_token", text: &r.RefreshToken},
		{name: "tenant_id", text: &r.TenantID, optional: true},
	}
}

// parse returns the token and what of it the store is told.
func (r refreshRequest) parse() (refreshToken, db.Step, error) {
	var step db.Step
	if r.TenantID != "" {
		tenant, err := db.ParseTenantID(r.TenantID)
		if err != nil {
			return refreshToken{}, step, invalidFields(fieldError{"tenant_id", "not_a_uuid"})
		}
		step.Tenant = &tenant
	}
	token, err := parseRefreshToken(r.RefreshToken)
	if err != nil {
		return refreshToken{}, step, errInvalidRefresh
	}
	step.Session, step.Generation = token.session, token.generation
	step.FamilyHash, step.StepHash = token.familyHash(), token.stepHash()
	return token, step, nil
}

// refresh spends a refresh token in one round trip and issues its successor.
func (s *Server) refresh(ctx context.Context, c caller, in refreshRequest) (tokenResponse, error) {
	token, step, err := in.parse()
	if err != nil {
		return tokenResponse{}, err
	}
	seed := make([]byte, 32)
	rand.Read(seed)
	next := token.successor(seed)
	step.NextHash, step.NextSeed = next.stepHash(), seed

	r, err := s.store.RotateSession(ctx, step, c.origin)
	if err != nil {
		return tokenResponse{}, err
	}
	if r.Outcome != db.RotateUnknown {
		c.rec.tenant, c.rec.user, c.rec.session = r.Session.Tenant, r.Session.User, r.Session.ID
	}
	switch r.Outcome {
	case db.Rotated:
		return s.issue(r.Session, next)
	case db.Reused:
		c.rec.result = "reused"
		return s.issue(r.Session, token.successor(r.Seed))
	case db.RotateLimited:
		return tokenResponse{}, rateLimited("session", r.RetryAfter)
	case db.Replay, db.ReplayAgain:
		s.sampler.line(ctx, slog.LevelWarn, logReplay, "", c.rec.attrs(c.origin)...)
		return tokenResponse{}, &failure{problem: errInvalidRefresh, result: "replay"}
	case db.RotateExpired:
		return tokenResponse{}, &failure{problem: errInvalidRefresh, result: "expired"}
	case db.RotateRevoked:
		return tokenResponse{}, &failure{problem: errInvalidRefresh, result: "revoked"}
	case db.RotateAhead, db.RotateUnknown:
		return tokenResponse{}, errInvalidRefresh
	}
	return tokenResponse{}, errInternal // unreachable: the outcomes are a closed list
}
