package auth

import (
	"context"
	"net/http"
	"net/url"

	"github.com/7d-solutions/identity-auth/db"
)

// introspection is the answer of RFC 7662; all but active is left out when the
// token is not.
type introspection struct {
	Active    bool   `json:"active"`
	TokenType string `json:"token_type,omitempty"`
	Issuer    string `json:"iss,omitempty"`
	Subject   string `json:"sub,omitempty"`
	Audience  string `json:"aud,omitempty"`
	ClientID  string `json:"client_id,omitempty"`
	ID        string `json:"jti,omitempty"`
	IssuedAt  int64  `json:"iat,omitempty"`
	ExpiresAt int64  `json:"exp,omitempty"`
	TenantID  string `json:"tenant_id,omitempty"`
	SessionID string `json:"sid,omitempty"`
}

// handleIntrospect reads the form that RFC 7662 section 2.1 asks for.
func (s *Server) handleIntrospect(w http.ResponseWriter, r *http.Request) {
	c := s.caller(r)
	var answer introspection
	token, err := readTokenForm(w, r)
	if err == nil {
		answer, err = s.introspect(r.Context(), c, token)
	}
	s.finish(r.Context(), logIntrospect, c, err)
	if err != nil {
		writeProblem(w, c.origin.TraceID, asFailure(err))
		return
	}
	writeJSON(w, http.StatusOK, answer)
}

func readTokenForm(w http.ResponseWriter, r *http.Request) (string, error) {
	body, err := readBody(w, r, "application/x-www-form-urlencoded")
	if err != nil {
		return "", err
	}
	form, err := url.ParseQuery(string(body))
	if err != nil || len(form["token"]) != 1 {
		return "", invalidFields(fieldError{"token", "missing"})
	}
	return form.Get("token"), nil
}

// introspect tells whether a token of either kind is good now: signed and in
// time, or the current one, and of a live session.
func (s *Server) introspect(ctx context.Context, c caller, token string) (introspection, error) {
	if _, step, err := (refreshRequest{RefreshToken: token}).parse(); err == nil {
		p, expires, ok, err := s.store.CheckRefresh(ctx, step)
		if err != nil || !ok {
			return introspection{}, err
		}
		tenant, user, session := p.Subject()
		c.rec.tenant, c.rec.user, c.rec.session = p.Subject()
		return introspection{Active: true, TokenType: "refresh_token", Issuer: s.cfg.Issuer, Subject: user.String(), ClientID: s.cfg.Audience,
			ExpiresAt: expires.Unix(), TenantID: tenant.String(), SessionID: session.String()}, nil
	}
	claims, err := s.live.Load().verifier.Verify(ctx, token)
	if err != nil {
		return introspection{}, nil
	}
	p, err := db.NewPrincipal(claims.TenantID, claims.Subject, claims.SessionID)
	if err != nil {
		return introspection{}, nil
	}
	c.rec.tenant, c.rec.user, c.rec.session = p.Subject()
	live, err := s.store.SessionIsLive(ctx, p)
	if err != nil || !live {
		return introspection{}, err
	}
	return introspection{Active: true, TokenType: "access_token", Issuer: claims.Issuer, Subject: claims.Subject, Audience: claims.Audience, ClientID: claims.ClientID,
		ID: claims.ID, IssuedAt: claims.IssuedAt.Unix(), ExpiresAt: claims.ExpiresAt.Unix(), TenantID: claims.TenantID, SessionID: claims.SessionID}, nil
}
