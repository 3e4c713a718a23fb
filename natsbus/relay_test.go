package natsbus_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
	"github.com/jackc/pgx/v5"
)

func TestMessage(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.start()
	w.within(3*time.Second, "up", w.bus.Up)
	tenant, err := db.ParseTenantID("11111111-1111-4111-8111-111111111111")
	if err != nil {
		t.Fatal(err)
	}
	user, err := db.ParseUserID("22222222-2222-4222-8222-222222222222")
	if err != nil {
		t.Fatal(err)
	}
	email, err := db.ParseEmail("a@example.com")
	if err != nil {
		t.Fatal(err)
	}
	origin := db.Origin{TraceID: "4bf92f3577b34da6a3ce929d0e0e4736"}
	if ok, err := w.store.Register(t.Context(), tenant, user, email, "hash", origin); !ok || err != nil {
		t.Fatal(ok, err)
	}
	began := time.Now()
	w.drained(2 * time.Second)
	t.Logf("relayed within %v of the commit", time.Since(began))
	w.write("3")
	dbtest.Exec(t, w.database, `UPDATE outbox SET causation_id = (SELECT min(event_id::text)::uuid FROM outbox), trace_id = 'A1A1A1A1-1111-4111-8111-111111111111'
		WHERE seq = 2 AND sent_at IS NULL`) // mostly in time; either way the message is checked against the row
	w.drained(2 * time.Second)

	msgs := w.stored("AUTH_EVENTS")
	if len(msgs) != 2 {
		t.Fatalf("got %d messages, want 2", len(msgs))
	}
	row := dbtest.Query[string](t, w.database, `SELECT concat_ws(' ', event_id, to_char(occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')) FROM outbox WHERE seq = 1`)
	id, at, _ := strings.Cut(row[0], " ")
	want := `{"event_id":"` + id + `","event_type":"auth.user.registered","schema_version":"1.0.0","occurred_at":"` + at + `","producer":"identity-auth",` +
		`"tenant_id":"11111111-1111-4111-8111-111111111111","aggregate_type":"user","aggregate_id":"22222222-2222-4222-8222-222222222222",` +
		`"trace_id":"4bf92f3577b34da6a3ce929d0e0e4736","causation_id":null,"data":{"email":"a@example.com","user_id":"22222222-2222-4222-8222-222222222222"}}`
	if got := string(msgs[0].Data()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got, want := msgs[0].Subject(), "auth.events.user.registered"; got != want {
		t.Errorf("subject: got %s, want %s", got, want)
	}
	header := msgs[0].Headers()
	if header.Get("Nats-Msg-Id") != id || header.Get("Nats-Expected-Stream") != "AUTH_EVENTS" {
		t.Errorf("headers: got %v", header)
	}
	span := strings.ReplaceAll(id, "-", "")[:16]
	if got, want := header.Get("traceparent"), "00-4bf92f3577b34da6a3ce929d0e0e4736-"+span+"-01"; got != want {
		t.Errorf("traceparent: got %s, want %s", got, want)
	}
	if got := msgs[1].Subject(); got != "auth.events.security.lockout" {
		t.Errorf("subject: got %s", got)
	}
	if w.published["auth.user.registered"] != 1 || w.published["auth.lockout"] != 1 || len(w.failed) != 0 {
		t.Errorf("counts: got %v published, %v failed", w.published, w.failed)
	}
	w.complete()
}

// NATS is killed again and again under load. Nothing is lost, nothing is told
// of work that was rolled back, and by first copy each user's events are in
// order.
func TestNATSKilled(t *testing.T) { natsKilled(t, 12*time.Second) }

func natsKilled(t *testing.T, duration time.Duration) {
	w := newWorld(t, natstest.New(t))
	w.start()
	load := startLoad(w)
	for end := time.Now().Add(duration); time.Now().Before(end); {
		w.relaysOn()
		w.nats.Kill()
		w.nats.Restart()
	}
	t.Logf("%d events written", load.stop())
	w.drained(30 * time.Second)
	w.complete()
	if n := len(w.log.of("outbox.store_lost")); n != 0 {
		t.Errorf("a kill looked like a lost store:\n%s", w.log)
	}
}

// PostgreSQL is killed while events are relayed. What was committed goes out.
func TestPostgresKilled(t *testing.T) {
	server := dbtest.Start(t)
	w := &world{T: t, database: server.URL(), nats: natstest.New(t), log: &lines{}, published: map[string]int{}, failed: map[string]int{}}
	w.open()
	w.start()
	load := startLoad(w)
	for range 3 {
		w.relaysOn()
		server.Kill()
		server.Restart()
	}
	t.Logf("%d events written", load.stop())
	w.within(20*time.Second, "the outbox is empty", func() bool {
		n, _, err := w.store.OutboxBacklog(t.Context())
		return err == nil && n == 0
	})
	w.complete()
}

// load writes events of eight users, each user's one after the other, and as
// many that are rolled back.
type load struct {
	cancel  context.CancelFunc
	writers sync.WaitGroup
	written [8]int
}

func startLoad(w *world) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{cancel: cancel}
	for user := range l.written {
		l.writers.Go(func() {
			var conn *pgx.Conn
			for ctx.Err() == nil {
				var err error
				if conn == nil {
					if conn, err = pgx.Connect(ctx, w.database+"&search_path=identity_auth&synchronous_commit=on"); err != nil {
						time.Sleep(50 * time.Millisecond)
						continue
					}
				}
				sql := writeSQL(fmt.Sprint(user + 1))
				err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
					_, err := tx.Exec(ctx, sql)
					return errors.Join(err, errRollBack)
				})
				if errors.Is(err, errRollBack) {
					_, err = conn.Exec(ctx, sql)
				}
				if err != nil {
					conn.Close(context.Background())
					conn = nil
					continue
				}
				l.written[user]++
			}
			if conn != nil {
				conn.Close(context.Background())
			}
		})
	}
	w.Cleanup(func() { l.stop() })
	return l
}

