package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptrace"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// A request is in flight from the moment the service asks for its body (100
// Continue). Under load, everyone in flight at SIGTERM is answered, and nobody
// is cut off; who comes later is refused.
func TestSigtermUnderLoad(t *testing.T) {
	for round := range 3 {
		w := newWorld(t)
		start := w.startPlain
		if round == 0 {
			start = w.start
		}
		s := start(unlimited, cheapHashes, env{"HASH_ACQUIRE_TIMEOUT": "8s"})
		p := s.register()
		token := s.login(p).RefreshToken
		bodies := map[string][]byte{
			"/api/auth/login":   p.loginBody(p.Password),
			"/api/auth/refresh": refreshBody(token[:len(token)-1] + "~"), // 401 without a query
		}
		var mu sync.Mutex
		answers, broken := map[string]int{}, map[string]int{}
		var inFlight atomic.Int64
		stop := make(chan struct{})
		var clients sync.WaitGroup
		for i := range 12 {
			path := "/api/auth/login"
			if i%3 == 0 {
				path = "/api/auth/refresh"
			}
			clients.Go(func() {
				// A connection for each request: there is no idle one to race with.
				client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, ExpectContinueTimeout: time.Minute}, Timeout: time.Minute}
				for {
					select {
					case <-stop:
						return
					default:
					}
					asked := false
					ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{Got100Continue: func() { asked = true; inFlight.Add(1) }})
					req, err := http.NewRequestWithContext(ctx, "POST", s.base+path, strings.NewReader(string(bodies[path])))
					if err != nil {
						t.Error(err)
						return
					}
					req.Header.Set("Content-Type", "application/json")
					req.Header.Set("Expect", "100-continue")
					resp, err := client.Do(req)
					status := 0
					if err == nil {
						status = resp.StatusCode
						_, err = io.Copy(io.Discard, resp.Body)
						resp.Body.Close()
					}
					if asked {
						inFlight.Add(-1)
					}
					mu.Lock()
					if err == nil {
						answers[fmt.Sprintf("%s %d", path, status)]++
					} else if asked {
						broken[err.Error()]++
					}
					mu.Unlock()
					if err != nil {
						return // gone, or never there
					}
				}
			})
		}
		eventually(t, "requests are in flight", 10*time.Second, func() bool { return inFlight.Load() >= 6 })
		s.cmd.Process.Signal(syscall.SIGTERM)
		caught := inFlight.Load()
		code := s.wait(30 * time.Second)
		close(stop)
		clients.Wait()
		t.Logf("round %d: %d in flight at SIGTERM, answers %v", round, caught, answers)
		if code != 0 {
			t.Errorf("exit code: got %d, want 0", code)
		}
		for what, n := range broken {
			t.Errorf("requests in flight that were not answered: %d with %s", n, what)
		}
		for key := range answers {
			if key != "/api/auth/login 200" && key != "/api/auth/refresh 401" {
				t.Errorf("got %d answers %s, want login 200 or refresh 401", answers[key], key)
			}
		}
		if conn, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://")); err == nil {
			conn.Close()
			t.Error("the port is still open after the stop")
		}
	}
}

// ledger is what clients were told, to be held against the database.
type ledger struct {
	mu         sync.Mutex
	registered []string          // user ids
	sessions   map[string]int    // session id: rotations answered
	tokens     map[string]string // session id: the last refresh token
	answers    map[string]int
	slowest    time.Duration
}

func (l *ledger) note(path string, a answer, took time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.slowest = max(l.slowest, took)
	if err != nil {
		l.answers[path+" "+err.Error()]++
		return
	}
	l.answers[fmt.Sprintf("%s %d %s", path, a.status, a.code())]++
}

// client registers, logs in and refreshes in turn until stop is closed, and
// remembers what it was told.
func (l *ledger) client(t *testing.T, s *service, stop <-chan struct{}) {
	call := func(path string, body []byte) answer {
		begun := time.Now()
		a, err := s.try("POST", path, body)
		l.note(path, a, time.Since(begun), err)
		return a
	}
	for {
		select {
		case <-stop:
			return
		default:
		}
		p := newPerson()
		if a := call("/api/auth/register", toJSON(p)); a.status != 201 {
			continue
		}
		l.mu.Lock()
		l.registered = append(l.registered, p.UserID)
		l.mu.Unlock()
		a := call("/api/auth/login", p.loginBody(p.Password))
		var got tokens
		if a.status != 200 || json.Unmarshal(a.body, &got) != nil {
			continue
		}
		id := sessionOf(t, got)
		for n := 0; ; n++ {
			l.mu.Lock()
			l.sessions[id], l.tokens[id] = n, got.RefreshToken
			l.mu.Unlock()
			if n == 20 {
				break
			}
			a := call("/api/auth/refresh", refreshBody(got.RefreshToken))
			if a.status != 200 || json.Unmarshal(a.body, &got) != nil {
				break
			}
		}
	}
}

