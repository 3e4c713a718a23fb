package natsbus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/7d-solutions/identity-auth/db"
)

const (
	maxUnderWay  = 3000                   // messages published and not answered, below the 4000 of nats.go; also the rows of one fetch
	maxHeld      = 10000                  // lanes in back-off; beyond that it is an outage of everybody
	ackTimeout   = 5 * time.Second        // of one message
	patience     = 250 * time.Millisecond // without any answer, before the batch goes on without the rest
	leaseTTL     = 5 * time.Second
	leaseRenewal = 1500 * time.Millisecond
	leaseAttempt = time.Second            // of who is not the holder
	pollInterval = 250 * time.Millisecond // for what other replicas committed
	batchPause   = 50 * time.Millisecond  // gathers rows: one fetch and one commit for many
	minBackoff   = 200 * time.Millisecond // halved by jitter at most
	maxBackoff   = 5 * time.Second
)

// errDrop ends the connection; the next one compares the streams anew.
var errDrop = errors.New("the connection is dropped to compare the streams again")

// relayer is the holder's state on one connection. One goroutine uses it.
type relayer struct {
	*Bus
	*link
	leaseEnds time.Time // by our clock, never later than by PostgreSQL's
	fetchTook time.Duration
	streams   map[string]*streamMark
	underWay  map[*nats.Msg]*flight
	live      int // of these, those that the batch waits for
	held      map[db.Lane]backoff
	acks      map[string][]db.Ack // received and not yet recorded, by stream
}

// streamMark is what a stream is known to hold.
type streamMark struct {
	generation int64  // of the comparison
	lastSeq    uint64 // every message stored from now on comes after it
}

// flight is a message under way and the rows of its lane that follow it.
type flight struct {
	rows  []db.OutboxRow // the first is under way
	after uint64         // its stream's lastSeq when it was published
	late  bool           // the batch goes on without it
}

// backoff is how long a lane waits after a failure.
type backoff struct {
	delay time.Duration
	until time.Time
}

// result is JetStream's answer to a message, or why there is none.
type result struct {
	msg *nats.Msg
	ack *jetstream.PubAck
	err error
}

// relay waits until the lease is ours, makes and compares the streams, and then
// relays until ctx is done or something is not as expected.
func (b *Bus) relay(ctx context.Context, l *link) {
	for ctx.Err() == nil {
		if b.ready != nil && !b.ready() {
			sleep(ctx, batchPause)
			continue
		}
		began := time.Now()
		held, err := b.store.AcquireRelay(ctx, b.id, leaseTTL)
		if err == nil && held {
			r := &relayer{
				Bus: b, link: l, leaseEnds: began.Add(leaseTTL), streams: map[string]*streamMark{},
				underWay: map[*nats.Msg]*flight{}, held: map[db.Lane]backoff{}, acks: map[string][]db.Ack{},
			}
			if err = r.compareStreams(ctx); err == nil {
				l.relaying.Store(true)
				err = r.run(ctx)
				if err != nil && ctx.Err() == nil {
					b.report(logRelayFailed, err)
				}
				return
			}
			// Another process may see more than this one.
			err = errors.Join(err, b.store.ReleaseRelay(ctx, b.id))
		}
		if err != nil && ctx.Err() == nil {
			b.report(logRelayFailed, err)
		}
		sleep(ctx, leaseAttempt)
	}
}

func (r *relayer) run(ctx context.Context) error {
	for ctx.Err() == nil {
		err := r.renew(ctx)
		more := false
		if err == nil {
			more, err = r.batch(ctx)
		}
		if err != nil && (errors.Is(err, errDrop) || !errors.Is(err, db.ErrUnavailable)) {
			return err
		}
		if err != nil && ctx.Err() == nil {
			r.report(logRelayFailed, err)
		}
		if !more {
			r.wait(ctx)
		}
	}
	return nil
}

