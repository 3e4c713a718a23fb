package dbtest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/migrate"
	"github.com/7d-solutions/identity-auth/sql"
	"github.com/jackc/pgx/v5"
)

func TestMain(m *testing.M) { os.Exit(dbtest.Main(m)) }

func TestClonesAreMigratedAndApart(t *testing.T) {
	a, b := dbtest.New(t), dbtest.New(t)
	if a == b {
		t.Fatalf("two databases have the URL %s", a)
	}
	const count = `SELECT count(*)::int FROM rate_windows`
	if n := dbtest.Exec(t, a, `INSERT INTO rate_windows VALUES (sha256('a'), now(), 1, now())`); n != 1 {
		t.Errorf("rows inserted: got %d, want 1", n)
	}
	if got := dbtest.Value[int](t, a, count); got != 1 {
		t.Errorf("rows in the first database: got %d, want 1", got)
	}
	if got := dbtest.Value[int](t, b, count); got != 0 {
		t.Errorf("rows in the second database: got %d, want 0", got)
	}
}

func TestParallelClones(t *testing.T) {
	for range 6 {
		t.Run("", func(t *testing.T) {
			t.Parallel()
			if got := dbtest.Value[int](t, dbtest.New(t), `SELECT count(*)::int FROM schema_migrations`); got < 1 {
				t.Errorf("applied migrations: got %d, want some", got)
			}
		})
	}
}

func TestEmptyHasNoSchema(t *testing.T) {
	url := dbtest.Empty(t)
	if got := dbtest.Query[string](t, url, `SELECT nspname::text FROM pg_namespace WHERE nspname = 'identity_auth'`); len(got) != 0 {
		t.Errorf("schemas: got %v, want none", got)
	}
	dbtest.Check(t, url)
}

// recorder takes the errors of a test that is meant to fail.
type recorder struct {
	testing.TB
	errors []string
}

func (r *recorder) Helper() {}

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

func TestCheckFindsBrokenRows(t *testing.T) {
	event := func(name string) string {
		return `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
			SELECT '` + name + `', a.tenant_id, a.user_id, '', jsonb_build_object('user_id', a.user_id, 'session_id', s.id)
			  FROM accounts AS a LEFT JOIN sessions AS s ON true;`
	}
	const account = `INSERT INTO accounts (tenant_id, user_id, email, password_hash)
		SELECT id, id, 'a@example.com', 'x' FROM (SELECT gen_random_uuid() AS id) AS i;`
	const session = `INSERT INTO sessions (id, tenant_id, user_id, family_hash, step_hash, created_at, used_at, expires_at, ends_at, window_start, client_ip, user_agent)
		SELECT gen_random_uuid(), tenant_id, user_id, sha256('f'), sha256('s'), now(), now(), now() + interval '1h', now() + interval '1h', now(), '', '' FROM accounts;`
	loggedIn := account + event("auth.user.registered") + session + event("auth.user.logged_in")
	const revoke = `UPDATE sessions SET revoked_at = now(), revoked_reason = 'logout', expires_at = now();`
	for _, test := range []struct{ promise, before, breakIt string }{
		{"disabled", loggedIn, `UPDATE accounts SET disabled_at = now()`},
		{"expired with its revocation", loggedIn + revoke + event("auth.session.revoked"), `UPDATE sessions SET expires_at = ends_at`},
		{"only a rotation", loggedIn, `UPDATE sessions SET step_seed = sha256('x')`},
		{"only a rotation", loggedIn, `UPDATE sessions SET generation = 1, prev_step_hash = step_hash`},
		{"are distinct", "", `INSERT INTO guards (key, outcome, window_start, window_count, ticket, touched_at, pending, failed)
			VALUES (sha256('a'), 'x', now(), 0, now(), now(), ARRAY[now()], ARRAY[now()])`},
		{"about its own user", loggedIn, `UPDATE outbox SET user_id = gen_random_uuid()`},
		{"refresh token", loggedIn, `UPDATE outbox SET data = data || '{"x": "iar_AAAA"}'`},
		{"at most once", loggedIn + event("auth.user.logged_out") + revoke, event("auth.user.logged_out")},
		{"after its revocation", loggedIn + event("auth.user.logged_out") + revoke + `UPDATE sessions SET generation = 1;`, event("auth.token.refreshed")},
		{"tells of a rotation", loggedIn, event("auth.token.refreshed")},
		{"registered or imported", loggedIn, account},
		{"registered or imported", loggedIn, `DELETE FROM accounts`},
		{"has its event", loggedIn, session},
		{"has its event", loggedIn, revoke},
	} {
		t.Run(test.promise, func(t *testing.T) {
			url := dbtest.Empty(t) // New would Check by itself
			migrateAll(t, url)
			if test.before != "" {
				dbtest.Exec(t, url, test.before)
			}
			r := &recorder{TB: t}
			dbtest.Check(r, url)
			if len(r.errors) != 0 {
				t.Fatalf("before: got %q, want no error", r.errors)
			}
			dbtest.Exec(t, url, strings.ReplaceAll(test.breakIt, "a@", "b@"))
			dbtest.Check(r, url)
			if !strings.Contains(strings.Join(r.errors, "\n"), test.promise) {
				t.Errorf("got %q, want the promise %q broken", r.errors, test.promise)
			}
		})
	}
}

