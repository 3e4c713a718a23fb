package auth

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/jwt"
)

// maxClaims bounds an account's own claims in bytes.
const maxClaims = 4 << 10

// Actions are what operators do to an account, from the command line or over
// HTTP: the same functions behind both.
var Actions = []string{"get", "disable", "enable", "unlock", "revoke-sessions", "set-email", "set-claims", "force-reset", "delete", "export"}

// ActionTakesArgument tells which actions need a value beside the account: an
// e-mail, or a JSON object of claims.
func ActionTakesArgument(action string) bool { return action == "set-email" || action == "set-claims" }

// Act does one action and writes its audit line. From the return on it holds
// on every replica.
func (s *Server) Act(ctx context.Context, action, tenant, user, argument string, origin db.Origin) (any, error) {
	c := caller{origin: origin, rec: &record{}}
	answer, err := s.act(ctx, c, action, accountRequest{tenant, user, argument, json.RawMessage(argument)})
	s.finish(ctx, logAdmin, c, err)
	return answer, err
}

func (s *Server) act(ctx context.Context, c caller, action string, in accountRequest) (any, error) {
	c.rec.action = action
	ref, err := db.ParseAccountRef(in.Tenant, in.User)
	if err != nil {
		return nil, errNotFound
	}
	c.rec.tenant, c.rec.user = ref.Tenant, ref.User
	var a db.AccountInfo
	switch action {
	case "get":
		a, err = s.store.GetAccount(ctx, ref)
	case "disable":
		a, err = s.store.SetDisabled(ctx, ref, true, c.origin)
	case "enable":
		a, err = s.store.SetDisabled(ctx, ref, false, c.origin)
	case "unlock":
		a, err = s.store.Unlock(ctx, ref, c.origin)
	case "revoke-sessions":
		a, err = s.store.RevokeSessions(ctx, ref, c.origin)
	case "set-email":
		email, parseErr := db.ParseEmail(in.Email)
		if parseErr != nil {
			return nil, invalidFields(fieldError{"email", "not_an_email"})
		}
		a, err = s.store.SetEmail(ctx, ref, email, c.origin)
	case "set-claims":
		if reason := checkClaims(in.Claims); reason != "" {
			return nil, invalidFields(fieldError{"claims", reason})
		}
		a, err = s.store.SetClaims(ctx, ref, in.Claims, c.origin)
	case "force-reset":
		if s.cfg.PasswordResetTTL == 0 { // the account could never come back
			return nil, invalidFields(fieldError{"action", "password_reset_is_off"})
		}
		token := newResetToken()
		a, err = s.store.ForceReset(ctx, ref, token.hash(), s.sealFor(ref.Tenant, token), c.origin)
	case "delete":
		a, err = s.store.Delete(ctx, ref, c.origin)
	case "export":
		e, err := s.store.ExportAccount(ctx, ref)
		c.rec.user = e.Account.UserID
		return e, err
	default:
		return nil, errNotFound
	}
	c.rec.user = a.UserID
	return a, err
}

// checkClaims returns what is wrong with an account's own claims, or "".
func checkClaims(claims json.RawMessage) string {
	switch {
	case len(claims) > maxClaims:
		return "too_long"
	case jwt.CheckExtra(claims) != nil:
		return "not_an_object_of_free_names"
	}
	return ""
}

// accountRequest names an account in the path and, for the two actions that
// take one, a value in the body.
type accountRequest struct {
	Tenant, User, Email string
	Claims              json.RawMessage
}

func (r *accountRequest) members() []member {
	return []member{{name: "tenant", text: &r.Tenant, path: true}, {name: "user", text: &r.User, path: true}}
}

type emailRequest struct{ accountRequest }

func (r *emailRequest) members() []member {
	return append(r.accountRequest.members(), member{name: "email", text: &r.Email})
}

type claimsRequest struct{ accountRequest }

func (r *claimsRequest) members() []member {
	return append(r.accountRequest.members(), member{name: "claims", object: &r.Claims})
}

// adminRoutes is the table of ADMIN_ADDR. Without ADMIN_TOKEN it holds the
// metrics alone.
func (s *Server) adminRoutes() []route {
	routes := []route{s.metricsRoute()}
	if s.cfg.AdminToken.Reveal() == "" {
		return routes
	}
	add := func(method, path, event string, handler http.HandlerFunc) {
		routes = append(routes, route{method, path, "200", s.withToken(event, func(l *live) Secret { return l.adminToken }, false, handler)})
	}
	const account = "/api/admin/tenants/{tenant}/users/{user}"
	for _, action := range Actions {
		handler := handleJSON(s, logAdmin, http.StatusOK, func(ctx context.Context, c caller, in accountRequest) (any, error) { return s.act(ctx, c, action, in) })
		switch action {
		case "get":
			add(http.MethodGet, account, logAdmin, handler)
		case "delete":
			add(http.MethodDelete, account, logAdmin, handler)
		case "export":
			add(http.MethodGet, account+"/export", logAdmin, handler)
		case "set-email":
			handler = handleJSON(s, logAdmin, http.StatusOK, func(ctx context.Context, c caller, in emailRequest) (any, error) {
				return s.act(ctx, c, action, in.accountRequest)
			})
			add(http.MethodPost, account+"/"+action, logAdmin, handler)
		case "set-claims":
			handler = handleJSON(s, logAdmin, http.StatusOK, func(ctx context.Context, c caller, in claimsRequest) (any, error) {
				return s.act(ctx, c, action, in.accountRequest)
			})
			add(http.MethodPost, account+"/"+action, logAdmin, handler)
		default:
			add(http.MethodPost, account+"/"+action, logAdmin, handler)
		}
	}
	add(http.MethodPost, "/api/admin/introspect", logIntrospect, s.handleIntrospect)
	return routes
}
