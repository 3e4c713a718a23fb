package dbtest

import "testing"

// Server is a PostgreSQL of one test's own, to be killed, stopped and paused.
// Its methods belong to the test's goroutine, fail the test when they do not
// succeed, and need Linux.
type Server struct {
	t      testing.TB
	c      *cluster
	paused bool
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
	s := &Server{t: t, c: c}
	t.Cleanup(func() {
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

func (s *Server) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}
