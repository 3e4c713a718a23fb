package e2e

import (
	"crypto"
	"crypto/md5"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/crypto/argon2"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// logins is a load of logins, each worker with an account of its own.
func (t *target) logins(people []person, loadTime time.Duration) reading {
	return t.run(len(people), loadTime, func(worker int) bool {
		status, answer := t.post("/api/auth/login", people[worker].loginBody(password))
		if status != 200 && status != 503 {
			t.b.Errorf("login: %d %s", status, answer)
		}
		return status == 200
	})
}

// BenchmarkLogin is logins of 8 workers beside bare argon2id of the same cost
// on as many goroutines as there are cores, and logins of 64 workers beside
// those of 8.
func BenchmarkLogin(b *testing.B) {
	const loadTime = 15 * time.Second // some 200 logins: the 99th percentile is not the slowest
	salt := make([]byte, 16)
	argon := func() reading {
		return limitRate(func() { argon2.IDKey([]byte(password), salt, 3, 64<<10, 1, 32) })
	}
	t := newTarget(b)
	people := t.people(64)
	eight := func() reading { return t.logins(people[:8], loadTime) }
	b.Run("workers=8", func(b *testing.B) {
		ms := pairs(b, argon, eight)
		report(b, ms, "argon2/s", limitRateOf)
		report(b, ms, "logins/s", loadRate)
		report(b, ms, "of-argon2", ofLimit)
		report(b, ms, "CPU/argon2-CPU", cpuRatio)
		report(b, ms, "p99/(8/argon2-rate)", func(load, limit reading) float64 { return load.p99.Seconds() * limit.rate / 8 })
	})
	b.Run("workers=64", func(b *testing.B) {
		ms := pairs(b, eight, func() reading { return t.logins(people, loadTime) })
		report(b, ms, "of-8-workers", ofLimit)
		report(b, ms, "refused", refused)
	})
}

// refreshes is a load of refreshes, each worker with a session of its own.
func (t *target) refreshes(held []string, loadTime time.Duration) reading {
	return t.run(len(held), loadTime, func(worker int) bool { return t.refresh(&held[worker]) })
}

// refresh trades the token held for its successor.
func (t *target) refresh(held *string) bool {
	status, answer := t.post("/api/auth/refresh", refreshBody(*held))
	var got tokens
	if json.Unmarshal(answer, &got); status != 200 {
		t.b.Errorf("refresh: %d %s", status, answer)
		return false
	}
	*held = got.RefreshToken
	return true
}

// sessions begins n sessions and returns their refresh tokens.
func (t *target) sessions(n int) []string {
	held := make([]string, n)
	for i, p := range t.people(n) {
		_, answer := t.post("/api/auth/login", p.loginBody(password))
		var got tokens
		json.Unmarshal(answer, &got)
		held[i] = got.RefreshToken
	}
	return held
}

const (
	refreshWorkers = 16
	refreshTime    = 5 * time.Second
)

// BenchmarkRefresh is refreshes beside bare RSA-2048 signatures on as many
// goroutines as there are cores.
func BenchmarkRefresh(b *testing.B) {
	key, digest := keyPair().key, sha256.Sum256([]byte("claims"))
	sign := func() reading {
		return limitRate(func() {
			if _, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:]); err != nil {
				b.Error(err)
			}
		})
	}
	t := newTarget(b)
	held := t.sessions(refreshWorkers)
	ms := pairs(b, sign, func() reading { return t.refreshes(held, refreshTime) })
	report(b, ms, "signatures/s", limitRateOf)
	report(b, ms, "refreshes/s", loadRate)
	report(b, ms, "of-signatures", ofLimit)
	report(b, ms, "CPU/signature-CPU", cpuRatio)
	report(b, ms, "p99/(16/rate)", func(load, _ reading) float64 { return load.p99.Seconds() * load.rate / refreshWorkers })
}

// BenchmarkRefreshBesideLogins is refreshes while 64 workers log in, beside
// refreshes alone.
func BenchmarkRefreshBesideLogins(b *testing.B) {
	t := newTarget(b)
	people, held := t.people(64), t.sessions(refreshWorkers)
	quiet := func() reading { return t.refreshes(held, refreshTime) }
	ms := pairs(b, quiet, func() (r reading) {
		var flood sync.WaitGroup
		flood.Go(func() { t.logins(people, refreshTime+2*time.Second) })
		time.Sleep(time.Second) // the flood has filled the queue
		r = quiet()
		flood.Wait()
		return r
	})
	report(b, ms, "p99/quiet-p99", p99Ratio)
	report(b, ms, "of-quiet", ofLimit)
}

