// Package auth is the service: configuration, HTTP, and what each endpoint
// does. Its map:
//
//	config.go config_values.go   every variable, its bounds, its parser
//	auth.go                      Server, the route table, the background loops
//	http.go decode.go problem.go one adapter, strict JSON, the error table
//	input.go policy.go           parsers for what clients send; passwords
//	register.go login.go refresh.go session.go password.go   the endpoints, each read top to bottom
//	hash.go hash_stored.go       argon2id in a bounded number of slots; imported hashes
//	admin.go introspect.go import.go   operating accounts
//	token.go reset.go keys.go discovery.go   refresh, access and reset tokens, keys, metadata
//	iplimit.go                   limits by address, in this process
//	health.go metrics.go log.go  what operators see
//
// It guarantees: nothing is read beyond its bounds; an error outside the table
// is 500 without a word of its cause; an outage is 503 and never looks like a
// wrong password or a bad token; secrets are compared in constant time and
// never logged. What must hold over replicas and crashes is db's to guarantee.
// It trusts: package db for atomicity and the clock, package jwt for tokens,
// TRUSTED_PROXIES for the client's address. It leaves to the operator: TLS
// unless configured, and who may reach /metrics and the admin listener.
package auth

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/jwt"
)

// Server answers requests. Everything in it is set by New; what a reload
// replaces is behind live.
type Server struct {
	cfg         Config
	store       *db.Store
	schemaReady *atomic.Bool
	log         *slog.Logger
	sampler     *sampler
	metrics     *metrics
	hasher      *hasher
	turns       *turns
	signing     chan struct{} // full when as many signatures are under way as there are CPUs: the rest wait in order of arrival
	ipRate      *ipLimiter
	ipFailures  *ipLimiter
	health      health
	routes      []route
	warnProxy   sync.Once
	live        atomic.Pointer[live]

	openAPIETag  string
	metadata     []byte // nil: no discovery
	metadataETag string
}

// EventBus is the relay's state as readiness shows it.
type EventBus interface{ Up() bool }

// live is what SIGHUP replaces, whole.
type live struct {
	keys          KeyRing
	verifier      *jwt.Verifier
	sealers       map[string]resetSealer // by the kid of the key they are derived from
	registerToken Secret
	adminToken    Secret
	policy        passwordPolicy
	certificate   *tls.Certificate // nil: plain HTTP
}

// New wires a Server. schemaReady tells whether the database's schema is as
// new as this binary.
func New(cfg Config, store *db.Store, schemaReady *atomic.Bool, build Build, log *slog.Logger) *Server {
	s := &Server{
		cfg: cfg, store: store, schemaReady: schemaReady, log: log, sampler: newSampler(log),
		signing:    make(chan struct{}, cpus),
		ipRate:     newIPLimiter(float64(cfg.IPRatePerSecond), float64(cfg.IPRateBurst)),
		ipFailures: newIPLimiter(float64(cfg.LoginFailuresPerHourIP)/3600, float64(cfg.LoginFailuresPerHourIP)),
		metadata:   newMetadata(cfg.Issuer),
	}
	s.openAPIETag, s.metadataETag = etagOf(openAPI), etagOf(s.metadata)
	s.routes = s.routeTable()
	measured := s.routes
	if cfg.AdminAddr != "" {
		measured = append(slices.Clone(measured), s.adminRoutes()...)
	}
	s.metrics = newMetrics(build, store.Stats, measured)
	s.hasher = newHasher(cfg.Argon2, cfg.MaxConcurrentHashes, cfg.HashAcquireTimeout, s.metrics)
	s.turns = newTurns(min(cfg.LockoutThreshold, 2*cfg.MaxConcurrentHashes), s.hasher)
	s.setLive(cfg)
	return s
}

func etagOf(body []byte) string {
	sum := sha256.Sum256(body)
	return `"` + base64.RawURLEncoding.EncodeToString(sum[:16]) + `"`
}

func (s *Server) setLive(cfg Config) {
	sealers := map[string]resetSealer{}
	if old := s.live.Load(); old != nil {
		maps.Copy(sealers, old.sealers) // what was sealed and not yet relayed can still be opened
	}
	sealers[cfg.Keys.Signer.KeyID()] = cfg.Keys.sealer
	s.live.Store(&live{
		keys:          cfg.Keys,
		verifier:      jwt.NewVerifier(cfg.Issuer, cfg.Audience, cfg.Keys.Public),
		sealers:       sealers,
		registerToken: cfg.RegisterToken,
		adminToken:    cfg.AdminToken,
		policy:        passwordPolicy{minLength: cfg.PasswordMinLength, blocklist: cfg.Blocklist},
		certificate:   cfg.TLSCertificate,
	})
	s.metrics.keys(cfg.Keys)
}

// TLSConfig serves the certificate of the last reload, with TLS 1.2 or later.
func (s *Server) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return s.live.Load().certificate, nil
		},
	}
}

// EventPublished counts an acknowledged event.
func (s *Server) EventPublished(eventType string) {
	s.metrics.published.WithLabelValues(eventType).Inc()
}

// EventPublishFailed counts a failed attempt to publish an event.
func (s *Server) EventPublishFailed(eventType string) {
	s.metrics.publishFailures.WithLabelValues(eventType).Inc()
}

