package e2e

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// loginBytes is a login as it goes over the wire.
func loginBytes(headers, tenant, email string) string {
	body := person{TenantID: tenant, Email: email}.loginBody("a password that leaked elsewhere")
	return "POST " + loginPath + " HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + headers +
		fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body), body)
}

// TestOneGuessOnManyEmails: with one guess for each of 10,000 e-mails no e-mail
// locks and no limit by e-mail is met. What stops it is the number of wrong
// passwords from an address; past it a guess costs no hash, no query and no row.
func TestOneGuessOnManyEmails(t *testing.T) {
	t.Parallel()
	const emails, perAddress = 10_000, 100
	for _, row := range []struct {
		name, proxies string
		addresses     int
		headers       func(i int) string
	}{
		{"from one address that says to be others", "", 1, func(i int) string { return fmt.Sprintf("X-Forwarded-For: 203.0.%d.%d\r\n", i>>8, i&255) }},
		{"from four addresses in turn, behind a proxy", "127.0.0.1", 4, func(i int) string {
			return fmt.Sprintf("X-Forwarded-For: 203.0.%d.%d, 198.51.100.%d\r\n", i>>8, i&255, i/4%4)
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			w := newWorld(t)
			s := w.startPlain(cheap, unlimited, env{"LOGIN_FAILURES_PER_HOUR_PER_IP": fmt.Sprint(perAddress), "TRUSTED_PROXIES": row.proxies})
			people := accounts(t, w, s.from("127.0.0.200").register(), 50)
			tenant := people[0].TenantID
			undisturbed(t, s, func() {
				hashed, failed, refused, byAddress := s.growth("auth_password_hash_duration_seconds_count"), s.growth(`auth_login_total{result="failure"}`),
					s.growth(`auth_login_total{result="rate_limited"}`), s.growth(`auth_rate_limited_total{scope="ip"}`)
				rows := func() int { return dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM guards`) }
				before, begun := rows(), time.Now()
				answers := pipelined(t, s, emails, func(i int) string {
					email := fmt.Sprintf("leaked%d@example.com", i)
					if i%200 == 0 {
						email = people[i/200].Email // some of a list exist
					}
					return loginBytes(row.headers(i), tenant, email)
				})
				most := row.addresses * (perAddress + 1 + int(time.Since(begun).Hours()*perAddress))
				t.Logf("%v: answers %v", time.Since(begun).Round(time.Second), answers)
				if answers[401] < row.addresses*perAddress || answers[401] > most || answers[401]+answers[429] != emails {
					t.Errorf("got answers %v, want %d checked, at most %d, and the others 429", answers, row.addresses*perAddress, most)
				}
				for what, got := range map[string]int{"hashes": int(hashed()), "failures counted": int(failed()), "rows of guards": rows() - before} {
					if got != answers[401] {
						t.Errorf("%s: got %d, want one for each of %d guesses that were checked", what, got, answers[401])
					}
				}
				for what, got := range map[string]float64{"logins limited": refused(), "requests limited by address": byAddress()} {
					if int(got) != answers[429] {
						t.Errorf("%s: got %v, want %d", what, got, answers[429])
					}
				}
			})
			if n := s.metric("auth_lockouts_total"); n != 0 {
				t.Errorf("lockouts: got %v, want 0", n)
			}
			s.from("127.0.0.201").login(people[0]) // who was guessed at is not kept out
			if code := s.stop(); code != 0 {
				t.Errorf("exit code: got %d, want 0", code)
			}
			// Each guess is a line, or counted as one that was left out.
			lines := s.linesWith(`"result":"failure"`) + s.linesWith(`"result":"rate_limited"`)
			for _, m := range s.logged("log.sampled") {
				n, _ := m["dropped"].(float64)
				lines += int(n)
			}
			if lines != emails {
				t.Errorf("lines and lines left out: got %d, want %d", lines, emails)
			}
		})
	}
}

// TestInventedEmails: tens of thousands of requests with e-mails that no one
// has leave rows that are over with their limits, and nothing else; and a
// million such rows are pruned beside the traffic.
func TestInventedEmails(t *testing.T) {
	t.Parallel()
	const forgotten, guessed, clients = 20_000, 300, 200
	w := newWorld(t)
	s := w.startPlain(cheap, env{
		"IP_RATE_PER_SECOND": "0", "LOGIN_FAILURES_PER_HOUR_PER_IP": "0", "LOGIN_PER_MIN_PER_EMAIL": "2",
		"HASH_ACQUIRE_TIMEOUT": "10s", "PASSWORD_RESET_TTL": "1h",
	})
	tenant := newUUID()
	flood := func(n, clients int, call func(i int) (answer, error), statuses ...int) {
		t.Helper()
		next := make(chan int)
		var all sync.WaitGroup
		for range clients {
			all.Go(func() {
				for i := range next {
					a, err := call(i)
					for again := 0; err != nil && again < 3; again++ { // a machine too busy to send a request in time loses the connection
						a, err = call(i)
					}
					if err != nil || !slices.Contains(statuses, a.status) {
						t.Errorf("request %d: %v, got %d %s, want one of %v", i, err, a.status, a.body, statuses)
					}
				}
			})
		}
		for i := range n {
			next <- i
		}
		close(next)
		all.Wait()
	}
	forgot := func(i int) (answer, error) {
		return s.try("POST", forgotPath, toJSON(map[string]string{"tenant_id": tenant, "email": fmt.Sprintf("forgot%d@example.com", i)}))
	}
	// Every e-mail three times: two are checked, the third is limited.
	login := func(i int) (answer, error) {
		return s.try("POST", loginPath, toJSON(map[string]string{"tenant_id": tenant, "email": fmt.Sprintf("guess%d@example.com", i/3), "password": "wrong guess"}))
	}
	count := func(table string) int { return dbtest.Value[int](t, w.db, `SELECT count(*) FROM `+table) }
	series := func() int {
		return strings.Count(strings.ReplaceAll(string(s.get("/metrics").body), "\n# ", "\n"), "\n")
	}

	flood(200, clients, forgot, 202)
	flood(3, 1, login, 401, 429)
	known := series()
	others := map[string]int{}
	for _, table := range tables(t, w) {
		if table != "identity_auth.guards" && table != "identity_auth.rate_windows" {
			others[table] = count(table)
		}
	}
	flood(forgotten, clients, forgot, 202)
	flood(guessed, 1, login, 401, 429)

	if got := series(); got != known {
		t.Errorf("lines of /metrics: got %d, want %d as before", got, known)
	}
	for table, was := range others {
		if got := count(table); got != was {
			t.Errorf("rows of %s: got %d, want %d as before", table, got, was)
		}
	}
	if got := count("rate_windows"); got != forgotten {
		t.Errorf("rows of rate_windows: got %d, want one an e-mail, %d", got, forgotten)
	}
	if got := count("guards"); got != guessed/3 {
		t.Errorf("rows of guards: got %d, want one an e-mail, %d", got, guessed/3)
	}
	dbtest.Exec(t, w.db, `UPDATE rate_windows SET window_ends = clock_timestamp() - interval '1 second'`)
	dbtest.Exec(t, w.db, `UPDATE guards SET touched_at = touched_at - interval '1 day', failed = '{}', pending = '{}', ticket = ticket - interval '1 day'`)
	eventually(t, "rows that say nothing any more are pruned", time.Minute, func() bool { return count("rate_windows")+count("guards") == 0 })

	const million = 1_000_000
	eventually(t, "memory is what it was", 2*time.Minute, func() bool {
		now, _ := s.rss()
		return now <= idleRSS+restRSS
	})
	other := w.startPlain(cheap, unlimited) // both prune
	p := other.register()
	undisturbed(t, other, func() {
		logins := 0
		for i := 0; i < million; i += million / 20 {
			other.login(p)
			logins++
			dbtest.Exec(t, w.db, `
INSERT INTO guards (key, outcome, window_start, window_count, ticket, failed, touched_at)
SELECT sha256(int4send(i)), 'failed', t, 1, t, ARRAY[t], t
  FROM generate_series($1::int + 1, $1::int + $2::int) AS i, (SELECT clock_timestamp() - interval '1 day') AS aged(t)`, i, million/20)
		}
		eventually(t, "a million rows are pruned", 10*time.Minute, func() bool {
			for range 10 { // what is pruned keeps nobody from logging in, whose rows are in the same table
				other.login(p)
				logins++
				time.Sleep(50 * time.Millisecond)
			}
			return !dbtest.Value[bool](t, w.db, `SELECT EXISTS (SELECT FROM guards WHERE touched_at < clock_timestamp() - interval '1 hour')`)
		})
		t.Logf("%d logins meanwhile", logins)
	})
	if got := count("guards"); got > 5 {
		t.Errorf("rows of guards: got %d, want those of the two who logged in", got)
	}
	// A batch that a busy machine does not finish in time is for the next call.
	t.Logf("%d batches were not finished in time", len(s.logged("prune.failed"))+len(other.logged("prune.failed")))
	if got := series(); got != known {
		t.Errorf("lines of /metrics after a million: got %d, want %d as before", got, known)
	}
}

// p99 is the 99th percentile of durations, which it sorts.
func p99(ds []time.Duration) time.Duration {
	slices.Sort(ds)
	return ds[(len(ds)-1)*99/100]
}

// TestRefreshDuringLoginFlood: a flood of logins that keeps every slot busy
// does not make refreshes wait for one. Windows of quiet and of flood
// alternate, so that a machine that slows down slows both.
func TestRefreshDuringLoginFlood(t *testing.T) {
	const pairs, samples, clients = 5, 100, 16
	w := newWorld(t)
	s := w.startPlain(unlimited)
	first := s.register()
	people := accounts(t, w, first, clients)
	neighbour := s.from("127.0.0.200")
	token := neighbour.login(first).RefreshToken
	refreshes := func() (took []time.Duration) {
		for range samples {
			begun := time.Now()
			a := neighbour.refresh(token)
			took = append(took, time.Since(begun))
			token = a.tokens(t).RefreshToken
		}
		return took
	}
	refreshes()
	var quiet, flooded, served []time.Duration
	for range pairs {
		quiet = append(quiet, p99(refreshes()))

		stop := make(chan struct{})
		var mu sync.Mutex
		var flood sync.WaitGroup
		begin := hashes(s)
		for _, p := range people {
			flood.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					begun := time.Now()
					a, err := s.try("POST", loginPath, p.loginBody(p.Password))
					if err != nil || a.status != 200 && a.code() != "hash_busy" {
						t.Errorf("a login of the flood: got %d %s, %v", a.status, a.body, err)
						return
					}
					if a.status == 200 {
						mu.Lock()
						served = append(served, time.Since(begun))
						mu.Unlock()
					}
				}
			})
		}
		eventually(t, "the slots are busy", 30*time.Second, func() bool { return hashes(s) > begin+2 })
		flooded = append(flooded, p99(refreshes()))
		close(stop)
		flood.Wait()
	}
	per := time.Duration(1e9 * s.metric("auth_password_hash_duration_seconds_sum") / s.metric("auth_password_hash_duration_seconds_count"))
	q, f := median(quiet), median(flooded)
	t.Logf("p99 of refresh: %v quiet, %v beside a flood of %d clients: a ratio of %.1f; a login took %v (median), a hash %v (mean)", q, f, clients, float64(f)/float64(q), median(served), per)
	t.Logf("quiet %v, flooded %v", quiet, flooded)
	// Whoever waits for a slot waits for whole hashes. Less than half of one is
	// what two cores that are both busy hashing cost anyone, however quick a
	// quiet refresh is.
	if limit := max(3*q, per/2); f > limit {
		t.Errorf("p99 of refresh beside a flood: got %v, want at most %v: three times the %v of quiet, or half a hash", f, limit, q)
	}
}
