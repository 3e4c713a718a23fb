// Package natsbus relays the outbox to JetStream.
//
// It guarantees: every committed event is published, each time under its one
// event_id, until JetStream has acknowledged it, and again when JetStream
// turns out to have lost it. No row is skipped or given up; one that cannot go
// out holds back its own user's only. By first copy in the stream, the events
// of a user stand in the order of writing.
//
// Why that holds. A row is unsent until its acknowledgement is recorded in it:
// a crash of anything leads to a second copy, which JetStream drops by
// event_id for ten minutes, and never to a lost one. Of each user one message
// is under way, so the next goes out only when the one before is stored,
// whatever timed out or was refused in between.
//
// One process relays at a time, by a lease that it gives up by its own clock
// before PostgreSQL's runs out. One that is stopped between its last look at
// the clock and the write publishes, when it goes on, one message of each user
// at most: the one whose turn it is, or one that the next holder has published
// by then, a second copy whether or not the ten minutes are over. What it would
// record is void if a loss was noticed meanwhile. So two relays at once cost
// copies, not events or order, but for one case: such a late message can come
// before older ones if the stream was lost during the pause as well.
//
// A connection is never reconnected. Each begins with a comparison of what the
// streams hold with what they acknowledged, so nothing is published into a
// store that was cut back before that is known; a stream that stops looking as
// expected ends the connection. Only the holder of the lease makes streams, so
// nobody publishes into a new one before the loss of the old one is known.
//
// It trusts the NATS account: who may publish to auth.events.> can forge
// events. It trusts that a stream on file storage keeps what it acknowledged,
// as far as created time and last sequence tell. It leaves to consumers:
// dropping second copies by event_id.
package natsbus

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/7d-solutions/identity-auth/db"
)

// Names of the streams.
const (
	eventsStream  = "AUTH_EVENTS"
	secretsStream = "AUTH_SECRETS"
)

// Event names of log lines.
const (
	logConnected         = "nats.connected"
	logDisconnected      = "nats.disconnected"
	logCredentialsBad    = "nats.credentials_unreadable"
	logStreamCreated     = "nats.stream_created"
	logStreamWidened     = "nats.stream_widened"
	logStreamMaxAge      = "nats.stream_max_age"
	logStreamUnsafe      = "nats.stream_unsafe"
	logStreamUnavailable = "nats.stream_unavailable"
	logRelayFailed       = "outbox.relay_failed"
	logRelaying          = "outbox.relaying"
	logStoreLost         = "outbox.store_lost"
)

const (
	connectTimeout = 2 * time.Second        // one server
	reconnectWait  = 250 * time.Millisecond // and as much again by chance
	pingInterval   = 2 * time.Second        // a silent connection is dropped after three
	checkInterval  = 500 * time.Millisecond // between looks at the streams
	checkTimeout   = time.Second
	upWindow       = 2000 * time.Millisecond // an answer older than this says nothing
	sampleInterval = 10 * time.Second        // of log lines that repeat themselves
)

// Config is what the bus is told.
type Config struct {
	URL           string        // comma-separated nats:// or tls:// servers; one tls:// makes TLS required of all
	CredsFile     string        // NATS credentials, read again at every connect; empty: those in the URL, if any
	CAFile        string        // PEM; makes TLS required; read again at every connect
	Replicas      int           // of streams that are made here
	SecretsMaxAge time.Duration // PASSWORD_RESET_TTL; 0: no AUTH_SECRETS stream

	// Unseal opens the data of an EventPasswordResetSecret just before it is
	// published. Nil, or an error: the row waits.
	Unseal func(db.OutboxRow) (json.RawMessage, error)

	// Ready tells whether the database has the tables that the relay needs; it
	// waits until then. Nil: it has.
	Ready func() bool
}

// Observer is told of every event acknowledged and of every attempt that
// failed.
type Observer struct {
	Published     func(eventType string)
	PublishFailed func(eventType string)
}

// Bus relays the outbox.
type Bus struct {
	store   *db.Store
	log     *slog.Logger
	obs     Observer
	id      db.RelayID
	streams []jetstream.StreamConfig
	unseal  func(db.OutboxRow) (json.RawMessage, error)
	ready   func() bool

	start    time.Time
	answered atomic.Int64 // when every stream last answered and was safe, since start; 0: never

	failures sampler           // of connecting and of the relay
	cutBack  map[string]uint64 // by stream: where its end turned out to be, for the relay's next comparison

	// mu guards cfg and files, which Reload replaces, and findings.
	mu       sync.Mutex
	cfg      Config
	files    files
	findings map[string]string // by stream: what keeps it from being used
}