var errRollBack = errors.New("to be rolled back")

func (l *load) stop() (written int) {
	l.cancel()
	l.writers.Wait()
	for _, n := range l.written {
		written += n
	}
	return written
}

// An acknowledgement is lost and NATS is away for longer than the duplicate
// window: the event goes out a second time, with the same event_id, and what
// came after it stays after it.
func TestNATSAwayBeyondDuplicateWindow(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.start()
	w.write("1121")
	w.drained(5 * time.Second)
	js := w.jetStream()
	cfg := info(w, js, "AUTH_EVENTS").Config
	cfg.Duplicates = 100 * time.Millisecond
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	w.nats.Kill()
	dbtest.Exec(t, w.database, `UPDATE outbox SET sent_at = NULL, stream_seq = NULL WHERE seq IN (2, 4)`) // as if the kill had come between publish and ack
	w.write("12")
	time.Sleep(500 * time.Millisecond) // NATS' own clock forgets the ids
	w.nats.Restart()
	w.drained(5 * time.Second)
	w.complete()
	if got := len(w.stored("AUTH_EVENTS")); got != 8 {
		t.Errorf("got %d messages, want 6 events and two second copies", got)
	}
}

// The store is deleted, under a running or a stopped server: all retained
// events come back, in order, under the same ids.
func TestStoreLost(t *testing.T) {
	for name, lose := range map[string]func(*world){
		"store deleted": func(w *world) {
			w.nats.Kill()
			w.nats.DeleteStore()
			w.nats.Restart()
		},
		"stream deleted": func(w *world) {
			if err := w.jetStream().DeleteStream(w.Context(), "AUTH_EVENTS"); err != nil {
				w.Fatal(err)
			}
		},
		"stream replaced by hand, nothing written since": func(w *world) {
			w.drained(5 * time.Second)
			js := w.jetStream()
			cfg := info(w, js, "AUTH_EVENTS").Config
			if err := js.DeleteStream(w.Context(), "AUTH_EVENTS"); err != nil {
				w.Fatal(err)
			}
			if _, err := js.CreateStream(w.Context(), cfg); err != nil {
				w.Fatal(err)
			}
		},
		"stream deleted, nobody relaying": func(w *world) {
			w.stop()
			if err := w.jetStream().DeleteStream(w.Context(), "AUTH_EVENTS"); err != nil {
				w.Fatal(err)
			}
			w.start()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, natstest.New(t))
			w.start()
			w.write(strings.Repeat("1213", 500))
			w.drained(5 * time.Second)
			w.write("3") // the newest: its relay must not overtake the others'
			lose(w)
			w.within(10*time.Second, "what is lost is to be sent again", func() bool { return strings.Contains(w.log.String(), `"resent":`) })
			w.drained(10 * time.Second)
			w.complete()
			var order []string
			for _, msg := range w.stored("AUTH_EVENTS") {
				order = append(order, msg.Headers().Get("Nats-Msg-Id"))
			}
			if len(order) != 2001 {
				t.Errorf("got %d messages, want 2001: each once", len(order))
			}
		})
	}
}

