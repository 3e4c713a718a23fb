package db

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"
)

// pruneBatch rows are deleted by one statement, and at most pruneBatches
// statements a table follow each other: pruning never holds many locks, nor a
// connection for long.
const (
	pruneBatch   = 1000
	pruneBatches = 20
)

// Prune deletes what says nothing any more: locks, limits and reset tokens
// that are over, secrets that no mailer fetched in the life of their token,
// sessions that ended longer than SessionRetention ago, and relayed events. What is left over
// is for the next call. SKIP LOCKED keeps out of the way of traffic and of
// other replicas.
func (s *Store) Prune(ctx context.Context) error {
	// Nothing in a guard outlives the lock, the failures and the reservations
	// of its last use.
	err := s.deleteInBatches(ctx, `
DELETE FROM guards WHERE key IN (
    SELECT key FROM guards
     WHERE touched_at < clock_timestamp() - ($2::interval + interval '2 minutes') AND locked_until < clock_timestamp()
     LIMIT $1 FOR UPDATE SKIP LOCKED)`, s.rules.LockoutDuration)
	if err != nil {
		return err
	}
	err = s.deleteInBatches(ctx, `
DELETE FROM rate_windows WHERE key IN (
    SELECT key FROM rate_windows WHERE window_ends < clock_timestamp()
     LIMIT $1 FOR UPDATE SKIP LOCKED)`)
	if err != nil {
		return err
	}
	err = s.deleteInBatches(ctx, `
DELETE FROM reset_tokens WHERE token_hash IN (
    SELECT token_hash FROM reset_tokens WHERE expires_at < clock_timestamp()
     LIMIT $1 FOR UPDATE SKIP LOCKED)`)
	if err != nil {
		return err
	}
	err = s.deleteInBatches(ctx, `
DELETE FROM outbox WHERE seq IN (
    SELECT seq FROM outbox
     WHERE sent_at IS NULL AND event_type = $3 AND occurred_at < clock_timestamp() - $2::interval
     LIMIT $1 FOR UPDATE SKIP LOCKED)`, s.rules.ResetTTL, EventPasswordResetSecret)
	if err != nil {
		return err
	}
	err = s.deleteInBatches(ctx, `
DELETE FROM sessions WHERE id IN (
    SELECT id FROM sessions
     WHERE expires_day <= ((clock_timestamp() - $2::interval) AT TIME ZONE 'UTC')::date
       AND expires_at < clock_timestamp() - $2::interval
     LIMIT $1 FOR UPDATE SKIP LOCKED)`, s.rules.SessionRetention)
	if err != nil {
		return err
	}
	return s.PruneOutbox(ctx)
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