// BenchmarkRefreshOfMany is refreshes on a table of 10,000,000 sessions beside
// one of 10,000. In both, 10,000 sessions are refreshed, at random.
func BenchmarkRefreshOfMany(b *testing.B) {
	many, few := newTarget(b), newTarget(b)
	load := func(t *target, rows int) func() reading {
		held := t.grow(rows, 10_000)
		shares := make([][]string, refreshWorkers)
		for i, token := range held {
			shares[i%refreshWorkers] = append(shares[i%refreshWorkers], token)
		}
		return func() reading {
			return t.run(refreshWorkers, refreshTime, func(worker int) bool {
				share := shares[worker]
				return t.refresh(&share[rand.IntN(len(share))])
			})
		}
	}
	ms := pairs(b, load(few, 10_000), load(many, 10_000_000))
	report(b, ms, "rate/rate-of-few", ofLimit)
	report(b, ms, "p99/p99-of-few", p99Ratio)
}

// grow inserts sessions, ten an account, whose secrets follow from their
// number, and returns the tokens of some, evenly spread.
func (t *target) grow(rows, want int) []string {
	ctx := t.b.Context() // minutes, for which dbtest has no patience
	conn, err := pgx.Connect(ctx, t.db)
	if err != nil {
		t.b.Fatal(err)
	}
	defer conn.Close(ctx)
	for _, statement := range []string{
		`SET session_replication_role = replica; SET work_mem = '1GB'`,
		fmt.Sprintf(`
INSERT INTO identity_auth.accounts (tenant_id, user_id, email, password_hash)
SELECT md5('tenant')::uuid, md5('u' || i)::uuid, 'u' || i || '@example.com', '$argon2id$v=19$m=65536,t=3,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA'
  FROM generate_series(0, %d / 10 - 1) AS i`, rows),
		fmt.Sprintf(`
INSERT INTO identity_auth.sessions (id, tenant_id, user_id, family_hash, step_hash, created_at, used_at, expires_at, ends_at, window_start, client_ip, user_agent)
SELECT md5('s' || i)::uuid, md5('tenant')::uuid, md5('u' || i / 10)::uuid, sha256(sha256(('f' || i)::bytea)), sha256(sha256(('t' || i)::bytea)),
       now(), now(), now() + interval '10 days', now() + interval '20 days', now(), '192.0.2.1', 'bench'
  FROM generate_series(0, %d - 1) AS i ORDER BY 1`, rows),
		`VACUUM (FREEZE, ANALYZE) identity_auth.sessions`,
		`CHECKPOINT`,
	} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			t.b.Fatalf("%s: %v", statement, err)
		}
	}
	tokens := make([]string, want)
	for n := range tokens {
		tokens[n] = grownToken(n * (rows / want))
	}
	return tokens
}

// grownToken is the refresh token of the i-th session that grow made.
func grownToken(i int) string {
	id := md5.Sum(fmt.Appendf(nil, "s%d", i))
	family, step := sha256.Sum256(fmt.Appendf(nil, "f%d", i)), sha256.Sum256(fmt.Appendf(nil, "t%d", i))
	body := append(id[:], make([]byte, 8)...)
	body = append(append(body, family[:]...), step[:]...)
	return "iar_" + base64.RawURLEncoding.EncodeToString(binary.BigEndian.AppendUint32(body, crc32.ChecksumIEEE(body)))
}

// BenchmarkBloat is what 1,000,000 refreshes of 1,000 sessions leave: rows a
// session, the sizes of the table and of its indexes as ratios to those before,
// and the share of updates that were heap-only (HOT).
func BenchmarkBloat(b *testing.B) {
	const sessions, refreshes, workers = 1_000, 1_000_000, 8 // no two workers have a session in common
	t := newTarget(b)
	held := t.grow(sessions, sessions)
	size := func(what string) float64 {
		return float64(dbtest.Value[int64](b, t.db, `SELECT pg_`+what+`_size('identity_auth.sessions')`))
	}
	table, indexes := size("table"), size("indexes")
	begun := time.Now()
	together(workers, func(worker int) {
		for n := worker; n < refreshes; n += workers {
			t.refresh(&held[n%sessions])
		}
	})
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(refreshes/time.Since(begun).Seconds(), "refreshes/s")
	b.ReportMetric(dbtest.Value[float64](b, t.db, `SELECT count(*)::float8 FROM identity_auth.sessions`)/sessions, "rows/session")
	b.ReportMetric(size("table")/table, "table/before")
	b.ReportMetric(size("indexes")/indexes, "indexes/before")
	b.ReportMetric(dbtest.Value[float64](b, t.db, `
SELECT n_tup_hot_upd::float8 / n_tup_upd FROM pg_stat_user_tables WHERE schemaname = 'identity_auth' AND relname = 'sessions'`), "HOT")
}

