package auth

import (
	"net/http"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/7d-solutions/identity-auth/db"
)

// Build is what the binary was made from.
type Build struct{ Version, Revision, GoVersion string }

// ReadBuild takes the version from the linker when it was stamped, else from
// what the Go tool recorded.
func ReadBuild(version, revision string) Build {
	b := Build{Version: version, Revision: revision, GoVersion: "unknown"}
	if info, ok := debug.ReadBuildInfo(); ok {
		b.GoVersion = info.GoVersion
	}
	return b
}

// metrics is everything that /metrics shows. Label values come from closed
// lists and every series exists at 0 from the start; no label ever holds
// client input.
type metrics struct {
	scrape http.Handler

	results         map[string]*prometheus.CounterVec // by log event of the operation
	lockouts        prometheus.Counter
	rateLimited     *prometheus.CounterVec
	requestDuration *prometheus.HistogramVec
	dependencyUp    *prometheus.GaugeVec
	hashDuration    prometheus.Histogram
	hashWait        prometheus.Histogram
	hashesInFlight  prometheus.Gauge
	outboxPending   prometheus.Gauge
	outboxOldest    prometheus.Gauge
	published       *prometheus.CounterVec
	publishFailures *prometheus.CounterVec
	keyInfo         *prometheus.GaugeVec
}

// results are the label values of each operation's counter (spec section 4).
// Operations that end sessions share one counter, as do the two halves of a
// password reset.
var results = map[string]struct {
	metric, help string
	values       []string
}{
	logRegister: {"auth_register_total", "Registrations by result.", []string{"success", "weak_password", "conflict", "rate_limited", "hash_busy", "invalid", "unauthorized", "unavailable", "error"}},
	logLogin:    {"auth_login_total", "Logins by result.", []string{"success", "failure", "locked", "rate_limited", "hash_busy", "invalid", "unavailable", "error"}},
	logRefresh:  {"auth_refresh_total", "Refreshes by result.", []string{"success", "replay", "expired", "revoked", "invalid", "rate_limited", "reused", "unavailable", "error"}},
	logLogout:   {"auth_logout_total", "Logouts, of one session or all, by result.", []string{"success", "invalid", "unauthorized", "rate_limited", "unavailable", "error"}},
	logPassword: {"auth_password_change_total", "Password changes by result.", []string{"success", "failure", "weak_password", "locked", "rate_limited", "hash_busy", "invalid", "unauthorized", "unavailable", "error"}},
	logReset:    {"auth_password_reset_total", "Password resets by result; requested counts what was asked for, whether or not there is an account.", []string{"success", "requested", "weak_password", "rate_limited", "hash_busy", "invalid", "unavailable", "error"}},
}

// sharedResults are the operations that count on another one's counter.
var sharedResults = map[string]string{logLogoutAll: logLogout, logSessionRevoke: logLogout, logForgot: logReset}

var hashBuckets = []float64{0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5}

func newMetrics(build Build, poolStats func() db.PoolStats, routes []route) *metrics {
	reg := prometheus.NewRegistry()
	m := &metrics{scrape: promhttp.HandlerFor(reg, promhttp.HandlerOpts{}), results: map[string]*prometheus.CounterVec{}}
	counter := func(name, help string, label string, values ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{label})
		reg.MustRegister(v)
		for _, value := range values {
			v.WithLabelValues(value)
		}
		return v
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		reg.MustRegister(g)
		return g
	}
	gauges := func(name, help string, labels ...string) *prometheus.GaugeVec {
		g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
		reg.MustRegister(g)
		return g
	}
	histogram := func(name, help string) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: hashBuckets})
		reg.MustRegister(h)
		return h
	}
	for event, r := range results {
		m.results[event] = counter(r.metric, r.help, "result", r.values...)
	}
	for event, counted := range sharedResults {
		m.results[event] = m.results[counted]
	}
	m.lockouts = prometheus.NewCounter(prometheus.CounterOpts{Name: "auth_lockouts_total", Help: "Locks begun by too many wrong passwords."})
	reg.MustRegister(m.lockouts)
	m.rateLimited = counter("auth_rate_limited_total", "Requests refused with 429 by scope of the limit.", "scope", "ip", "email", "session")
	m.requestDuration = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "auth_http_request_duration_seconds", Help: "HTTP requests by method, route pattern and status.",
		// 0.4, 0.5, 0.9 and 1.2 are the objectives of deploy/prometheus/alerts.yaml.
		Buckets: []float64{0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 1.2, 2.5, 5, 10},
	}, []string{"method", "route", "status"})
	reg.MustRegister(m.requestDuration)
	for _, r := range routes {
		m.requestDuration.WithLabelValues(r.method, r.path, r.success)
	}
	m.dependencyUp = gauges("auth_dependency_up", "1 when the dependency answers.", "dep")
	m.dependencyUp.WithLabelValues("db")
	m.dependencyUp.WithLabelValues("nats")
	m.hashDuration = histogram("auth_password_hash_duration_seconds", "Time to compute one password hash.")
	m.hashWait = histogram("auth_password_hash_wait_seconds", "Wait for a hash slot before a hash was computed.")
	m.hashesInFlight = gauge("auth_password_hashes_in_flight", "Password hashes being computed.")
	m.outboxPending = gauge("auth_outbox_pending", "Events not yet acknowledged by JetStream.")
	m.outboxOldest = gauge("auth_outbox_oldest_seconds", "Age of the oldest event not yet acknowledged.")
	var types []string
	for _, t := range db.EventTypes {
		types = append(types, string(t))
	}
	m.published = counter("auth_events_published_total", "Events acknowledged by JetStream.", "type", types...)
	m.publishFailures = counter("auth_events_publish_failures_total", "Attempts to publish an event that failed; each is repeated.", "type", types...)
	m.keyInfo = gauges("auth_jwt_key_info", "JWT keys by kid and role.", "kid", "role")
	gauges("auth_build_info", "What the binary was made from.", "version", "revision", "goversion").
		WithLabelValues(build.Version, build.Revision, build.GoVersion).Set(1)
	reg.MustRegister(poolCollector(poolStats), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// poolCollector reads the pool when it is scraped.
type poolCollector func() db.PoolStats

var poolDesc = prometheus.NewDesc("auth_db_pool_connections", "Connections to PostgreSQL by state; max is the bound.", []string{"state"}, nil)

func (c poolCollector) Describe(ch chan<- *prometheus.Desc) { ch <- poolDesc }

func (c poolCollector) Collect(ch chan<- prometheus.Metric) {
	st := c()
	for state, n := range map[string]int{"idle": st.Idle, "used": st.Used, "max": st.Max} {
		ch <- prometheus.MustNewConstMetric(poolDesc, prometheus.GaugeValue, float64(n), state)
	}
}

func (m *metrics) request(method, route, status string, took time.Duration) {
	m.requestDuration.WithLabelValues(method, route, status).Observe(took.Seconds())
}

func (m *metrics) dependency(dep string, up bool) {
	value := 0.0
	if up {
		value = 1
	}
	m.dependencyUp.WithLabelValues(dep).Set(value)
}

func (m *metrics) backlog(pending int64, oldest time.Duration) {
	m.outboxPending.Set(float64(pending))
	m.outboxOldest.Set(oldest.Seconds())
}

func (m *metrics) keys(ring KeyRing) {
	m.keyInfo.Reset()
	for kid, role := range ring.Roles {
		m.keyInfo.WithLabelValues(kid, role).Set(1)
	}
}
