// Package db is the only room that knows SQL. Each method of Store is one
// transaction and one promise; no transaction leaves the package.
//
// It guarantees: a change and the event that tells of it are written together
// or not at all; what must happen at most once is decided by one statement or
// under one row lock, so any number of replicas may run on one database; time
// is PostgreSQL's. It trusts PostgreSQL and the ids and addresses made by the
// parsers here. It leaves to its caller: hashing, tokens, and what an outcome
// means to a client.
//
// An outcome that the caller acts on is a value. An error means "could not
// find out": ErrUnavailable when PostgreSQL cannot be asked now, anything else
// is a mistake of ours.
//
// Rows are locked in one order everywhere: guard, account, sessions.
package db

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrUnavailable wraps every failure to reach PostgreSQL, to get a connection
// in time, or to write because the server is read-only, full or shutting down.
// What was asked may or may not have happened.
var ErrUnavailable = errors.New("database unavailable")

// opTimeout bounds one Store call, waiting for a connection included, so that
// a client hears 503 within 5 seconds.
const opTimeout = 4 * time.Second

// Rules are the configured numbers that the statements apply. Durations are
// positive unless zero is given a meaning.
type Rules struct {
	LoginPerMinute   int           // 0: no limit
	RefreshPerMinute int           // 0: no limit
	LockoutThreshold int           // wrong guesses per lock, at least 1
	LockoutDuration  time.Duration // life of a lock and of a counted failure
	AccessTokenTTL   time.Duration // only to tell consumers of auth.session.revoked how long to remember it
	RefreshTokenTTL  time.Duration // idle life of a session
	SessionMaxAge    time.Duration // absolute life of a session
	ReuseGrace       time.Duration // 0: a spent token is always a replay
	MaxSessions      int           // per account; 0: no limit
	ResetTTL         time.Duration // life of a password reset token
	SessionRetention time.Duration // how long ended sessions are kept
	OutboxRetention  time.Duration // how long relayed events are kept
}

// Store is safe for concurrent use. Everything in it is set by Open.
type Store struct {
	pool  *pgxpool.Pool
	rules Rules
	wake  chan struct{} // one token: an event was committed here

	plaintextRemote bool
}

// Open prepares a pool of at most maxConns connections. It does not connect:
// PostgreSQL may be away. url is a DSN or URL, with several hosts if wanted.
func Open(url string, maxConns int, rules Rules) (*Store, error) {
	cfg, err := parseURL(url)
	if err != nil {
		return nil, err
	}
	cfg.MaxConns = int32(maxConns)
	cfg.MaxConnLifetime = time.Hour
	cfg.MaxConnIdleTime = 5 * time.Minute
	params := cfg.ConnConfig.RuntimeParams
	params["search_path"] = "identity_auth"
	// A replica that is stopped in the middle of anything must not hold its
	// row locks for longer than others are willing to wait.
	params["statement_timeout"] = "4500"
	params["idle_in_transaction_session_timeout"] = "4500"
	cfg.AfterConnect = prepare
	pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
	if err != nil {
		return nil, fmt.Errorf("connection pool: %w", err)
	}
	return &Store{pool: pool, rules: rules, plaintextRemote: plaintextRemote(cfg.ConnConfig), wake: make(chan struct{}, 1)}, nil
}

// Conn is a connection that a caller has for itself.
type Conn = pgx.Conn

// Alone gives f a connection of the pool for itself, without the time limits
// of requests, and closes it afterwards, whatever f has done to it.
func (s *Store) Alone(ctx context.Context, f func(*Conn) error) error {
	conn, err := s.pool.Acquire(ctx)
	if err != nil {
		return s.classify(err)
	}
	defer conn.Release()
	defer conn.Conn().Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `SELECT set_config('statement_timeout', '0', false), set_config('idle_in_transaction_session_timeout', '0', false)`); err != nil {
		return s.classify(err)
	}
	return f(conn.Conn())
}

// CheckURL tells whether Open would take the URL.
func CheckURL(url string) error {
	_, err := parseURL(url)
	return err
}

func parseURL(url string) (*pgxpool.Config, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, errors.New("not a PostgreSQL DSN or URL") // pgx's text could hold the password
	}
	c := cfg.ConnConfig
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 2 * time.Second
	}
	if c.RuntimeParams["application_name"] == "" {
		c.RuntimeParams["application_name"] = "identity-auth"
	}
	neverFallBack(c)
	return cfg, nil
}

// neverFallBack takes the downgrade out of sslmode=prefer (the default) and
// allow: whoever sits in between could force it, so it protects nobody who
// relies on it. These modes connect in plaintext, which is warned of;
// require, verify-ca and verify-full are TLS or nothing.
func neverFallBack(c *pgx.ConnConfig) {
	tries := append([]*pgconn.FallbackConfig{{Host: c.Host, Port: c.Port, TLSConfig: c.TLSConfig}}, c.Fallbacks...)
	var plain []*pgconn.FallbackConfig
	downgrade := false
	for _, t := range tries {
		if t.TLSConfig == nil {
			plain = append(plain, t)
			downgrade = downgrade || !isSocket(t.Host)
		}
	}
	if downgrade {
		tries = plain
	}
	c.Host, c.Port, c.TLSConfig, c.Fallbacks = tries[0].Host, tries[0].Port, tries[0].TLSConfig, tries[1:]
}

func isSocket(host string) bool { return strings.HasPrefix(host, "/") || strings.HasPrefix(host, "@") }