// wait first lets rows gather, and keeps a fetch that is slow, because vacuum
// is held up, from eating a processor. It ends with a commit in this process,
// when a lane's back-off is over, or with the poll for what other processes
// committed. LISTEN would tell of those too, but NOTIFY takes a lock that
// makes all commits of all replicas follow each other.
func (r *relayer) wait(ctx context.Context) {
	sleep(ctx, max(batchPause, min(4*r.fetchTook, time.Second)))
	next := pollInterval
	for _, h := range r.held {
		if d := time.Until(h.until); d > 0 {
			next = min(next, d)
		}
	}
	select {
	case <-ctx.Done():
	case <-r.store.Wake():
	case <-time.After(next):
	}
}

// renew keeps the lease. Our clock was read before PostgreSQL's, so leaseEnds
// is not later than the end of the lease.
func (r *relayer) renew(ctx context.Context) error {
	now := time.Now()
	if r.leaseEnds.Sub(now) > leaseTTL-leaseRenewal {
		return nil
	}
	held, err := r.store.RenewRelay(ctx, r.id, leaseTTL)
	if err != nil {
		return err
	}
	if !held {
		return fmt.Errorf("%w: another process relays", errDrop)
	}
	r.leaseEnds = now.Add(leaseTTL)
	return nil
}

// compareStreams makes what is absent, holds every stream against what it
// acknowledged and makes lost events unsent again, before anything is
// published on this connection.
func (r *relayer) compareStreams(ctx context.Context) error {
	for _, want := range r.Bus.streams {
		info, err := r.makeStream(ctx, r.js, want)
		if err != nil {
			return fmt.Errorf("%s: %w", want.Name, err)
		}
		lastSeq := info.State.LastSeq
		if at, ok := r.cutBack[want.Name]; ok {
			lastSeq = min(lastSeq, at)
		}
		if err := r.compare(ctx, want.Name, info.Created, lastSeq); err != nil {
			return err
		}
		delete(r.cutBack, want.Name)
	}
	r.log.Info(logRelaying)
	return nil
}

func (r *relayer) compare(ctx context.Context, stream string, created time.Time, lastSeq uint64) error {
	state := db.StreamState{Name: stream, Created: created, LastSeq: int64(lastSeq)}
	generation, lost, resend, err := r.store.CompareStream(ctx, state, stream == secretsStream)
	if err != nil {
		return err
	}
	r.streams[stream] = &streamMark{generation, lastSeq}
	if lost {
		r.log.Warn(logStoreLost, "stream", stream, "created", created, "last_seq", lastSeq)
	}
	var total int64
	for resend {
		if err := r.renew(ctx); err != nil {
			return err
		}
		n, done, err := r.store.ResendLost(ctx, stream)
		if err != nil {
			return err
		}
		total += n
		if done {
			r.log.Warn(logStoreLost, "stream", stream, "resent", total)
			resend = false
		}
	}
	return nil
}

// batch publishes the next unsent rows, each lane in order and one message at
// a time, and records what was acknowledged. more tells that it was not all.
// Lanes that are not answered in time stay under way and are left out of the
// next fetches, as are those in back-off.
func (r *relayer) batch(ctx context.Context) (more bool, err error) {
	defer func() { err = errors.Join(err, r.record(ctx)) }()
	for answered := true; answered; { // of earlier batches
		select {
		case res := <-r.results:
			if err := r.settle(res); err != nil {
				return false, err
			}
		default:
			answered = false
		}
	}
	if err := r.record(ctx); err != nil {
		return false, err
	}
	limit := maxUnderWay - len(r.underWay)
	excluded := r.excluded()
	if limit == 0 || len(excluded) >= maxHeld {
		return false, nil
	}
	began := time.Now()
	rows, err := r.store.UnsentEvents(ctx, limit, excluded)
	r.fetchTook = time.Since(began)
	if err != nil {
		return false, err
	}
	for _, lane := range lanes(rows) {
		r.publish(lane)
	}
	slow := time.NewTimer(patience)
	defer slow.Stop()
	for r.live > 0 {
		select {
		case res := <-r.results:
			if err := r.settle(res); err != nil {
				return false, err
			}
			slow.Reset(patience)
		case <-slow.C:
			for _, f := range r.underWay {
				f.late, f.rows = true, f.rows[:1]
			}
			r.live = 0
		case <-ctx.Done():
			return false, nil
		}
	}
	return len(rows) == limit, nil
}

