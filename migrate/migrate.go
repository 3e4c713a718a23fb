// Package migrate brings a database to the schema of this binary.
//
// It guarantees: migrations run in order, each exactly once however many
// replicas start together, each wholly or not at all; what is in the database
// was made by the very files this binary holds, or by a newer binary's.
//
// It trusts the role it connects as to own the schema (or, with nothing to
// apply, to read it), and the connection to be a session of its own: behind a
// pooler that hands out single transactions the lock is worth nothing.
//
// It leaves to the caller: connecting, retrying, and closing the connection,
// whose session settings Apply changes.
package migrate

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Schema is the PostgreSQL schema of every table of ours. The tables of a
// service that shares the database, or of a first version of this one in
// public, never collide with them.
const Schema = "identity_auth"

// ErrChanged means that the database's record of applied migrations cannot
// come from this binary's files: one of them was edited after it ran, or the
// record has a hole. Nothing was applied, and trying again is no use.
var ErrChanged = errors.New("applied migrations are not those of this binary")

// lockKey names the advisory lock that appliers queue for ("idauth" in ASCII).
const lockKey int64 = 0x696461757468

// lockTimeout is how long a migration waits for a table's lock. All traffic
// on that table queues behind the wait, so it is shorter than the time a
// request may take. The caller tries again later.
const lockTimeout = "2s"

// Migration is one file. It comes only from Load.
type Migration struct {
	Version  int
	Name     string            // without number and suffix
	Checksum [sha256.Size]byte // of the file's bytes
	sql      string
}

// String is the name of the file.
func (m Migration) String() string { return fileName(m.Version, m.Name) }

// Load reads every migration at the top of fsys, in order. Numbers run from
// 0001 without gap or duplicate; any other name that ends in .sql is refused,
// so that a misnamed migration cannot be left out unseen.
func Load(fsys fs.FS) ([]Migration, error) {
	entries, err := fs.ReadDir(fsys, ".") // sorted by name, so by number
	if err != nil {
		return nil, fmt.Errorf("reading migrations: %w", err)
	}
	var ms []Migration
	for _, e := range entries {
		file := e.Name()
		if !strings.HasSuffix(strings.ToLower(file), ".sql") {
			continue
		}
		version, name, ok := parseFileName(file)
		if !ok {
			return nil, fmt.Errorf("%q is not a migration's name: want NNNN_name.sql with a name of a-z, 0-9 and _", file)
		}
		if want := len(ms) + 1; version != want {
			return nil, fmt.Errorf("%s: expected migration %04d here: numbers run from 0001 without gap or duplicate", file, want)
		}
		text, err := fs.ReadFile(fsys, file)
		if err != nil {
			return nil, fmt.Errorf("reading migrations: %w", err)
		}
		ms = append(ms, Migration{Version: version, Name: name, Checksum: sha256.Sum256(text), sql: string(text)})
	}
	if len(ms) == 0 {
		return nil, errors.New("no migration found")
	}
	return ms, nil
}

const nameChars = "abcdefghijklmnopqrstuvwxyz0123456789_"

// parseFileName accepts exactly what fileName makes of a version from 1 to
// 9999 and a name of nameChars.
func parseFileName(file string) (version int, name string, ok bool) {
	number, rest, _ := strings.Cut(file, "_")
	name, ok = strings.CutSuffix(rest, ".sql")
	if !ok || name == "" || strings.Trim(name, nameChars) != "" {
		return 0, "", false
	}
	version, err := strconv.Atoi(number)
	if err != nil || version < 1 || version > 9999 || fileName(version, name) != file {
		return 0, "", false
	}
	return version, name, true
}

func fileName(version int, name string) string { return fmt.Sprintf("%04d_%s.sql", version, name) }

// State is what Status knows of one migration.
type State struct {
	Version   int
	Name      string
	AppliedAt time.Time // zero: pending
	Changed   bool      // applied from a file with other bytes
	Unknown   bool      // applied by a newer binary
}

