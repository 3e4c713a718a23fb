package db

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/jackc/pgx/v5"
)

// writeEvents writes one event of each user, given by a digit, in order. They
// are of a type that needs no account.
const writeEvents = `
INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
SELECT 'auth.lockout', u, u, '', jsonb_build_object('user_id', u, 'client_ip', '')
  FROM regexp_split_to_table('%s', '') WITH ORDINALITY AS d(digit, i), LATERAL (SELECT repeat(digit, 32)::uuid AS u) AS u
 ORDER BY i`

func openOutbox(t *testing.T, rules Rules) (store *Store, url string) {
	t.Helper()
	url = dbtest.New(t)
	store, err := Open(url, 4, rules)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	return store, url
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func seqs(rows []OutboxRow) []int64 {
	out := []int64{}
	for _, r := range rows {
		out = append(out, r.Seq)
	}
	return out
}

func unsent(t *testing.T, store *Store, held ...Lane) []int64 {
	t.Helper()
	return seqs(must[[]OutboxRow](t)(store.UnsentEvents(t.Context(), 100, held)))
}

func wantSeqs(t *testing.T, what string, got []int64, want ...int64) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestUnsentEvents(t *testing.T) {
	store, url := openOutbox(t, Rules{})
	dbtest.Exec(t, url, fmt.Sprintf(writeEvents, "1231"))
	dbtest.Exec(t, url, `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data) SELECT 'auth.secrets.password_reset', u, u, '', '{}' FROM (SELECT repeat('1', 32)::uuid AS u) AS u`)
	// The same user id in another tenant is another lane.
	dbtest.Exec(t, url, `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data, causation_id)
		SELECT event_type, repeat('9', 32)::uuid, user_id, '', data, event_id FROM outbox WHERE seq = 1`)

	rows := must[[]OutboxRow](t)(store.UnsentEvents(t.Context(), 100, nil))
	wantSeqs(t, "all", seqs(rows), 1, 2, 3, 4, 5, 6)
	if rows[0].CausationID != nil || rows[5].CausationID == nil || *rows[5].CausationID != rows[0].EventID {
		t.Errorf("causation: got %v and %v, want none and %v", rows[0].CausationID, rows[5].CausationID, rows[0].EventID)
	}
	wantSeqs(t, "first user held", unsent(t, store, rows[0].Lane()), 2, 3, 5, 6)
	wantSeqs(t, "secrets held", unsent(t, store, rows[4].Lane(), rows[1].Lane()), 1, 3, 4, 6)
	wantSeqs(t, "limited", seqs(must[[]OutboxRow](t)(store.UnsentEvents(t.Context(), 2, nil))), 1, 2)
	dbtest.Exec(t, url, `UPDATE outbox SET sent_at = now(), stream_seq = 1 WHERE seq IN (1, 6)`)
	wantSeqs(t, "without the sent", unsent(t, store), 2, 3, 4, 5)
}

// A row that becomes visible after later ones were sent is found all the same.
func TestUnsentEventsOutOfOrder(t *testing.T) {
	store, url := openOutbox(t, Rules{})
	ctx := t.Context()
	conn := must[*pgx.Conn](t)(pgx.Connect(ctx, url+"&search_path=identity_auth"))
	defer conn.Close(ctx)
	tx := must[pgx.Tx](t)(conn.Begin(ctx))
	if _, err := tx.Exec(ctx, fmt.Sprintf(writeEvents, "1")); err != nil {
		t.Fatal(err)
	}
	dbtest.Exec(t, url, fmt.Sprintf(writeEvents, "2"))
	wantSeqs(t, "before the commit", unsent(t, store), 2)
	generation, _, _, err := store.CompareStream(ctx, StreamState{Name: "S"}, false)
	if err != nil {
		t.Fatal(err)
	}
	must[bool](t)(store.MarkSent(ctx, "S", generation, []Ack{{Seq: 2, StreamSeq: 1}}))
	if err := tx.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	wantSeqs(t, "after the commit", unsent(t, store), 1)
}

// The fetch walks along the unsent rows, and marking looks rows up one by one,
// whatever the statistics say of a large outbox.
func TestOutboxPlans(t *testing.T) {
	_, url := openOutbox(t, Rules{})
	dbtest.Exec(t, url, `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data, sent_at, stream_seq)
		SELECT 'auth.lockout', u, u, '', jsonb_build_object('user_id', u), now(), i FROM (SELECT i, gen_random_uuid() AS u FROM generate_series(1, 20000) AS i) AS u`)
	for _, analyzed := range []string{"no row is unsent", "every row is unsent"} {
		dbtest.Exec(t, url, `ANALYZE outbox`)
		for _, c := range []struct {
			sql, want string
			arguments int
		}{
			{unsentSQL, "Index Scan using outbox_unsent", 5},
			{markSentSQL, "Index Scan using outbox_pkey", 4},
		} {
			plan := strings.Join(explain(t, url, c.sql, c.arguments), "\n")
			if !strings.Contains(plan, c.want) || strings.Contains(plan, "Sort") || strings.Contains(plan, "Seq Scan on outbox") {
				t.Errorf("%s: got plan\n%s\nwant %s and neither a sort nor a walk over the table", analyzed, plan, c.want)
			}
		}
		dbtest.Exec(t, url, `UPDATE outbox SET sent_at = NULL`)
	}
}

// explain returns the plan that is used for any arguments.
func explain(t *testing.T, url, sql string, arguments int) []string {
	t.Helper()
	ctx := t.Context()
	conn := must[*pgx.Conn](t)(pgx.Connect(ctx, url+"&search_path=identity_auth&plan_cache_mode=force_generic_plan"))
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "PREPARE q AS "+sql); err != nil {
		t.Fatal(err)
	}
	nulls := strings.TrimSuffix(strings.Repeat("NULL, ", arguments), ", ")
	rows := must[pgx.Rows](t)(conn.Query(ctx, "EXPLAIN EXECUTE q("+nulls+")", pgx.QueryExecModeSimpleProtocol))
	return must[[]string](t)(pgx.CollectRows(rows, pgx.RowTo[string]))
}

