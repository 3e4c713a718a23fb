package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// TestFaults lets every fault come once, while clients use three replicas, and
// then judges what they were told.
func TestFaults(t *testing.T) {
	r := newFaultRun(t, faultSeed(t))
	r.begin()
	for _, f := range faults {
		r.pass(f)
	}
	r.finish()
}

// faultSeed is FAULT_SEED, or fresh.
func faultSeed(t *testing.T) uint64 {
	t.Helper()
	text := os.Getenv("FAULT_SEED")
	if text == "" {
		return uint64(rand.Uint32())
	}
	seed, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("FAULT_SEED: %v", err)
	}
	return seed
}

// faultRun is three replicas, their PostgreSQL behind a proxy that can break
// the connection, their NATS, the clients, and a consumer of the events. One
// goroutine, the test's, injects and heals faults.
type faultRun struct {
	*recorder
	t    *testing.T
	w    *world
	seed uint64
	rng  *rand.Rand

	proxies  [2]*proxy // the hosts of DATABASE_URL
	disks    [3]*disk  // of a server at each host, and of NATS
	pg       *dbtest.Server
	at       int // the host where pg is
	configs  []env
	replicas []*service

	clients  []*client
	stop     chan struct{} // closed when the clients are to end
	working  sync.WaitGroup
	consumer *consumer
	injected []string
	cuts     int
}

func newFaultRun(t *testing.T, seed uint64) *faultRun {
	t.Helper()
	r := &faultRun{
		recorder: &recorder{zero: time.Now()}, t: t, seed: seed, stop: make(chan struct{}),
		rng: rand.New(rand.NewPCG(seed, 0)),
	}
	r.h = history{threshold: 5, lockout: 3 * time.Second, grace: time.Duration(r.rng.IntN(2)) * 10 * time.Second}
	t.Logf("FAULT_SEED=%d, REFRESH_REUSE_GRACE=%v", seed, r.h.grace)
	if _, err := plainBinary(); err != nil {
		t.Fatal(err)
	}
	for i, megabytes := range []int{256, 256, 64} {
		r.disks[i] = newDisk(t, megabytes)
	}
	r.disks[0].under(func() { r.pg = dbtest.Start(t) })
	dbtest.Exec(t, r.pg.URL(), `ALTER SYSTEM SET max_wal_size = '64MB'`)
	dbtest.Exec(t, r.pg.URL(), `ALTER SYSTEM SET min_wal_size = '32MB'`)
	dbtest.Exec(t, r.pg.URL(), `SELECT pg_reload_conf()`)
	r.w = &world{t: t, db: r.pg.URL()}
	r.disks[2].under(func() { r.w.nats = natstest.Start(t, natstest.Options{JetStream: "sync_interval: always"}) })
	var hosts []string
	for i := range r.proxies {
		r.proxies[i] = newProxy(t)
		hosts = append(hosts, r.proxies[i].listener.Addr().String())
	}
	r.proxies[0].pointAt(r.pg.URL())
	for i := range 3 {
		port, admin := freePort(t), freePort(t)
		r.configs = append(r.configs, r.w.config(unlimited, cheapHashes, env{
			"DATABASE_URL":             fmt.Sprintf("postgres://postgres@%s/identity_auth?sslmode=disable&target_session_attrs=read-write&application_name=replica-%d", strings.Join(hosts, ","), i),
			"DATABASE_MAX_CONNECTIONS": "8",
			"PORT":                     port,
			"ADMIN_ADDR":               "127.0.0.1:" + admin,
			"ADMIN_TOKEN":              faultAdminToken,
			"LOCKOUT_THRESHOLD":        strconv.Itoa(r.h.threshold),
			"LOCKOUT_DURATION":         r.h.lockout.String(),
			"REFRESH_REUSE_GRACE":      r.h.grace.String(),
			"MAX_SESSIONS_PER_USER":    "0",
		}))
		r.base = append(r.base, "http://127.0.0.1:"+port)
		r.admin = append(r.admin, "http://127.0.0.1:"+admin)
		r.http = append(r.http, &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 100}})
		r.replicas = append(r.replicas, nil)
		r.launch(i)
	}
	r.ready()
	return r
}

func (r *faultRun) launch(i int) { r.replicas[i] = r.w.launch(plainBinary, r.configs[i]) }

