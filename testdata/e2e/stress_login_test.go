package e2e

import (
	"bytes"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// lockoutThreshold is the default of LOCKOUT_THRESHOLD.
const lockoutThreshold = 5

// cheapHashes is the least that the service allows.
var cheapHashes = env{"ARGON2_MEMORY_KIB": "19456", "ARGON2_ITERATIONS": "2", "ARGON2_PARALLELISM": "1"}

// replicas starts n replicas: they share the world and nothing else. The first
// has the race detector; with it, every hash takes several times as long.
func (w *world) replicas(n int, more ...env) []*service {
	w.t.Helper()
	rs := []*service{w.start(more...)}
	for range n - 1 {
		rs = append(rs, w.startPlain(more...))
	}
	return rs
}

// together runs f(0) to f(n-1) in parallel from one moment on, and waits.
func together(n int, f func(i int)) {
	begin := make(chan struct{})
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { <-begin; f(i) })
	}
	close(begin)
	all.Wait()
}

// seeded is chance that can be had again: its seed is in the test's log.
func seeded(t *testing.T) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// hashes is the number of password hashes that the replicas have computed.
func hashes(rs ...*service) int {
	n := 0
	for _, s := range rs {
		n += int(s.metric("auth_password_hash_duration_seconds_count"))
	}
	return n
}

// guess is one login and what came of it.
type guess struct {
	answer
	err            error
	replica        *service
	sent, answered time.Time
}

// guessAll sends every password at once, spread over the replicas.
func guessAll(rs []*service, p person, passwords []string) []guess {
	guesses := make([]guess, len(passwords))
	together(len(passwords), func(i int) {
		g := &guesses[i]
		g.replica, g.sent = rs[i%len(rs)], time.Now()
		g.answer, g.err = g.replica.try("POST", "/api/auth/login", p.loginBody(passwords[i]))
		g.answered = time.Now()
	})
	return guesses
}

func wrongPasswords(n int) []string {
	list := make([]string, n)
	for i := range list {
		list[i] = "not the password " + strconv.Itoa(i)
	}
	return list
}

// tally counts the answers by status. Everyone gets one, and only what a login
// of this kind may answer; locked and busy say when to come again.
func tally(t *testing.T, guesses []guess) map[int]int {
	t.Helper()
	n, bad := map[int]int{}, map[string]int{}
	for _, g := range guesses {
		if g.err != nil {
			bad[g.err.Error()]++
			continue
		}
		n[g.status]++
		want := map[int]string{200: "", 401: "invalid_credentials", 423: "locked", 503: "hash_busy"}
		if code, known := want[g.status]; !known || g.code() != code {
			bad[fmt.Sprintf("%d %s", g.status, g.code())]++
		}
		if retry, _ := strconv.Atoi(g.header.Get("Retry-After")); (g.status == 423 || g.status == 503) && retry < 1 {
			bad[fmt.Sprintf("%d with Retry-After %q", g.status, g.header.Get("Retry-After"))]++
		}
	}
	for what, n := range bad {
		t.Errorf("got %d answers %s, want 200, 401 invalid_credentials, 423 locked or 503 hash_busy with Retry-After", n, what)
	}
	return n
}

// checkLocked tells that the lock holds on every replica, for the right
// password too, and costs no hash.
func checkLocked(t *testing.T, rs []*service, p person) {
	t.Helper()
	before := hashes(rs...)
	for i, s := range rs {
		a := s.do("POST", "/api/auth/login", p.loginBody(p.Password))
		retry, _ := strconv.Atoi(a.header.Get("Retry-After"))
		if a.status != 423 || a.code() != "locked" || retry < 1 || retry > 15*60 {
			t.Errorf("right password on replica %d after the attack: got %d %s, Retry-After %d, want 423 locked, 1 to 900 s", i, a.status, a.body, retry)
		}
	}
	if after := hashes(rs...); after != before {
		t.Errorf("hashes computed during the lock: got %d, want 0", after-before)
	}
}

