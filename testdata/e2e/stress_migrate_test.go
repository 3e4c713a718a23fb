package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// migrationFiles are the names of this checkout's migrations, in order.
func migrationFiles(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob("../../sql/*.sql")
	if err != nil || len(files) == 0 {
		t.Fatalf("no migrations in ../../sql: %v", err)
	}
	for i := range files {
		files[i] = filepath.Base(files[i])
	}
	return files
}

// applied is the database's own record, in the same form.
func applied(t *testing.T, db string) []string {
	t.Helper()
	return dbtest.Query[string](t, db, `SELECT lpad(version::text, 4, '0') || '_' || name || '.sql' FROM identity_auth.schema_migrations ORDER BY version`)
}

// shape is every table, column, default, constraint, index and comment of the
// schema, one a line.
func shape(t *testing.T, db string) string {
	t.Helper()
	return strings.Join(dbtest.Query[string](t, db, `
WITH rel AS (
    SELECT c.oid, c.relname, c.relkind, c.reloptions FROM pg_class AS c
     WHERE c.relnamespace = to_regnamespace('identity_auth')
)
SELECT line FROM (
    SELECT format('%s %s %s', relkind, relname, reloptions) FROM rel
    UNION ALL
    SELECT format('%s.%s %s %s %s %s', relname, attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid), col_description(rel.oid, attnum))
      FROM rel JOIN pg_attribute ON attrelid = rel.oid AND attnum > 0 AND NOT attisdropped LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    UNION ALL
    SELECT format('%s %s %s', relname, conname, pg_get_constraintdef(pg_constraint.oid)) FROM rel JOIN pg_constraint ON conrelid = rel.oid
    UNION ALL
    SELECT pg_get_indexdef(rel.oid) FROM rel WHERE relkind = 'i'
) AS lines(line) ORDER BY line`), "\n")
}

// emptyWorld is a world whose database has no schema.
func emptyWorld(t *testing.T, nats *natstest.Server) *world {
	t.Helper()
	return &world{t: t, db: dbtest.Empty(t), nats: nats}
}

// checkMigrated tells that the database is as a single undisturbed start would
// have left it, and that the service works on it.
func checkMigrated(t *testing.T, w *world, s *service) {
	t.Helper()
	if got, want := fmt.Sprint(applied(t, w.db)), fmt.Sprint(migrationFiles(t)); got != want {
		t.Errorf("applied migrations: got %s, want %s", got, want)
	}
	if got, want := shape(t, w.db), shape(t, dbtest.New(t)); got != want {
		t.Errorf("schema: got\n%s\nwant\n%s", got, want)
	}
	s.login(s.register())
}

func TestReplicasMigrateTogether(t *testing.T) {
	nats := natstest.New(t)
	for range 2 {
		w := emptyWorld(t, nats)
		rs := make([]*service, 3)
		for i := range rs {
			rs[i] = w.launch(plainBinary, w.config(cheapHashes))
		}
		times := 0
		for _, s := range rs {
			s.waitReady()
			for _, line := range s.logged("migrate.applied") {
				times += int(line["count"].(float64))
			}
			if failed := s.logged("migrate.failed"); len(failed) > 0 {
				t.Errorf("a replica did not wait for the one that migrates: %v", failed)
			}
		}
		if want := len(migrationFiles(t)); times != want {
			t.Errorf("migrations applied by the three replicas: got %d, want %d", times, want)
		}
		checkMigrated(t, w, rs[2])
		for _, s := range rs {
			s.stop()
		}
	}
}