// begin lets the clients loose.
func (r *faultRun) begin() {
	r.consumer = newConsumer(r.w.nats.URL())
	r.t.Cleanup(r.consumer.stop)
	for i := range 2 {
		c := newClient(r.recorder, fmt.Sprint("attacker-", i), r.seed)
		r.clients = append(r.clients, c)
		var victim *knownAccount
		eventually(r.t, "a registration before any fault", 30*time.Second, func() bool {
			victim = c.register()
			return victim != nil
		})
		r.working.Go(func() { c.attack(victim, r.stop) })
	}
	for i := range 6 {
		c := newClient(r.recorder, fmt.Sprint("user-", i), r.seed)
		r.clients = append(r.clients, c)
		r.working.Go(func() { c.live(r.stop) })
	}
	for i := range r.base {
		r.working.Go(func() { r.watch(i, r.stop) })
	}
	r.t.Cleanup(func() { // when the test has given up
		select {
		case <-r.stop:
		default:
			close(r.stop)
		}
		r.working.Wait()
	})
}

// pass lets faults come, stay a while and go, after some time without any.
func (r *faultRun) pass(fs ...fault) {
	r.t.Helper()
	time.Sleep(blink)
	var heals []func()
	hold := time.Duration(0)
	names := ""
	for _, f := range fs {
		names += " + " + f.name
		hold = max(hold, f.hold)
	}
	names = names[3:]
	begun := r.now()
	for _, f := range fs {
		heals = append(heals, f.inject(r))
	}
	hold += time.Duration(r.rng.Int64N(int64(hold)))
	if hold > outage && r.rng.IntN(3) == 0 {
		hold += 4 * time.Second // longer than any request may take
	}
	time.Sleep(hold)
	if r.rng.IntN(2) == 0 {
		slices.Reverse(heals)
	}
	for _, heal := range heals {
		heal()
	}
	healed := r.now()
	r.ready()
	r.injected = append(r.injected, names)
	r.t.Logf("%6.2fs to %.2fs, ready again after %.2fs: %s", begun.Seconds(), healed.Seconds(), (r.now() - healed).Seconds(), names)
}

// ready waits until every replica says so, by itself.
func (r *faultRun) ready() {
	r.t.Helper()
	for _, s := range r.replicas {
		s.waitReady()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, spans := range [][]span{r.h.killed, r.h.stopped} {
		for i := range spans {
			if spans[i].end == 0 {
				spans[i].end = r.now()
			}
		}
	}
}

// finish ends the clients, asks for what must have survived, and judges.
func (r *faultRun) finish() {
	r.t.Helper()
	time.Sleep(blink)
	close(r.stop)
	r.working.Wait()
	r.ask()
	unsent := func() int {
		return dbtest.Value[int](r.t, r.pg.URL(), `SELECT count(*)::int FROM outbox WHERE sent_at IS NULL`)
	}
	eventually(r.t, "every event is relayed", 60*time.Second, func() bool { return unsent() == 0 })
	for _, text := range dbtest.Query[string](r.t, r.pg.URL(), `
SELECT json_build_object('seq', seq, 'id', event_id, 'type', event_type, 'trace', trace_id, 'user', user_id, 'session', data->>'session_id')::text FROM outbox ORDER BY seq`) {
		var o struct {
			Seq                            int64
			ID, Type, Trace, User, Session string
		}
		if err := json.Unmarshal([]byte(text), &o); err != nil {
			r.t.Fatal(err)
		}
		r.h.outbox = append(r.h.outbox, row{o.Seq, published{o.ID, o.Type, o.Trace, o.User, o.Session}})
	}
	// What is not delivered in that time, a checker names.
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end) && !r.consumer.has(r.h.outbox); {
		time.Sleep(50 * time.Millisecond)
	}
	r.consumer.stop()
	r.h.events = r.consumer.events

	n := map[outcome]int{}
	kinds := map[string]int{}
	for _, c := range r.h.calls {
		n[c.result]++
		kinds[fmt.Sprint(c.kind, " ", c.status)]++
	}
	if n[ok] < 50 || kinds["guess 401"] < r.h.threshold { // on a machine that is fast enough, many times that
		r.t.Errorf("too little happened to judge: %v", kinds)
	}
	for _, c := range checkers {
		violations := c.check(&r.h)
		for _, v := range violations[:min(len(violations), 10)] {
			r.t.Errorf("%s: violated: %s", c.promise, v)
		}
		if len(violations) > 10 {
			r.t.Errorf("%s: violated %d times", c.promise, len(violations))
		}
	}
	for _, s := range slices.Sorted(maps.Keys(kinds)) {
		r.t.Logf("%6d %s", kinds[s], s)
	}
	r.t.Logf("FAULT_SEED=%d: %d calls ok, %d fail, %d unknown; %d faults, %d answers of commits cut off; %d events", r.seed,
		n[ok], n[fail], n[unknown], len(r.injected), r.cuts, len(r.h.events))
}

