package migrate_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/migrate"
	"github.com/7d-solutions/identity-auth/sql"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func TestMain(m *testing.M) { os.Exit(dbtest.Main(m)) }

// files numbers migrations named a, b, c ... with these texts.
func files(texts ...string) fstest.MapFS {
	fsys := fstest.MapFS{}
	for i, text := range texts {
		fsys[fmt.Sprintf("%04d_%c.sql", i+1, 'a'+i)] = &fstest.MapFile{Data: []byte(text)}
	}
	return fsys
}

func load(t *testing.T, fsys fs.FS) []migrate.Migration {
	t.Helper()
	ms, err := migrate.Load(fsys)
	if err != nil {
		t.Fatal(err)
	}
	return ms
}

func connect(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func apply(t *testing.T, url string, texts ...string) ([]migrate.Migration, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	return migrate.Apply(ctx, connect(t, url), load(t, files(texts...)))
}

// names are the names of what is in our schema.
func names(t *testing.T, url string) []string {
	t.Helper()
	return dbtest.Query[string](t, url, `
SELECT relname::text FROM pg_class WHERE relnamespace = to_regnamespace('identity_auth') AND relkind = 'r' ORDER BY 1`)
}

func wantNames(t *testing.T, url string, want ...string) {
	t.Helper()
	if got := names(t, url); !slices.Equal(got, want) {
		t.Errorf("tables: got %v, want %v", got, want)
	}
}

// eventually asks the database until it says yes.
func eventually(t *testing.T, url, question string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if dbtest.Value[bool](t, url, question) {
			return
		}
	}
	t.Fatalf("it never came to: %s", question)
}