// Reload takes over the keys, tokens, certificate and block list of a configuration that
// was read again, if also agrees, which may do the same for others. A set of
// keys that verifiers would stumble over is refused and the old one kept.
func (s *Server) Reload(cfg Config, also func() error) error {
	if err := cfg.Keys.succeeds(s.live.Load().keys); err != nil {
		return err
	}
	if (cfg.TLSCertificate == nil) != (s.cfg.TLSCertificate == nil) {
		return errors.New("TLS_CERT_FILE, TLS_KEY_FILE: turning TLS on or off needs a restart")
	}
	if (cfg.AdminToken.Reveal() == "") != (s.cfg.AdminToken.Reveal() == "") {
		return errors.New("ADMIN_TOKEN: turning the admin API on or off needs a restart")
	}
	if err := also(); err != nil {
		return err
	}
	s.setLive(cfg)
	return nil
}

// route is one row of the table: nothing registers a path elsewhere.
type route struct {
	method, path string
	success      string // status of success, for the metrics and OpenAPI
	handler      http.HandlerFunc
}

func (s *Server) routeTable() []route {
	routes := []route{
		{"POST", "/api/auth/register", "201", s.withToken(logRegister, func(l *live) Secret { return l.registerToken }, true,
			handleJSON(s, logRegister, http.StatusCreated, s.register))},
		{"POST", "/api/auth/login", "200", handleJSON(s, logLogin, http.StatusOK, s.login)},
		{"POST", "/api/auth/refresh", "200", handleJSON(s, logRefresh, http.StatusOK, s.refresh)},
		{"POST", "/api/auth/logout", "204", handleJSON(s, logLogout, http.StatusNoContent, s.logout)},
		{"POST", "/api/auth/logout-all", "204", handleJSON(s, logLogoutAll, http.StatusNoContent, withBearer(s, s.logoutAll))},
		{"GET", "/api/auth/sessions", "200", handleJSON(s, logSessions, http.StatusOK, withBearer(s, s.listSessions))},
		{"DELETE", "/api/auth/sessions/{session_id}", "204", handleJSON(s, logSessionRevoke, http.StatusNoContent, withBearer(s, s.revokeSession))},
		{"POST", "/api/auth/password", "200", handleJSON(s, logPassword, http.StatusOK, withBearer(s, s.changePassword))},
		{"GET", "/.well-known/jwks.json", "200", s.handleJWKS},
		{"GET", "/.well-known/openid-configuration", "200", s.handleMetadata},
		{"GET", "/.well-known/oauth-authorization-server", "200", s.handleMetadata},
		{"GET", "/health/live", "200", s.handleLive},
		{"GET", "/health/ready", "200", s.handleReady},
		{"GET", "/openapi.json", "200", s.handleOpenAPI},
	}
	if s.cfg.PasswordResetTTL > 0 {
		routes = append(routes,
			route{"POST", "/api/auth/forgot-password", "202", handleJSON(s, logForgot, http.StatusAccepted, s.forgotPassword)},
			route{"POST", "/api/auth/reset-password", "204", handleJSON(s, logReset, http.StatusNoContent, s.resetPassword)})
	}
	if s.cfg.AdminAddr == "" {
		routes = append(routes, s.metricsRoute())
	}
	return routes
}

func (s *Server) metricsRoute() route {
	return route{"GET", "/metrics", "200", func(w http.ResponseWriter, r *http.Request) { s.metrics.scrape.ServeHTTP(w, r) }}
}

// Handler is what PORT serves.
func (s *Server) Handler() http.Handler { return s.wrap(s.mux(s.routes), s.cfg.CORSOrigins) }

// AdminHandler is what ADMIN_ADDR serves.
func (s *Server) AdminHandler() http.Handler { return s.wrap(s.mux(s.adminRoutes()), nil) }

// mux registers the table. A path without the method asked for is 405 with
// what it allows; everything else is 404.
func (s *Server) mux(routes []route) *http.ServeMux {
	mux := http.NewServeMux()
	allowed := map[string][]string{}
	for _, r := range routes {
		mux.HandleFunc(r.method+" "+r.path, r.handler)
		allowed[r.path] = append(allowed[r.path], r.method)
		if r.method == http.MethodGet {
			allowed[r.path] = append(allowed[r.path], http.MethodHead) // ServeMux serves HEAD wherever it serves GET
		}
	}
	for path, methods := range allowed {
		slices.Sort(methods)
		allow := strings.Join(methods, ", ")
		mux.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Allow", allow)
			writeProblem(w, traceOf(r.Context()), &failure{problem: errMethodNotAllowed})
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeProblem(w, traceOf(r.Context()), &failure{problem: errNotFound})
	})
	return mux
}

// Run keeps health, metrics, memory and the size of tables in order until ctx
// is done. events is the relay whose state readiness shows.
func (s *Server) Run(ctx context.Context, events EventBus) error {
	var loops sync.WaitGroup
	loops.Go(func() { s.watchDependencies(ctx, events) })
	loops.Go(func() { s.hasher.Run(ctx) })
	loops.Go(func() { s.keepHouse(ctx) })
	loops.Wait()
	return nil
}

// keepHouse prunes what is over, in small batches beside traffic, on any
// replica, and reports what the log sampler dropped.
func (s *Server) keepHouse(ctx context.Context) {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			s.sampler.report()
			return
		case <-tick.C:
		}
		s.sampler.report()
		pending, oldest, err := s.store.OutboxBacklog(ctx)
		if err == nil {
			s.metrics.backlog(pending, oldest)
		}
		if err := errors.Join(err, s.store.Prune(ctx)); err != nil && ctx.Err() == nil {
			s.sampler.line(ctx, slog.LevelWarn, logPruneFailed, "", slog.String("err", err.Error()))
		}
	}
}