// The stream is deleted while events pour in: nothing younger is published
// before what was lost.
func TestStreamDeletedUnderLoad(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	other := newWorldOn(w)
	w.start()
	other.start()
	w.within(5*time.Second, "up", w.bus.Up)
	load := startLoad(w)
	made := func() int { return len(w.log.of("nats.stream_created")) + len(other.log.of("nats.stream_created")) }
	for range 4 {
		w.relaysOn()
		before := made()
		if err := w.jetStream().DeleteStream(t.Context(), "AUTH_EVENTS"); err != nil {
			t.Fatal(err)
		}
		w.within(5*time.Second, "it is made again", func() bool { return made() > before })
	}
	load.stop()
	w.drained(20 * time.Second)
	w.complete()
}

// Only the holder of the relay makes a stream: nobody else can know whether
// the holder is about to publish into it.
func TestOnlyHolderMakesStreams(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	dbtest.Exec(t, w.database, `UPDATE relay SET holder = gen_random_uuid(), lease_until = clock_timestamp() + interval '1 hour'`)
	w.start()
	w.within(5*time.Second, "connected", func() bool { return len(w.log.of("nats.connected")) > 0 })
	time.Sleep(time.Second) // in which it would have made them
	if _, err := w.jetStream().Stream(t.Context(), "AUTH_EVENTS"); err == nil || w.bus.Up() {
		t.Errorf("made by who does not hold the relay: %v, up: %v", err == nil, w.bus.Up())
	}
	dbtest.Exec(t, w.database, `UPDATE relay SET lease_until = clock_timestamp()`)
	w.within(3*time.Second, "up", w.bus.Up)
}

// A power cut takes the end of the store: what was acknowledged behind it is
// sent again, and what is younger comes after.
func TestStoreCutBack(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.start()
	w.write("123")
	w.drained(5 * time.Second)
	w.nats.Stop()
	backup := t.TempDir()
	if err := os.CopyFS(backup, os.DirFS(w.nats.StoreDir())); err != nil {
		t.Fatal(err)
	}
	w.nats.Restart()
	w.write("1233")
	w.drained(5 * time.Second)
	w.nats.Kill()
	w.nats.DeleteStore()
	if err := os.CopyFS(w.nats.StoreDir(), os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	w.write(strings.Repeat("3", 20)) // more than what is missing
	w.nats.Restart()
	w.drained(5 * time.Second)
	w.complete()
	if got := len(w.stored("AUTH_EVENTS")); got != 27 {
		t.Errorf("got %d messages, want 27: each once", got)
	}
	if n := len(w.log.of("outbox.store_lost")); n == 0 {
		t.Error("the loss was not logged")
	}
}

// Messages that went by age, by a limit or by an operator's hand are no loss.
func TestRemovedMessagesAreNoLoss(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.start()
	w.write("123")
	w.drained(5 * time.Second)
	s, err := w.jetStream().Stream(t.Context(), "AUTH_EVENTS")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.nats.Kill()
	w.nats.Restart()
	w.write("1")
	w.drained(5 * time.Second)
	if got := len(w.stored("AUTH_EVENTS")); got != 1 {
		t.Errorf("got %d messages, want the new one only", got)
	}
}

// Rows that JetStream refuses, or does not answer, hold back their own user's
// rows only, however many they are, and go out when they can.
func TestStuckRows(t *testing.T) {
	const permissions = `
accounts { A { jetstream: enabled, users: [{ user: svc, password: x, permissions: { publish: { deny: "auth.events.user.disabled" } } }, { user: test, password: x }] } }`
	for _, c := range []struct {
		name, config, stick, free string
	}{
		{"too large", "max_payload: 2000",
			`UPDATE outbox SET data = data || jsonb_build_object('client_ip', repeat('x', 3000)) WHERE user_id = repeat('1', 32)::uuid AND seq < 3`,
			`UPDATE outbox SET data = data || '{"client_ip":""}' WHERE sent_at IS NULL`},
		{"unknown type", "",
			`UPDATE outbox SET event_type = 'auth.user.promoted' WHERE seq = 1`,
			`UPDATE outbox SET event_type = 'auth.lockout' WHERE seq = 1`},
		{"never answered", permissions,
			`UPDATE outbox SET event_type = 'auth.user.disabled' WHERE seq = 1`,
			`UPDATE outbox SET event_type = 'auth.lockout' WHERE seq = 1`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, natstest.Start(t, natstest.Options{Config: c.config, User: userOf(c.config, "test")}))
			w.write("12112")
			dbtest.Exec(t, w.database, c.stick)
			w.start(func(cfg *natsbus.Config) {
				cfg.URL = strings.Replace(cfg.URL, "test:", "svc:", 1)
			})
			left := func() []int64 {
				return dbtest.Query[int64](t, w.database, `SELECT seq FROM outbox WHERE sent_at IS NULL ORDER BY seq`)
			}
			w.within(5*time.Second, "the other user's are sent", func() bool { return slices.Equal(left(), []int64{1, 3, 4}) })
			began := time.Now()
			w.write("2")
			w.within(2*time.Second, "so is what the other writes later", func() bool { return slices.Equal(left(), []int64{1, 3, 4}) })
			t.Logf("the other user's next event took %v", time.Since(began))
			w.within(8*time.Second, "the failure is logged and counted", func() bool {
				w.mu.Lock()
				defer w.mu.Unlock()
				return len(w.log.of("outbox.relay_failed")) > 0 && len(w.failed) == 1
			})
			dbtest.Exec(t, w.database, c.free)
			w.drained(20 * time.Second)
			w.complete()
		})
	}
}

