package natsbus_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A test that needs a relay in a process of its own runs this binary with its
// database and NATS in childEnv.
const childEnv = "NATSBUS_TEST_CHILD"

func TestMain(m *testing.M) {
	if where := os.Getenv(childEnv); where != "" {
		runChild(where)
		return
	}
	os.Exit(dbtest.Main(m))
}

func runChild(where string) {
	database, server, _ := strings.Cut(where, " ")
	store, err := db.Open(database, 4, db.Rules{})
	if err != nil {
		panic(err)
	}
	bus, err := natsbus.New(natsbus.Config{URL: server, Replicas: 1}, store, slog.New(slog.DiscardHandler), silent)
	if err != nil {
		panic(err)
	}
	bus.Run(context.Background())
}

var silent = natsbus.Observer{Published: func(string) {}, PublishFailed: func(string) {}}

// world is a database, a NATS server and one bus between them.
type world struct {
	*testing.T
	database string
	nats     *natstest.Server
	store    *db.Store
	log      *lines
	bus      *natsbus.Bus
	stop     func() // ends Run and waits for it; the test's end does too

	mu                sync.Mutex // guards the counts by event type
	published, failed map[string]int
}

func newWorld(t *testing.T, server *natstest.Server) *world {
	t.Helper()
	w := &world{T: t, database: dbtest.New(t), nats: server, log: &lines{}, published: map[string]int{}, failed: map[string]int{}}
	w.open()
	return w
}

func (w *world) open() {
	w.Helper()
	store, err := db.Open(w.database, 8, db.Rules{})
	if err != nil {
		w.Fatal(err)
	}
	w.store = store
	w.Cleanup(store.Close)
}

// start runs a bus on the world's servers; change adapts its configuration.
func (w *world) start(change ...func(*natsbus.Config)) {
	w.Helper()
	cfg := natsbus.Config{URL: w.nats.URL(), Replicas: 1}
	for _, f := range change {
		f(&cfg)
	}
	count := func(counts map[string]int) func(string) {
		return func(eventType string) {
			w.mu.Lock()
			defer w.mu.Unlock()
			counts[eventType]++
		}
	}
	bus, err := natsbus.New(cfg, w.store, slog.New(slog.NewJSONHandler(w.log, nil)), natsbus.Observer{Published: count(w.published), PublishFailed: count(w.failed)})
	if err != nil {
		w.Fatal(err)
	}
	w.bus, w.stop = bus, run(w, bus)
}

// run runs a bus until stop is called or the test is over.
func run(t testing.TB, bus *natsbus.Bus) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- bus.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: got %v, want nil", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// within polls until the condition holds, or fails the test.
func (w *world) within(d time.Duration, what string, holds func() bool) {
	w.Helper()
	for end := time.Now().Add(d); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			w.Fatalf("not within %v: %s\nlog:\n%s", d, what, w.log)
		}
	}
}

// write inserts one event a digit, for the users that the digits name, in order.
func (w *world) write(users string) {
	w.Helper()
	dbtest.Exec(w.T, w.database, writeSQL(users))
}

func writeSQL(users string) string {
	return fmt.Sprintf(`INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
SELECT 'auth.lockout', u, u, '', jsonb_build_object('user_id', u, 'client_ip', '')
  FROM regexp_split_to_table('%s', '') WITH ORDINALITY AS d(digit, i), LATERAL (SELECT repeat(digit, 32)::uuid AS u) AS u
 ORDER BY i`, users)
}

func (w *world) pending() int64 {
	w.Helper()
	n, _, err := w.store.OutboxBacklog(w.Context())
	if err != nil {
		w.Fatal(err)
	}
	return n
}

func (w *world) drained(within time.Duration) {
	w.Helper()
	w.within(within, "the outbox is empty", func() bool { return w.pending() == 0 })
}

// relaysOn returns when events that were written after the call are relayed:
// load and relay are at work, and what was before has settled.
func (w *world) relaysOn() {
	w.Helper()
	last := dbtest.Value[int64](w.T, w.database, `SELECT coalesce(max(seq), 0) FROM outbox`)
	w.within(20*time.Second, "what is written is relayed", func() bool {
		return dbtest.Value[int64](w.T, w.database, `SELECT count(*) FROM outbox WHERE seq > $1 AND sent_at IS NOT NULL`, last) > 100
	})
}

