package natsbus_test

import (
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// BenchmarkDrain relays a backlog, from the start of the bus to the last
// acknowledgement recorded, and publishes as many messages of the same size
// to the same server with nothing around it: bare/s, and the ratio of both.
func BenchmarkDrain(b *testing.B) {
	for _, users := range []int{100000, 100, 1} {
		b.Run(fmt.Sprintf("users=%d", users), func(b *testing.B) {
			const events = 50000
			for b.Loop() {
				rate, bare := drain(b, events, users)
				b.ReportMetric(rate, "events/s")
				b.ReportMetric(bare, "bare/s")
				b.ReportMetric(rate/bare, "ratio")
			}
		})
	}
}

func drain(b *testing.B, events, users int) (rate, bare float64) {
	url, server := dbtest.New(b), natstest.New(b)
	store, err := db.Open(url, 8, db.Rules{})
	if err != nil {
		b.Fatal(err)
	}
	defer store.Close()
	dbtest.Exec(b, url, `
INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
SELECT 'auth.lockout', u, u, gen_random_uuid()::text, jsonb_build_object('user_id', u, 'client_ip', '127.0.0.1')
  FROM (SELECT md5((i % $2)::text)::uuid AS u FROM generate_series(1, $1) AS i) AS u`, events, users)
	dbtest.Exec(b, url, `VACUUM ANALYZE outbox`)
	bus, err := natsbus.New(natsbus.Config{URL: server.URL(), Replicas: 1}, store, slog.New(slog.DiscardHandler), silent)
	if err != nil {
		b.Fatal(err)
	}
	began := time.Now()
	stop := run(b, bus)
	if err := bus.Flush(b.Context()); err != nil {
		b.Fatal(err)
	}
	rate = float64(events) / time.Since(began).Seconds()
	stop()
	return rate, publishBare(b, server.URL(), events)
}

func publishBare(b *testing.B, url string, n int) float64 {
	nc, err := nats.Connect(url)
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := js.CreateStream(b.Context(), jetstream.StreamConfig{Name: "BARE", Subjects: []string{"bare"}, Duplicates: 10 * time.Minute}); err != nil {
		b.Fatal(err)
	}
	payload := make([]byte, 500)
	began := time.Now()
	for i := range n {
		if _, err := js.PublishAsync("bare", payload, jetstream.WithMsgID(fmt.Sprintf("%036d", i)), jetstream.WithExpectStream("BARE")); err != nil {
			b.Fatal(err)
		}
	}
	<-js.PublishAsyncComplete()
	return float64(n) / time.Since(began).Seconds()
}
