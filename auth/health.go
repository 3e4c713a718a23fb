package auth

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
	"time"
)

// health is what the probes answer from. A loop asks the dependencies twice a
// second; probes read the last answer and cost them nothing.
type health struct {
	db       atomic.Bool
	nats     atomic.Bool
	draining atomic.Bool
}

type readyResponse struct {
	Status string            `json:"status"`
	Checks map[string]string `json:"checks"`
}

func (s *Server) handleLive(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, http.StatusOK, map[string]string{"status": "live"})
}

func (s *Server) handleReady(w http.ResponseWriter, r *http.Request) {
	dbUp, natsUp := s.health.db.Load(), s.health.nats.Load()
	word := map[bool]string{true: "up", false: "down"}
	answer := readyResponse{"ready", map[string]string{"db": word[dbUp], "nats": word[natsUp]}}
	status := http.StatusOK
	if !dbUp || !natsUp && s.cfg.ReadyRequiresNATS || s.health.draining.Load() {
		answer.Status, status = "not_ready", http.StatusServiceUnavailable
		w.Header().Set("Retry-After", "1")
	}
	writeJSON(w, status, answer)
}

// BeginShutdown makes the service not ready, so that load balancers send no
// more requests.
func (s *Server) BeginShutdown() { s.health.draining.Store(true) }

// watchDependencies keeps health and its metrics current until ctx is done. It
// asks twice a second, and more often while the answer is no, so that a start
// or a recovery shows at once.
func (s *Server) watchDependencies(ctx context.Context, events EventBus) {
	for {
		pause := 100 * time.Millisecond
		if s.probe(ctx, events) {
			pause = time.Second / 2
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

func (s *Server) probe(ctx context.Context, events EventBus) (allUp bool) {
	probeCtx, cancel := context.WithTimeout(ctx, 1900*time.Millisecond)
	defer cancel()
	dbErr := s.store.Probe(probeCtx)
	dbUp := dbErr == nil && s.schemaReady.Load()
	natsUp := events.Up()
	if ctx.Err() != nil {
		return false // stopping, not an outage
	}
	s.noteDependency("db", &s.health.db, dbUp, dbErr)
	s.noteDependency("nats", &s.health.nats, natsUp, errors.New("no answer from JetStream")) // natsbus logs why
	return dbUp && natsUp
}

func (s *Server) noteDependency(dep string, state *atomic.Bool, up bool, why error) {
	s.metrics.dependency(dep, up)
	if state.Swap(up) == up {
		return
	}
	if up {
		s.log.Info(logDependency, "dep", dep, "up", up)
	} else {
		s.log.Warn(logDependency, "dep", dep, "up", up, "err", why)
	}
}