func TestLoad(t *testing.T) {
	for _, test := range []struct {
		files []string
		want  string // part of the error, empty for none
	}{
		{[]string{}, "no migration"},
		{[]string{"README.md"}, "no migration"},
		{[]string{"0002_a.sql"}, "expected migration 0001"},
		{[]string{"0000_a.sql", "0001_b.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "0003_b.sql"}, "expected migration 0002"},
		{[]string{"0001_a.sql", "0001_b.sql"}, "expected migration 0002"},
		{[]string{"0001_a.sql", "init.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "0002_b.SQL"}, "not a migration's name"},
		{[]string{"0001_a.sql", "0002_.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "0002-b.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "0002_B.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "0002_b.down.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "2_b.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "00002_b.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "+002_b.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql", "10000_b.sql"}, "not a migration's name"},
		{[]string{"0001_a.sql/file"}, "reading migrations"},
		{[]string{"0001_a.sql"}, ""},
		{[]string{"0001_init.sql", "0002_second_step_2.sql", "embed.go", "old/0001_x.sql"}, ""},
	} {
		fsys := fstest.MapFS{}
		for _, f := range test.files {
			fsys[f] = &fstest.MapFile{Data: []byte("SELECT 1")}
		}
		ms, err := migrate.Load(fsys)
		if test.want == "" {
			if err != nil || ms[0].String() != test.files[0] || ms[0].Version != 1 {
				t.Errorf("%q: got %v, %v, want no error", test.files, ms, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: got %v, %v, want an error with %q", test.files, ms, err, test.want)
		}
	}
}

// FuzzLoad: a name that is accepted is the one that the migration has.
func FuzzLoad(f *testing.F) {
	for _, name := range []string{"0001_init.sql", "0001_.sql", "1_a.sql", "0001_a.sql.sql", "-001_a.sql", "0001_a b.sql"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if !fs.ValidPath(name) || strings.Contains(name, "/") {
			return
		}
		ms, err := migrate.Load(fstest.MapFS{name: {}})
		if err == nil && (len(ms) != 1 || ms[0].Version != 1 || ms[0].String() != name) {
			t.Errorf("%q: got %v", name, ms)
		}
	})
}

// lockKey is a promise to binaries of other versions: it never changes.
const lockKey = 0x696461757468

func TestConcurrentStartsApplyOnce(t *testing.T) {
	const replicas = 5
	url := dbtest.Empty(t)
	ms := load(t, files("CREATE TABLE a ()", "CREATE TABLE b ()", "CREATE TABLE c ()"))
	gate := connect(t, url)
	if _, err := gate.Exec(t.Context(), `SELECT pg_advisory_lock($1)`, lockKey); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var applied [replicas][]migrate.Migration
	var errs [replicas]error
	for i := range replicas {
		conn := connect(t, url)
		wg.Go(func() { applied[i], errs[i] = migrate.Apply(t.Context(), conn, ms) })
	}
	eventually(t, url, fmt.Sprintf(`SELECT count(*) = %d FROM pg_locks WHERE locktype = 'advisory' AND NOT granted`, replicas))
	gate.Close(t.Context()) // with its lock
	wg.Wait()

	if err := errors.Join(errs[:]...); err != nil {
		t.Error(err)
	}
	if got := slices.Concat(applied[:]...); !reflect.DeepEqual(got, ms) {
		t.Errorf("applied by all replicas together: got %v, want %v", got, ms)
	}
	wantNames(t, url, "a", "b", "c", "schema_migrations")
}

func TestChangedIsRefused(t *testing.T) {
	url := dbtest.Empty(t)
	if _, err := apply(t, url, "CREATE TABLE a ()", "CREATE TABLE b ()"); err != nil {
		t.Fatal(err)
	}
	ms := load(t, files("CREATE TABLE a ()", "CREATE TABLE b ( )", "CREATE TABLE c ()"))
	conn := connect(t, url)
	applied, err := migrate.Apply(t.Context(), conn, ms)
	if !errors.Is(err, migrate.ErrChanged) || !strings.Contains(err.Error(), "0002_b.sql") || applied != nil {
		t.Errorf("Apply: got %v, %v, want ErrChanged naming 0002_b.sql", applied, err)
	}
	if pending, err := migrate.Pending(t.Context(), conn, ms); !errors.Is(err, migrate.ErrChanged) || pending != nil {
		t.Errorf("Pending: got %v, %v, want ErrChanged", pending, err)
	}
	states, err := migrate.Status(t.Context(), conn, ms)
	if err != nil {
		t.Fatal(err)
	}
	if states[0].Changed || !states[1].Changed || states[2].Changed || !states[2].AppliedAt.IsZero() {
		t.Errorf("Status: got %+v, want only the second changed and the third pending", states)
	}
	wantNames(t, url, "a", "b", "schema_migrations")
}

func TestHoleIsRefused(t *testing.T) {
	for _, deleted := range []int{1, 2} {
		url := dbtest.Empty(t)
		texts := []string{"CREATE TABLE a ()", "CREATE TABLE b ()", "CREATE TABLE c ()"}
		if _, err := apply(t, url, texts...); err != nil {
			t.Fatal(err)
		}
		dbtest.Exec(t, url, `DELETE FROM schema_migrations WHERE version = $1`, deleted)
		for known := range 3 { // a hole above what the binary knows counts as well
			applied, err := apply(t, url, texts[:known+1]...)
			if !errors.Is(err, migrate.ErrChanged) || applied != nil {
				t.Errorf("without record %d, knowing %d: got %v, %v, want ErrChanged", deleted, known+1, applied, err)
			}
		}
	}
}

func TestNewerSchemaIsAccepted(t *testing.T) {
	url := dbtest.Empty(t)
	before := time.Now().Add(-time.Minute)
	if _, err := apply(t, url, "CREATE TABLE a ()", "CREATE TABLE b ()"); err != nil {
		t.Fatal(err)
	}
	if applied, err := apply(t, url, "CREATE TABLE a ()"); err != nil || applied != nil {
		t.Errorf("Apply by an older binary: got %v, %v, want nothing", applied, err)
	}
	states, err := migrate.Status(t.Context(), connect(t, url), load(t, files("CREATE TABLE a ()")))
	if err != nil {
		t.Fatal(err)
	}
	for i := range states {
		if states[i].AppliedAt.Before(before) {
			t.Errorf("%s: applied at %v, want a moment ago", states[i].Name, states[i].AppliedAt)
		}
		states[i].AppliedAt = time.Time{}
	}
	want := []migrate.State{{Version: 1, Name: "a"}, {Version: 2, Name: "b", Unknown: true}}
	if !slices.Equal(states, want) {
		t.Errorf("Status: got %+v, want %+v", states, want)
	}
}

func TestStateString(t *testing.T) {
	at := time.Date(2030, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))
	for _, test := range []struct {
		state migrate.State
		want  string
	}{
		{migrate.State{Version: 1, Name: "a"}, "0001_a.sql  pending"},
		{migrate.State{Version: 1, Name: "a", AppliedAt: at}, "0001_a.sql  applied 2030-01-02T02:04:05Z"},
		{migrate.State{Version: 1, Name: "a", AppliedAt: at, Changed: true}, "0001_a.sql  CHANGED since it was applied 2030-01-02T02:04:05Z"},
		{migrate.State{Version: 2, Name: "b", AppliedAt: at, Unknown: true}, "0002_b.sql  newer than this binary, applied 2030-01-02T02:04:05Z"},
	} {
		if got := test.state.String(); got != test.want {
			t.Errorf("got %q, want %q", got, test.want)
		}
	}
}

func TestFailureLeavesNothing(t *testing.T) {
	url := dbtest.Empty(t)
	const good, bad = "CREATE TABLE a ()", "CREATE TABLE half (); SELECT 1 / 0; CREATE TABLE never ()"
	applied, err := apply(t, url, bad, good)
	if err == nil || !strings.Contains(err.Error(), "0001_a.sql") || applied != nil {
		t.Errorf("got %v, %v, want an error naming 0001_a.sql", applied, err)
	}
	if dbtest.Value[bool](t, url, `SELECT to_regnamespace('identity_auth') IS NOT NULL`) {
		t.Error("the failed first migration left the schema")
	}

	applied, err = apply(t, url, good, bad)
	if err == nil || errors.Is(err, migrate.ErrChanged) || len(applied) != 1 || applied[0].Version != 1 {
		t.Errorf("got %v, %v, want the first applied and an error", applied, err)
	}
	wantNames(t, url, "a", "schema_migrations")

	applied, err = apply(t, url, good, "CREATE TABLE b ()") // never applied, so it may be mended
	if err != nil || len(applied) != 1 || applied[0].Version != 2 {
		t.Errorf("got %v, %v, want the second applied", applied, err)
	}
	wantNames(t, url, "a", "b", "schema_migrations")
}

func TestOwnTransactionIsRefused(t *testing.T) {
	url := dbtest.Empty(t)
	if _, err := apply(t, url, "CREATE TABLE a (); COMMIT"); err == nil || !strings.Contains(err.Error(), "its own transaction") {
		t.Errorf("got %v, want an error about the file's own transaction", err)
	}
}

// line is a connection to PostgreSQL that can hang. There is no second one, so
// that pgx cannot send the cancel request that a process which died never sends.
type line struct {
	net.Conn
	hung chan struct{} // closed: nothing is written any more
}

func (l *line) Write(b []byte) (int, error) {
	select {
	case <-l.hung:
		select {} // the goroutine is as dead as its process would be
	default:
		return l.Conn.Write(b)
	}
}

func connectLine(t *testing.T, url string) (*pgx.Conn, *line) {
	t.Helper()
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		t.Fatal(err)
	}
	var l *line
	dial := cfg.DialFunc
	cfg.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if l != nil {
			return nil, errors.New("the process is dead")
		}
		conn, err := dial(ctx, network, addr)
		l = &line{conn, make(chan struct{})}
		return l, err
	}
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return conn, l
}

// TestDeadApplier ends an applier in the middle of its transaction. The next
// one finds nothing of it and does not wait for it.
func TestDeadApplier(t *testing.T) {
	const sleeping = ` FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'PgSleep'`
	for name, end := range map[string]func(url string, l *line){
		"backend killed":        func(url string, _ *line) { dbtest.Exec(t, url, `SELECT pg_terminate_backend(pid)`+sleeping) },
		"process or host dead":  func(_ string, l *line) { l.Conn.Close() },
		"process or host hangs": func(_ string, l *line) { close(l.hung) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := dbtest.Empty(t)
			conn, l := connectLine(t, url)
			seconds := 3600
			if name == "process or host hangs" {
				seconds = 2 // it hangs at its next statement
			}
			ms := load(t, files("CREATE TABLE a ()", fmt.Sprintf("CREATE TABLE half (); SELECT pg_sleep(%d)", seconds)))
			go migrate.Apply(t.Context(), conn, ms)
			eventually(t, url, `SELECT count(*) = 1`+sleeping)
			end(url, l)
			applied, err := apply(t, url, "CREATE TABLE a ()", "CREATE TABLE b ()")
			if err != nil || len(applied) != 1 || applied[0].Version != 2 {
				t.Errorf("the next Apply: got %v, %v, want the second applied", applied, err)
			}
			wantNames(t, url, "a", "b", "schema_migrations")
		})
	}
}

func TestWaitEndsWithContext(t *testing.T) {
	url := dbtest.Empty(t)
	gate := connect(t, url)
	if _, err := gate.Exec(t.Context(), `SELECT pg_advisory_lock($1)`, lockKey); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	conn, ms := connect(t, url), load(t, files("CREATE TABLE a ()"))
	done := make(chan error)
	go func() {
		_, err := migrate.Apply(ctx, conn, ms)
		done <- err
	}()
	eventually(t, url, `SELECT count(*) = 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted`)
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	gate.Close(t.Context())
	if _, err := apply(t, url, "CREATE TABLE a ()"); err != nil {
		t.Error(err)
	}
}

func TestNothingToDoDoesNotWait(t *testing.T) {
	url := dbtest.Empty(t)
	if _, err := apply(t, url, "CREATE TABLE a ()"); err != nil {
		t.Fatal(err)
	}
	newer := connect(t, url)
	if _, err := newer.Exec(t.Context(), `SELECT pg_advisory_lock($1)`, lockKey); err != nil {
		t.Fatal(err)
	}
	if applied, err := apply(t, url, "CREATE TABLE a ()"); err != nil || applied != nil {
		t.Errorf("got %v, %v, want nothing", applied, err)
	}
}

func TestLockIsGivenBack(t *testing.T) {
	url := dbtest.Empty(t)
	kept := connect(t, url)
	for _, text := range []string{"SELECT 1 / 0", "CREATE TABLE a ()"} {
		migrate.Apply(t.Context(), kept, load(t, files(text)))
		if n := dbtest.Value[int](t, url, `SELECT count(*)::int FROM pg_locks WHERE locktype = 'advisory'`); n != 0 {
			t.Errorf("%s: %d advisory locks left while the connection lives, want none", text, n)
		}
	}
}

func TestBusyTableIsNotWaitedForLong(t *testing.T) {
	url := dbtest.Empty(t)
	texts := []string{"CREATE TABLE a ()", "ALTER TABLE a ADD b integer"}
	if _, err := apply(t, url, texts[0]); err != nil {
		t.Fatal(err)
	}
	reader := connect(t, url)
	tx, err := reader.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT FROM identity_auth.a`); err != nil {
		t.Fatal(err)
	}
	var refused *pgconn.PgError
	if _, err := apply(t, url, texts...); !errors.As(err, &refused) || refused.Code != "55P03" {
		t.Errorf("beside a long transaction: got %v, want lock_not_available", err)
	}
	tx.Rollback(t.Context())
	if applied, err := apply(t, url, texts...); err != nil || len(applied) != 1 {
		t.Errorf("after it: got %v, %v, want the second applied", applied, err)
	}
}

func TestRequestLimitsDoNotApply(t *testing.T) {
	url := dbtest.Empty(t) + "&statement_timeout=500&lock_timeout=500&idle_in_transaction_session_timeout=500"
	if _, err := apply(t, url, "SELECT pg_sleep(0.7)"); err != nil {
		t.Error(err)
	}
}

func TestStatusOnlyReads(t *testing.T) {
	url := dbtest.Empty(t)
	conn, ms := connect(t, url+"&default_transaction_read_only=on"), load(t, sql.FS)
	states, err := migrate.Status(t.Context(), conn, ms)
	if err != nil || len(states) != len(ms) || states[0] != (migrate.State{Version: 1, Name: "init"}) {
		t.Errorf("Status: got %v, %v, want everything pending", states, err)
	}
	if pending, err := migrate.Pending(t.Context(), conn, ms); err != nil || !reflect.DeepEqual(pending, ms) {
		t.Errorf("Pending: got %v, %v, want everything", pending, err)
	}
	if dbtest.Value[bool](t, url, `SELECT to_regnamespace('identity_auth') IS NOT NULL`) {
		t.Error("Status created the schema")
	}
}

// as returns url for another role.
func as(url, role string) string { return strings.Replace(url, "postgres@", role+"@", 1) }

func TestRoleWithoutDDLRights(t *testing.T) {
	url := dbtest.Empty(t)
	ms := load(t, sql.FS)
	if _, err := migrate.Apply(t.Context(), connect(t, url), ms); err != nil {
		t.Fatal(err)
	}
	dbtest.Exec(t, url, `
CREATE ROLE dml LOGIN;
GRANT USAGE ON SCHEMA identity_auth TO dml;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA identity_auth TO dml;`)
	t.Cleanup(func() { dbtest.Exec(t, url, `DROP OWNED BY dml; DROP ROLE dml`) })
	conn := connect(t, as(url, "dml"))
	if states, err := migrate.Status(t.Context(), conn, ms); err != nil || len(states) != len(ms) || states[0].AppliedAt.IsZero() {
		t.Errorf("Status: got %v, %v, want everything applied", states, err)
	}
	if applied, err := migrate.Apply(t.Context(), conn, ms); err != nil || applied != nil {
		t.Errorf("Apply with nothing to do: got %v, %v", applied, err)
	}
	dbtest.Exec(t, url, `DELETE FROM schema_migrations`)
	if pending, err := migrate.Pending(t.Context(), conn, ms); err != nil || len(pending) != len(ms) {
		t.Errorf("Pending: got %v, %v, want everything", pending, err)
	}
	if _, err := migrate.Apply(t.Context(), conn, ms); err == nil {
		t.Error("Apply: want an error")
	}
}

func TestSchemaMadeBeforehand(t *testing.T) {
	url := dbtest.Empty(t)
	dbtest.Exec(t, url, `CREATE ROLE tenant LOGIN; CREATE SCHEMA identity_auth AUTHORIZATION tenant;`)
	t.Cleanup(func() { dbtest.Exec(t, url, `DROP OWNED BY tenant CASCADE; DROP ROLE tenant`) })
	if applied, err := apply(t, as(url, "tenant"), "CREATE TABLE a ()"); err != nil || len(applied) != 1 {
		t.Errorf("got %v, %v, want the migration applied", applied, err)
	}
	wantNames(t, url, "a", "schema_migrations")
}

// TestReleasedSchema holds what every table of ours promises, beside tables of
// the same names that belong to someone else.
func TestReleasedSchema(t *testing.T) {
	url := dbtest.Empty(t)
	dbtest.Exec(t, url, `CREATE TABLE public.accounts (theirs int); CREATE TABLE public.sessions (theirs int); CREATE TABLE public.schema_migrations (theirs int)`)
	if _, err := migrate.Apply(t.Context(), connect(t, url), load(t, sql.FS)); err != nil {
		t.Fatal(err)
	}
	if got := dbtest.Query[string](t, url, `
SELECT table_name || '.' || column_name FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1`); !slices.Equal(got, []string{"accounts.theirs", "schema_migrations.theirs", "sessions.theirs"}) {
		t.Errorf("columns in public: got %v, want those of before", got)
	}
	if got := dbtest.Query[string](t, url, `
SELECT relname || coalesce('.' || attname, '')
  FROM pg_class AS c LEFT JOIN LATERAL (
       SELECT 0 AS attnum, NULL::name AS attname
        UNION ALL SELECT attnum, attname FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped) AS a ON true
 WHERE relnamespace = 'identity_auth'::regnamespace AND relkind IN ('r', 'p')
   AND CASE attnum WHEN 0 THEN obj_description(c.oid, 'pg_class') ELSE col_description(c.oid, attnum) END IS NULL`); len(got) != 0 {
		t.Errorf("tables and columns without a comment: %v", got)
	}
}