// lanes splits rows by lane; within a lane the order stays.
func lanes(rows []db.OutboxRow) [][]db.OutboxRow {
	var split [][]db.OutboxRow
	at := map[db.Lane]int{}
	for _, row := range rows {
		i, ok := at[row.Lane()]
		if !ok {
			i = len(split)
			at[row.Lane()] = i
			split = append(split, nil)
		}
		split[i] = append(split[i], row)
	}
	return split
}

// publish sends the first row of a lane, unless the lease may be over: then
// the rows are left to whoever holds it now.
func (r *relayer) publish(rows []db.OutboxRow) {
	if !time.Now().Before(r.leaseEnds) {
		return
	}
	mark := r.streams[streamOf(rows[0].Type)]
	if mark == nil {
		r.hold(rows[0], errors.New("its stream is not configured"))
		return
	}
	msg, err := r.message(rows[0])
	if err == nil {
		_, err = r.js.PublishMsgAsync(msg, jetstream.WithRetryAttempts(0))
	}
	if err != nil {
		r.hold(rows[0], err)
		return
	}
	r.underWay[msg] = &flight{rows: rows, after: mark.lastSeq}
	r.live++
}

// settle takes an answer. An acknowledgement lets the lane's next row go; a
// failure makes the lane wait and try the same row again.
func (r *relayer) settle(res result) error {
	f := r.underWay[res.msg]
	delete(r.underWay, res.msg)
	if !f.late {
		r.live--
	}
	row := f.rows[0]
	stream := streamOf(row.Type)
	if res.err == nil && res.ack.Stream != stream {
		res.err = fmt.Errorf("acknowledged by stream %q, not %q", res.ack.Stream, stream)
	}
	if res.err != nil {
		r.hold(row, res.err)
		return nil
	}
	mark := r.streams[stream]
	if seq := res.ack.Sequence; !res.ack.Duplicate && seq <= f.after {
		// The stream took a new message at a place that it had given out
		// before: it lost its end while this connection lived. Nothing
		// acknowledged since the last record counts.
		clear(r.acks)
		r.cutBack[stream] = seq - 1
		return fmt.Errorf("%w: %s lost its end", errDrop, stream)
	}
	mark.lastSeq = max(mark.lastSeq, res.ack.Sequence)
	r.acks[stream] = append(r.acks[stream], db.Ack{Seq: row.Seq, StreamSeq: int64(res.ack.Sequence)})
	delete(r.held, row.Lane())
	r.obs.Published(string(row.Type))
	if len(f.rows) > 1 {
		r.publish(f.rows[1:])
	}
	return nil
}

// record writes down what was acknowledged, also when ctx is done already.
func (r *relayer) record(ctx context.Context) error {
	for stream, acks := range r.acks {
		ok, err := r.store.MarkSent(context.WithoutCancel(ctx), stream, r.streams[stream].generation, acks)
		if err != nil {
			return err
		}
		delete(r.acks, stream)
		if !ok {
			return fmt.Errorf("%w: another process noticed a loss", errDrop)
		}
	}
	return nil
}

// hold makes the row's lane wait: 100 ms to 5 s, longer each time, without end.
func (r *relayer) hold(row db.OutboxRow, err error) {
	h := r.held[row.Lane()]
	h.delay = min(max(2*h.delay, minBackoff), maxBackoff)
	h.until = time.Now().Add(h.delay/2 + rand.N(h.delay/2))
	r.held[row.Lane()] = h
	r.obs.PublishFailed(string(row.Type))
	r.report(logRelayFailed, err, "event_type", row.Type, "event_id", row.EventID, "lanes_held", len(r.held))
}

// excluded are the lanes that wait or are under way. One that stopped waiting
// long ago has no row any more.
func (r *relayer) excluded() []db.Lane {
	now := time.Now()
	var out []db.Lane
	for lane, h := range r.held {
		if h.until.After(now) {
			out = append(out, lane)
		} else if now.Sub(h.until) > time.Minute {
			delete(r.held, lane)
		}
	}
	for _, f := range r.underWay {
		out = append(out, f.rows[0].Lane())
	}
	return out
}
