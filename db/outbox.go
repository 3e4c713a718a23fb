package db

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// EventPasswordResetSecret is not an event for everyone: its data is a sealed
// token for the mailer. It goes to a stream of its own, its row is transient,
// and it is never sent again once acknowledged.
const EventPasswordResetSecret EventType = "auth.secrets.password_reset"

// OutboxRow is one event as it was written.
type OutboxRow struct {
	Seq         int64
	EventID     EventID
	Type        EventType
	Tenant      TenantID
	User        UserID
	TraceID     string
	CausationID *EventID // nil: none
	OccurredAt  time.Time
	Data        json.RawMessage
}

// Lane is what keeps its order: the events of one user, or the user's secrets.
type Lane struct {
	Tenant TenantID
	User   UserID
	Secret bool
}

// Lane is the row's.
func (r OutboxRow) Lane() Lane {
	return Lane{r.Tenant, r.User, r.Type == EventPasswordResetSecret}
}

// RelayID names a process that wants to relay.
type RelayID struct{ uuid }

// NewRelayID is a fresh random id.
func NewRelayID() RelayID { return RelayID{newUUID()} }

// AcquireRelay makes id the holder of the relay for ttl, by PostgreSQL's clock,
// unless another holder's time is not over. Of N replicas at most one holds it.
func (s *Store) AcquireRelay(ctx context.Context, id RelayID, ttl time.Duration) (held bool, err error) {
	return s.exec(ctx, `
UPDATE relay SET holder = $1, lease_until = clock_timestamp() + $2::interval
 WHERE holder IS NULL OR holder = $1 OR lease_until < clock_timestamp()`, id, ttl)
}

// RenewRelay prolongs the time of the holder. held is false once another
// process has been the holder in between.
func (s *Store) RenewRelay(ctx context.Context, id RelayID, ttl time.Duration) (held bool, err error) {
	return s.exec(ctx, `UPDATE relay SET lease_until = clock_timestamp() + $2::interval WHERE holder = $1`, id, ttl)
}

// ReleaseRelay lets another process become the holder at once.
func (s *Store) ReleaseRelay(ctx context.Context, id RelayID) error {
	_, err := s.exec(ctx, `UPDATE relay SET holder = NULL WHERE holder = $1`, id)
	return err
}

// unsentSQL walks along outbox_unsent. NOT IN becomes a hash of the held lanes
// beside it: neither their number nor that of sent rows makes it slow.
const unsentSQL = `
SELECT seq, event_id, event_type, tenant_id, user_id, trace_id, causation_id, occurred_at, data
  FROM outbox
 WHERE sent_at IS NULL
   AND (tenant_id, user_id, event_type = $1) NOT IN (SELECT * FROM unnest($2::uuid[], $3::uuid[], $4::boolean[]))
 ORDER BY seq LIMIT $5`

// UnsentEvents are the first unacknowledged events in the order of writing,
// without those of the held lanes. Each row itself says that it is unsent, so
// one that becomes visible after later ones is not missed.
func (s *Store) UnsentEvents(ctx context.Context, limit int, held []Lane) ([]OutboxRow, error) {
	tenants, users, secret := make([]TenantID, len(held)), make([]UserID, len(held)), make([]bool, len(held))
	for i, l := range held {
		tenants[i], users[i], secret[i] = l.Tenant, l.User, l.Secret
	}
	var rows []OutboxRow
	err := s.do(ctx, func(ctx context.Context, conn *pgxpool.Conn) error {
		found, err := conn.Query(ctx, unsentSQL, EventPasswordResetSecret, tenants, users, secret, limit)
		if err != nil {
			return err
		}
		rows, err = pgx.CollectRows(found, func(row pgx.CollectableRow) (r OutboxRow, err error) {
			return r, row.Scan(&r.Seq, &r.EventID, &r.Type, &r.Tenant, &r.User, &r.TraceID, &r.CausationID, &r.OccurredAt, &r.Data)
		})
		return err
	})
	return rows, err
}

// Ack is JetStream's acknowledgement of one row.
type Ack struct{ Seq, StreamSeq int64 }

