package db

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// BenchmarkRefreshBesideOutbox prints the rate of rotations on a database whose
// outbox holds 1,000,000 relayed rows as a ratio to one whose outbox is small:
// the median of pairs measured one after the other.
//
//	go test -run '^$' -bench RefreshBesideOutbox -benchtime 1x ./db
func BenchmarkRefreshBesideOutbox(b *testing.B) {
	small, large := newChain(b), newChain(b)
	dbtest.Exec(b, large.url, `
INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data, sent_at, stream_seq)
SELECT 'auth.lockout', u, u, '0af7651916cd43dd8448eb211c80319c', jsonb_build_object('user_id', u, 'client_ip', '192.0.2.1'), now(), i
  FROM (SELECT i, gen_random_uuid() AS u FROM generate_series(1, 1000000) AS i) AS x`)
	dbtest.Exec(b, large.url, `ANALYZE outbox`)
	for b.Loop() {
		var ratios []float64
		for range 9 {
			ratios = append(ratios, large.rate(b)/small.rate(b))
		}
		slices.Sort(ratios)
		b.ReportMetric(ratios[len(ratios)/2], "large/small")
	}
}

// BenchmarkBloat rotates 1,000 sessions 1,000,000 times in all and prints what
// that leaves: rows a session, the size of the table and of its indexes as
// ratios to those before, and the share of updates that were heap-only (HOT).
//
//	go test -run '^$' -bench Bloat -benchtime 1x ./db
func BenchmarkBloat(b *testing.B) {
	const sessions, rotations, workers = 1_000, 1_000_000, 8
	chains := []*chain{newChain(b)}
	for len(chains) < sessions {
		chains = append(chains, newChainOn(b, chains[0].url, chains[0].store))
	}
	url := chains[0].url
	b.Cleanup(func() { dbtest.Exec(b, url, `DROP SCHEMA identity_auth CASCADE`) }) // checking a million events takes too long
	size := func(what string) float64 {
		return float64(dbtest.Value[int64](b, url, `SELECT pg_`+what+`_size('identity_auth.sessions')`))
	}
	dbtest.Exec(b, url, `VACUUM FULL identity_auth.sessions`)
	table, indexes := size("table"), size("indexes")
	for b.Loop() {
		var all sync.WaitGroup
		for worker := range workers {
			all.Go(func() {
				for n := range rotations / workers {
					chains[(worker+n*workers)%sessions].rotate(b)
				}
			})
		}
		all.Wait()
		b.ReportMetric(dbtest.Value[float64](b, url, `SELECT count(*)::float8 FROM identity_auth.sessions`)/sessions, "rows/session")
		b.ReportMetric(size("table")/table, "table/before")
		b.ReportMetric(size("indexes")/indexes, "indexes/before")
		dbtest.Exec(b, url, `SELECT pg_stat_force_next_flush()`)
		b.ReportMetric(dbtest.Value[float64](b, url, `
SELECT n_tup_hot_upd::float8 / n_tup_upd FROM pg_stat_user_tables WHERE schemaname = 'identity_auth' AND relname = 'sessions'`), "HOT")
	}
}

// chain is a session that is refreshed again and again.
type chain struct {
	url   string
	store *Store
	id    SessionID
	next  int64
}

func newChain(b *testing.B) *chain {
	b.Helper()
	url := dbtest.New(b)
	store, err := Open(url, 8, rules())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(store.Close)
	return newChainOn(b, url, store)
}

func newChainOn(b *testing.B, url string, store *Store) *chain {
	b.Helper()
	c := &chain{url: url, store: store, id: NewSessionID()}
	p := person{tenant: TenantID{newUUID()}, user: UserID{newUUID()}, email: Email{"a@example.com"}}
	if _, err := c.store.Register(b.Context(), p.tenant, p.user, p.email, hashA, origin); err != nil {
		b.Fatal(err)
	}
	r, err := c.store.ReserveGuess(b.Context(), p.tenant, p.email, p.email.s, false, origin)
	if err != nil {
		b.Fatal(err)
	}
	n := NewSession{ID: c.id, FamilyHash: hashed("family" + c.id.String()), StepHash: hashed("0" + c.id.String())}
	if _, _, err := c.store.CompleteLogin(b.Context(), r.Guess, "", n, origin); err != nil {
		b.Fatal(err)
	}
	return c
}

// rate is rotations a second, over half a second.
func (c *chain) rate(b *testing.B) float64 {
	b.Helper()
	begun, first := time.Now(), c.next
	for time.Since(begun) < 500*time.Millisecond {
		c.rotate(b)
	}
	return float64(c.next-first) / time.Since(begun).Seconds()
}

func (c *chain) rotate(b *testing.B) {
	if r, err := c.store.RotateSession(context.Background(), step(c.id, c.next), origin); err != nil || r.Outcome != Rotated {
		b.Error(r.Outcome, err)
	}
	c.next++
}