// String is one line for operators.
func (s State) String() string {
	what := "pending"
	switch {
	case s.Changed:
		what = "CHANGED since it was applied "
	case s.Unknown:
		what = "newer than this binary, applied "
	case !s.AppliedAt.IsZero():
		what = "applied "
	}
	if !s.AppliedAt.IsZero() {
		what += s.AppliedAt.UTC().Format(time.RFC3339)
	}
	return fileName(s.Version, s.Name) + "  " + what
}

// Status lists every migration that this binary or the database knows, by
// version. It only reads: it works before the first Apply, and for a role that
// may SELECT from schema_migrations and nothing else.
func Status(ctx context.Context, conn *pgx.Conn, ms []Migration) ([]State, error) {
	recorded, err := readRecords(ctx, conn)
	if err != nil {
		return nil, err
	}
	states := make([]State, 0, len(ms))
	for _, m := range ms {
		s := State{Version: m.Version, Name: m.Name}
		if len(recorded) > 0 && recorded[0].version == m.Version {
			s.AppliedAt = recorded[0].appliedAt
			s.Changed = string(recorded[0].checksum) != string(m.Checksum[:])
			recorded = recorded[1:]
		}
		states = append(states, s)
	}
	for _, r := range recorded {
		states = append(states, State{Version: r.version, Name: r.name, AppliedAt: r.appliedAt, Unknown: true})
	}
	return states, nil
}

// Pending returns the migrations that the database lacks; none means that this
// binary can work with it. A schema newer than the binary is accepted, one
// that disagrees with it is ErrChanged. Like Status it only reads.
func Pending(ctx context.Context, conn *pgx.Conn, ms []Migration) ([]Migration, error) {
	states, err := Status(ctx, conn, ms)
	if err != nil {
		return nil, err
	}
	applied := 0
	for _, s := range states {
		if s.AppliedAt.IsZero() {
			continue
		}
		applied++
		if s.Version != applied {
			return nil, fmt.Errorf("%w: %04d is applied and %04d is not", ErrChanged, s.Version, applied)
		}
		if s.Changed {
			return nil, fmt.Errorf("%w: %s was edited after it had been applied", ErrChanged, fileName(s.Version, s.Name))
		}
	}
	return ms[min(applied, len(ms)):], nil
}

// Apply runs what Pending returns and says what this call applied, also
// beside an error: each migration that is done stays done. It waits for other
// appliers as long as ctx allows. After an error other than ErrChanged, the
// caller may call it again on a new connection.
func Apply(ctx context.Context, conn *pgx.Conn, ms []Migration) (applied []Migration, err error) {
	// Who has nothing to apply does not wait for a newer replica that has.
	todo, err := Pending(ctx, conn, ms)
	if err != nil || len(todo) == 0 {
		return nil, err
	}
	if err := prepareSession(ctx, conn); err != nil {
		return nil, err
	}
	// The lock belongs to the session and dies with it, so that no crash of an
	// applier, of its host or of PostgreSQL leaves it taken.
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock($1)`, lockKey); err != nil {
		return nil, fmt.Errorf("waiting for the migration lock: %w", err)
	}
	defer unlock(ctx, conn)

	todo, err = Pending(ctx, conn, ms) // another replica may have been first
	if err != nil {
		return nil, err
	}
	for _, m := range todo {
		if err := m.apply(ctx, conn); err != nil {
			return applied, fmt.Errorf("migration %s: %w", m, err)
		}
		applied = append(applied, m)
	}
	return applied, nil
}

// prepareSession lifts the limits on work that the role, the database or the
// URL may carry for requests, and bounds how long an applier that died or hangs
// keeps the others waiting: it is never idle for long by itself.
func prepareSession(ctx context.Context, conn *pgx.Conn) error {
	const limitsSQL = `
SELECT set_config(name, CASE WHEN name LIKE 'idle%' THEN '5s' ELSE '0' END, false)
  FROM pg_settings
 WHERE name IN ('statement_timeout', 'lock_timeout', 'transaction_timeout',
                'idle_in_transaction_session_timeout', 'idle_session_timeout')`
	if _, err := conn.Exec(ctx, limitsSQL); err != nil {
		return fmt.Errorf("preparing the session: %w", err)
	}
	const noticeSQL = `
SELECT set_config('tcp_keepalives_idle', '10', false), set_config('tcp_keepalives_interval', '5', false),
       set_config('tcp_keepalives_count', '3', false), set_config('client_connection_check_interval', '1s', false)`
	var refused *pgconn.PgError
	if _, err := conn.Exec(ctx, noticeSQL); err != nil && !errors.As(err, &refused) { // refused: a server platform without them
		return fmt.Errorf("preparing the session: %w", err)
	}
	return nil
}

// unlock also runs when ctx is over. When it fails the connection is gone or
// useless, and closing it frees the lock.
func unlock(ctx context.Context, conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_unlock($1)`, lockKey); err != nil {
		conn.Close(ctx)
	}
}

