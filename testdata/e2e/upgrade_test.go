package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// buildIn builds the source tree in dir under a version of its own.
func buildIn(t *testing.T, dir, version string) func() (string, error) {
	t.Helper()
	path := filepath.Join(binDir, "identity-auth-"+version)
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-X main.version="+version, "-o", path, ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	out, err := cmd.CombinedOutput()
	return func() (string, error) {
		if err != nil {
			return "", fmt.Errorf("go build of %s: %v\n%s", version, err, out)
		}
		return path, nil
	}
}

// git runs git on this checkout's own repository, not one in a folder above.
func git(args ...string) (string, error) {
	cmd := exec.Command("git", append([]string{"--git-dir=.git"}, args...)...)
	cmd.Dir = "../.."
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
}

// versionBefore is the source of the release before this commit, or before the
// first release that of the commit before, unpacked; "" when there is no
// history, as in an unpacked archive.
func versionBefore(t *testing.T) (dir, name string) {
	t.Helper()
	name, err := git("describe", "--tags", "--abbrev=0", "--match", "v[0-9]*", "HEAD~1")
	released := err == nil
	if !released {
		if name, err = git("rev-parse", "--short", "HEAD~1"); err != nil {
			return "", ""
		}
	}
	archive := filepath.Join(t.TempDir(), "before.tar")
	dir = t.TempDir()
	if _, err := git("archive", "--output="+archive, name); err != nil {
		t.Fatalf("git archive %s: %v", name, err)
	}
	if out, err := exec.Command("tar", "-xf", archive, "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v\n%s", err, out)
	}
	for _, file := range migrationFiles(t) {
		before, err := os.ReadFile(filepath.Join(dir, "sql", file))
		now, _ := os.ReadFile(filepath.Join("../../sql", file))
		if err == nil && string(before) != string(now) {
			if released {
				t.Fatalf("%s was edited after it had been released in %s", file, name)
			}
			return "", "" // may still be edited, and then has no version before it
		}
	}
	return dir, name
}

// versionAfter is this source with one migration more, as the next version may
// have it: a table, a column and an index.
func versionAfter(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"main.go", "go.mod", "go.sum", "auth", "db", "jwt", "natsbus", "migrate", "sql"} {
		if out, err := exec.Command("cp", "-r", filepath.Join("../..", name), dir).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v\n%s", err, out)
		}
	}
	name := fmt.Sprintf("%04d_of_the_next_version.sql", len(migrationFiles(t))+1)
	const sql = `
CREATE TABLE of_the_next_version (one boolean NOT NULL PRIMARY KEY);
ALTER TABLE accounts ADD COLUMN nickname text;
CREATE INDEX accounts_nickname ON accounts (nickname);
`
	if err := os.WriteFile(filepath.Join(dir, "sql", name), []byte(sql), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// balancer sends requests to its replicas in turn. One that refuses the
// connection has taken nothing, and the next is asked; whatever else is not the
// answer wanted fails the test.
type balancer struct {
	t *testing.T

	mu       sync.Mutex
	next     int
	replicas []*service
	answered map[string]int // by path
}

func (b *balancer) set(replicas ...*service) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.replicas = replicas
}