// BenchmarkReplicas is refreshes of two and three replicas on one database
// beside those of one.
func BenchmarkReplicas(b *testing.B) {
	for _, n := range []int{2, 3} {
		b.Run(fmt.Sprintf("replicas=%d", n), func(b *testing.B) {
			db, nats := durable(b), natstest.New(b).URL()
			var replicas []*target
			for range n {
				replicas = append(replicas, newReplica(b, db, nats))
			}
			held := replicas[0].sessions(refreshWorkers)
			load := func(n int) func() reading {
				return func() reading {
					all, before := replicas[0], 0.0
					for _, r := range replicas[1:n] {
						before -= r.cpu()
					}
					r := all.run(refreshWorkers, refreshTime, func(worker int) bool { return replicas[worker%n].refresh(&held[worker]) })
					for _, other := range replicas[1:n] {
						before += other.cpu()
					}
					r.cpu += before / (r.rate * refreshTime.Seconds())
					return r
				}
			}
			ms := pairs(b, load(1), load(n))
			report(b, ms, "rate/rate-of-one", ofLimit)
			report(b, ms, "CPU/CPU-of-one", cpuRatio)
		})
	}
}

// BenchmarkBesideBareHandler is the endpoints without a database beside a
// bare net/http handler, with the same client.
func BenchmarkBesideBareHandler(b *testing.B) {
	get := func(t *target, path string, want int, headers ...string) func() reading {
		return func() reading {
			return t.run(16, 2*time.Second, func(int) bool {
				req, err := http.NewRequest(http.MethodGet, t.base+path, nil)
				if err != nil {
					t.b.Error(err)
					return false
				}
				if len(headers) > 0 {
					req.Header.Set(headers[0], headers[1])
				}
				resp, err := t.client.Do(req)
				if err != nil {
					t.b.Error(err)
					return false
				}
				defer resp.Body.Close()
				io.Copy(io.Discard, resp.Body)
				if resp.StatusCode != want {
					t.b.Errorf("%s: got %d, want %d", path, resp.StatusCode, want)
				}
				return true
			})
		}
	}
	t, bare := newTarget(b), bareHandler(b)
	b.Run("health/live", func(b *testing.B) {
		ms := pairs(b, get(bare, "/health/live", 200), get(t, "/health/live", 200))
		report(b, ms, "of-bare", ofLimit)
		report(b, ms, "bare/s", limitRateOf)
	})
	b.Run("jwks-304", func(b *testing.B) {
		resp, err := t.client.Get(t.base + "/.well-known/jwks.json")
		if err != nil {
			b.Fatal(err)
		}
		resp.Body.Close()
		etag := resp.Header.Get("ETag")
		ms := pairs(b, get(bare, "/", 304, "If-None-Match", etag), get(t, "/.well-known/jwks.json", 304, "If-None-Match", etag))
		report(b, ms, "of-bare", ofLimit)
		report(b, ms, "bare/s", limitRateOf)
	})
}

// BenchmarkMemory is the resident set: idle, at the peak of 64, 1,000 and 3,000
// parallel logins, and 30 s after.
func BenchmarkMemory(b *testing.B) {
	for _, n := range []int{64, 1000, 3000} {
		b.Run(fmt.Sprintf("logins=%d", n), func(b *testing.B) {
			t := newTarget(b, env{"MAX_CONCURRENT_HASHES": "2"})
			time.Sleep(10 * time.Second) // what the start needed has been given back
			b.ReportMetric(0, "ns/op")
			b.ReportMetric(t.status("VmRSS:"), "idle-MiB")
			strangers := make([]person, n) // an e-mail without an account costs a hash too
			for i := range strangers {
				strangers[i] = newPerson()
			}
			for range 3 {
				together(n, func(i int) { t.post("/api/auth/login", strangers[i].loginBody(password)) })
			}
			t.client.CloseIdleConnections()
			b.ReportMetric(t.status("VmHWM:"), "peak-MiB")
			time.Sleep(30 * time.Second)
			b.ReportMetric(t.status("VmRSS:"), "after-30s-MiB")
		})
	}
}

// status reads a line of /proc/PID/status in MiB.
func (t *target) status(line string) (mib float64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.pid))
	if err != nil {
		t.b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), line)
	var kib float64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.b.Fatal(err)
	}
	return kib / 1024
}

// BenchmarkStart is the time from the start of the process to the first 200 of
// /health/ready, on a migrated database, and what the binary weighs.
func BenchmarkStart(b *testing.B) {
	db, nats := durable(b), natstest.New(b).URL()
	newReplica(b, db, nats) // has made the streams
	var took []time.Duration
	b.Run("ready", func(b *testing.B) {
		for range 15 {
			begun := time.Now()
			t := newReplica(b, db, nats)
			took = append(took, time.Since(begun))
			t.stop()
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(median(took))/1e6, "ms")
	})
	b.Run("binary", func(b *testing.B) {
		path, err := build("identity-auth-stripped", "CGO_ENABLED=0", "-trimpath", "-buildvcs=false", "-ldflags=-s -w")
		if err != nil {
			b.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			b.Fatal(err)
		}
		out, err := exec.Command("go", "version", "-m", path).Output()
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(info.Size())/1e6, "MB")
		b.ReportMetric(float64(strings.Count(string(out), "\n\tdep\t")), "modules")
	})
}
