package auth

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/7d-solutions/identity-auth/db"
)

// requestTimeout is the one deadline of a request.
const requestTimeout = 10 * time.Second

// sendBuffer is how much of an answer may wait in the kernel for a client that
// does not read, in bytes; Linux books twice that. By itself it grows to 4 MB a
// connection, and then 500 of them put every socket of the host, those to
// PostgreSQL too, under memory pressure.
const sendBuffer = 64 << 10

// NewHTTPServer sets every time and size that bounds what a slow or hostile
// client can hold: its own connection, and not for long.
func NewHTTPServer(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      2 * requestTimeout, // at its deadline a request may still hash and settle what it guessed
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    12 << 10, // net/http adds 4 KiB
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if encrypted, ok := c.(interface{ NetConn() net.Conn }); ok { // a *tls.Conn
				c = encrypted.NetConn()
			}
			if tcp, ok := c.(*net.TCPConn); ok {
				tcp.SetWriteBuffer(sendBuffer)
			}
			return ctx
		},
		// OPTIONS * would otherwise be answered by net/http, past our rules.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(serverLog{log.Handler()}, slog.LevelDebug),
	}
}

// serverLog gives net/http's own messages an event name. They are of clients
// that break the protocol, hence at level debug; their text holds addresses
// only.
type serverLog struct{ slog.Handler }

func (l serverLog) Handle(ctx context.Context, r slog.Record) error {
	line := slog.NewRecord(r.Time, r.Level, logServer, 0)
	line.AddAttrs(slog.String("detail", clientText(r.Message, 256)))
	return l.Handler.Handle(ctx, line)
}

// caller is who asks.
type caller struct {
	addr   netip.Addr // limitKey of the client's address
	origin db.Origin
	bearer string  // of the Authorization header, "" when there is none
	rec    *record // for the log line of the operation
}

// record is filled by an endpoint as it learns the names.
type record struct {
	result  string // "" for success until the operation ends
	action  string // of an operator
	tenant  db.TenantID
	user    db.UserID
	session db.SessionID
}

func (r *record) attrs(o db.Origin) []slog.Attr {
	attrs := make([]slog.Attr, 0, 8)
	if r.action != "" {
		attrs = append(attrs, slog.String("action", r.action))
	}
	if r.result != "" {
		attrs = append(attrs, slog.String("result", r.result))
	}
	if r.tenant != (db.TenantID{}) {
		attrs = append(attrs, slog.String("tenant_id", r.tenant.String()))
	}
	if r.user != (db.UserID{}) {
		attrs = append(attrs, slog.String("user_id", r.user.String()))
	}
	if r.session != (db.SessionID{}) {
		attrs = append(attrs, slog.String("session_id", r.session.String()))
	}
	return append(attrs, slog.String("client_ip", o.ClientIP), slog.String("user_agent", o.UserAgent), slog.String("trace_id", o.TraceID))
}

type traceKey struct{}

// traceOf is the request's trace id: the only value in a context.
func traceOf(ctx context.Context) string {
	id, _ := ctx.Value(traceKey{}).(string)
	return id
}

// handleJSON is the adapter between HTTP and the endpoints: it limits by
// address before any work, bounds and decodes, calls, logs, counts, and writes
// the answer. Endpoints never see a ResponseWriter.
func handleJSON[In any, P request[In], Out any](s *Server, event string, status int, endpoint func(context.Context, caller, In) (Out, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c := s.caller(r)
		var in In
		var out Out
		err := s.readRequest(w, r, c, P(&in).members())
		if err == nil {
			out, err = endpoint(r.Context(), c, in)
		}
		s.finish(r.Context(), event, c, err)
		switch {
		case err != nil:
			writeProblem(w, c.origin.TraceID, asFailure(err))
		case status == http.StatusNoContent:
			w.WriteHeader(status)
		default:
			writeJSON(w, status, out)
		}
	}
}

// readRequest fills members from the path and, for a POST, from the body.
func (s *Server) readRequest(w http.ResponseWriter, r *http.Request, c caller, members []member) error {
	inBody := false
	for _, m := range members {
		if m.path {
			*m.text = r.PathValue(m.name)
		}
		inBody = inBody || !m.path
	}
	if r.Method != http.MethodPost {
		return nil
	}
	if err := s.spendIP(c); err != nil {
		return err
	}
	if !inBody && r.ContentLength == 0 {
		return nil // nothing to say, and nothing said
	}
	body, err := readBody(w, r, "application/json")
	if err != nil {
		return err
	}
	return decodeObject(body, members)
}