// files are what the files named in Config hold; nil: none is named.
type files struct {
	login nats.Option
	roots *x509.CertPool
}

// New checks cfg; the network is not needed. An error names the variables that
// are wrong, and no value.
func New(cfg Config, store *db.Store, log *slog.Logger, obs Observer) (*Bus, error) {
	b := &Bus{
		store: store, log: log, obs: obs, id: db.NewRelayID(), unseal: cfg.Unseal, ready: cfg.Ready,
		start: time.Now(), findings: map[string]string{}, cutBack: map[string]uint64{},
	}
	b.streams = []jetstream.StreamConfig{{
		Name:        eventsStream,
		Description: "Events of identity-auth",
		Subjects:    []string{"auth.events.>"},
		Storage:     jetstream.FileStorage,
		MaxAge:      14 * 24 * time.Hour,
		Duplicates:  10 * time.Minute,
		Replicas:    cfg.Replicas,
	}}
	if cfg.SecretsMaxAge > 0 {
		b.streams = append(b.streams, jetstream.StreamConfig{
			Name:        secretsStream,
			Description: "Password reset tokens of identity-auth, for the mailer only",
			Subjects:    []string{"auth.secrets.>"},
			Storage:     jetstream.FileStorage,
			MaxAge:      cfg.SecretsMaxAge,
			Duplicates:  min(cfg.SecretsMaxAge, 10*time.Minute),
			Replicas:    cfg.Replicas,
		})
	}
	return b, b.Reload(cfg)
}

// Reload makes the next connection use the servers, credentials and CA of cfg,
// and says what is wrong with them; then the old ones stay in use. The rest of
// cfg changes with a restart only.
func (b *Bus) Reload(cfg Config) error {
	_, urlErr := servers(cfg.URL)
	f, filesErr := readFiles(cfg)
	if err := errors.Join(urlErr, filesErr); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cfg, b.files = cfg, f
	return nil
}

func servers(list string) ([]string, error) {
	urls := strings.Split(list, ",")
	for i, s := range urls {
		s = strings.TrimSpace(s)
		if !strings.Contains(s, "://") {
			s = "nats://" + s
		}
		u, err := url.Parse(s)
		if err != nil || u.Hostname() == "" || u.Scheme != "nats" && u.Scheme != "tls" {
			return nil, errors.New("NATS_URL: not comma-separated nats:// or tls:// servers") // url's text could hold the password
		}
		urls[i] = s
	}
	return urls, nil
}

func readFiles(cfg Config) (f files, err error) {
	if cfg.CredsFile != "" {
		creds, readErr := os.ReadFile(cfg.CredsFile)
		f.login = nats.UserCredentialBytes(creds)
		var o nats.Options
		f.login(&o) // parses nothing yet
		_, jwtErr := o.UserJWT()
		_, keyErr := o.SignatureCB(nil)
		if errors.Join(readErr, jwtErr, keyErr) != nil {
			err = errors.New("NATS_CREDS_FILE: not a readable NATS credentials file")
		}
	}
	if cfg.CAFile != "" {
		pem, readErr := os.ReadFile(cfg.CAFile)
		f.roots = x509.NewCertPool()
		if readErr != nil || !f.roots.AppendCertsFromPEM(pem) {
			err = errors.Join(err, errors.New("NATS_CA_FILE: not a readable file of PEM certificates"))
		}
	}
	return f, err
}

// Up tells whether every stream is there, safe, and answered just now. Who asks
// twice a second sees a change within 2.5 s.
func (b *Bus) Up() bool {
	at := b.answered.Load()
	return at != 0 && time.Since(b.start)-time.Duration(at) < upWindow
}

// Run connects, keeps the streams in order and relays, until ctx is done. Then
// it lets another process relay and returns nil. What is still unsent stays in
// the outbox; call Flush first to wait for it.
func (b *Bus) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		b.connection(ctx)
		sleep(ctx, reconnectWait+rand.N(reconnectWait))
	}
	b.answered.Store(0)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := b.store.ReleaseRelay(ctx, b.id); err != nil {
		b.log.Warn(logRelayFailed, "err", err.Error()) // the lease ends by itself
	}
	return nil
}

