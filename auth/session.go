package auth

import (
	"context"

	"github.com/7d-solutions/identity-auth/db"
)

// logout ends the session of a refresh token, whichever of its tokens it is.
// It is not done before it is written: an outage is 503.
func (s *Server) logout(ctx context.Context, c caller, in refreshRequest) (nothing, error) {
	_, step, err := in.parse()
	if err != nil {
		return nothing{}, err
	}
	p, genuine, err := s.store.EndSession(ctx, step, c.origin)
	if err != nil {
		return nothing{}, err
	}
	if !genuine {
		return nothing{}, errInvalidRefresh
	}
	c.rec.tenant, c.rec.user, c.rec.session = p.Subject()
	return nothing{}, nil
}

func (s *Server) logoutAll(ctx context.Context, c caller, p db.Principal, _ nothing) (nothing, error) {
	return nothing{}, s.store.RevokeOwnSessions(ctx, p, c.origin)
}

type sessionsResponse struct {
	Sessions []db.SessionInfo `json:"sessions"`
}

func (s *Server) listSessions(ctx context.Context, _ caller, p db.Principal, _ nothing) (sessionsResponse, error) {
	list, err := s.store.ListSessions(ctx, p)
	return sessionsResponse{list}, err
}

type sessionRequest struct{ SessionID string }

func (r *sessionRequest) members() []member {
	return []member{{name: "session_id", text: &r.SessionID, path: true}}
}

// revokeSession ends one session of the caller's account. What is not the
// caller's, or no session at all, is not found.
func (s *Server) revokeSession(ctx context.Context, c caller, p db.Principal, in sessionRequest) (nothing, error) {
	id, err := db.ParseSessionID(in.SessionID)
	if err != nil {
		return nothing{}, errNotFound
	}
	found, err := s.store.RevokeOwnSession(ctx, p, id, c.origin)
	if err != nil {
		return nothing{}, err
	}
	if !found {
		return nothing{}, errNotFound
	}
	return nothing{}, nil
}