// withToken lets only callers through that show the configured token as
// Bearer. Without one configured, open decides. Guesses count for the limit by
// address.
func (s *Server) withToken(event string, token func(*live) Secret, open bool, next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		want := token(s.live.Load()).Reveal()
		c := s.caller(r)
		if want == "" && open || want != "" && sameSecret(c.bearer, want) {
			next(w, r)
			return
		}
		err := s.spendIP(c)
		if err == nil {
			err = errUnauthorized
		}
		s.finish(r.Context(), event, c, err)
		writeProblem(w, c.origin.TraceID, asFailure(err))
	}
}

// sameSecret compares digests, so that neither content nor length shows in
// the time.
func sameSecret(got, want string) bool {
	a, b := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// nothing is the input of endpoints that need none, and the output of those
// that answer 204.
type nothing struct{}

func (*nothing) members() []member { return nil }

// withBearer lets only callers with a good access token through. Whether the
// token's session is still live is for the endpoint's own statement to check.
func withBearer[In, Out any](s *Server, endpoint func(context.Context, caller, db.Principal, In) (Out, error)) func(context.Context, caller, In) (Out, error) {
	return func(ctx context.Context, c caller, in In) (out Out, err error) {
		if c.bearer == "" {
			return out, &failure{problem: errInvalidToken, challenge: "Bearer"}
		}
		claims, err := s.live.Load().verifier.Verify(ctx, c.bearer)
		if err != nil {
			return out, errInvalidToken
		}
		p, err := db.NewPrincipal(claims.TenantID, claims.Subject, claims.SessionID)
		if err != nil { // unreachable with our own keys
			return out, errInvalidToken
		}
		c.rec.tenant, c.rec.user, c.rec.session = p.Subject()
		return endpoint(ctx, c, p, in)
	}
}

func (s *Server) spendIP(c caller) error {
	if ok, wait := s.ipRate.take(c.addr); !ok {
		return rateLimited("ip", wait)
	}
	return nil
}

// finish writes the operation's line and counts its result, once.
func (s *Server) finish(ctx context.Context, event string, c caller, err error) {
	level := slog.LevelInfo
	if err != nil {
		f := asFailure(err)
		c.rec.result = f.problem.result
		if f.result != "" {
			c.rec.result = f.result
		}
		if f.scope != "" {
			s.metrics.rateLimited.WithLabelValues(f.scope).Inc()
		}
		s.logCause(ctx, f, err)
		if f.problem == errHashBusy {
			s.sampler.line(ctx, slog.LevelWarn, logHashBusy, "", c.rec.attrs(c.origin)...)
		}
	} else if c.rec.result == "" {
		c.rec.result = "success"
	}
	if counter := s.metrics.results[event]; counter != nil {
		counter.WithLabelValues(c.rec.result).Inc()
	}
	if err == nil && c.rec.user != (db.UserID{}) { // never sampled: someone known did it
		s.log.LogAttrs(ctx, level, event, c.rec.attrs(c.origin)...)
		return
	}
	s.sampler.line(ctx, level, event, c.rec.result, c.rec.attrs(c.origin)...)
}

// logCause writes what the client is not told.
func (s *Server) logCause(ctx context.Context, f *failure, err error) {
	switch f.problem {
	case errInternal:
		s.sampler.line(ctx, slog.LevelError, logInternal, "", slog.String("trace_id", traceOf(ctx)), slog.String("err", err.Error()))
	case errUnavailable:
		if errors.Is(err, context.Canceled) {
			return // the client went away: no outage
		}
		s.sampler.line(ctx, slog.LevelWarn, logUnavailable, "", slog.String("trace_id", traceOf(ctx)), slog.String("err", err.Error()))
	}
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	body, err := json.Marshal(v)
	if err != nil { // unreachable: our own types
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(append(body, '\n'))
}

// caller reads who asks from the connection and the headers.
func (s *Server) caller(r *http.Request) caller {
	peer := netip.Addr{}
	if ap, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		peer = ap.Addr().Unmap().WithZone("")
	}
	addr, forged := clientAddr(peer, r.Header.Values("X-Forwarded-For"), s.cfg.TrustedProxies)
	if forged {
		s.warnProxy.Do(func() { s.log.Warn(logConfigProxy, "peer", peer.String()) })
	}
	scheme, bearer, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		bearer = ""
	}
	return caller{
		addr:   limitKey(addr),
		origin: db.Origin{ClientIP: addr.String(), UserAgent: clientText(r.UserAgent(), maxUserAgent), TraceID: traceOf(r.Context())},
		bearer: bearer,
		rec:    &record{},
	}
}