// ask logs every account in that was told 201, and presents the newest token
// of every chain, revoked or not. The checkers judge the answers.
func (r *faultRun) ask() {
	users := r.h.byUser()
	newest := map[string][]string{} // user: tokens
	for _, ch := range r.h.chains() {
		token := ""
		for _, c := range r.h.calls {
			if t := parseRefresh(c.got); t.family == ch.family && (token == "" || t.generation >= parseRefresh(token).generation) {
				token = c.got
			}
		}
		newest[ch.user] = append(newest[ch.user], token)
	}
	var asking sync.WaitGroup
	for _, c := range r.clients {
		c.settled = true
		asking.Go(func() {
			for _, a := range c.all {
				for _, token := range newest[a.UserID] {
					c.present(a, &knownSession{id: parseRefresh(token).session}, token, c.rng.IntN(len(c.base)))
				}
				var known credentials
				for _, call := range users[a.UserID] {
					known.follow(call)
				}
				if !known.told || known.deleted {
					continue
				}
				if known.disabled {
					c.settle(func() call { return c.operate(opEnable, a) })
				}
				for _, password := range slices.Backward(known.passwords) {
					if c.settle(func() call { return c.loginWith(a, password) }).result == ok {
						break
					}
				}
			}
		})
	}
	asking.Wait()
}

// settle repeats a call that is refused for a while only.
func (c *client) settle(f func() call) (done call) {
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if done = f(); done.status != 423 && done.status != 503 {
			break
		}
	}
	return done
}

// consumer reads the events as other services do: from wherever the stream
// is, through every fault, noting the first delivery of each.
type consumer struct {
	cancel context.CancelFunc
	ended  chan struct{}

	mu     sync.Mutex
	events []published
	seen   map[string]bool

	created time.Time // of the stream read last; only read uses these
	lastSeq uint64
}

func newConsumer(server string) *consumer {
	ctx, cancel := context.WithCancel(context.Background())
	c := &consumer{cancel: cancel, ended: make(chan struct{}), seen: map[string]bool{}}
	go func() {
		defer close(c.ended)
		for ctx.Err() == nil {
			if nc, err := nats.Connect(server, nats.NoReconnect(), nats.Timeout(time.Second)); err == nil {
				c.read(ctx, nc)
				nc.Close()
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	return c
}

func (c *consumer) stop() {
	c.cancel()
	<-c.ended
}

func (c *consumer) has(rows []row) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !slices.ContainsFunc(rows, func(r row) bool { return !c.seen[r.id] })
}

// read reads on until the stream is another one or does not answer.
func (c *consumer) read(ctx context.Context, nc *nats.Conn) {
	js, err := jetstream.New(nc)
	if err != nil {
		return
	}
	look := func() (jetstream.Stream, *jetstream.StreamInfo) {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		stream, err := js.Stream(ctx, "AUTH_EVENTS")
		if err != nil {
			return nil, nil
		}
		return stream, stream.CachedInfo()
	}
	stream, info := look()
	if stream == nil {
		return
	}
	if !info.Created.Equal(c.created) || info.State.LastSeq < c.lastSeq {
		c.created, c.lastSeq = info.Created, 0
	}
	from, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: c.lastSeq + 1})
	if err != nil {
		return
	}
	messages, err := from.Messages()
	if err != nil {
		return
	}
	defer messages.Stop()
	for ctx.Err() == nil {
		next, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		msg, err := messages.Next(jetstream.NextContext(next))
		cancel()
		if err != nil {
			if _, now := look(); nc.IsClosed() || now == nil || !now.Created.Equal(c.created) || now.State.LastSeq != c.lastSeq {
				return
			}
			continue
		}
		if meta, err := msg.Metadata(); err == nil {
			c.lastSeq = meta.Sequence.Stream
		}
		c.note(msg.Data())
	}
}

func (c *consumer) note(payload []byte) {
	var e struct {
		ID      string `json:"event_id"`
		Type    string `json:"event_type"`
		Trace   string `json:"trace_id"`
		User    string `json:"aggregate_id"`
		Session struct {
			ID string `json:"session_id"`
		} `json:"data"`
	}
	if err := json.Unmarshal(payload, &e); err != nil {
		panic(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.seen[e.ID] {
		c.seen[e.ID] = true
		c.events = append(c.events, published{e.ID, e.Type, e.Trace, e.User, e.Session.ID})
	}
}