// markSentSQL needs the lock on the stream's row first, which makes it come
// wholly before or wholly after a CompareStream. It does not ask whether a row
// is unsent: that would invite a walk over the whole backlog in place of one
// look-up a row. A row that becomes transient meanwhile is left unsent, and
// deleted with its next acknowledgement.
const markSentSQL = `
WITH fence AS (
    UPDATE relay_streams SET acked_seq = greatest(acked_seq, (SELECT max(a) FROM unnest($4::bigint[]) AS a))
     WHERE stream = $1 AND generation = $2
    RETURNING stream
), acks AS MATERIALIZED (
    SELECT a.* FROM fence, unnest($3::bigint[], $4::bigint[]) AS a(seq, stream_seq)
), gone AS (
    DELETE FROM outbox AS o USING acks WHERE o.seq = acks.seq AND o.transient
), sent AS (
    UPDATE outbox AS o SET sent_at = clock_timestamp(), stream_seq = acks.stream_seq
      FROM acks WHERE o.seq = acks.seq AND NOT o.transient
)
SELECT EXISTS (SELECT FROM fence)`

// MarkSent records acknowledgements of one stream, received since generation
// was learnt from CompareStream; transient rows are deleted. ok is false, and
// nothing is recorded, when a loss was noticed since: what was acknowledged may
// be gone. Recording twice does no harm.
func (s *Store) MarkSent(ctx context.Context, stream string, generation int64, acks []Ack) (ok bool, err error) {
	seqs, streamSeqs := make([]int64, len(acks)), make([]int64, len(acks))
	for i, a := range acks {
		seqs[i], streamSeqs[i] = a.Seq, a.StreamSeq
	}
	err = s.queryRow(ctx, []any{&ok}, markSentSQL, stream, generation, seqs, streamSeqs)
	return ok, err
}

// StreamState is what JetStream says of a stream.
type StreamState struct {
	Name    string
	Created time.Time
	LastSeq int64
}

// CompareStream holds what JetStream says of a stream against what it has
// acknowledged. lost means that it is another stream than before or ends
// before an acknowledged message; LastSeq never sinks by age or limits. From
// then on acknowledgements of earlier generations do not count. resend means
// that a loss, this or an earlier one, is to be made good with ResendLost
// before anything else is published; of secrets nothing is kept to send again.
func (s *Store) CompareStream(ctx context.Context, st StreamState, secrets bool) (generation int64, lost, resend bool, err error) {
	err = s.tx(ctx, func(ctx context.Context, tx pgx.Tx) error {
		created := st.Created.UTC().Format(time.RFC3339Nano)
		_, err := tx.Exec(ctx, `INSERT INTO relay_streams (stream, created) VALUES ($1, $2) ON CONFLICT DO NOTHING`, st.Name, created)
		if err != nil {
			return err
		}
		var known string
		var acked int64
		err = tx.QueryRow(ctx, `
SELECT created, acked_seq, generation, resend_above IS NOT NULL FROM relay_streams WHERE stream = $1 FOR UPDATE`, st.Name).
			Scan(&known, &acked, &generation, &resend)
		if err != nil {
			return err
		}
		above := st.LastSeq
		if known != created {
			above = -1
		} else if acked <= st.LastSeq {
			return nil
		}
		lost = true
		return tx.QueryRow(ctx, `
UPDATE relay_streams
   SET created = $2, generation = generation + 1, acked_seq = greatest($3, 0),
       resend_above = CASE WHEN NOT $4 THEN least(resend_above, $3) END,
       resend_after = CASE WHEN NOT $4 THEN 0 END
 WHERE stream = $1
RETURNING generation, resend_above IS NOT NULL`, st.Name, created, above, secrets).Scan(&generation, &resend)
	})
	return generation, lost, resend, err
}

// outboxPage rows are looked at by one statement that walks the outbox.
const outboxPage = 10000