// outbox are the ids of all events of the outbox, by order of writing.
func (w *world) outbox() []string {
	w.Helper()
	return dbtest.Query[string](w.T, w.database, `SELECT event_id::text FROM outbox ORDER BY seq`)
}

// jetStream is a connection of the test's own.
func (w *world) jetStream() jetstream.JetStream {
	w.Helper()
	nc, err := nats.Connect(w.nats.URL())
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		w.Fatal(err)
	}
	return js
}

// stored are the messages of a stream.
func (w *world) stored(stream string) []jetstream.Msg {
	w.Helper()
	js := w.jetStream()
	defer js.Conn().Close()
	s, err := js.Stream(w.Context(), stream)
	if err != nil {
		w.Fatal(err)
	}
	want := int(s.CachedInfo().State.Msgs)
	msgs := make([]jetstream.Msg, 0, want)
	consumer, err := s.OrderedConsumer(w.Context(), jetstream.OrderedConsumerConfig{})
	if err != nil {
		w.Fatal(err)
	}
	for len(msgs) < want {
		upTo := min(want, len(msgs)+10_000)
		batch, err := consumer.Fetch(upTo-len(msgs), jetstream.FetchMaxWait(10*time.Second)) // beyond 64 MiB pending, nats.go drops messages
		if err != nil {
			w.Fatal(err)
		}
		for msg := range batch.Messages() {
			msgs = append(msgs, msg)
		}
		if len(msgs) != upTo {
			w.Fatalf("reading %s: got %d messages, want %d of %d, %v", stream, len(msgs), upTo, want, batch.Error())
		}
	}
	return msgs
}

// complete checks what the package promises: every event of the outbox is in
// the stream, nothing else is, and by first copy each user's are in order.
func (w *world) complete() {
	w.Helper()
	users, order := w.nothingLost()
	for user, ids := range users {
		for i := range min(len(ids), len(order[user])) {
			if ids[i] != order[user][i] {
				w.Errorf("user %s: at place %d of %d is the event that was written in place %d", user, i, len(ids), slices.Index(order[user], ids[i]))
				break
			}
		}
	}
}

// nothingLost holds the stream against the outbox: every event is there, and
// none of rolled-back work. It returns the event ids by user, by first copy in
// the stream and in the order of writing.
func (w *world) nothingLost() (users, order map[string][]string) {
	w.Helper()
	seen := map[string]bool{}
	users, order = map[string][]string{}, map[string][]string{}
	for _, msg := range w.stored("AUTH_EVENTS") {
		var e struct {
			ID   string `json:"event_id"`
			User string `json:"aggregate_id"`
		}
		if err := json.Unmarshal(msg.Data(), &e); err != nil {
			w.Fatal(err)
		}
		if !seen[e.ID] {
			seen[e.ID] = true
			users[e.User] = append(users[e.User], e.ID)
		}
	}
	for _, row := range dbtest.Query[string](w.T, w.database, `SELECT user_id || ' ' || event_id FROM outbox ORDER BY seq`) {
		user, id, _ := strings.Cut(row, " ")
		order[user] = append(order[user], id)
		if !seen[id] {
			w.Errorf("event %s is lost", id)
		}
		delete(seen, id)
	}
	for id := range seen {
		w.Errorf("event %s tells of what was rolled back", id)
	}
	return users, order
}

// lines is a log that tests look into.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// of are the lines of one event.
func (l *lines) of(event string) []string {
	var out []string
	for line := range strings.Lines(l.String()) {
		if strings.Contains(line, `"msg":"`+event+`"`) {
			out = append(out, line)
		}
	}
	return out
}

// certificate makes a self-signed certificate for 127.0.0.1: the files of its
// authority, which it is itself, and of its key.
func certificate(t *testing.T) (ca, cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	cert = write("cert.pem", "CERTIFICATE", der)
	return cert, cert, write("key.pem", "PRIVATE KEY", pkcs8)
}

// userOf is for a server with accounts: who connects to it in the test.
func userOf(config, name string) *url.Userinfo {
	if config == "" || !strings.Contains(config, "user: "+name) {
		return nil
	}
	return url.UserPassword(name, "x")
}
