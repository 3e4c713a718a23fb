package e2e

import (
	"bytes"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/argon2"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// Benchmarks print ratios to a limit of the machine that is measured before
// and after each load: the bare computation on as many goroutines as there are
// cores. Client, service, PostgreSQL and NATS share the machine. A pair counts
// when both readings of the limit agree within 10 %; what is printed is the
// median of the pairs that count.
const (
	wantPairs = 5
	maxPairs  = 15
	limitTime = 2 * time.Second
	loadTime  = 4 * time.Second
)

// reading is what one load or one limit came to.
type reading struct {
	rate    float64 // successes a second
	cpu     float64 // processor seconds a success, of the service or of the limit
	p99     time.Duration
	refused float64 // share of requests
}

// pairs measures limit, load, limit and reports the medians.
func pairs(b *testing.B, name string, workers int, limit, load func() reading) {
	var loads, limits []reading
	for tried := 0; len(loads) < wantPairs && tried < maxPairs; tried++ {
		before := limit()
		r := load()
		after := limit()
		if math.Abs(before.rate-after.rate) > 0.1*max(before.rate, after.rate) {
			b.Logf("does not count: limit %.1f/s before, %s %.1f/s, limit %.1f/s after", before.rate, name, r.rate, after.rate)
			continue
		}
		loads = append(loads, r)
		limits = append(limits, reading{rate: (before.rate + after.rate) / 2, cpu: (before.cpu + after.cpu) / 2})
	}
	if len(loads) == 0 {
		b.Fatal("no two readings of the limit agree within 10 %: the machine is too busy")
	}
	report := func(unit string, f func(load, limit reading) float64) {
		values := make([]float64, len(loads))
		for i := range values {
			values[i] = f(loads[i], limits[i])
		}
		slices.Sort(values)
		b.ReportMetric(values[len(values)/2], unit)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(len(loads)), "pairs")
	report("limit/s", func(_, limit reading) float64 { return limit.rate })
	report(name+"/s", func(load, _ reading) float64 { return load.rate })
	report("of-limit", func(load, limit reading) float64 { return load.rate / limit.rate })
	report("p99/ideal", func(load, limit reading) float64 { return load.p99.Seconds() * limit.rate / float64(workers) })
	report("CPU/limit-CPU", func(load, limit reading) float64 { return load.cpu / limit.cpu })
	report("refused", func(load, _ reading) float64 { return load.refused })
}

// limitRate runs f on every core for a while.
func limitRate(f func()) reading {
	cpu := ownCPU()
	var mu sync.Mutex
	var r reading
	n := 0
	together(runtime.GOMAXPROCS(0), func(int) {
		begun := time.Now()
		mine := 0
		for time.Since(begun) < limitTime {
			f()
			mine++
		}
		mu.Lock()
		defer mu.Unlock()
		r.rate += float64(mine) / time.Since(begun).Seconds()
		n += mine
	})
	r.cpu = (ownCPU() - cpu) / float64(n)
	return r
}

// ownCPU is the processor time of this process in seconds.
func ownCPU() float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

// target is a service under load; the harness's service belongs to tests.
type target struct {
	b      *testing.B
	base   string
	db     string
	pid    int
	client *http.Client
}

func newTarget(b *testing.B, more ...env) *target {
	path, err := plainBinary()
	if err != nil {
		b.Fatal(err)
	}
	keys := keyPair()
	port := strconv.Itoa(20000 + os.Getpid()%10000)
	t := &target{b: b, base: "http://127.0.0.1:" + port, db: dbtest.Empty(b), client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 2000}}}
	c := env{
		"DATABASE_URL": t.db, "NATS_URL": natstest.New(b).URL(), "HOST": "127.0.0.1", "PORT": port,
		"JWT_PRIVATE_KEY_PEM": keys.private, "JWT_PUBLIC_KEY_PEM": keys.public, "JWT_KID": "bench",
	}
	for _, m := range append([]env{unlimited}, more...) {
		for k, v := range m {
			c[k] = v
		}
	}
	cmd := exec.Command(path)
	cmd.Env = c.list()
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	t.pid = cmd.Process.Pid
	b.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		resp, err := t.client.Get(t.base + "/health/ready")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == 200 {
				return t
			}
		}
		if time.Now().After(end) {
			b.Fatal("service is not ready")
		}
	}
}