// Flush returns nil when every event committed before the call is acknowledged,
// by whichever process relays, and an error when that makes no progress for
// two seconds or ctx is done. Run must be running.
func (b *Bus) Flush(ctx context.Context) error {
	pending, last, err := b.store.PendingThrough(ctx, math.MaxInt64)
	for progress := time.Now(); err == nil && pending > 0; {
		if time.Since(progress) > 2*time.Second || ctx.Err() != nil {
			return fmt.Errorf("%d events wait in the outbox", pending)
		}
		sleep(ctx, 100*time.Millisecond)
		before := pending
		if pending, _, err = b.store.PendingThrough(ctx, last); pending < before {
			progress = time.Now()
		}
	}
	return err
}

// link is one connection.
type link struct {
	nc       *nats.Conn
	js       jetstream.JetStream
	relaying atomic.Bool // the streams were compared and are published to
	results  chan result // of every message published, in a buffer that holds them all
}

// connection connects once and works until the connection is closed, is to be
// dropped, or ctx is done.
func (b *Bus) connection(ctx context.Context) {
	ctx, drop := context.WithCancel(ctx)
	defer drop()
	l, err := b.connect(drop)
	if err != nil {
		b.answered.Store(0)
		b.report(logDisconnected, err)
		return
	}
	b.log.Info(logConnected, "server", l.nc.ConnectedAddr())
	var loops sync.WaitGroup
	loops.Go(func() { defer drop(); b.keepStreams(ctx, l) })
	loops.Go(func() { defer drop(); b.relay(ctx, l) })
	loops.Wait()
	if l.nc.IsClosed() {
		b.answered.Store(0)
		b.log.Warn(logDisconnected, "err", fmt.Sprint(l.nc.LastError()))
	}
	l.nc.Close()
}

// connect reads the files again, so that rotated ones are used; when they are
// bad the last good ones are.
func (b *Bus) connect(closed func()) (*link, error) {
	b.mu.Lock()
	if f, err := readFiles(b.cfg); err == nil {
		b.files = f
	} else {
		b.report(logCredentialsBad, err)
	}
	urls, _ := servers(b.cfg.URL) // checked by Reload
	f := b.files
	b.mu.Unlock()

	o := nats.GetDefaultOptions()
	o.Servers = urls
	o.Name = "identity-auth"
	o.AllowReconnect = false
	o.Timeout = connectTimeout
	o.PingInterval = pingInterval
	o.FlusherTimeout = ackTimeout // a server that stopped reading
	o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.roots}
	o.Secure = f.roots != nil
	o.ClosedCB = func(*nats.Conn) { closed() }
	// Such as a missing permission, which no reply tells of.
	o.AsyncErrorCB = func(_ *nats.Conn, _ *nats.Subscription, err error) { b.report(logRelayFailed, err) }
	if f.login != nil {
		f.login(&o)
	}
	nc, err := o.Connect()
	if err != nil {
		return nil, err
	}
	l := &link{nc: nc, results: make(chan result, maxUnderWay)}
	l.js, err = jetstream.New(nc,
		jetstream.WithPublishAsyncTimeout(ackTimeout),
		jetstream.WithPublishAsyncAckHandler(func(_ jetstream.JetStream, m *nats.Msg, ack *jetstream.PubAck) { l.results <- result{m, ack, nil} }),
		jetstream.WithPublishAsyncErrHandler(func(_ jetstream.JetStream, m *nats.Msg, err error) { l.results <- result{m, nil, err} }))
	if err != nil { // unreachable: the options are constants
		nc.Close()
		return nil, err
	}
	return l, nil
}

// report logs a failure that may repeat itself many times a second.
func (b *Bus) report(event string, err error, args ...any) {
	if b.failures.take(event + err.Error()) {
		b.log.Warn(event, append(args, "err", err.Error())...)
	}
}

// sampler lets a text through when it is new, at most once a second, and else
// every sampleInterval.
type sampler struct {
	mu   sync.Mutex // guards the rest
	last string
	at   time.Time
}

func (s *sampler) take(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	age := time.Since(s.at)
	if age < time.Second || text == s.last && age < sampleInterval {
		return false
	}
	s.last, s.at = text, time.Now()
	return true
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
