package auth

import (
	"context"
	"crypto/rand"
	"errors"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/argon2"
)

// Argon2Params are the costs of an argon2id hash (RFC 9106).
type Argon2Params struct {
	MemoryKiB   uint32
	Iterations  uint32
	Parallelism uint32 // 1 to 255
}

// hasher computes at most cap(slots) hashes at a time. Who would have to wait
// for a slot longer than maxWait is refused at the door, before any query:
// queue takes a place, lease waits for a slot, and both are given back however
// the request ends.
//
// Memory: every argon2 call leaves its buffer (ARGON2_MEMORY_KIB) as garbage,
// and the collector, left alone, lets the heap double before it looks. A
// collection inside the slot after each hash frees the buffer before the next
// one is made, so the heap holds about slots buffers. While hashes are under way
// these collections are enough; the collector's own, one for each new buffer,
// would cost a tenth of the hashes. The runtime's soft limit (set by main from
// the same product) is the net below. After some idle seconds rest gives the
// buffers' memory back.
type hasher struct {
	params  Argon2Params
	slots   chan struct{}
	maxWait time.Duration
	metrics *metrics

	places  atomic.Int64 // requests that hold a slot or wait for one
	perHash atomic.Int64 // running mean of a hash in nanoseconds
	begun   atomic.Int64 // when a slot was taken last, in Unix nanoseconds

	mu        sync.Mutex
	pages     hugePages
	awake     bool // hashes are under way, or were since the last rest
	gcPercent int  // while not awake
}

// firstGuess is the time of a hash before one has been measured: about half a
// nanosecond a byte and iteration.
func (a Argon2Params) firstGuess() time.Duration {
	return time.Duration(a.MemoryKiB) * time.Duration(a.Iterations) * 512 * time.Nanosecond
}

func newHasher(params Argon2Params, slots int, maxWait time.Duration, m *metrics) *hasher {
	h := &hasher{params: params, slots: make(chan struct{}, slots), maxWait: maxWait, metrics: m}
	h.pages = findHugePages(slots, int(params.MemoryKiB)<<10)
	h.perHash.Store(int64(params.firstGuess()))
	return h
}

// expectedWait is how long the n-th place waits for a slot.
func (h *hasher) expectedWait(n int64) time.Duration {
	return time.Duration((n - 1) / int64(cap(h.slots)) * h.pace())
}

// pace is what a hash takes in nanoseconds: the mean, or, where the machine has
// become slower, what those under way have taken by now.
func (h *hasher) pace() int64 {
	if len(h.slots) == 0 {
		return h.perHash.Load()
	}
	return max(h.perHash.Load(), time.Now().UnixNano()-h.begun.Load())
}

// place is one request's place in the queue.
type place struct {
	h    *hasher
	rank int64 // places taken when this one was, itself included
	left sync.Once
}

// queue takes a place, or refuses at once with errHashBusy.
func (h *hasher) queue() (*place, error) {
	rank := h.places.Add(1)
	if wait := h.expectedWait(rank); wait > h.maxWait {
		h.places.Add(-1)
		return nil, &failure{problem: errHashBusy, retryAfter: wait - h.maxWait}
	}
	return &place{h: h, rank: rank}, nil
}

// leave gives the place up; it may be called more than once.
func (p *place) leave() { p.left.Do(func() { p.h.places.Add(-1) }) }

// run waits for a slot and calls work in it with the time it waited. It returns
// errHashBusy when no slot came free in time, or ctx's error when the client
// went away; then work was not called.
func (p *place) run(ctx context.Context, work func(waited time.Duration)) error {
	begun := time.Now()
	timeout := time.NewTimer(p.h.maxWait)
	defer timeout.Stop()
	select {
	case p.h.slots <- struct{}{}:
	case <-timeout.C:
		p.h.slower(p.rank)
		return errHashBusy
	case <-ctx.Done():
		return waitEnded(ctx)
	}
	defer func() {
		<-p.h.slots
		p.leave()
	}()
	p.h.begun.Store(time.Now().UnixNano())
	work(time.Since(begun))
	return nil
}

// waitEnded tells a wait that took too long from a client that went away.
func waitEnded(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return errHashBusy
	}
	return ctx.Err()
}

// slower learns from a place that was refused after maxWait: as many rounds of
// hashes as were before it take at least that long.
func (h *hasher) slower(rank int64) {
	if rounds := (rank - 1) / int64(cap(h.slots)); rounds > 0 {
		h.perHash.Store(max(h.perHash.Load(), int64(h.maxWait)/rounds))
	}
}

// compute computes one hash in the slot that the caller holds, and frees its
// buffer.
func (h *hasher) compute(waited time.Duration, hash func()) {
	defer runtime.GC()
	h.wake()
	h.metrics.hashesInFlight.Inc()
	defer h.metrics.hashesInFlight.Dec()
	begun := time.Now()
	hash()
	took := time.Since(begun)
	// A lost update does no harm; one slow imported hash is not everybody's pace.
	pace := h.perHash.Load()
	h.perHash.Store((3*pace + min(int64(took), 4*pace)) / 4)
	h.metrics.hashWait.Observe(waited.Seconds())
	h.metrics.hashDuration.Observe(took.Seconds())
}

