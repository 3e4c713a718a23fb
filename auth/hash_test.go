package auth

import (
	"context"
	"encoding/hex"
	"errors"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/argon2"

	"github.com/7d-solutions/identity-auth/db"
)

var floor = Argon2Params{MemoryKiB: 19456, Iterations: 2, Parallelism: 1}

func testHasher(slots int, maxWait time.Duration) *hasher {
	return newHasher(floor, slots, maxWait, newMetrics(Build{}, func() db.PoolStats { return db.PoolStats{} }, nil))
}

func place1(t *testing.T, h *hasher) *place {
	t.Helper()
	p, err := h.queue()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The reference implementation's own test of version 1.3 (argon2id, 2
// iterations, 64 MiB, 1 lane, "password", "somesalt").
func TestArgon2idVector(t *testing.T) {
	got := argon2.IDKey([]byte("password"), []byte("somesalt"), 2, 64*1024, 1, 32)
	if want := "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7"; hex.EncodeToString(got) != want {
		t.Errorf("got %x, want %s", got, want)
	}
}

func TestVerify(t *testing.T) {
	h := testHasher(1, time.Minute)
	phc, err := place1(t, h).hash(t.Context(), "right password")
	if err != nil {
		t.Fatal(err)
	}
	stronger := Argon2Params{MemoryKiB: 4 * 19456, Iterations: 1, Parallelism: 1}.phc("right password")
	tooStrong := Argon2Params{MemoryKiB: 4*19456 + 1, Iterations: 1, Parallelism: 1}.phc("right password")
	long := strings.Repeat("x", maxPassword+1)
	ofLong := floor.phc(long)
	for _, row := range []struct {
		name, phc, password string
		match, rehash       bool
		err                 error
	}{
		{"unknown e-mail", "", "right password", false, false, nil},
		{"unknown e-mail, empty password", "", "", false, false, nil},
		{"wrong", phc, "wrong password", false, false, nil},
		{"empty", phc, "", false, false, nil},
		{"over-long", ofLong, long, false, false, nil},
		{"broken hash", phc[:strings.LastIndex(phc, "$")], "right password", false, false, errHashForm},
		{"four times today's memory and a bit", tooStrong, "right password", false, false, errHashCost},
		{"right", phc, "right password", true, false, nil},
		{"right, other costs", stronger, "right password", true, true, nil},
		{"wrong, other costs", stronger, "wrong password", false, false, nil},
	} {
		match, rehash, err := place1(t, h).verify(t.Context(), row.phc, row.password, "")
		if match != row.match || (rehash != "") != row.rehash || !errors.Is(err, row.err) {
			t.Errorf("%s: got %v, %q, %v", row.name, match, rehash, err)
		}
	}
	match, fresh, err := place1(t, h).verify(t.Context(), phc, "right password", "the next password")
	if err != nil || !match {
		t.Fatalf("got %v, %v", match, err)
	}
	if match, _, err := place1(t, h).verify(t.Context(), fresh, "the next password", ""); err != nil || !match {
		t.Errorf("the new password: got %v, %v", match, err)
	}
	if _, fresh, _ := place1(t, h).verify(t.Context(), phc, "wrong password", "the next password"); fresh != "" {
		t.Error("a new hash without a match")
	}
	if n := h.places.Load(); n != 0 {
		t.Errorf("%d places still taken", n)
	}
}

func TestQueueRefusesAtOnce(t *testing.T) {
	h := testHasher(2, time.Second)
	h.perHash.Store(int64(300 * time.Millisecond))
	var places []*place
	for {
		p, err := h.queue()
		if err != nil {
			break
		}
		places = append(places, p)
	}
	// Two run; behind them two wait for one hash, two for two, two for three.
	if len(places) != 8 {
		t.Errorf("%d places for 2 slots, 300 ms a hash and 1 s of patience; want 8", len(places))
	}
	places[0].leave()
	places[0].leave() // no second place is freed
	place1(t, h)
	if _, err := h.queue(); !errors.Is(err, errHashBusy) {
		t.Errorf("one place was free: got %v for the second", err)
	}
}

func TestLeavingTheQueue(t *testing.T) {
	h := testHasher(1, time.Minute)
	running, finish := make(chan struct{}), make(chan struct{})
	var first sync.WaitGroup
	first.Go(func() {
		place1(t, h).run(context.Background(), func(time.Duration) { close(running); <-finish })
	})
	<-running
	ctx, hangUp := context.WithCancel(t.Context())
	hangUp()
	p := place1(t, h)
	if err := p.run(ctx, func(time.Duration) { t.Error("computed for a client that had gone") }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	p.leave()
	close(finish)
	first.Wait()
	if n := h.places.Load(); n != 0 {
		t.Errorf("%d places still taken", n)
	}
}

func TestPanicFreesTheSlot(t *testing.T) {
	h := testHasher(1, time.Minute)
	func() {
		defer func() { recover() }()
		place1(t, h).run(t.Context(), func(time.Duration) { panic("test") })
	}()
	if err := place1(t, h).run(t.Context(), func(time.Duration) {}); err != nil || h.places.Load() != 0 {
		t.Errorf("got %v, %d places taken", err, h.places.Load())
	}
}

func TestRest(t *testing.T) {
	const before = 100
	defer debug.SetGCPercent(debug.SetGCPercent(before))
	h := testHasher(1, time.Minute)
	first, second := place1(t, h), place1(t, h)
	if _, err := first.hash(t.Context(), "password"); err != nil {
		t.Fatal(err)
	}
	if h.rest(); gcPercent() != -1 {
		t.Errorf("GC percent %d while a request waits, want -1: the collector runs beside hashes", gcPercent())
	}
	second.leave()
	if h.rest(); gcPercent() != before {
		t.Errorf("GC percent %d after the last request, want %d as before the first", gcPercent(), before)
	}
}

func gcPercent() int {
	percent := debug.SetGCPercent(-1)
	debug.SetGCPercent(percent)
	return percent
}

func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := testHasher(2, time.Second)
		turns := newTurns(2, h)
		var leaves []func()
		for range 2 {
			leave, err := turns.enter(t.Context(), "a")
			if err != nil {
				t.Fatal(err)
			}
			leaves = append(leaves, leave)
		}
		if leave, err := turns.enter(t.Context(), "b"); err != nil {
			t.Errorf("another key waits: %v", err)
		} else {
			leave()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := turns.enter(ctx, "a"); !errors.Is(err, errHashBusy) {
			t.Errorf("got %v at the deadline", err)
		}
		entered := make(chan func())
		go func() {
			leave, _ := turns.enter(t.Context(), "a")
			entered <- leave
		}()
		synctest.Wait()
		leaves[0]()
		(<-entered)()
		leaves[1]()
		if len(turns.keys) != 0 {
			t.Errorf("%d keys kept", len(turns.keys))
		}
		h.perHash.Store(int64(time.Hour))
		turns.enter(t.Context(), "a")
		turns.enter(t.Context(), "a")
		if _, err := turns.enter(t.Context(), "a"); !errors.Is(err, errHashBusy) {
			t.Errorf("a turn that cannot come in time: got %v", err)
		}
	})
}
