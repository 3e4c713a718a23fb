package dbtest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Server is a PostgreSQL of one test's own, to be killed, stopped and paused.
// Its methods belong to the test's goroutine, fail the test when they do not
// succeed, and need Linux.
type Server struct {
	t      testing.TB
	c      *cluster
	paused bool
	closed bool
}

const serverDatabase = "identity_auth"

// Start starts a server with one migrated database; settings, such as
// "fsync=on", win over the package's own. When the test is over, in
// whatever state it left the server, the database is checked with Check after
// PostgreSQL's own crash recovery, and everything is removed.
func Start(t testing.TB, settings ...string) *Server {
	t.Helper()
	c, err := newCluster(settings...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.close)
	if err := c.createMigrated(serverDatabase); err != nil {
		t.Fatal(err)
	}
	return newServer(t, c)
}

func newServer(t testing.TB, c *cluster) *Server {
	s := &Server{t: t, c: c}
	t.Cleanup(func() {
		if s.closed {
			return
		}
		if s.paused {
			s.Resume()
		}
		if !c.running() {
			s.Restart() // also frees the shared memory that a kill leaves behind
		}
		Check(t, s.URL())
	})
	return s
}

// URL is the DATABASE_URL; it stays the same over restarts.
func (s *Server) URL() string { return s.c.url(serverDatabase) }

// Kill ends every process of the server with SIGKILL and returns when none is
// left. Commits that were not flushed to the operating system are lost.
func (s *Server) Kill() { s.t.Helper(); s.must(s.c.kill()); s.paused = false }

// Stop shuts the server down cleanly, with its clients' connections.
func (s *Server) Stop() { s.t.Helper(); s.must(s.c.stop()) }

// Restart starts the server again and returns when it answers; one that still
// runs is stopped first.
func (s *Server) Restart() {
	s.t.Helper()
	if s.c.running() {
		s.Stop()
	}
	s.must(s.c.start())
}

// Pause freezes every process of the server: connections stay open and nothing
// answers, as with a host that hangs.
func (s *Server) Pause() {
	s.t.Helper()
	_, err := s.c.freeze()
	s.must(err)
	s.paused = true
}

// Resume ends a Pause.
func (s *Server) Resume() { s.t.Helper(); s.must(s.c.thaw()); s.paused = false }

// Postmaster is the process id of the server's first process.
func (s *Server) Postmaster() int { return s.c.pid }

// KillPostmaster ends the server's first process with SIGKILL, and no other.
func (s *Server) KillPostmaster() { s.t.Helper(); s.must(s.c.killPostmaster()) }

// Recover returns when the server answers; one that has ended, such as on a
// full disk, is started again.
func (s *Server) Recover() { s.t.Helper(); s.must(s.c.recover()) }

// Close ends the server as Kill does and removes it, unchecked.
func (s *Server) Close() {
	s.t.Helper()
	if s.c.running() {
		s.Kill()
	}
	s.c.close()
	s.closed = true
}

// Standby starts a streaming standby of s. From the return on no commit of s is
// answered before the standby has it.
func (s *Server) Standby() *Server {
	s.t.Helper()
	c, err := newStandby(s.c)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.close)
	standby := newServer(s.t, c)
	s.must(s.c.admin(`ALTER SYSTEM SET synchronous_standby_names = '*'`))
	s.must(s.c.admin(`SELECT pg_reload_conf()`))
	s.must(withConn(s.c.url("postgres"), func(ctx context.Context, conn *pgx.Conn) error {
		poll := func(condition string, args ...any) error {
			for {
				var holds bool
				err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_stat_replication WHERE sync_state = 'sync' AND `+condition+`)`, args...).Scan(&holds)
				if err != nil || holds {
					return err
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
		if err := poll(`true`); err != nil {
			return err
		}
		// The setting is a flag in shared memory that the checkpointer sets when it
		// reads the file, which it does before it makes a checkpoint. What was
		// committed before that must have arrived too.
		if _, err := conn.Exec(ctx, `CHECKPOINT`); err != nil {
			return err
		}
		var now string
		if err := conn.QueryRow(ctx, `SELECT pg_current_wal_lsn()::text`).Scan(&now); err != nil {
			return err
		}
		return poll(`flush_lsn >= $1::pg_lsn`, now)
	}))
	return standby
}

// Promote makes a standby a server of its own. Whoever calls it sees to it that
// the old primary takes no more writes.
func (s *Server) Promote() {
	s.t.Helper()
	s.must(withConn(s.c.url("postgres"), func(ctx context.Context, conn *pgx.Conn) error {
		var promoted bool
		err := conn.QueryRow(ctx, `SELECT pg_promote()`).Scan(&promoted)
		if err == nil && !promoted {
			err = errors.New("the standby was not promoted")
		}
		return err
	}))
}

func (s *Server) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}