// ensureSQL looks before it creates: IF NOT EXISTS would ask for the right to
// create even when a DBA has made the schema beforehand.
const ensureSQL = `
DO $$
BEGIN
    IF to_regnamespace('` + Schema + `') IS NULL THEN
        CREATE SCHEMA ` + Schema + `;
    END IF;
    IF to_regclass('` + Schema + `.schema_migrations') IS NULL THEN
        CREATE TABLE ` + Schema + `.schema_migrations (
            version    integer     NOT NULL PRIMARY KEY CHECK (version > 0),
            name       text        NOT NULL,
            checksum   bytea       NOT NULL CHECK (octet_length(checksum) = 32),
            applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
        );
        COMMENT ON TABLE  ` + Schema + `.schema_migrations IS 'Migrations that this schema has had.';
        COMMENT ON COLUMN ` + Schema + `.schema_migrations.version IS 'The file''s number.';
        COMMENT ON COLUMN ` + Schema + `.schema_migrations.name IS 'The file''s name without number and suffix.';
        COMMENT ON COLUMN ` + Schema + `.schema_migrations.checksum IS 'SHA-256 of the file.';
        COMMENT ON COLUMN ` + Schema + `.schema_migrations.applied_at IS 'When it was applied.';
    END IF;
END
$$`

// apply runs the migration and records it in one transaction, the creation of
// the schema included: an applier that dies anywhere leaves nothing.
func (m Migration) apply(ctx context.Context, conn *pgx.Conn) error {
	return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		const settingsSQL = `SELECT set_config('search_path', $1, true), set_config('lock_timeout', $2, true)`
		if _, err := tx.Exec(ctx, settingsSQL, Schema, lockTimeout); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, ensureSQL); err != nil {
			return err
		}
		// Without arguments pgx sends the text as one simple query, which may
		// hold any number of statements.
		if _, err := tx.Exec(ctx, m.sql); err != nil {
			return err
		}
		if tx.Conn().PgConn().TxStatus() != 'T' {
			return errors.New("the file ended its own transaction")
		}
		const recordSQL = `INSERT INTO ` + Schema + `.schema_migrations (version, name, checksum) VALUES ($1, $2, $3)`
		_, err := tx.Exec(ctx, recordSQL, m.Version, m.Name, m.Checksum[:])
		return err
	})
}

type record struct {
	version   int
	name      string
	checksum  []byte
	appliedAt time.Time
}

// readRecords returns the applied migrations by version.
func readRecords(ctx context.Context, conn *pgx.Conn) ([]record, error) {
	var exists bool
	err := conn.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL`, Schema+".schema_migrations").Scan(&exists)
	if err != nil {
		return nil, fmt.Errorf("looking for schema_migrations: %w", err)
	}
	if !exists {
		return nil, nil
	}
	rows, err := conn.Query(ctx, `SELECT version, name, checksum, applied_at FROM `+Schema+`.schema_migrations ORDER BY version`)
	if err != nil {
		return nil, fmt.Errorf("reading schema_migrations: %w", err)
	}
	records, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r record, err error) {
		return r, row.Scan(&r.version, &r.name, &r.checksum, &r.appliedAt)
	})
	if err != nil {
		return nil, fmt.Errorf("reading schema_migrations: %w", err)
	}
	return records, nil
}
