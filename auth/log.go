package auth

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"time"
)

// Event names of this package's log lines. RUNBOOK.md lists all event names; a
// test holds the list.
const (
	logConfigPlaintext = "config.plaintext"
	logConfigOpen      = "config.register_open"
	logConfigProxy     = "config.untrusted_proxy"
	logDependency      = "dependency.changed"
	logUnavailable     = "dependency.unavailable"
	logInternal        = "http.internal_error"
	logPanic           = "http.panic"
	logServer          = "http.server"
	logSampled         = "log.sampled"
	logPruneFailed     = "prune.failed"

	logRegister      = "auth.register"
	logLogin         = "auth.login"
	logRefresh       = "auth.refresh"
	logLogout        = "auth.logout"
	logLogoutAll     = "auth.logout_all"
	logSessions      = "auth.sessions"
	logSessionRevoke = "auth.session_revoke"
	logPassword      = "auth.password_change"
	logForgot        = "auth.password_forgot"
	logReset         = "auth.password_reset"
	logAdmin         = "admin.action"
	logIntrospect    = "admin.introspect"
	logLockout       = "auth.lockout"
	logHashBusy      = "auth.hash_busy"
	logHashBad       = "auth.hash_refused"
	logReplay        = "security.refresh_replay_detected"
)

// NewLogger writes one JSON object a line: time (RFC 3339, UTC), level, event,
// then the fields.
func NewLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{
		Level: level,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) > 0 {
				return a
			}
			switch a.Key {
			case slog.TimeKey:
				return slog.String(slog.TimeKey, a.Value.Time().UTC().Format("2006-01-02T15:04:05.000000Z"))
			case slog.MessageKey:
				a.Key = "event"
			}
			return a
		},
	}))
}

// perKeyPerSecond is how many lines of one kind are written in a second.
const perKeyPerSecond = 100

// sampler thins floods of lines of one kind out. Kinds come from closed lists,
// so its memory is bounded. What it drops it counts, and report tells.
type sampler struct {
	log *slog.Logger

	mu    sync.Mutex
	kinds map[string]*sampled
}

type sampled struct {
	second  int64
	written int
	dropped int
}

func newSampler(log *slog.Logger) *sampler {
	return &sampler{log: log, kinds: map[string]*sampled{}}
}

// line writes the line unless its kind has had its share of this second.
func (s *sampler) line(ctx context.Context, level slog.Level, event, result string, attrs ...slog.Attr) {
	if s.take(event + " " + result) {
		s.log.LogAttrs(ctx, level, event, attrs...)
	}
}

func (s *sampler) take(kind string) bool {
	now := time.Now().Unix()
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.kinds[kind]
	if k == nil {
		k = &sampled{}
		s.kinds[kind] = k
	}
	if k.second != now {
		k.second, k.written = now, 0
	}
	if k.written >= perKeyPerSecond {
		k.dropped++
		return false
	}
	k.written++
	return true
}

// report tells how many lines were dropped since the last report.
func (s *sampler) report() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for kind, k := range s.kinds {
		if k.dropped > 0 {
			s.log.Warn(logSampled, "kind", kind, "dropped", k.dropped)
			k.dropped = 0
		}
	}
}