// More users are stuck than one fetch has rows.
func TestManyStuckRows(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	dbtest.Exec(t, w.database, `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data)
		SELECT 'auth.user.promoted', u, u, '', jsonb_build_object('user_id', u, 'client_ip', '') FROM (SELECT gen_random_uuid() AS u FROM generate_series(1, 3000)) AS u`)
	w.write("1")
	w.start()
	w.within(10*time.Second, "the row behind them is sent", func() bool { return w.pending() == 3000 })
	if got := len(w.log.of("outbox.relay_failed")); got > 12 {
		t.Errorf("%d log lines for one cause", got)
	}
	dbtest.Exec(t, w.database, `UPDATE outbox SET event_type = 'auth.lockout'`)
	w.drained(15 * time.Second)
	w.complete()
}

// A row that becomes visible after later ones were sent is sent.
func TestOutOfOrderCommit(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.start()
	conn, err := pgx.Connect(t.Context(), w.database+"&search_path=identity_auth")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), writeSQL("1")); err != nil {
		t.Fatal(err)
	}
	w.write("2233")
	w.within(5*time.Second, "the later ones are sent", func() bool {
		return dbtest.Value[int64](t, w.database, `SELECT count(*) FROM outbox WHERE sent_at IS NOT NULL`) == 4
	})
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.drained(2 * time.Second)
	w.complete()
}

// child is a relay in a process of its own.
type child struct{ cmd *exec.Cmd }

func (w *world) startChild() *child {
	w.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+w.database+" "+w.nats.URL())
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return &child{cmd}
}

func (c *child) signal(w *world, s syscall.Signal) {
	w.Helper()
	if err := c.cmd.Process.Signal(s); err != nil {
		w.Fatal(err)
	}
}

func (w *world) holder() string {
	w.Helper()
	return dbtest.Value[string](w.T, w.database, `SELECT coalesce(holder::text, '') FROM relay`)
}

// The holder is stopped under load, another takes over, and the first comes
// back with what it has in its hands: nothing is lost, and by first copy the
// order is kept. That acknowledgements from before a loss do not count after
// it is TestMarkSent's; the package comment names what a loss during the pause
// can do to the order.
func TestPausedHolder(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	first := w.startChild()
	load := startLoad(w)
	for range 2 {
		w.within(10*time.Second, "the child relays", func() bool { return w.holder() != "" })
		holder := w.holder()
		w.start()
		time.Sleep(time.Duration(200+rand.IntN(500)) * time.Millisecond) // stopped anywhere in its work
		first.signal(w, syscall.SIGSTOP)
		began := time.Now()
		w.within(10*time.Second, "another takes over", func() bool { return w.holder() != holder })
		t.Logf("taken over after %v", time.Since(began))
		first.signal(w, syscall.SIGCONT)
		w.relaysOn()
		w.stop()
	}
	load.stop()
	w.drained(20 * time.Second)
	w.complete()
}

// The stream is lost while a holder is paused, and the holder goes on where it
// was, on a connection that has lived through it all: one late message may come
// before older ones, but none is lost and what the holder records is void.
func TestPausedHolderAndStreamLost(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	first := w.startChild()
	load := startLoad(w)
	w.within(10*time.Second, "the child relays", func() bool { return w.holder() != "" && int64(len(w.outbox())) > w.pending() })
	holder := w.holder()
	first.signal(w, syscall.SIGSTOP)
	w.start()
	w.within(10*time.Second, "another takes over", func() bool { return w.holder() != holder })
	w.within(10*time.Second, "and relays", w.bus.Up)
	if err := w.jetStream().DeleteStream(t.Context(), "AUTH_EVENTS"); err != nil {
		t.Fatal(err)
	}
	w.within(10*time.Second, "the loss is noticed", func() bool { return len(w.log.of("outbox.store_lost")) > 0 })
	first.signal(w, syscall.SIGCONT)
	load.stop()
	w.drained(60 * time.Second)
	w.nothingLost()
}