// statusWriter remembers what was answered.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// wrap is everything around the route table: one deadline, the trace id, the
// headers of every answer, one histogram, and a panic that ends one request.
func (s *Server) wrap(mux *http.ServeMux, origins []string) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		begun := time.Now()
		w := &statusWriter{ResponseWriter: rw}
		trace := traceID(r.Header.Get("traceparent"), r.Header.Get("X-Trace-Id"))
		ctx, cancel := context.WithTimeout(context.WithValue(r.Context(), traceKey{}, trace), requestTimeout)
		defer cancel()
		r = r.WithContext(ctx)
		setHeaders(w.Header(), trace)
		// Kept-alive clients leave before the connection is shut on them. Of a length beside chunks, and of chunks in
		// HTTP/1.0, net/http says nothing: what follows may be a part of the body to a proxy (RFC 9112 section 6.1).
		if s.health.draining.Load() || len(r.TransferEncoding) > 0 || !r.ProtoAtLeast(1, 1) {
			w.Header().Set("Connection", "close")
		}
		defer func() {
			if cause := recover(); cause != nil {
				s.log.Error(logPanic, "trace_id", trace, "panic", panicText(cause), "stack", string(debug.Stack()))
				if w.status != 0 {
					panic(http.ErrAbortHandler) // half an answer went out: cut the connection
				}
				writeProblem(w, trace, &failure{problem: errInternal})
			}
			s.metrics.request(methodLabel(r.Method), routeLabel(r.Pattern), strconv.Itoa(w.status), time.Since(begun))
		}()
		if answerCORS(w, r, origins) {
			return
		}
		// net/http would redirect what path.Clean changes; we have no such path.
		if r.URL.Path != path.Clean("/"+r.URL.Path) {
			writeProblem(w, trace, &failure{problem: errNotFound})
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// panicText keeps values that might hold secrets out of the log: only errors
// and strings of the runtime and our own code are shown.
func panicText(cause any) string {
	switch v := cause.(type) {
	case error:
		return v.Error()
	case string:
		return v
	}
	return "not a string"
}

func setHeaders(h http.Header, trace string) {
	h.Set("X-Trace-Id", trace)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Strict-Transport-Security", "max-age=31536000; includeSubDomains")
	h.Set("Cache-Control", "no-store") // JWKS, discovery and OpenAPI set their own
}

// answerCORS adds the headers for a listed origin and answers its preflights.
func answerCORS(w http.ResponseWriter, r *http.Request, origins []string) (answered bool) {
	if len(origins) == 0 {
		return false
	}
	origin := r.Header.Get("Origin")
	h := w.Header()
	h.Add("Vary", "Origin") // also without one: a cache may keep the answer for who has one
	if !slices.Contains(origins, origin) {
		return false
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Expose-Headers", "X-Trace-Id, Retry-After")
	if r.Method != http.MethodOptions || r.Header.Get("Access-Control-Request-Method") == "" {
		return false
	}
	h.Set("Access-Control-Allow-Methods", "GET, POST, DELETE")
	h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, X-Trace-Id, traceparent")
	h.Set("Access-Control-Max-Age", "600")
	w.WriteHeader(http.StatusNoContent)
	return true
}

func methodLabel(method string) string {
	switch method {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS":
		return method
	}
	return "other"
}

// routeLabel is the path of the pattern that matched, never the path asked for.
func routeLabel(pattern string) string {
	if _, path, ok := strings.Cut(pattern, " "); ok {
		return path
	}
	if pattern == "" || pattern == "/" {
		return "unmatched"
	}
	return pattern
}