func TestServerFaults(t *testing.T) {
	ctx := t.Context()
	s := dbtest.Start(t)
	conn, err := pgx.Connect(ctx, s.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)

	s.Pause()
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if c, err := pgx.Connect(short, s.URL()); err == nil || !errors.Is(short.Err(), context.DeadlineExceeded) {
		t.Errorf("connecting to a paused server: got %v, %v, want a timeout", c, err)
	}
	s.Resume()
	if err := conn.Ping(ctx); err != nil {
		t.Errorf("a connection from before the pause: %v", err)
	}

	s.Kill()
	if _, err := pgx.Connect(ctx, s.URL()); err == nil {
		t.Error("a killed server takes connections")
	}
	s.Restart()
	s.KillPostmaster()
	s.Restart()
	s.Stop()
	s.Recover()
	s.Recover()
	s.Restart()
	s.Pause() // the cleanup copes
}

func TestKillTellsSynchronousCommits(t *testing.T) {
	s := dbtest.Start(t)
	const insert = `INSERT INTO rate_windows SELECT sha256(gen_random_uuid()::text::bytea), now(), 1, now()`
	dbtest.Exec(t, s.URL(), `SET synchronous_commit = on; `+insert)
	lost := false
	for kept := 1; kept < 6 && !lost; { // PostgreSQL may write one earlier than it has to
		dbtest.Exec(t, s.URL(), insert)
		s.Kill()
		s.Restart()
		got := dbtest.Value[int](t, s.URL(), `SELECT count(*)::int FROM rate_windows`)
		if got < kept {
			t.Fatalf("after kill: got %d rows, want the %d that were there before it", got, kept)
		}
		lost, kept = got == kept, got
	}
	if !lost {
		t.Error("no commit with the default synchronous_commit was lost by a kill")
	}
}

// What a primary has answered is there when its standby takes over.
func TestStandby(t *testing.T) {
	primary := dbtest.Start(t)
	const insert = `SET synchronous_commit = on; INSERT INTO rate_windows SELECT sha256(gen_random_uuid()::text::bytea), now(), 1, now()`
	dbtest.Exec(t, primary.URL(), insert)
	standby := primary.Standby()
	dbtest.Exec(t, primary.URL(), insert)
	if !dbtest.Value[bool](t, standby.URL(), `SELECT pg_is_in_recovery()`) {
		t.Error("the standby takes writes before it is promoted")
	}
	primary.Kill()
	standby.Promote()
	dbtest.Exec(t, standby.URL(), insert)
	if got := dbtest.Value[int](t, standby.URL(), `SELECT count(*)::int FROM rate_windows`); got != 3 {
		t.Errorf("rows after the promotion: got %d, want 3", got)
	}
	primary.Close()
}

// TestNothingOutlivesTheTests kills a test process that has both kinds of
// server, one of them frozen.
func TestNothingOutlivesTheTests(t *testing.T) {
	const victim = "DBTEST_VICTIM"
	if os.Getenv(victim) != "" {
		s := dbtest.Start(t)
		for _, url := range []string{dbtest.New(t), s.URL()} {
			fmt.Println(dbtest.Value[string](t, url, `SHOW data_directory`))
		}
		s.Pause()
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), victim+"=1")
	out, err := cmd.Output()
	dirs := strings.Fields(string(out))
	if err == nil || len(dirs) != 2 {
		t.Fatalf("victim: got %v, %q, want its death after two lines", err, out)
	}
	for _, data := range dirs {
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if _, err := os.Stat(filepath.Dir(data)); err != nil { // removed after the server has ended
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%s is still there", data)
			}
		}
	}
	// A server keeps its data directory as its working directory, also when that has been removed.
	links, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range links {
		if cwd, err := os.Readlink(link); err == nil && (strings.HasPrefix(cwd, dirs[0]) || strings.HasPrefix(cwd, dirs[1])) {
			t.Errorf("%s: a process is left in %s", link, cwd)
		}
	}
}

func migrateAll(t *testing.T, url string) {
	t.Helper()
	migrations, err := migrate.Load(sql.FS)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := migrate.Apply(t.Context(), conn, migrations); err != nil {
		t.Fatal(err)
	}
}