// A holder that is killed is followed within seconds, one that ends at once.
func TestTakeOver(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	first := w.startChild()
	w.within(10*time.Second, "the child relays", func() bool { return w.holder() != "" })
	w.start()
	first.signal(w, syscall.SIGKILL)
	w.write("12")
	w.drained(8 * time.Second)

	second := newWorldOn(w)
	second.start()
	w.within(3*time.Second, "the second is connected", second.bus.Up)
	w.stop()
	w.write("12")
	second.drained(3 * time.Second)
	second.complete()
}

func newWorldOn(w *world) *world {
	other := &world{T: w.T, database: w.database, nats: w.nats, log: &lines{}, published: map[string]int{}, failed: map[string]int{}}
	other.open()
	return other
}

// The service is killed between commit and acknowledgement, 20 times: each
// event is there, and no change has two.
func TestServiceKilled(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	for i := range 20 {
		dbtest.Exec(t, w.database, `UPDATE relay SET holder = NULL`) // not to wait for the lease of the dead
		before := int64(len(w.outbox()))
		w.write(strings.Repeat("1231", 250))
		c := w.startChild()
		w.within(10*time.Second, "some are recorded", func() bool {
			return dbtest.Value[bool](t, w.database, `SELECT EXISTS (SELECT FROM outbox WHERE sent_at IS NOT NULL AND seq > $1)`, before) || i%2 == 0 && w.holder() != ""
		})
		c.signal(w, syscall.SIGKILL)
		c.cmd.Wait()
	}
	dbtest.Exec(t, w.database, `UPDATE relay SET holder = NULL`)
	w.start()
	w.drained(20 * time.Second)
	w.complete()
}

func TestSecrets(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	unseal := func(row db.OutboxRow) (json.RawMessage, error) {
		if !strings.Contains(string(row.Data), "sealed") {
			return nil, errors.New("cannot open")
		}
		return json.RawMessage(`{"token":"opened"}`), nil
	}
	w.write("121")
	dbtest.Exec(t, w.database, `UPDATE outbox SET event_type = 'auth.secrets.password_reset', data = data || '{"sealed":"x"}', transient = true WHERE seq = 1`)

	// Without the key it waits, and its user's events do not.
	w.start(func(c *natsbus.Config) { c.SecretsMaxAge = time.Minute })
	w.within(5*time.Second, "the events are sent", func() bool { return w.pending() == 1 })
	w.stop()
	w.start(func(c *natsbus.Config) { c.SecretsMaxAge, c.Unseal = time.Minute, unseal })
	w.drained(8 * time.Second)
	msgs := w.stored("AUTH_SECRETS")
	if len(msgs) != 1 || !strings.HasSuffix(string(msgs[0].Data()), `"data":{"token":"opened"}}`) || msgs[0].Subject() != "auth.secrets.password_reset" {
		t.Fatalf("got %v, want the opened secret", msgs)
	}
	if got := dbtest.Value[int64](t, w.database, `SELECT count(*) FROM outbox WHERE seq = 1`); got != 0 {
		t.Error("the sealed secret is still in the outbox")
	}
	if got := len(w.stored("AUTH_EVENTS")); got != 2 {
		t.Errorf("AUTH_EVENTS: got %d messages, want 2", got)
	}

	// A lost store does not bring it back.
	w.nats.Kill()
	w.nats.DeleteStore()
	w.nats.Restart()
	w.within(5*time.Second, "both losses are noticed", func() bool {
		s := strings.Join(w.log.of("outbox.store_lost"), "")
		return strings.Contains(s, `"resent":2`) && strings.Contains(s, "AUTH_SECRETS")
	})
	w.drained(5 * time.Second)
	if got := len(w.stored("AUTH_SECRETS")); got != 0 {
		t.Errorf("got %d secrets, want none", got)
	}
	if got := len(w.stored("AUTH_EVENTS")); got != 2 {
		t.Errorf("AUTH_EVENTS: got %d messages, want 2", got)
	}
}

func TestFlush(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.start()
	w.within(3*time.Second, "up", w.bus.Up)
	w.write(strings.Repeat("123", 1000))
	if err := w.bus.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := w.pending(); got != 0 {
		t.Errorf("got %d pending after Flush", got)
	}
	w.complete()
}