// plaintextRemote tells whether a password may cross a network in clear.
func plaintextRemote(c *pgx.ConnConfig) bool {
	for _, t := range append([]*pgconn.FallbackConfig{{Host: c.Host, TLSConfig: c.TLSConfig}}, c.Fallbacks...) {
		addr, err := netip.ParseAddr(t.Host)
		local := isSocket(t.Host) || t.Host == "localhost" || err == nil && addr.IsLoopback()
		if t.TLSConfig == nil && !local {
			return true
		}
	}
	return false
}

// PlaintextRemote tells whether the connection to PostgreSQL crosses a network
// without TLS.
func (s *Store) PlaintextRemote() bool { return s.plaintextRemote }

// prepare readies a new connection: times come in UTC, and commits are durable.
func prepare(ctx context.Context, conn *pgx.Conn) error {
	conn.TypeMap().RegisterType(&pgtype.Type{Name: "timestamptz", OID: pgtype.TimestamptzOID, Codec: &pgtype.TimestamptzCodec{ScanLocation: time.UTC}})
	return requireDurableCommits(ctx, conn)
}

// requireDurableCommits makes every answered success survive a crash of
// PostgreSQL, whatever the server's default is. A stronger setting
// (remote_apply) is left alone.
func requireDurableCommits(ctx context.Context, conn *pgx.Conn) error {
	_, err := conn.Exec(ctx, `
SELECT set_config('synchronous_commit', 'on', false)
 WHERE current_setting('synchronous_commit') <> 'remote_apply'`)
	return err
}

// Close waits for calls under way and closes every connection.
func (s *Store) Close() { s.pool.Close() }

// Wake receives after events were committed through this Store.
func (s *Store) Wake() <-chan struct{} { return s.wake }

func (s *Store) wakeRelay() {
	select {
	case s.wake <- struct{}{}:
	default: // already woken
	}
}

// Probe asks whether PostgreSQL takes writes now.
func (s *Store) Probe(ctx context.Context) error {
	return s.do(ctx, func(ctx context.Context, conn *pgxpool.Conn) error {
		var readOnly bool
		err := conn.QueryRow(ctx, `SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean`).Scan(&readOnly)
		if err == nil && readOnly {
			s.pool.Reset()
			return fmt.Errorf("%w: server is read-only", ErrUnavailable)
		}
		return err
	})
}

// PoolStats are numbers of connections.
type PoolStats struct{ Idle, Used, Max int }

// Stats are the pool's numbers at this moment.
func (s *Store) Stats() PoolStats {
	st := s.pool.Stat()
	return PoolStats{Idle: int(st.IdleConns()), Used: int(st.AcquiredConns()), Max: int(st.MaxConns())}
}

// do runs f on one connection. Waiting for the connection ends when ctx does;
// once f has begun it runs to its end even if the client hangs up, for two
// reasons: a wrong guess must be counted, and pgx closes a connection whose
// query is cancelled, which would let clients that hang up drain the pool.
func (s *Store) do(ctx context.Context, f func(context.Context, *pgxpool.Conn) error) error {
	deadline := time.Now().Add(opTimeout)
	waitCtx, cancelWait := context.WithDeadline(ctx, deadline)
	defer cancelWait()
	conn, err := s.pool.Acquire(waitCtx)
	if err != nil {
		return s.classify(err)
	}
	defer conn.Release()
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	runCtx, cancelRun := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancelRun()
	return s.classify(f(runCtx, conn))
}

// tx runs f in one transaction and commits it when f returns nil.
func (s *Store) tx(ctx context.Context, f func(context.Context, pgx.Tx) error) error {
	return s.do(ctx, func(ctx context.Context, conn *pgxpool.Conn) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error { return f(ctx, tx) })
	})
}

// exec runs one statement and tells whether it changed a row.
func (s *Store) exec(ctx context.Context, sql string, args ...any) (changed bool, err error) {
	err = s.do(ctx, func(ctx context.Context, conn *pgxpool.Conn) error {
		tag, err := conn.Exec(ctx, sql, args...)
		changed = tag.RowsAffected() > 0
		return err
	})
	return changed, err
}

// queryRow runs one statement that returns one row.
func (s *Store) queryRow(ctx context.Context, dest []any, sql string, args ...any) error {
	return s.do(ctx, func(ctx context.Context, conn *pgxpool.Conn) error {
		return conn.QueryRow(ctx, sql, args...).Scan(dest...)
	})
}

// outageClasses are connection, transaction state, authorization, missing
// database, rollback, resources, locks, intervention, system (PostgreSQL,
// appendix A).
var outageClasses = []string{"08", "25", "28", "3D", "40", "53", "55", "57", "58", "XX"}

// classify turns everything that is not a mistake in our own SQL into
// ErrUnavailable. The caller's own cancellation stays what it is.
func (s *Store) classify(err error) error {
	if err == nil || errors.Is(err, pgx.ErrNoRows) || errors.Is(err, ErrUnavailable) || errors.Is(err, context.Canceled) {
		return err
	}
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) {
		var own ownError
		if errors.As(err, &own) || errors.Is(err, ErrSessionOver) || errors.Is(err, ErrNoAccount) || errors.Is(err, ErrTaken) {
			return err
		}
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	if pgErr.Code == "25006" { // read_only_sql_transaction: a demoted server
		s.pool.Reset()
	}
	notMigrated := pgErr.Code == "42P01" || pgErr.Code == "3F000" // no table, no schema
	if notMigrated || slices.Contains(outageClasses, pgErr.Code[:2]) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func isUniqueViolation(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == "23505"
}

// ownError ends a transaction for a reason of ours; it never leaves a method.
type ownError string

func (e ownError) Error() string { return string(e) }

func seconds(f float64) time.Duration { return time.Duration(f * float64(time.Second)) }