func countEvents(t *testing.T, w *world, p person, event string) int {
	t.Helper()
	return dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM outbox WHERE user_id = $1 AND event_type = $2`, p.UserID, event)
}

// sessionsAfterLock counts sessions begun at or after the beginning of the
// last lock, by PostgreSQL's clock.
func sessionsAfterLock(t *testing.T, w *world, p person) int {
	t.Helper()
	return dbtest.Value[int](t, w.db, `
SELECT count(*)::int FROM sessions
 WHERE user_id = $1 AND created_at >= (SELECT max(locked_until) FROM guards) - interval '15 minutes'`, p.UserID)
}

func TestLockUnderAttack(t *testing.T) {
	w := newWorld(t)
	rs := w.replicas(3, unlimited)
	for name, known := range map[string]bool{"account": true, "unknown e-mail": false} {
		t.Run(name, func(t *testing.T) {
			p := newPerson()
			passwords := wrongPasswords(500)
			right := -1
			if known {
				p = rs[0].register()
				right = seeded(t).IntN(len(passwords) + 1)
				passwords = append(passwords[:right:right], append([]string{p.Password}, passwords[right:]...)...)
			}
			before := hashes(rs...)
			guesses := guessAll(rs, p, passwords)
			n := tally(t, guesses)
			wrong := hashes(rs...) - before - n[200]
			t.Logf("answers %v, the right password was number %d, hashes of wrong ones %d", n, right, wrong)

			// A success clears the count: with one in between, there were fewer
			// than the threshold before it and at most the threshold after it.
			limit, successes := lockoutThreshold, 0
			if right >= 0 && guesses[right].status == 200 {
				limit, successes = 2*lockoutThreshold-1, 1
			}
			if n[200] != successes {
				t.Errorf("logins with a wrong password: got %d, want 0", n[200]-successes)
			}
			if wrong > limit {
				t.Errorf("hashes of wrong guesses: got %d, want at most %d", wrong, limit)
			}
			if n[401] != wrong {
				t.Errorf("answers 401: got %d, want one for each of %d wrong guesses checked", n[401], wrong)
			}
			var began time.Time // no later than the lock
			for _, g := range guesses {
				if g.status == 423 && (began.IsZero() || g.answered.Before(began)) {
					began = g.answered
				}
			}
			if began.IsZero() {
				t.Error("nobody was told 423")
			} else if successes > 0 && guesses[right].sent.After(began) {
				t.Error("a login sent after an answer 423 succeeded")
			}
			if n := sessionsAfterLock(t, w, p); n > 0 {
				t.Errorf("sessions begun during the lock: got %d, want 0", n)
			}
			checkLocked(t, rs, p)
			wantEvents := 0
			if known {
				wantEvents = 1
			}
			if n := countEvents(t, w, p, "auth.lockout"); n != wantEvents {
				t.Errorf("auth.lockout events: got %d, want %d", n, wantEvents)
			}
		})
	}
}

// The right password races with the guess that begins the lock.
func TestNoTokenAfterLock(t *testing.T) {
	w := newWorld(t)
	rs := w.replicas(3, unlimited, cheapHashes)
	rng := seeded(t)
	successes := 0
	for range 12 {
		p := rs[0].register()
		passwords := append(wrongPasswords(2*lockoutThreshold), p.Password, p.Password, p.Password)
		rng.Shuffle(len(passwords), func(i, j int) { passwords[i], passwords[j] = passwords[j], passwords[i] })
		guesses := guessAll(rs, p, passwords)
		n := tally(t, guesses)
		successes += n[200]
		for _, g := range guesses {
			for _, late := range guesses {
				if g.status == 423 && late.status == 200 && late.sent.After(g.answered) {
					t.Errorf("a login sent after an answer 423 succeeded: %v after", late.sent.Sub(g.answered))
				}
			}
		}
		// Each success clears the count once.
		if limit := (n[200]+1)*lockoutThreshold - n[200]; n[401] > limit {
			t.Errorf("wrong guesses checked around %d successes: got %d, want at most %d", n[200], n[401], limit)
		}
		if n[423] > 0 {
			if n := sessionsAfterLock(t, w, p); n > 0 {
				t.Errorf("sessions begun during the lock: got %d, want 0", n)
			}
			checkLocked(t, rs, p)
		}
		// The guess that begins a lock may be the last, so that nobody is told.
		if locks := countEvents(t, w, p, "auth.lockout"); locks > 1 || n[423] > 0 && locks == 0 {
			t.Errorf("auth.lockout events after %d answers 423: got %d", n[423], locks)
		}
	}
	t.Logf("%d logins got in before a lock", successes)
}

// A replica dies with guesses under way. What it had reserved counts as
// failed, also after a restart: its hashes may have been computed.
func TestLockSurvivesKill(t *testing.T) {
	w := newWorld(t)
	rs := w.replicas(3, unlimited, env{"ARGON2_ITERATIONS": "12"}) // time to kill in the middle
	victim := rs[0]
	p := victim.register()
	failed := func() int {
		return dbtest.Value[int](t, w.db, `SELECT failed_logins FROM accounts WHERE user_id = $1`, p.UserID)
	}

	done := make(chan []guess)
	go func() { done <- guessAll([]*service{victim}, p, wrongPasswords(3)) }() // too few for a lock
	eventually(t, "the replica computes a hash", 30*time.Second, func() bool {
		return victim.metric("auth_password_hashes_in_flight") > 0
	})
	victim.kill()
	var answered []guess
	for _, g := range append(<-done, guessAll(rs[1:], p, wrongPasswords(200))...) {
		if g.err == nil {
			answered = append(answered, g)
		} else if g.replica != victim {
			t.Errorf("a living replica did not answer: %v", g.err)
		}
	}
	first := tally(t, answered)
	dead := dbtest.Value[int](t, w.db, `SELECT cardinality(pending) FROM guards`)
	t.Logf("answers %v; %d wrong guesses counted, %d reserved by the dead replica", first, failed(), dead)

	// The reservation of a dead owner ends by itself; here it ages at once.
	dbtest.Exec(t, w.db, `
UPDATE guards SET ticket = ticket - interval '20 s',
       pending = ARRAY(SELECT p - interval '20 s' FROM unnest(pending) AS p),
       failed  = ARRAY(SELECT f - interval '20 s' FROM unnest(failed) AS f)`)
	rs[0] = w.start(unlimited, env{"ARGON2_ITERATIONS": "12"})
	second := tally(t, guessAll(rs, p, wrongPasswords(100)))
	t.Logf("after the restart: answers %v; %d wrong guesses counted", second, failed())

	if n := failed(); n+dead > lockoutThreshold {
		t.Errorf("guesses checked: got %d counted and %d reserved by the dead replica, want at most %d together", n, dead, lockoutThreshold)
	}
	if n := hashes(rs...); n > failed() {
		t.Errorf("hashes on living replicas: got %d, want no more than the %d wrong guesses counted", n, failed())
	}
	if n := first[401] + second[401]; n > failed() {
		t.Errorf("answers 401: got %d, want no more than the %d wrong guesses counted", n, failed())
	}
	if first[200]+second[200] > 0 {
		t.Error("a wrong password got in")
	}
	checkLocked(t, rs, p)
	if n := countEvents(t, w, p, "auth.lockout"); n != 1 {
		t.Errorf("auth.lockout events: got %d, want 1", n)
	}
}

// Guesses under way make others wait their turn, they do not lock them out.
func TestParallelGoodLogins(t *testing.T) {
	w := newWorld(t)
	more := []env{unlimited, cheapHashes} // cheap: 20 within a request's deadline on a slow machine too
	rs := []*service{w.startPlain(more...), w.startPlain(more...), w.startPlain(more...)}
	for _, n := range []int{1, 3} {
		t.Run(fmt.Sprintf("replicas=%d", n), func(t *testing.T) {
			p := rs[0].register()
			passwords := slices.Repeat([]string{p.Password}, 20)
			checkAllLoggedIn(t, guessAll(rs[:n], p, passwords))
		})
	}
}

// That holds whatever the threshold is: who would wait longer for a slot than
// HASH_ACQUIRE_TIMEOUT because of his own account waits for his turn first.
func TestParallelGoodLoginsWithHighThreshold(t *testing.T) {
	w := newWorld(t)
	s := w.startPlain(unlimited, cheapHashes, env{"LOCKOUT_THRESHOLD": "100", "HASH_ACQUIRE_TIMEOUT": "1s"})
	p := s.register()
	checkAllLoggedIn(t, guessAll([]*service{s}, p, slices.Repeat([]string{p.Password}, 50)))
}

func checkAllLoggedIn(t *testing.T, guesses []guess) {
	t.Helper()
	n := tally(t, guesses)
	if n[200] != len(guesses) {
		t.Errorf("answers: got %v, want %d times 200", n, len(guesses))
	}
	seen := map[string]bool{}
	slowest := time.Duration(0)
	for _, g := range guesses {
		if g.status == 200 {
			seen[g.tokens(t).RefreshToken] = true
		}
		slowest = max(slowest, g.answered.Sub(g.sent))
	}
	if len(seen) != n[200] {
		t.Errorf("different refresh tokens: got %d, want %d", len(seen), n[200])
	}
	t.Logf("slowest answer after %v", slowest)
}

// What a refused login says and how long it takes tells nobody whether the
// account exists. Each round tries every kind once in random order, and kinds
// are compared within a round, so that what slows the machine down for a while
// slows all alike. The quarters of the rounds that differ most to either side
// do not count: they are those in which something else ran. There are 200
// rounds, or up to 400 if it takes more to know the difference well enough; how
// large it is has no part in when to stop. What uncertainty a very busy machine
// leaves even then is granted on top of the limit.
func TestRefusedLoginsAreAlike(t *testing.T) {
	const accountsOfKind, enough, limit = 20, 0.005, 0.03
	w := newWorld(t)
	s := w.startPlain(unlimited, cheapHashes, env{"LOCKOUT_THRESHOLD": "100"})
	first := s.register()
	known, disabled := accounts(t, w, first, accountsOfKind), accounts(t, w, first, accountsOfKind)
	for _, p := range disabled {
		dbtest.Exec(t, w.db, `UPDATE accounts SET disabled_at = clock_timestamp() WHERE user_id = $1`, p.UserID)
	}
	unknown, overLong := slices.Clone(known), accounts(t, w, first, accountsOfKind)
	for i := range unknown {
		unknown[i].Email = "x" + unknown[i].Email[1:]
	}
	kinds := []struct {
		name, password string
		people         []person
	}{
		{"unknown e-mail", "some other password", unknown},
		{"wrong password", "some other password", known},
		{"disabled account", first.Password, disabled},
		{"over-long password", strings.Repeat("much too long ", 100), overLong},
	}
	rng := seeded(t)
	var reference answer
	log := make([][]float64, len(kinds)) // natural logarithms of seconds
	round := func() {
		for _, k := range rng.Perm(len(kinds)) {
			body := kinds[k].people[len(log[k])%accountsOfKind].loginBody(kinds[k].password)
			begun := time.Now()
			a := s.do("POST", "/api/auth/login", body)
			log[k] = append(log[k], math.Log(time.Since(begun).Seconds()))
			if a.status != 401 || a.code() != "invalid_credentials" {
				t.Fatalf("%s: got %d %s, want 401 invalid_credentials", kinds[k].name, a.status, a.body)
			}
			a = anonymous(a)
			if reference.status == 0 {
				reference = a
			}
			if !reflect.DeepEqual(a, reference) {
				t.Fatalf("%s: got\n%v %s, want\n%v %s", kinds[k].name, a.header, a.body, reference.header, reference.body)
			}
		}
	}
	for rounds := 1; ; rounds++ {
		round()
		if rounds%100 != 0 || rounds < 200 {
			continue
		}
		worst := 0.0
		means, errs := make([]float64, len(kinds)), make([]float64, len(kinds))
		for k := 1; k < len(kinds); k++ {
			diff := make([]float64, rounds)
			for i := range diff {
				diff[i] = log[k][i] - log[0][i]
			}
			means[k], errs[k] = trimmedMean(diff)
			worst = max(worst, errs[k])
		}
		if worst > enough && rounds < 400 {
			continue
		}
		for k := 1; k < len(kinds); k++ {
			t.Logf("%s takes %+.2f %% of the time of an unknown e-mail (standard error %.2f %%, %d rounds)", kinds[k].name, 100*means[k], 100*errs[k], rounds)
			if granted := limit + 3*max(0, errs[k]-enough); math.Abs(means[k]) > granted {
				t.Errorf("time of %s beside that of an unknown e-mail: got %+.1f %%, want at most %.1f %% apart", kinds[k].name, 100*means[k], 100*granted)
			}
		}
		return
	}
}

// anonymous takes away what names the request.
func anonymous(a answer) answer {
	trace := a.header.Get("X-Trace-Id")
	a.header, a.body = a.header.Clone(), bytes.ReplaceAll(a.body, []byte(trace), nil)
	a.header.Del("X-Trace-Id")
	a.header.Del("Date")
	return a
}

// trimmedMean is the mean of the middle half, and its standard error (by the
// winsorized variance).
func trimmedMean(xs []float64) (mean, stderr float64) {
	xs = slices.Sorted(slices.Values(xs))
	n, cut := len(xs), len(xs)/4
	for _, x := range xs[cut : n-cut] {
		mean += x / float64(n-2*cut)
	}
	low, high := xs[cut], xs[n-cut-1]
	sum, squares := 0.0, 0.0
	for _, x := range xs {
		x = min(max(x, low), high)
		sum += x
		squares += x * x
	}
	variance := (squares - sum*sum/float64(n)) / float64(n-1)
	return mean, math.Sqrt(variance/float64(n)) / (1 - 2*float64(cut)/float64(n))
}