// hash makes the PHC string of a new password.
func (p *place) hash(ctx context.Context, password string) (phc string, err error) {
	err = p.run(ctx, func(waited time.Duration) {
		p.h.compute(waited, func() { phc = p.h.params.phc(password) })
	})
	return phc, err
}

// verify tells whether the password is the one that stored was made from. When
// stored is empty or not acceptable, a hash of today's cost is computed all the
// same and nothing matches: an unknown e-mail and a known one take the same
// time. With a match, fresh is the hash to keep instead of stored: that of
// newPassword when one is given, else that of the password when stored is not
// of today's algorithm and costs, else "".
func (p *place) verify(ctx context.Context, stored, password, newPassword string) (match bool, fresh string, err error) {
	hash, parseErr := parseHash(stored, p.h.params)
	if parseErr != nil || len(password) > maxPassword {
		hash, password = storedHash{params: p.h.params, matches: p.h.params.dummy}, ""
	}
	if newPassword == "" && hash.params != p.h.params {
		newPassword = password
	}
	err = p.run(ctx, func(waited time.Duration) {
		p.h.compute(waited, func() { match = hash.matches(password) && password != "" })
		if match && newPassword != "" {
			p.h.compute(0, func() { fresh = p.h.params.phc(newPassword) })
		}
	})
	if err == nil && stored != "" && parseErr != nil {
		err = parseErr
	}
	return match, fresh, err
}

// phc hashes password with a fresh salt and writes the PHC string.
func (a Argon2Params) phc(password string) string {
	salt := make([]byte, saltBytes)
	rand.Read(salt)
	key := argon2.IDKey([]byte(password), salt, a.Iterations, a.MemoryKiB, uint8(a.Parallelism), hashBytes)
	return formatPHC("argon2id", a, salt, key)
}

// dummy costs what a check of today's costs does, and never matches.
func (a Argon2Params) dummy(password string) bool {
	argon2.IDKey([]byte(password), make([]byte, saltBytes), a.Iterations, a.MemoryKiB, uint8(a.Parallelism), hashBytes)
	return false
}

// Run learns what a hash costs here, before a first flood has to, and then
// gives memory back to the system whenever hashing has paused.
func (h *hasher) Run(ctx context.Context) {
	if p, err := h.queue(); err == nil {
		p.run(ctx, func(time.Duration) {
			h.wake()
			begun := time.Now()
			h.params.dummy("")
			h.perHash.Store(int64(time.Since(begun)))
		})
	}
	h.rest()
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			h.rest()
		}
	}
}

// wake makes ready for hashing after a pause.
func (h *hasher) wake() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.awake {
		h.awake = true
		h.pages.advise(true)
		h.gcPercent = debug.SetGCPercent(-1)
	}
}

// rest gives memory back to the system if nobody hashes.
func (h *hasher) rest() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.awake && h.places.Load() == 0 {
		h.awake = false
		debug.SetGCPercent(h.gcPercent)
		h.pages.advise(false)
		debug.FreeOSMemory()
	}
}

// turns lets only so many requests of one (tenant, e-mail) into the hash queue
// of this process at a time; the others wait here for their turn, in order of
// arrival, without a place, a slot or a connection. This is what makes 20
// parallel good logins of one account succeed without taking everybody's
// places, and bounds what one account's attackers hold.
type turns struct {
	perKey int
	hasher *hasher

	mu   sync.Mutex
	keys map[string]*turn // entries live as long as someone is inside or waits
}

type turn struct {
	inside chan struct{}
	users  int // inside or waiting; guarded by turns.mu
}

func newTurns(perKey int, h *hasher) *turns {
	return &turns{perKey: perKey, hasher: h, keys: map[string]*turn{}}
}

// enter waits for the key's turn. It refuses at once when so many wait already
// that the turn could not come within the request's deadline.
func (t *turns) enter(ctx context.Context, key string) (leave func(), err error) {
	t.mu.Lock()
	k := t.keys[key]
	if k == nil {
		k = &turn{inside: make(chan struct{}, t.perKey)}
		t.keys[key] = k
	}
	if ahead := int64(k.users - t.perKey); ahead >= 0 {
		sideBySide := int64(min(t.perKey, cap(t.hasher.slots)))
		if wait := time.Duration((ahead + sideBySide) / sideBySide * t.hasher.pace()); wait > longestTurn {
			t.mu.Unlock()
			return nil, &failure{problem: errHashBusy, retryAfter: wait - longestTurn}
		}
	}
	k.users++
	t.mu.Unlock()

	done := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if k.users--; k.users == 0 {
			delete(t.keys, key)
		}
	}
	select {
	case k.inside <- struct{}{}:
		return func() { <-k.inside; done() }, nil
	case <-ctx.Done():
		done()
		return nil, waitEnded(ctx)
	}
}

// longestTurn leaves a request that has waited time for its own hash within
// requestTimeout.
const longestTurn = requestTimeout * 7 / 10
