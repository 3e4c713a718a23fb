// Package natsbus relays the outbox to JetStream.
//
// It guarantees: every event that was committed is published, with the same
// event_id however often, until JetStream has acknowledged it, and again when
// JetStream turns out to have lost it; no row is skipped or given up, and one
// that cannot go out holds back its own user's only. By the first copy in the
// stream, the events of one user stand in the order of writing.
//
// How: a row is unsent until an acknowledgement is recorded in it, so crashes
// of anything lead to a second copy, never to a lost one, and JetStream drops
// second copies by event_id for ten minutes. A user has one message under way
// at a time, so the next goes out only when the one before is stored. One
// process relays at a time, by a lease that it gives up believing in, by its
// own clock, before PostgreSQL gives it to another. A process that was stopped
// between that look at the clock and the write, and goes on minutes later,
// publishes one message of each user at most, which the other has published
// by then: a second copy, and what it would record is void if a loss was
// noticed meanwhile.
//
// A connection is never reconnected: each begins with a comparison of what the
// streams hold with what they acknowledged, so nothing is published into a
// store that was cut back before that is known. Whenever a stream does not
// look as expected the connection is dropped and the comparison made anew.
//
// It trusts the NATS account: who may publish to auth.events.> can forge
// events. It trusts that a stream on file storage keeps what it acknowledged,
// and checks what it can see of that. It leaves to consumers: dropping second
// copies by event_id.
package natsbus

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/url"
	"os"
	"slices"
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
	checkInterval  = 750 * time.Millisecond // between looks at the streams
	checkTimeout   = 1500 * time.Millisecond
	upWindow       = 2500 * time.Millisecond // an answer older than this says nothing
	sampleInterval = 10 * time.Second        // of log lines that repeat themselves
)

// Config is what the bus is told.
type Config struct {
	URL           string        // comma-separated nats:// or tls:// servers; one tls:// makes TLS required of all
	CredsFile     string        // NATS credentials, read again at every connect; empty: those in the URL, if any
	CAFile        string        // PEM; makes TLS required; read again at every connect
	Replicas      int           // of streams that are made here
	SecretsMaxAge time.Duration // PASSWORD_RESET_TTL; 0: no AUTH_SECRETS stream

	// Unseal makes the message of an EventPasswordResetSecret from its sealed
	// data. Nil, or an error: the row waits.
	Unseal func(db.OutboxRow) ([]byte, error)
}

// Observer is told of every event acknowledged and of every attempt that
// failed.
type Observer struct {
	Published     func(eventType string)
	PublishFailed func(eventType string)
}

// Bus relays the outbox. But for what follows mu everything is set by New.
type Bus struct {
	store   *db.Store
	log     *slog.Logger
	obs     Observer
	id      db.RelayID
	streams []jetstream.StreamConfig
	unseal  func(db.OutboxRow) ([]byte, error)

	start    time.Time
	answered atomic.Int64 // when every stream last answered and was safe, since start; 0: never

	// mu guards cfg and files, which Reload replaces.
	mu    sync.Mutex
	cfg   Config
	files files

	failures sampler           // of connecting and of the relay
	findings map[string]string // by stream: what keeps it from being used; for keepStreams
	cutBack  map[string]uint64 // by stream: where its end turned out to be, for the next comparison; for relay
}

// files are the contents of the files named in Config.
type files struct {
	creds []byte
	roots *x509.CertPool
}

// New checks cfg; the network is not needed. An error names the variables that
// are wrong, and no value.
func New(cfg Config, store *db.Store, log *slog.Logger, obs Observer) (*Bus, error) {
	b := &Bus{
		store: store, log: log, obs: obs, id: db.NewRelayID(), unseal: cfg.Unseal,
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
		var o nats.Options
		if readErr == nil {
			readErr = nats.UserCredentialBytes(creds)(&o)
		}
		if readErr == nil {
			_, readErr = o.UserJWT()
		}
		if readErr == nil {
			_, readErr = o.SignatureCB([]byte("nonce"))
		}
		if readErr != nil {
			err = errors.New("NATS_CREDS_FILE: not a readable NATS credentials file")
		}
		f.creds = creds
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

// Up tells whether every stream is there, safe, and answered just now. A
// change shows within three seconds.
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
		sleep(ctx, 50*time.Millisecond)
		before := pending
		if pending, _, err = b.store.PendingThrough(ctx, last); pending < before {
			progress = time.Now()
		}
	}
	return err
}

