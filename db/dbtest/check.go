package dbtest

import (
	"context"
	"testing"

	"github.com/7d-solutions/identity-auth/migrate"
	"github.com/jackc/pgx/v5"
)

// invariants hold at every commit, whatever ran concurrently, crashed or was
// rolled back, and also after a test has moved times into the past. Each
// statement selects a text about every row that breaks one. What constraints
// of the schema hold by themselves is not repeated here.
var invariants = []struct{ promise, sql string }{
	{"no session of a disabled account is live", `
SELECT s.id::text FROM sessions AS s JOIN accounts AS a USING (tenant_id, user_id)
 WHERE a.disabled_at IS NOT NULL AND s.revoked_at IS NULL AND s.expires_at > clock_timestamp()`},

	{"a revoked session has expired with its revocation", `
SELECT id::text FROM sessions WHERE expires_at > revoked_at`},

	{"only a rotation leaves a spent secret or a seed, and never the current secret twice", `
SELECT id::text FROM sessions
 WHERE generation = 0 AND (prev_step_hash IS NOT NULL OR step_seed IS NOT NULL) OR prev_step_hash = step_hash`},

	{"guesses of an address are distinct, each is pending or failed, and none is newer than the last ticket", `
SELECT encode(g.key, 'hex') FROM guards AS g, LATERAL unnest(g.pending || g.failed) AS guess
 GROUP BY g.key HAVING count(*) <> count(DISTINCT guess) OR max(guess) > g.ticket`},

	{"guess lists are bounded", `
SELECT encode(key, 'hex') FROM guards WHERE cardinality(pending) + cardinality(failed) > 1000`},

	{"an event is unique, told after it happened, and about its own user", `
SELECT event_id::text FROM outbox
 GROUP BY event_id
HAVING count(*) > 1 OR max(occurred_at) > clock_timestamp()
    OR bool_or(data->>'user_id' IS DISTINCT FROM user_id::text AND event_type NOT LIKE 'auth.secrets.%')`},

	{"no event holds a refresh token", `
SELECT event_id::text FROM outbox WHERE data::text LIKE '%iar\_%'`},

	{"a session is begun, ended and found replayed at most once", `
SELECT event_type || ' ' || (data->>'session_id') FROM outbox
 WHERE event_type IN ('auth.user.logged_in', 'auth.user.logged_out', 'auth.session.revoked', 'security.refresh_replay_detected')
 GROUP BY event_type, data->>'session_id' HAVING count(*) > 1`},

	{"no session is refreshed before its login or after its revocation", `
SELECT data->>'session_id' FROM outbox WHERE data ? 'session_id'
 GROUP BY data->>'session_id'
HAVING max(seq) FILTER (WHERE event_type = 'auth.token.refreshed')
         > min(seq) FILTER (WHERE event_type IN ('auth.session.revoked', 'auth.user.logged_out'))
    OR min(seq) < min(seq) FILTER (WHERE event_type = 'auth.user.logged_in')`},

	{"no event tells of a rotation that is not in the row", `
SELECT s.id::text
  FROM sessions AS s JOIN outbox AS o ON o.event_type = 'auth.token.refreshed' AND o.data->>'session_id' = s.id::text
 WHERE o.seq > ALL (SELECT seq FROM outbox AS p -- a change of the password begins a new family of tokens
                     WHERE event_type = 'auth.user.password_changed' AND (p.tenant_id, p.user_id) = (s.tenant_id, s.user_id))
 GROUP BY s.id HAVING count(*) > s.generation`},

	{"an account exists if it was registered or imported and not deleted since", whileComplete + `
SELECT coalesce(a.user_id, e.user_id)::text
  FROM accounts AS a FULL JOIN (
       SELECT tenant_id, user_id,
              count(*) FILTER (WHERE event_type IN ('auth.user.registered', 'auth.user.imported'))
            - count(*) FILTER (WHERE event_type = 'auth.user.deleted') AS n
         FROM outbox GROUP BY tenant_id, user_id) AS e USING (tenant_id, user_id), complete
 WHERE coalesce(e.n, 0) <> CASE WHEN a.user_id IS NULL THEN 0 ELSE 1 END`},

	{"every session's login, and every revocation, has its event", whileComplete + `
SELECT s.id::text
  FROM complete, sessions AS s LEFT JOIN outbox AS o ON o.data->>'session_id' = s.id::text
 GROUP BY s.id
HAVING count(*) FILTER (WHERE o.event_type = 'auth.user.logged_in') <> 1
    OR (s.revoked_at IS NOT NULL) <> coalesce(bool_or(o.event_type IN ('auth.session.revoked', 'auth.user.logged_out')), false)`},
}

// whileComplete yields a row while the outbox still has every event that was
// ever numbered: nothing was pruned, nothing rolled back. The rules that miss
// an event can only be held then.
const whileComplete = `
WITH complete AS (
    SELECT FROM pg_sequences
     WHERE schemaname = current_schema() AND sequencename = 'outbox_seq_seq'
       AND coalesce(last_value, 0) = (SELECT count(*) FROM outbox))`

// Check holds the invariants of the data at url against one snapshot. It only
// reads; a database without our tables passes.
func Check(t testing.TB, url string) {
	t.Helper()
	err := withConn(url, func(ctx context.Context, conn *pgx.Conn) error {
		var migrated bool
		err := conn.QueryRow(ctx, `SELECT to_regclass($1) IS NOT NULL`, migrate.Schema+".outbox").Scan(&migrated)
		if err != nil || !migrated {
			return err
		}
		options := pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}
		return pgx.BeginTxFunc(ctx, conn, options, func(tx pgx.Tx) error {
			for _, inv := range invariants {
				rows, err := tx.Query(ctx, inv.sql)
				if err != nil {
					return err
				}
				broken, err := pgx.CollectRows(rows, pgx.RowTo[string])
				if err != nil {
					return err
				}
				if len(broken) > 0 {
					t.Errorf("invariant %q does not hold for %d: %q", inv.promise, len(broken), broken[:min(len(broken), 5)])
				}
			}
			return nil
		})
	})
	if err != nil {
		t.Errorf("checking invariants: %v", err)
	}
}
