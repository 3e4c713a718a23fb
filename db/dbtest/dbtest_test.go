package dbtest_test

import (
	"context"
	"errors"
	"os"
	"strings"
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

func (r *recorder) Helper()                   {}
func (r *recorder) Errorf(f string, a ...any) { r.errors = append(r.errors, f) }

func TestCheckFindsBrokenRows(t *testing.T) {
	const account = `INSERT INTO accounts (tenant_id, user_id, email, password_hash)
		SELECT id, id, 'a@example.com', 'x' FROM (SELECT gen_random_uuid() AS id) AS i;`
	const session = account + `
		INSERT INTO sessions (id, tenant_id, user_id, family_hash, step_hash, created_at, used_at, expires_at, ends_at, window_start, client_ip, user_agent)
		SELECT gen_random_uuid(), tenant_id, user_id, sha256('f'), sha256('s'), now(), now(), now() + interval '1h', now() + interval '1h', now(), '', '' FROM accounts;`
	const refreshed = `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
		SELECT 'auth.token.refreshed', tenant_id, user_id, '', jsonb_build_object('user_id', user_id, 'session_id', id) FROM sessions;`
	for name, breakIt := range map[string]string{
		"account without event":      account,
		"live session, disabled":     session + `UPDATE accounts SET disabled_at = now()`,
		"revoked but not expired":    session + `UPDATE sessions SET revoked_at = now(), revoked_reason = 'admin'`,
		"seed without rotation":      session + `UPDATE sessions SET step_seed = sha256('x')`,
		"refreshed without rotation": session + refreshed,
		"guess pending and failed":   `INSERT INTO guards (key, outcome, window_start, window_count, ticket, touched_at, pending, failed) VALUES (sha256('a'), 'x', now(), 0, now(), now(), ARRAY[now()], ARRAY[now()])`,
		"refreshed after its logout": session + strings.ReplaceAll(refreshed, "token.refreshed", "user.logged_out") +
			`UPDATE sessions SET revoked_at = now(), revoked_reason = 'logout', expires_at = now(), generation = 1;` + refreshed,
	} {
		t.Run(name, func(t *testing.T) {
			url := dbtest.Empty(t) // New would Check by itself
			migrateAll(t, url)
			r := &recorder{TB: t}
			dbtest.Check(r, url)
			if len(r.errors) != 0 {
				t.Fatalf("before: got %q, want no error", r.errors)
			}
			dbtest.Exec(t, url, breakIt)
			dbtest.Check(r, url)
			if len(r.errors) == 0 {
				t.Error("Check found nothing")
			}
		})
	}
}

func TestServerFaults(t *testing.T) {
	ctx := t.Context()
	s := dbtest.Start(t)
	insert := func(key, commit string) {
		dbtest.Exec(t, s.URL(), `SET synchronous_commit = `+commit+`; INSERT INTO rate_windows VALUES (sha256('`+key+`'), now(), 1, now())`)
	}
	insert("on", "on")
	insert("off", "off")
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
	if got := dbtest.Query[bool](t, s.URL(), `SELECT key = sha256('on') FROM rate_windows`); len(got) != 1 || !got[0] {
		t.Errorf("after kill: got %v, want only the row committed synchronously", got)
	}

	s.Stop()
	s.Restart()
	s.Restart()
	insert("again", "on")
	s.Pause() // the cleanup copes
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