func TestRelayLease(t *testing.T) {
	store, url := openOutbox(t, Rules{})
	ctx := t.Context()
	a, b := NewRelayID(), NewRelayID()
	step := func(what string, got bool, err error, want bool) {
		t.Helper()
		if err != nil || got != want {
			t.Errorf("%s: got %v, %v, want %v", what, got, err, want)
		}
	}
	try := func(what string, id RelayID, want bool) {
		t.Helper()
		got, err := store.AcquireRelay(ctx, id, time.Minute)
		step(what, got, err, want)
	}
	got, err := store.RenewRelay(ctx, a, time.Minute)
	step("renewing what nobody holds", got, err, false)
	try("first", a, true)
	try("another", b, false)
	try("the holder again", a, true)
	got, err = store.RenewRelay(ctx, a, time.Minute)
	step("renewing", got, err, true)
	dbtest.Exec(t, url, `UPDATE relay SET lease_until = clock_timestamp() - interval '1 ms'`)
	got, err = store.RenewRelay(ctx, a, time.Millisecond)
	step("renewing late, before anyone else", got, err, true)
	dbtest.Exec(t, url, `UPDATE relay SET lease_until = clock_timestamp() - interval '1 ms'`)
	try("another after the end", b, true)
	got, err = store.RenewRelay(ctx, a, time.Minute)
	step("renewing too late", got, err, false)
	if err := store.ReleaseRelay(ctx, a); err != nil {
		t.Error(err)
	}
	try("after a release by who is not the holder", a, false)
	if err := store.ReleaseRelay(ctx, b); err != nil {
		t.Error(err)
	}
	try("after the release", a, true)
}

// Of many that find the lease over, one gets it.
func TestRelayLeaseRace(t *testing.T) {
	store, url := openOutbox(t, Rules{})
	for range 20 {
		results := make(chan bool)
		for range 8 {
			go func() {
				held, err := store.AcquireRelay(context.Background(), NewRelayID(), time.Minute)
				results <- held && err == nil
			}()
		}
		holders := 0
		for range 8 {
			if <-results {
				holders++
			}
		}
		if holders != 1 {
			t.Errorf("got %d holders, want 1", holders)
		}
		dbtest.Exec(t, url, `UPDATE relay SET lease_until = clock_timestamp() - interval '1 ms'`)
	}
}

func TestMarkSent(t *testing.T) {
	store, url := openOutbox(t, Rules{})
	ctx := t.Context()
	dbtest.Exec(t, url, fmt.Sprintf(writeEvents, "123"))
	dbtest.Exec(t, url, fmt.Sprintf(writeEvents, "5"))
	dbtest.Exec(t, url, `UPDATE outbox SET transient = true WHERE seq IN (2, 4)`)
	st := StreamState{Name: "S", Created: time.Unix(1, 5), LastSeq: 7}
	generation, lost, resend, err := store.CompareStream(ctx, st, false)
	if err != nil || lost || resend {
		t.Fatalf("first comparison: got %v, %v, %v, want no loss", lost, resend, err)
	}
	for _, c := range []struct {
		what       string
		stream     string
		generation int64
		want       bool
	}{
		{"another generation", "S", generation + 1, false},
		{"unknown stream", "T", generation, false},
		{"in order", "S", generation, true},
		{"again", "S", generation, true},
	} {
		got, err := store.MarkSent(ctx, c.stream, c.generation, []Ack{{Seq: 2, StreamSeq: 9}, {Seq: 4, StreamSeq: 10}, {Seq: 1, StreamSeq: 8}})
		if err != nil || got != c.want {
			t.Errorf("%s: got %v, %v, want %v", c.what, got, err, c.want)
		}
		if left := len(unsent(t, store)); c.want != (left == 1) {
			t.Errorf("%s: %d rows are unsent", c.what, left)
		}
	}
	if got := dbtest.Query[string](t, url, `SELECT concat(stream_seq, ' ', sent_at IS NOT NULL) FROM outbox ORDER BY seq`); !slices.Equal(got, []string{"8 t", " f"}) {
		t.Errorf("got %q: want the acknowledgement, and the transient rows gone", got)
	}
	if got := dbtest.Value[int64](t, url, `SELECT acked_seq FROM relay_streams`); got != 10 {
		t.Errorf("acked_seq: got %d, want 10", got)
	}
}