func (t *target) post(path string, body []byte) (status int, answer []byte) {
	resp, err := t.client.Post(t.base+path, "application/json", bytes.NewReader(body))
	if err != nil {
		t.b.Error(err)
		return 0, nil
	}
	defer resp.Body.Close()
	answer, _ = io.ReadAll(resp.Body)
	return resp.StatusCode, answer
}

// cpu is the processor time of the service in seconds.
func (t *target) cpu() float64 {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", t.pid))
	if err != nil {
		t.b.Fatal(err)
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return float64(user+system) / 100 // USER_HZ
}

// run keeps workers busy with call for a while.
func (t *target) run(workers int, call func(worker int) (ok bool)) reading {
	var mu sync.Mutex
	var took []time.Duration
	var r reading
	cpu := t.cpu()
	together(workers, func(worker int) {
		begun := time.Now()
		mine := 0
		for time.Since(begun) < loadTime {
			sent := time.Now()
			ok := call(worker)
			d := time.Since(sent)
			if !ok {
				mu.Lock()
				r.refused++
				mu.Unlock()
				time.Sleep(time.Second) // what Retry-After says at least
				continue
			}
			mine++
			mu.Lock()
			took = append(took, d)
			mu.Unlock()
		}
		mu.Lock()
		defer mu.Unlock()
		r.rate += float64(mine) / time.Since(begun).Seconds()
	})
	if len(took) == 0 {
		t.b.Fatal("no request succeeded")
	}
	slices.Sort(took)
	r.refused /= r.refused + float64(len(took))
	r.cpu = (t.cpu() - cpu) / float64(len(took))
	r.p99 = took[len(took)*99/100]
	return r
}

// people registers n accounts.
func (t *target) people(n int) []person {
	ps := make([]person, n)
	for i := range ps {
		ps[i] = newPerson()
		if status, answer := t.post("/api/auth/register", toJSON(ps[i])); status != 201 {
			t.b.Fatalf("register: %d %s", status, answer)
		}
	}
	return ps
}

// BenchmarkLogin is logins beside bare argon2id of the same cost.
func BenchmarkLogin(b *testing.B) {
	salt := make([]byte, 16)
	limit := func() reading {
		return limitRate(func() { argon2.IDKey([]byte(password), salt, 3, 64<<10, 1, 32) })
	}
	for _, workers := range []int{8, 64} {
		b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
			t := newTarget(b)
			people := t.people(workers)
			pairs(b, "logins", workers, limit, func() reading {
				return t.run(workers, func(worker int) bool {
					status, answer := t.post("/api/auth/login", people[worker].loginBody(password))
					if status != 200 && status != 503 {
						b.Errorf("login: %d %s", status, answer)
					}
					return status == 200
				})
			})
		})
	}
}

// BenchmarkRefresh is refreshes beside bare RSA-2048 signatures.
func BenchmarkRefresh(b *testing.B) {
	key, digest := keyPair().key, sha256.Sum256([]byte("claims"))
	limit := func() reading {
		return limitRate(func() {
			if _, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:]); err != nil {
				b.Error(err)
			}
		})
	}
	const workers = 16
	b.Run(fmt.Sprintf("workers=%d", workers), func(b *testing.B) {
		t := newTarget(b)
		held := make([]string, workers)
		for i, p := range t.people(workers) {
			_, answer := t.post("/api/auth/login", p.loginBody(password))
			var got tokens
			json.Unmarshal(answer, &got)
			held[i] = got.RefreshToken
		}
		pairs(b, "refreshes", workers, limit, func() reading {
			return t.run(workers, func(worker int) bool {
				status, answer := t.post("/api/auth/refresh", refreshBody(held[worker]))
				var got tokens
				if json.Unmarshal(answer, &got); status != 200 {
					b.Errorf("refresh: %d %s", status, answer)
					return false
				}
				held[worker] = got.RefreshToken
				return true
			})
		})
	})
}
