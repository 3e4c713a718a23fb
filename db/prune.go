package db

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5/pgxpool"
)

// pruneBatch rows are deleted by one statement, and at most pruneBatches
// statements a table follow each other: pruning never holds many locks, nor a
// connection for long.
const (
	pruneBatch   = 1000
	pruneBatches = 100
)

// Prune deletes what says nothing any more: locks, limits and reset tokens
// that are over, secrets that no mailer fetched in the life of their token,
// sessions that ended longer than SessionRetention ago, and relayed events.
// What is left over is for the next call; a table that fails does not keep the
// others. SKIP LOCKED keeps out of the way of traffic and of other replicas.
func (s *Store) Prune(ctx context.Context) error {
	var errs []error
	for _, step := range []struct {
		sql  string
		args []any // behind the batch size, $1
	}{
		// Nothing in a guard outlives the lock, the failures and the reservations
		// of its last use.
		{`DELETE FROM guards WHERE key IN (
    SELECT key FROM guards
     WHERE touched_at < clock_timestamp() - ($2::interval + interval '2 minutes') AND locked_until < clock_timestamp()
     LIMIT $1 FOR UPDATE SKIP LOCKED)`, []any{s.rules.LockoutDuration}},
		{`DELETE FROM rate_windows WHERE key IN (
    SELECT key FROM rate_windows WHERE window_ends < clock_timestamp()
     LIMIT $1 FOR UPDATE SKIP LOCKED)`, nil},
		{`DELETE FROM reset_tokens WHERE token_hash IN (
    SELECT token_hash FROM reset_tokens WHERE expires_at < clock_timestamp()
     LIMIT $1 FOR UPDATE SKIP LOCKED)`, nil},
		{`DELETE FROM outbox WHERE seq IN (
    SELECT seq FROM outbox
     WHERE sent_at IS NULL AND event_type = $3 AND occurred_at < clock_timestamp() - $2::interval
     LIMIT $1 FOR UPDATE SKIP LOCKED)`, []any{s.rules.ResetTTL, EventPasswordResetSecret}},
		{`DELETE FROM sessions WHERE id IN (
    SELECT id FROM sessions
     WHERE expires_day <= ((clock_timestamp() - $2::interval) AT TIME ZONE 'UTC')::date
       AND expires_at < clock_timestamp() - $2::interval
     LIMIT $1 FOR UPDATE SKIP LOCKED)`, []any{s.rules.SessionRetention}},
	} {
		errs = append(errs, s.deleteInBatches(ctx, step.sql, step.args...))
	}
	return errors.Join(append(errs, s.pruneOutbox(ctx))...)
}

// deleteInBatches repeats a DELETE that takes the batch size as $1.
func (s *Store) deleteInBatches(ctx context.Context, sql string, args ...any) error {
	args = append([]any{pruneBatch}, args...)
	for range pruneBatches {
		var deleted int64
		err := s.do(ctx, func(ctx context.Context, conn *pgxpool.Conn) error {
			tag, err := conn.Exec(ctx, sql, args...)
			deleted = tag.RowsAffected()
			return err
		})
		if err != nil || deleted < pruneBatch {
			return err
		}
	}
	return nil
}