func TestLostStore(t *testing.T) {
	created := time.Date(2026, 1, 2, 3, 4, 5, 123456789, time.UTC)
	for _, c := range []struct {
		name    string
		state   StreamState // after stream sequences 11, 12, 13 were given to rows 1, 3, 2
		secrets bool
		lost    bool
		want    []int64 // unsent afterwards; row 4 never was sent
	}{
		{"unchanged", StreamState{Created: created, LastSeq: 13}, false, false, []int64{4}},
		{"others published too", StreamState{Created: created, LastSeq: 99}, false, false, []int64{4}},
		{"cut back", StreamState{Created: created, LastSeq: 11}, false, true, []int64{2, 3, 4}},
		{"cut back to nothing", StreamState{Created: created, LastSeq: 0}, false, true, []int64{1, 2, 3, 4}},
		{"another stream, empty", StreamState{Created: created.Add(time.Nanosecond)}, false, true, []int64{1, 2, 3, 4}},
		{"another stream, longer", StreamState{Created: created.Add(time.Hour), LastSeq: 99}, false, true, []int64{1, 2, 3, 4}},
		{"an older stream", StreamState{Created: created.Add(-time.Hour), LastSeq: 99}, false, true, []int64{1, 2, 3, 4}},
		{"secrets", StreamState{Created: created.Add(time.Hour)}, true, true, []int64{4}},
	} {
		t.Run(c.name, func(t *testing.T) {
			store, url := openOutbox(t, Rules{})
			ctx := t.Context()
			dbtest.Exec(t, url, fmt.Sprintf(writeEvents, "1234"))
			before, _, _, err := store.CompareStream(ctx, StreamState{Name: "S", Created: created, LastSeq: 10}, c.secrets)
			if err != nil {
				t.Fatal(err)
			}
			must[bool](t)(store.MarkSent(ctx, "S", before, []Ack{{Seq: 1, StreamSeq: 11}, {Seq: 3, StreamSeq: 12}, {Seq: 2, StreamSeq: 13}}))

			c.state.Name = "S"
			generation, lost, resend, err := store.CompareStream(ctx, c.state, c.secrets)
			if err != nil || lost != c.lost || resend != (c.lost && !c.secrets) {
				t.Fatalf("got lost %v, resend %v, %v, want lost %v", lost, resend, err, c.lost)
			}
			if again, lost, _, err := store.CompareStream(ctx, c.state, c.secrets); err != nil || lost || again != generation {
				t.Errorf("comparing again: got generation %d, lost %v, %v, want %d and no new loss", again, lost, err, generation)
			}
			// Whoever dies half-way is followed by another that goes on.
			for pages := 1; resend; pages++ {
				n, done, err := store.ResendLost(ctx, "S")
				if err != nil || pages > 2 {
					t.Fatalf("page %d: got %d, %v, %v", pages, n, done, err)
				}
				resend = !done
			}
			if _, _, resend, err := store.CompareStream(ctx, c.state, c.secrets); err != nil || resend {
				t.Errorf("after the last page: got resend %v, %v, want false", resend, err)
			}
			wantSeqs(t, "unsent", unsent(t, store), c.want...)
			// An acknowledgement of before the loss is void after it.
			ok, err := store.MarkSent(ctx, "S", before, []Ack{{Seq: 4, StreamSeq: 14}})
			if err != nil || ok == c.lost {
				t.Errorf("an acknowledgement of before: got %v, %v, want %v", ok, err, !c.lost)
			}
		})
	}
}