// PostgreSQL is killed under load and comes back: everything that was answered
// is still there, though the server's own default would have lost it, and the
// service goes on by itself.
func TestAnsweredIsDurable(t *testing.T) {
	pg := dbtest.Start(t)
	w := &world{t: t, db: pg.URL(), nats: natstest.New(t)}
	s := w.start(unlimited, cheapHashes)
	l := &ledger{sessions: map[string]int{}, tokens: map[string]string{}, answers: map[string]int{}}
	total := func() int {
		l.mu.Lock()
		defer l.mu.Unlock()
		n := len(l.registered)
		for _, rotations := range l.sessions {
			n += 1 + rotations
		}
		return n
	}
	for round := range 2 {
		stop := make(chan struct{})
		var clients sync.WaitGroup
		for range 4 {
			clients.Go(func() { l.client(t, s, stop) })
		}
		before := total()
		eventually(t, "load", 60*time.Second, func() bool { return total() > before+100 })
		pg.Kill()
		eventually(t, "not ready", 10*time.Second, func() bool { return s.get("/health/ready").status == 503 })
		if a := s.get("/health/live"); a.status != 200 {
			t.Errorf("live while PostgreSQL is down: got %d, want 200", a.status)
		}
		down := time.Now()
		a := s.refresh(slices.Collect(maps.Values(l.copyTokens()))[0])
		if took := time.Since(down); a.status != 503 || a.code() != "unavailable" || took > 5*time.Second {
			t.Errorf("refresh while PostgreSQL is down: got %d %s after %v, want 503 unavailable within 5 s", a.status, a.body, took)
		}
		pg.Restart()
		s.waitReady()
		recovered := total()
		eventually(t, "load after the restart", 60*time.Second, func() bool { return total() > recovered+50 })
		close(stop)
		clients.Wait()

		var users, sessions []string
		var rotations []int
		l.mu.Lock()
		users = slices.Clone(l.registered)
		for id, n := range l.sessions {
			sessions, rotations = append(sessions, id), append(rotations, n)
		}
		t.Logf("round %d: %d accounts, %d sessions; answers %v, slowest %v", round, len(users), len(sessions), l.answers, l.slowest)
		for what, n := range l.answers {
			path, outcome, _ := strings.Cut(what, " ")
			want := map[string]string{"/api/auth/register": "201 ", "/api/auth/login": "200 ", "/api/auth/refresh": "200 "}
			if outcome != want[path] && outcome != "503 unavailable" {
				t.Errorf("got %d answers %s, want success or 503 unavailable", n, what)
			}
		}
		if l.slowest > 5*time.Second {
			t.Errorf("slowest answer: got %v, want at most 5 s", l.slowest)
		}
		l.mu.Unlock()
		lost := func(what, query string, args ...any) {
			t.Helper()
			if rows := dbtest.Query[string](t, w.db, query, args...); len(rows) > 0 {
				t.Errorf("%s that were answered and are lost: got %d (%v), want none", what, len(rows), rows[:min(3, len(rows))])
			}
		}
		lost("accounts", `SELECT u::text FROM unnest($1::uuid[]) AS u WHERE NOT EXISTS (SELECT FROM accounts WHERE user_id = u)`, users)
		lost("registrations without event", `SELECT u::text FROM unnest($1::uuid[]) AS u WHERE NOT EXISTS (SELECT FROM outbox WHERE user_id = u AND event_type = 'auth.user.registered')`, users)
		lost("sessions", `SELECT i::text FROM unnest($1::uuid[]) AS i WHERE NOT EXISTS (SELECT FROM sessions WHERE id = i AND revoked_at IS NULL)`, sessions)
		lost("rotations", `SELECT i::text FROM unnest($1::uuid[], $2::int[]) AS a(i, n) JOIN sessions ON id = i WHERE generation < n`, sessions, rotations)
		lost("refreshes without event", `
SELECT i::text FROM unnest($1::uuid[], $2::int[]) AS a(i, n)
 WHERE n > (SELECT count(*) FROM outbox WHERE event_type = 'auth.token.refreshed' AND data->>'session_id' = i::text)`, sessions, rotations)
	}
	// A last token may have been spent by a refresh that was never answered;
	// that one is found spent, everyone else goes on.
	good := 0
	for id, token := range l.tokens {
		a := s.refresh(token)
		spent := dbtest.Value[bool](t, w.db, `SELECT revoked_reason = 'replay' FROM sessions WHERE id = $1 AND revoked_at IS NOT NULL UNION ALL SELECT false LIMIT 1`, id)
		if a.status == 200 {
			good++
		} else if a.status != 401 || !spent {
			t.Errorf("refresh with the last token: got %d %s", a.status, a.body)
		}
	}
	if good < len(l.tokens)-8 {
		t.Errorf("sessions that go on: got %d of %d, want all but those of the 4 clients at the 2 kills", good, len(l.tokens))
	}
}

func (l *ledger) copyTokens() map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.tokens)
}

// A client that keeps its connection is told to leave it in time: whoever
// stops when told, as a load balancer does, has no request cut off.
func TestKeptConnectionsEndInShutdownDelay(t *testing.T) {
	w := newWorld(t)
	s := w.startPlain(unlimited, cheapHashes, env{"SHUTDOWN_DELAY": "1s"})
	var mu sync.Mutex
	broken := map[string]int{}
	var answered, told atomic.Int64
	var clients sync.WaitGroup
	for range 16 {
		clients.Go(func() {
			client := &http.Client{Transport: &http.Transport{}, Timeout: time.Minute}
			defer client.CloseIdleConnections()
			for {
				resp, err := client.Post(s.base+"/api/auth/refresh", "application/json", strings.NewReader(`{"refresh_token":"none"}`))
				if err != nil {
					mu.Lock()
					broken[err.Error()]++
					mu.Unlock()
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				answered.Add(1)
				if resp.Close {
					told.Add(1)
					return
				}
			}
		})
	}
	eventually(t, "load", 10*time.Second, func() bool { return answered.Load() > 200 })
	s.cmd.Process.Signal(syscall.SIGTERM)
	if code := s.wait(30 * time.Second); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	clients.Wait()
	t.Logf("%d answers; told to leave: %d of 16", answered.Load(), told.Load())
	for what, n := range broken {
		t.Errorf("requests that were cut off: %d with %s", n, what)
	}
}