// ResendLost makes the next page of lost events unsent again and tells how
// many there were, and whether that was the last page. Where it stands is in
// the database, so that whoever relays next goes on.
func (s *Store) ResendLost(ctx context.Context, stream string) (n int64, done bool, err error) {
	err = s.queryRow(ctx, []any{&n, &done}, `
WITH r AS (
    SELECT resend_above, resend_after FROM relay_streams WHERE stream = $1 AND resend_above IS NOT NULL FOR UPDATE
), page AS (
    SELECT p.seq, p.sent_at IS NOT NULL AND p.stream_seq > r.resend_above AS lost
      FROM r, LATERAL (SELECT * FROM outbox WHERE seq > r.resend_after ORDER BY seq LIMIT $2) AS p
), resent AS (
    UPDATE outbox AS o SET sent_at = NULL, stream_seq = NULL FROM page WHERE o.seq = page.seq AND page.lost
    RETURNING o.seq
), moved AS (
    UPDATE relay_streams
       SET resend_after = (SELECT max(seq) FROM page),
           resend_above = CASE WHEN EXISTS (SELECT FROM page) THEN resend_above END
     WHERE stream = $1
)
SELECT (SELECT count(*) FROM resent), NOT EXISTS (SELECT FROM page)`, stream, outboxPage)
	return n, done, err
}

// Replay makes the relayed events of one page of the outbox that occurred in
// [since, until) unsent again. The caller begins with after 0 and goes on with
// next until that is 0.
func (s *Store) Replay(ctx context.Context, since, until time.Time, after int64) (n, next int64, err error) {
	err = s.queryRow(ctx, []any{&n, &next}, `
WITH page AS (
    SELECT seq FROM outbox WHERE seq > $1 ORDER BY seq LIMIT $2
), again AS (
    UPDATE outbox AS o SET sent_at = NULL, stream_seq = NULL
      FROM page
     WHERE o.seq = page.seq AND o.sent_at IS NOT NULL AND o.occurred_at >= $3 AND o.occurred_at < $4
    RETURNING o.seq
)
SELECT (SELECT count(*) FROM again), coalesce((SELECT max(seq) FROM page), 0)`, after, outboxPage, since, until)
	if n > 0 {
		s.wakeRelay()
	}
	return n, next, err
}

// OutboxBacklog is the number of events not acknowledged yet, and the age of
// the one written first.
func (s *Store) OutboxBacklog(ctx context.Context) (pending int64, oldest time.Duration, err error) {
	var age float64
	err = s.queryRow(ctx, []any{&pending, &age}, `
SELECT (SELECT count(*) FROM outbox WHERE sent_at IS NULL),
       coalesce((SELECT extract(epoch FROM clock_timestamp() - occurred_at) FROM outbox
                  WHERE sent_at IS NULL ORDER BY seq LIMIT 1), 0)::float8`)
	return pending, seconds(age), err
}

// PendingThrough is the number of unacknowledged events up to seq through, and
// the last of them.
func (s *Store) PendingThrough(ctx context.Context, through int64) (pending, last int64, err error) {
	err = s.queryRow(ctx, []any{&pending, &last}, `
SELECT count(*), coalesce(max(seq), 0) FROM outbox WHERE sent_at IS NULL AND seq <= $1`, through)
	return pending, last, err
}

// pruneOutbox deletes events acknowledged longer than OutboxRetention ago, in
// small batches. It walks from the oldest row and stops at the first page that
// ends with a younger one; unsent rows are stepped over and stay, whatever
// their age. What is left over is for the next call.
func (s *Store) pruneOutbox(ctx context.Context) error {
	var after int64
	for range pruneBatches {
		more := false
		err := s.queryRow(ctx, []any{&after, &more}, `
WITH page AS (
    SELECT seq, occurred_at FROM outbox WHERE seq > $1 ORDER BY seq LIMIT $2
), gone AS (
    DELETE FROM outbox WHERE seq IN (
        SELECT o.seq FROM outbox AS o JOIN page USING (seq)
         WHERE o.sent_at < clock_timestamp() - $3::interval FOR UPDATE OF o SKIP LOCKED)
)
SELECT seq, occurred_at < clock_timestamp() - $3::interval FROM page ORDER BY seq DESC LIMIT 1`, after, pruneBatch, s.rules.OutboxRetention)
		if errors.Is(err, pgx.ErrNoRows) || err == nil && !more {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}
