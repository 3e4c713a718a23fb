package db

import (
	"context"
	"slices"
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
