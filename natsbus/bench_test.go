package natsbus_test

import (
	"context"
	"fmt"
	"io"
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

var _ = fmt.Sprint

func BenchmarkDrain(b *testing.B) {
	for _, c := range []struct {
		name  string
		users int
	}{{"users=many", 1000000}, {"users=100", 100}, {"users=1", 1}} {
		b.Run(c.name, func(b *testing.B) {
			url := dbtest.New(b)
			n := natstest.New(b)
			store, err := db.Open(url, 8, db.Rules{})
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(store.Close)
			const events = 50000
			dbtest.Exec(b, url, `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
			 SELECT 'auth.lockout', gen_random_uuid(), u, gen_random_uuid()::text, jsonb_build_object('user_id', u, 'client_ip', '127.0.0.1')
			 FROM (SELECT md5('x' || (i % $2))::uuid AS u FROM generate_series(1, $1) AS i) AS x`, events, c.users)
			if c.users == 1 {
				dbtest.Exec(b, url, `UPDATE outbox SET tenant_id = user_id`)
			} else if c.users == 100 {
				dbtest.Exec(b, url, `UPDATE outbox SET tenant_id = user_id`)
			}
			dbtest.Exec(b, url, `VACUUM ANALYZE outbox`)
			log := slog.New(slog.DiscardHandler)
			bus, err := natsbus.New(natsbus.Config{URL: n.URL(), Replicas: 1}, store, log, natsbus.Observer{Published: func(string) {}, PublishFailed: func(string) {}})
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(b.Context())
			done := make(chan struct{})
			began := time.Now()
			go func() { bus.Run(ctx); close(done) }()
			if err := bus.Flush(ctx); err != nil {
				b.Fatal(err)
			}
			rate := float64(events) / time.Since(began).Seconds()
			cancel()
			<-done
			b.ReportMetric(rate, "events/s")
			bare := bare(b, n.URL(), events)
			b.ReportMetric(bare, "bare/s")
			b.ReportMetric(rate/bare, "ratio")
		})
	}
}

var _ = io.Discard

func bare(b *testing.B, url string, n int) float64 {
	nc, err := nats.Connect(url)
	if err != nil {
		b.Fatal(err)
	}
	defer nc.Close()
	js, _ := jetstream.New(nc)
	if _, err := js.CreateStream(b.Context(), jetstream.StreamConfig{Name: "BARE", Subjects: []string{"bare.>"}, Duplicates: 10 * time.Minute}); err != nil {
		b.Fatal(err)
	}
	payload := make([]byte, 450)
	began := time.Now()
	for i := range n {
		if _, err := js.PublishAsync("bare.x", payload, jetstream.WithMsgID(fmt.Sprint("id-", i))); err != nil {
			b.Fatal(err)
		}
	}
	<-js.PublishAsyncComplete()
	return float64(n) / time.Since(began).Seconds()
}