// identityAuth runs a subcommand to its end.
func (w *world) identityAuth(args ...string) (code int, output string) {
	w.t.Helper()
	path, err := plainBinary()
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = w.config().list()
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		w.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestChangedMigrationIsRefused(t *testing.T) {
	w := newWorld(t)
	for _, file := range migrationFiles(t) {
		const change = `UPDATE identity_auth.schema_migrations SET checksum = sha256(checksum) WHERE version = $1::int`
		const restore = `UPDATE identity_auth.schema_migrations AS m SET checksum = o.checksum FROM public.original AS o WHERE m.version = o.version`
		dbtest.Exec(t, w.db, `DROP TABLE IF EXISTS public.original; CREATE TABLE public.original AS TABLE identity_auth.schema_migrations`)
		dbtest.Exec(t, w.db, change, file[:4])

		s := w.launch(racyBinary, w.config())
		if code := s.wait(30 * time.Second); code != 1 {
			t.Errorf("serve with %s changed: got exit code %d, want 1", file, code)
		}
		failed := s.logged("service.failed")
		if len(failed) != 1 || failed[0]["level"] != "ERROR" || !strings.Contains(fmt.Sprint(failed[0]["err"]), file) {
			t.Errorf("service.failed: got %v, want one ERROR that names %s", failed, file)
		}
		if code, out := w.identityAuth("migrate"); code != 1 || !strings.Contains(out, file) {
			t.Errorf("migrate with %s changed: got exit code %d and %q, want 1 and the name", file, code, out)
		}
		if code, out := w.identityAuth("migrate", "status"); code != 0 || !strings.Contains(out, strings.TrimSuffix(file, ".sql")) {
			t.Errorf("migrate status with %s changed: got exit code %d and %q, want 0 and the migration's name", file, code, out)
		}
		dbtest.Exec(t, w.db, restore)
	}
	checkMigrated(t, w, w.startPlain(cheapHashes))
}

func TestNewerSchemaIsAccepted(t *testing.T) {
	w := newWorld(t)
	dbtest.Exec(t, w.db, `
INSERT INTO identity_auth.schema_migrations (version, name, checksum)
SELECT max(version) + 1, 'of_a_newer_binary', sha256('newer') FROM identity_auth.schema_migrations`)
	s := w.start(cheapHashes)
	s.login(s.register())
	if code, out := w.identityAuth("migrate"); code != 0 {
		t.Errorf("migrate on a newer schema: got exit code %d and %q, want 0", code, out)
	}
	if code, out := w.identityAuth("migrate", "status"); code != 0 || !strings.Contains(out, "of_a_newer_binary") {
		t.Errorf("migrate status on a newer schema: got exit code %d and %q, want 0 and the newer one's name", code, out)
	}
}

// trapSQL makes the n-th DDL command stop until the table hold is empty. The
// counter is a sequence, so what is rolled back has been counted all the same.
const trapSQL = `
CREATE TABLE hold AS SELECT 1;
CREATE SEQUENCE commands;
CREATE FUNCTION trap() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('public.commands') = %d THEN
        WHILE EXISTS (SELECT FROM public.hold) LOOP
            PERFORM pg_sleep(0.005);
        END LOOP;
    END IF;
END $$;
CREATE EVENT TRIGGER trap ON ddl_command_start EXECUTE FUNCTION trap()`

// A first start is killed in the middle of its n-th DDL command. The next one
// succeeds, even while PostgreSQL has not noticed yet that the first is dead.
func TestKilledMigrationLeavesNothing(t *testing.T) {
	nats := natstest.New(t)
	trapped := func(n int) *world {
		w := emptyWorld(t, nats)
		dbtest.Exec(t, w.db, fmt.Sprintf(`SET search_path = public; `+trapSQL, n))
		return w
	}
	disarm := func(w *world) {
		dbtest.Exec(t, w.db, `DROP EVENT TRIGGER trap; DELETE FROM public.hold`)
	}
	whole := trapped(-1)
	whole.startPlain().stop()
	commands := dbtest.Value[int](t, whole.db, `SELECT last_value::int FROM public.commands`)
	disarm(whole)

	rng := seeded(t)
	points := append(rng.Perm(commands - 1)[:3], commands-1) // the last is after the first migration
	for _, point := range points {
		t.Run(fmt.Sprintf("command %d of %d", point+1, commands), func(t *testing.T) {
			w := trapped(point + 1)
			s := w.launch(plainBinary, w.config())
			eventually(t, "the migration has come to the command", 30*time.Second, func() bool {
				return dbtest.Value[int](t, w.db, `SELECT CASE WHEN is_called THEN last_value ELSE 0 END::int FROM public.commands`) == point+1
			})
			before := dbtest.Value[string](t, w.db, `SELECT coalesce(to_regclass('identity_auth.schema_migrations')::text, 'none')`)
			s.kill()
			// One of the two waits for nobody but the dead one's session.
			next := w.launch(plainBinary, w.config(cheapHashes))
			again := w.launch(plainBinary, w.config(cheapHashes))
			next.waitReady()
			again.waitReady()
			disarm(w)
			t.Logf("schema_migrations at the kill: %s", before)
			w.t = t
			checkMigrated(t, w, next)
		})
	}
}
