package auth

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/7d-solutions/identity-auth/db"
)

// problem is one row of the error table: what a client gets (RFC 9457), and
// the metric label of an operation that ends so. All texts are constants.
type problem struct {
	status int
	code   string // stable; clients switch on it
	title  string
	result string // label value of auth_*_total
}

func (p *problem) Error() string { return p.code }

// The error table. An error outside it is errInternal.
var (
	errInvalidRequest     = &problem{400, "invalid_request", "The request is not valid.", "invalid"}
	errWeakPassword       = &problem{400, "weak_password", "The password is too easy to guess.", "weak_password"}
	errUnauthorized       = &problem{401, "unauthorized", "This endpoint needs a token.", "unauthorized"}
	errInvalidCredentials = &problem{401, "invalid_credentials", "E-mail or password is wrong.", "failure"}
	errInvalidRefresh     = &problem{401, "invalid_refresh_token", "The refresh token is not valid.", "invalid"}
	errInvalidToken       = &problem{401, "invalid_token", "The access token is missing or not valid.", "unauthorized"}
	errInvalidReset       = &problem{400, "invalid_reset_token", "The reset token is not valid, or was used.", "invalid"}
	errNotFound           = &problem{404, "not_found", "There is nothing here.", "invalid"}
	errMethodNotAllowed   = &problem{405, "method_not_allowed", "The method is not allowed here.", "invalid"}
	errBodyTimeout        = &problem{408, "request_timeout", "The request body did not arrive in time.", "invalid"}
	errConflict           = &problem{409, "already_registered", "The user id or the e-mail is taken in this tenant.", "conflict"}
	errBodyTooLarge       = &problem{413, "body_too_large", "The request body is larger than 64 KiB.", "invalid"}
	errUnsupportedMedia   = &problem{415, "unsupported_media_type", "The body must be application/json in UTF-8, not encoded.", "invalid"}
	errLocked             = &problem{423, "locked", "Too many wrong passwords; login is locked for a while.", "locked"}
	errRateLimited        = &problem{429, "rate_limited", "Too many requests.", "rate_limited"}
	errInternal           = &problem{500, "internal", "Something went wrong here.", "error"}
	errHashBusy           = &problem{503, "hash_busy", "Too many password checks are under way.", "hash_busy"}
	errUnavailable        = &problem{503, "unavailable", "The service cannot reach its database.", "unavailable"}
)

// problems lists the table for tests and for the metrics' label values.
var problems = []*problem{
	errInvalidRequest, errWeakPassword, errUnauthorized, errInvalidCredentials, errInvalidRefresh,
	errInvalidToken, errInvalidReset, errNotFound, errMethodNotAllowed, errBodyTimeout,
	errConflict, errBodyTooLarge, errUnsupportedMedia, errLocked, errRateLimited, errInternal, errHashBusy, errUnavailable,
}

// fieldError names a member of the request and what is wrong with it.
type fieldError struct {
	Field  string `json:"field"`
	Reason string `json:"reason"`
}

// failure is a problem with what belongs to this one request.
type failure struct {
	*problem
	retryAfter time.Duration
	scope      string       // of a rate limit: ip, email or session
	fields     []fieldError // of invalid_request
	reasons    []string     // of weak_password
	result     string       // overrides the problem's metric label
	challenge  string       // overrides the problem's WWW-Authenticate
}

func (f *failure) Unwrap() error { return f.problem }

// Error is for the command line: clients get the problem.
func (f *failure) Error() string {
	text := f.code
	for _, e := range f.fields {
		text += ", " + e.Field + " " + e.Reason
	}
	return text
}

func rateLimited(scope string, retryAfter time.Duration) error {
	return &failure{problem: errRateLimited, scope: scope, retryAfter: retryAfter}
}

func invalidFields(fields ...fieldError) error {
	return &failure{problem: errInvalidRequest, fields: fields}
}

// asFailure finds the row of the table that err belongs to.
func asFailure(err error) *failure {
	var f *failure
	var p *problem
	switch {
	case errors.As(err, &f):
		return f
	case errors.As(err, &p):
		return &failure{problem: p}
	case errors.Is(err, db.ErrSessionOver):
		return &failure{problem: errInvalidToken}
	case errors.Is(err, db.ErrNoAccount):
		return &failure{problem: errNotFound}
	case errors.Is(err, db.ErrTaken):
		return &failure{problem: errConflict}
	case errors.Is(err, context.Canceled): // the client has gone and reads no answer
		return &failure{problem: errUnavailable, result: "error"}
	case errors.Is(err, db.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		return &failure{problem: errUnavailable}
	}
	return &failure{problem: errInternal}
}

// problemJSON is the body of every error.
type problemJSON struct {
	Type    string       `json:"type"`
	Title   string       `json:"title"`
	Status  int          `json:"status"`
	Detail  string       `json:"detail"`
	Code    string       `json:"code"`
	TraceID string       `json:"trace_id"`
	Errors  []fieldError `json:"errors,omitempty"`
	Reasons []string     `json:"reasons,omitempty"`
}

func writeProblem(w http.ResponseWriter, trace string, f *failure) {
	detail := f.title
	switch {
	case len(f.fields) > 0:
		detail = "See errors for the members that are wrong."
	case len(f.reasons) > 0:
		detail = "See reasons for what to change."
	}
	body, err := json.Marshal(problemJSON{
		Type: "urn:identity-auth:problem:" + f.code, Title: f.title, Status: f.status, Detail: detail,
		Code: f.code, TraceID: trace, Errors: f.fields, Reasons: f.reasons,
	})
	if err != nil { // unreachable: strings and an integer
		panic(err)
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	switch f.status {
	case http.StatusLocked, http.StatusTooManyRequests, http.StatusServiceUnavailable:
		h.Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(f.retryAfter.Seconds())))))
	}
	switch { // RFC 6750 section 3
	case f.challenge != "":
		h.Set("WWW-Authenticate", f.challenge)
	case f.problem == errUnauthorized:
		h.Set("WWW-Authenticate", `Bearer`)
	case f.problem == errInvalidToken:
		h.Set("WWW-Authenticate", `Bearer error="invalid_token"`)
	}
	w.WriteHeader(f.status)
	w.Write(append(body, '\n'))
}