func (b *balancer) post(path string, body []byte, want int) (a answer, ok bool) {
	b.mu.Lock()
	replicas := append([]*service{}, b.replicas...)
	b.next++
	first := b.next
	b.mu.Unlock()
	var err error
	for i := range replicas {
		a, err = replicas[(first+i)%len(replicas)].try("POST", path, body)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
	}
	if err != nil || a.status != want {
		b.t.Errorf("%s: got %d %s, %v, want %d", path, a.status, a.body, err, want)
		for _, s := range replicas {
			for _, line := range s.logged("dependency.unavailable") {
				b.t.Log(line)
			}
		}
		return a, false
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answered[path]++
	return a, true
}

func (b *balancer) count(path string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.answered[path]
}

// client registers, logs in and refreshes until stop is closed.
func (b *balancer) client(stop <-chan struct{}) {
	for {
		p := newPerson()
		if _, ok := b.post(registerPath, toJSON(p), 201); !ok {
			return
		}
		a, ok := b.post(loginPath, p.loginBody(p.Password), 200)
		for n := 0; ok && n < 8; n++ {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			a, ok = b.post(refreshPath, refreshBody(a.tokens(b.t).RefreshToken), 200)
		}
		if !ok {
			return
		}
	}
}

// TestRollingUpgrade: replicas of two versions work on one schema, while one is
// replaced by the other and then back, and clients notice nothing.
func TestRollingUpgrade(t *testing.T) {
	this := buildIn(t, "../..", "this")
	t.Run("from the version before", func(t *testing.T) {
		dir, name := versionBefore(t)
		if dir == "" {
			t.Log("there is no version before this one here")
			return
		}
		t.Logf("the version before is %s", name)
		upgradeAndBack(t, buildIn(t, dir, "before"), this)
	})
	t.Run("to a schema that is newer", func(t *testing.T) {
		upgradeAndBack(t, this, buildIn(t, versionAfter(t), "after"))
	})
}

// TestRollingChangeOfResetTTL: replicas of two values of PASSWORD_RESET_TTL,
// which is the stream's age too, are ready beside each other while one value
// replaces the other.
func TestRollingChangeOfResetTTL(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	age := func() time.Duration {
		js := w.jetStream()
		stream, err := js.Stream(t.Context(), "AUTH_SECRETS")
		if err != nil {
			t.Fatal(err)
		}
		return stream.CachedInfo().Config.MaxAge
	}
	long, short := env{"PASSWORD_RESET_TTL": "1h"}, env{"PASSWORD_RESET_TTL": "30m"}
	old1 := w.startPlain(cheap, unlimited, long)
	old2 := w.startPlain(cheap, unlimited, long)
	new1 := w.startPlain(cheap, unlimited, short) // ready beside the old ones
	if got := age(); got != time.Hour {
		t.Errorf("age of AUTH_SECRETS while an old replica relays: got %v, want 1h", got)
	}
	old1.stop()
	new2 := w.startPlain(cheap, unlimited, short)
	down := func(s *service) float64 { return 1 - s.metric(`auth_dependency_up{dep="nats"}`) }
	for end := time.Now().Add(8 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		for i, s := range []*service{old2, new1, new2} {
			if down(s) != 0 {
				t.Fatalf("replica %d says that NATS is down", i+1)
			}
		}
	}
	old2.stop()
	eventually(t, "the age of AUTH_SECRETS is that of the new ones", 30*time.Second, func() bool { return age() == 30*time.Minute })
	for _, s := range []*service{new1, new2} {
		wantCode(t, "ready", s.get("/health/ready"), 200, "")
	}
}

func upgradeAndBack(t *testing.T, before, after func() (string, error)) {
	w := newWorld(t)
	w.db = dbtest.Empty(t)
	t.Cleanup(func() { dbtest.Check(t, w.db) })
	start := func(binary func() (string, error)) *service {
		s := w.launch(binary, w.config(cheap, unlimited, env{"SHUTDOWN_DELAY": "3s", "HASH_ACQUIRE_TIMEOUT": "10s", "REFRESH_REUSE_GRACE": "0s"}))
		s.waitReady()
		return s
	}
	b := &balancer{t: t, answered: map[string]int{}}
	old1, old2 := start(before), start(before)
	if one, other := old1.metricLine("auth_build_info{"), start(after); one == other.metricLine("auth_build_info{") {
		t.Fatalf("both versions call themselves %s", one)
	} else {
		other.stop() // its migrations are in now, and stay
	}
	b.set(old1, old2)
	stop := make(chan struct{})
	var load sync.WaitGroup
	for range 2 {
		load.Go(func() { b.client(stop) })
	}
	end := sync.OnceFunc(func() { close(stop); load.Wait() })
	defer end()

	// A session begun by each replica at each stage is refreshed by each replica
	// of all stages that follow.
	type session struct {
		begun string
		person
		tok tokens
	}
	var sessions []*session
	refreshes := 0
	stage := func(name string, replicas ...*service) {
		t.Helper()
		for i, s := range replicas {
			p := s.register()
			sessions = append(sessions, &session{fmt.Sprintf("%s, replica %d", name, i+1), p, s.login(p)})
		}
		for _, ses := range sessions {
			for i, s := range replicas {
				a := s.refresh(ses.tok.RefreshToken)
				if refreshes++; a.status != 200 {
					t.Fatalf("a session begun at %q, refreshed at %q by replica %d: got %d %s", ses.begun, name, i+1, a.status, a.body)
				}
				ses.tok = a.tokens(t)
				for _, other := range replicas {
					wantCode(t, "its access token at "+name, other.get(sessionsPath, bearer(ses.tok.AccessToken)...), 200, "")
				}
			}
		}
		// The lock, replay and password reset are one thing on both.
		one, other := replicas[0], replicas[1]
		p := one.register()
		tok := one.login(p)
		next := other.refresh(tok.RefreshToken).tokens(t)
		wantCode(t, name+": a replay on the other replica", one.refresh(tok.RefreshToken), 401, "invalid_refresh_token")
		wantOver(t, name+": the session of the replay", next, one, other)
		for i := range lockoutThreshold {
			wantCode(t, name+": a guess", replicas[i%2].do("POST", loginPath, p.loginBody("wrong")), 401, "invalid_credentials")
		}
		wantCode(t, name+": locked", one.do("POST", loginPath, p.loginBody(p.Password)), 423, "locked")
		wantCode(t, name+": locked on the other", other.do("POST", loginPath, p.loginBody(p.Password)), 423, "locked")
		one.forgot(p)
		wantCode(t, name+": reset on the other", other.reset(resetTokens(t, w, p, 1)[0], "another horse, another battery"), 204, "")
		one.login(p.with("another horse, another battery"))

		at := b.count(refreshPath)
		eventually(t, name+": the load gets on", 2*time.Minute, func() bool { return t.Failed() || b.count(refreshPath) >= at+20 })
	}
	// replace takes a replica away as a load balancer does: it sends nothing
	// more to one that says that it is not ready.
	replace := func(leaving, stays, fresh *service) {
		t.Helper()
		b.set(leaving, stays, fresh)
		leaving.cmd.Process.Signal(syscall.SIGTERM)
		eventually(t, "the leaving replica is not ready", 10*time.Second, func() bool {
			a, err := leaving.try("GET", "/health/ready", nil)
			return err != nil || a.status == 503
		})
		b.set(stays, fresh)
		if code := leaving.wait(time.Minute); code != 0 {
			t.Errorf("the leaving replica: got exit code %d, want 0", code)
		}
	}
	stage("old and old", old1, old2)
	new1 := start(after)
	replace(old1, old2, new1)
	stage("old and new", old2, new1)
	new2 := start(after)
	replace(old2, new1, new2)
	stage("new and new", new1, new2)
	old3 := start(before)
	replace(new2, new1, old3)
	stage("new and old again", new1, old3)
	old4 := start(before)
	replace(new1, old3, old4)
	stage("old and old again", old3, old4)

	// Every answer has its event, once.
	end()
	eventually(t, "the outbox is empty", time.Minute, func() bool {
		return dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM outbox WHERE sent_at IS NULL`) == 0
	})
	const perStage = 5 // one of each in each stage
	for event, want := range map[string]int{
		"auth.user.registered":               b.count(registerPath) + len(sessions) + perStage,
		"auth.user.logged_in":                b.count(loginPath) + len(sessions) + 2*perStage,
		"auth.token.refreshed":               b.count(refreshPath) + refreshes + perStage,
		"security.refresh_replay_detected":   perStage,
		"auth.lockout":                       perStage,
		"auth.user.password_reset_requested": perStage,
		"auth.user.password_changed":         perStage,
	} {
		if got := dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM outbox WHERE event_type = $1`, event); got != want {
			t.Errorf("%s: got %d events, want %d as answered", event, got, want)
		}
	}
	js := w.jetStream()
	stream, err := js.Stream(t.Context(), "AUTH_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := int(stream.CachedInfo().State.Msgs), dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM outbox WHERE event_type NOT LIKE 'auth.secrets.%'`); got != want {
		t.Errorf("messages in the stream: got %d, want %d as in the outbox", got, want)
	}
	for _, s := range []*service{old1, old2, old3, old4, new1, new2} {
		for _, line := range s.tail(1 << 30) {
			if strings.Contains(line, `"level":"ERROR"`) {
				t.Errorf("got %s, want no ERROR", line)
			}
		}
	}
	t.Logf("%d registered, %d logged in, %d refreshed meanwhile", b.count(registerPath), b.count(loginPath), b.count(refreshPath))
}

// metricLine is the first line of /metrics with a prefix.
func (s *service) metricLine(prefix string) string {
	s.t.Helper()
	for line := range strings.Lines(string(s.get("/metrics").body)) {
		if strings.HasPrefix(line, prefix) {
			return strings.TrimSpace(line)
		}
	}
	s.t.Fatalf("no line %s", prefix)
	return ""
}