// link is one connection, from the comparison of the streams to its end.
type link struct {
	nc      *nats.Conn
	js      jetstream.JetStream
	safe    atomic.Bool // every stream was there and safe at the last look
	results chan result // of every message published, in a buffer that holds them all
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
	o.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.roots}
	o.Secure = f.roots != nil
	o.ClosedCB = func(*nats.Conn) { closed() }
	// Such as a missing permission, which no reply tells of.
	o.AsyncErrorCB = func(_ *nats.Conn, _ *nats.Subscription, err error) { b.report(logRelayFailed, err) }
	if f.creds != nil {
		if err := nats.UserCredentialBytes(f.creds)(&o); err != nil {
			return nil, err
		}
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

// keepStreams looks at every stream until ctx is done, makes what is absent,
// and drops the connection when a stream is no longer the one it was, or ends
// earlier than before: the relay must compare again.
func (b *Bus) keepStreams(ctx context.Context, l *link) {
	seen := map[string]jetstream.StreamInfo{}
	for ctx.Err() == nil {
		safe := true
		for _, want := range b.streams {
			info, err := b.ensureStream(ctx, l, want)
			if ctx.Err() != nil || l.nc.IsClosed() {
				return // says nothing of the stream
			}
			b.note(want.Name, err)
			if err != nil {
				safe = false
				continue
			}
			was, ok := seen[want.Name]
			if ok && (!was.Created.Equal(info.Created) || was.State.LastSeq > info.State.LastSeq) {
				return
			}
			seen[want.Name] = *info
		}
		l.safe.Store(safe)
		if safe {
			b.answered.Store(int64(time.Since(b.start)))
		}
		sleep(ctx, checkInterval)
	}
}

// unsafeStream says which field of a stream's configuration breaks a promise.
type unsafeStream struct{ field, why string }

func (u unsafeStream) Error() string { return u.field + ": " + u.why }

// ensureStream asks for a stream, makes it when it is absent, and widens the
// first version's subjects. It changes nothing else of what an operator set.
func (b *Bus) ensureStream(ctx context.Context, l *link, want jetstream.StreamConfig) (*jetstream.StreamInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	s, err := l.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if s, err = l.js.CreateStream(ctx, want); err == nil {
			b.log.Info(logStreamCreated, "stream", want.Name)
		}
	}
	if err == nil {
		if changed, event := adapt(s.CachedInfo().Config, want); event != "" {
			if s, err = l.js.UpdateStream(ctx, changed); err == nil {
				b.log.Info(event, "stream", want.Name)
			}
		}
	}
	var apiErr *jetstream.APIError
	if errors.As(err, &apiErr) && apiErr.ErrorCode == 10065 { // JSStreamSubjectOverlapErr
		return nil, unsafeStream{"subjects", "another stream has some of " + want.Subjects[0]}
	}
	if err != nil {
		return nil, err
	}
	return s.CachedInfo(), checkStream(s.CachedInfo().Config)
}

// adapt changes what we change of a stream that is there, if anything, and
// names the log line for it.
func adapt(c, want jetstream.StreamConfig) (jetstream.StreamConfig, string) {
	if slices.Contains(c.Subjects, "auth.events.*") { // the first version's; with it, ours would overlap
		c.Subjects = append(slices.DeleteFunc(slices.Clone(c.Subjects), func(s string) bool { return strings.HasPrefix(s, "auth.events.") }), want.Subjects...)
		return c, logStreamWidened
	}
	if want.Name == secretsStream && c.MaxAge != want.MaxAge { // PASSWORD_RESET_TTL was changed
		c.MaxAge, c.Duplicates = want.MaxAge, min(c.Duplicates, want.MaxAge)
		return c, logStreamMaxAge
	}
	return c, ""
}

// checkStream finds what would make an acknowledgement worthless, or never
// come. Limits of size and age are the operator's choice: a stream that is
// full refuses, and rows wait, or drops the oldest, as it was told to.
func checkStream(c jetstream.StreamConfig) error {
	switch {
	case c.Storage != jetstream.FileStorage:
		return unsafeStream{"storage", "not file: a restart of the server loses acknowledged events"}
	case c.PersistMode != jetstream.DefaultPersistMode:
		return unsafeStream{"persist_mode", "asynchronous: a crash of the server loses acknowledged events"}
	case c.NoAck:
		return unsafeStream{"no_ack", "the stream does not acknowledge"}
	case c.Sealed:
		return unsafeStream{"sealed", "the stream takes no messages"}
	case c.SubjectTransform != nil:
		return unsafeStream{"subject_transform", "consumers would not find the subjects of the contract"}
	}
	for eventType, subject := range subjects {
		if streamOf(eventType) == c.Name && !slices.ContainsFunc(c.Subjects, func(pattern string) bool { return covers(pattern, subject) }) {
			return unsafeStream{"subjects", "they do not cover those of the contract"}
		}
	}
	return nil
}

// covers tells whether a subject without wildcards matches a pattern.
func covers(pattern, subject string) bool {
	ps, ss := strings.Split(pattern, "."), strings.Split(subject, ".")
	for i, p := range ps {
		if p == ">" {
			return len(ss) > i
		}
		if i >= len(ss) || p != "*" && p != ss[i] {
			return false
		}
	}
	return len(ps) == len(ss)
}

// note logs what keeps a stream from being used, once for each change.
func (b *Bus) note(stream string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if b.findings[stream] == text {
		return
	}
	b.findings[stream] = text
	var bad unsafeStream
	if errors.As(err, &bad) {
		b.log.Error(logStreamUnsafe, "stream", stream, "field", bad.field, "err", bad.why)
	} else if err != nil {
		b.log.Warn(logStreamUnavailable, "stream", stream, "err", text)
	}
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
