// Package dbtest gives tests a real PostgreSQL of their own: private servers
// on 127.0.0.1, started when first needed and gone with the test process,
// however that ends.
//
// A package that uses New or Empty has
//
//	func TestMain(m *testing.M) { os.Exit(dbtest.Main(m)) }
//
// Durability is the service's business to ask for: the servers' default is
// synchronous_commit = off with a lazy WAL writer, so that a commit which
// relies on the default is lost when a test kills the server.
package dbtest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/migrate"
	"github.com/7d-solutions/identity-auth/sql"
	"github.com/jackc/pgx/v5"
)

// patience bounds everything here that waits for PostgreSQL.
const patience = 30 * time.Second

const template = "identity_auth_template"

// shared is the one server behind New and Empty. mu guards it, and makes
// clones follow each other: PostgreSQL refuses two at once of one template.
var shared struct {
	mu     sync.Mutex
	inMain bool
	server *cluster // nil before the first use
	err    error    // why it could not be started
	clones int
}

// Main runs the tests of a package and then stops the shared server.
func Main(m *testing.M) int {
	shared.inMain = true
	defer func() {
		if shared.server != nil {
			shared.server.close()
		}
	}()
	return m.Run()
}

// New returns the DATABASE_URL of a fresh, migrated database. When the test is
// over the database is checked with Check and dropped, so whatever the test
// started on it should have been stopped by then.
func New(t testing.TB) string {
	t.Helper()
	url := clone(t, template)
	t.Cleanup(func() { Check(t, url) }) // runs before the drop
	return url
}

// Empty returns the DATABASE_URL of a fresh database without our schema.
func Empty(t testing.TB) string {
	t.Helper()
	return clone(t, "template0")
}

func clone(t testing.TB, from string) string {
	t.Helper()
	server, name, err := createClone(from)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.admin(`DROP DATABASE ` + name + ` WITH (FORCE)`); err != nil {
			t.Errorf("dropping the test's database: %v", err)
		}
	})
	return server.url(name)
}

func createClone(from string) (server *cluster, name string, err error) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if !shared.inMain {
		return nil, "", errors.New("dbtest: the package needs func TestMain(m *testing.M) { os.Exit(dbtest.Main(m)) }")
	}
	if shared.server == nil && shared.err == nil {
		shared.server, shared.err = startShared()
	}
	if shared.err != nil {
		return nil, "", shared.err
	}
	shared.clones++
	name = fmt.Sprintf("test_%d", shared.clones)
	return shared.server, name, shared.server.admin(`CREATE DATABASE ` + name + ` TEMPLATE ` + from)
}

func startShared() (*cluster, error) {
	c, err := newCluster()
	if err != nil {
		return nil, err
	}
	err = c.createMigrated(template)
	if err == nil {
		// Not even autovacuum may be connected to what is being cloned.
		err = c.admin(`ALTER DATABASE ` + template + ` ALLOW_CONNECTIONS false`)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// createMigrated makes a database with the schema of this source tree.
func (c *cluster) createMigrated(name string) error {
	if err := c.admin(`CREATE DATABASE ` + name + ` TEMPLATE template0`); err != nil {
		return err
	}
	migrations, err := migrate.Load(sql.FS)
	if err != nil {
		return err
	}
	return withConn(c.url(name), func(ctx context.Context, conn *pgx.Conn) error {
		_, err := migrate.Apply(ctx, conn, migrations)
		return err
	})
}

// admin executes one statement outside any test's database.
func (c *cluster) admin(sql string) error {
	return withConn(c.url("postgres"), func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, sql)
		return err
	})
}

// withConn connects for one call of f. Names without a schema mean ours, or
// public where ours does not exist.
func withConn(url string, f func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience) // a test's own context is over in its cleanup
	defer cancel()
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return err
	}
	cfg.RuntimeParams["search_path"] = migrate.Schema + ", public"
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	return f(ctx, conn)
}

// Exec runs SQL, several statements if it takes no arguments, on the database
// at url and returns the number of rows the last statement affected.
func Exec(t testing.TB, url, sql string, args ...any) int64 {
	t.Helper()
	var affected int64
	err := withConn(url, func(ctx context.Context, conn *pgx.Conn) error {
		tag, err := conn.Exec(ctx, sql, args...)
		affected = tag.RowsAffected()
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return affected
}

// Query returns the single column that a query on the database at url selects.
func Query[T any](t testing.TB, url, sql string, args ...any) []T {
	t.Helper()
	var values []T
	err := withConn(url, func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		values, err = pgx.CollectRows(rows, pgx.RowTo[T])
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return values
}

// Value returns the single value of the single row that a query selects.
func Value[T any](t testing.TB, url, sql string, args ...any) T {
	t.Helper()
	values := Query[T](t, url, sql, args...)
	if len(values) != 1 {
		t.Fatalf("%s: got %d rows, want 1", sql, len(values))
	}
	return values[0]
}