// A loss that comes while an earlier one is being made good begins again.
func TestLostStoreTwice(t *testing.T) {
	store, url := openOutbox(t, Rules{})
	ctx := t.Context()
	dbtest.Exec(t, url, fmt.Sprintf(writeEvents, "123"))
	compare := func(created time.Time, lastSeq int64) (int64, bool, bool) {
		t.Helper()
		g, lost, resend, err := store.CompareStream(ctx, StreamState{Name: "S", Created: created, LastSeq: lastSeq}, false)
		if err != nil {
			t.Fatal(err)
		}
		return g, lost, resend
	}
	first := time.Unix(1, 0)
	g, _, _ := compare(first, 0)
	must[bool](t)(store.MarkSent(ctx, "S", g, []Ack{{1, 1}, {2, 2}, {3, 3}}))
	compare(first.Add(1), 0) // all three are lost
	store.ResendLost(ctx, "S")
	if g, lost, resend := compare(first.Add(2), 5); !lost || !resend || g != 2 {
		t.Errorf("got generation %d, lost %v, resend %v, want 2 and a loss", g, lost, resend)
	}
	if got := dbtest.Value[string](t, url, `SELECT resend_above || ' ' || resend_after FROM relay_streams`); got != "-1 0" {
		t.Errorf("got %q, want everything from the beginning", got)
	}
}

func TestReplay(t *testing.T) {
	store, url := openOutbox(t, Rules{})
	ctx := t.Context()
	dbtest.Exec(t, url, fmt.Sprintf(writeEvents, "12345"))
	dbtest.Exec(t, url, `UPDATE outbox SET occurred_at = date '2026-01-01' + seq * interval '1 hour', sent_at = now(), stream_seq = seq WHERE seq < 5`)
	at := func(hour int) time.Time { return time.Date(2026, 1, 1, hour, 0, 0, 0, time.UTC) }
	n, next, err := store.Replay(ctx, at(2), at(4), 0)
	if err != nil || n != 2 || next != 5 {
		t.Errorf("got %d, next %d, %v, want 2 and 5", n, next, err)
	}
	wantSeqs(t, "since and until", unsent(t, store), 2, 3, 5)
	select {
	case <-store.Wake():
	default:
		t.Error("the relay is not woken")
	}
	if n, next, err = store.Replay(ctx, at(2), at(4), next); err != nil || n != 0 || next != 0 {
		t.Errorf("after the last page: got %d, next %d, %v, want 0 and 0", n, next, err)
	}
}

func TestBacklog(t *testing.T) {
	store, url := openOutbox(t, Rules{})
	ctx := t.Context()
	if n, oldest, err := store.OutboxBacklog(ctx); n != 0 || oldest != 0 || err != nil {
		t.Errorf("empty: got %d, %v, %v", n, oldest, err)
	}
	dbtest.Exec(t, url, fmt.Sprintf(writeEvents, "1234"))
	dbtest.Exec(t, url, `UPDATE outbox SET sent_at = now() WHERE seq = 1`)
	dbtest.Exec(t, url, `UPDATE outbox SET occurred_at = now() - interval '1 hour' WHERE seq <= 2`)
	if n, oldest, err := store.OutboxBacklog(ctx); n != 3 || oldest < time.Hour || oldest > time.Hour+time.Minute || err != nil {
		t.Errorf("got %d, %v, %v, want 3 and an hour", n, oldest, err)
	}
	if n, last, err := store.PendingThrough(ctx, math.MaxInt64); n != 3 || last != 4 || err != nil {
		t.Errorf("got %d, last %d, %v, want 3, 4", n, last, err)
	}
	if n, last, err := store.PendingThrough(ctx, 3); n != 2 || last != 3 || err != nil {
		t.Errorf("through 3: got %d, last %d, %v, want 2, 3", n, last, err)
	}
}

func TestPruneOutbox(t *testing.T) {
	store, url := openOutbox(t, Rules{OutboxRetention: time.Hour})
	dbtest.Exec(t, url, `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data, occurred_at, sent_at)
		SELECT 'auth.lockout', u, u, '', jsonb_build_object('user_id', u, 'client_ip', ''), t, t
		  FROM (SELECT gen_random_uuid() AS u, now() - interval '61 minutes' AS t FROM generate_series(1, 2500)) AS u`)
	// Kept: never sent, sent late, young.
	dbtest.Exec(t, url, `UPDATE outbox SET sent_at = NULL WHERE seq = 1`)
	dbtest.Exec(t, url, `UPDATE outbox SET sent_at = now() - interval '59 minutes' WHERE seq = 1200`)
	dbtest.Exec(t, url, `UPDATE outbox SET sent_at = now(), occurred_at = now() WHERE seq = 2500`)
	if err := store.pruneOutbox(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantSeqs(t, "left", dbtest.Query[int64](t, url, `SELECT seq FROM outbox ORDER BY seq`), 1, 1200, 2500)
	if err := store.pruneOutbox(t.Context()); err != nil {
		t.Fatal(err)
	}
}
