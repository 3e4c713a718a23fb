package e2e

import (
	"bytes"
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

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// Benchmarks print ratios to a limit of the machine, measured before and after
// each load. Client, service, PostgreSQL and NATS share the machine. A pair
// counts when both readings of the limit agree within 10 %; what is printed is
// the median of the pairs that count. bench_test.go is the tools,
// bench_results_test.go the benchmarks.
const (
	wantPairs = 5
	maxPairs  = 15
	limitTime = 2 * time.Second
)

// reading is what one load or one limit came to.
type reading struct {
	rate    float64 // successes a second
	cpu     float64 // processor seconds a success, of the service or of the limit
	p99     time.Duration
	refused float64 // share of requests
}

// measured is a load and the limit before and after it.
type measured struct{ load, limit reading }

// pairs measures limit, load, limit until enough pairs count.
func pairs(b *testing.B, limit, load func() reading) []measured {
	var ms []measured
	for tried := 0; len(ms) < wantPairs && tried < maxPairs; tried++ {
		before := limit()
		r := load()
		after := limit()
		if math.Abs(before.rate-after.rate) > 0.1*max(before.rate, after.rate) {
			b.Logf("does not count: limit %.1f/s before, load %.1f/s, limit %.1f/s after", before.rate, r.rate, after.rate)
			continue
		}
		ms = append(ms, measured{r, reading{rate: (before.rate + after.rate) / 2, cpu: (before.cpu + after.cpu) / 2, p99: (before.p99 + after.p99) / 2}})
	}
	if len(ms) == 0 {
		b.Fatal("no two readings of the limit agree within 10 %: the machine is too busy")
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(len(ms)), "pairs")
	return ms
}

// report prints the median of f over the pairs.
func report(b *testing.B, ms []measured, unit string, f func(load, limit reading) float64) {
	values := make([]float64, len(ms))
	for i, m := range ms {
		values[i] = f(m.load, m.limit)
	}
	slices.Sort(values)
	b.ReportMetric(values[len(values)/2], unit)
}

// The ratios that several benchmarks print.
func ofLimit(load, limit reading) float64  { return load.rate / limit.rate }
func loadRate(load, _ reading) float64     { return load.rate }
func limitRateOf(_, limit reading) float64 { return limit.rate }
func cpuRatio(load, limit reading) float64 { return load.cpu / limit.cpu }
func p99Ratio(load, limit reading) float64 { return load.p99.Seconds() / limit.p99.Seconds() }
func refused(load, _ reading) float64      { return load.refused }

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

// target is one replica under load, or the bare handler; the harness's service
// belongs to tests.
type target struct {
	b      *testing.B
	base   string
	db     string
	pid    int
	client *http.Client
	stop   func()
}

// durable is a PostgreSQL that keeps what it acknowledged over a power cut, as
// one in production does. What the benchmark leaves in it is not checked.
func durable(b *testing.B) (url string) {
	url = dbtest.Start(b, "fsync=on", "full_page_writes=on", "synchronous_commit=on", "wal_writer_delay=200ms",
		"bgwriter_lru_maxpages=100", "shared_buffers=1GB", "max_wal_size=4GB").URL()
	b.Cleanup(func() { dbtest.Exec(b, url, `DROP SCHEMA identity_auth CASCADE`) })
	return url
}

func newTarget(b *testing.B, more ...env) *target {
	return newReplica(b, durable(b), natstest.New(b).URL(), more...)
}

// newReplica starts a replica on a migrated database and waits until it is ready.
func newReplica(b *testing.B, db, nats string, more ...env) *target {
	path, err := plainBinary()
	if err != nil {
		b.Fatal(err)
	}
	keys := keyPair()
	c := env{
		"DATABASE_URL": db, "NATS_URL": nats, "HOST": "127.0.0.1", "PORT": freePort(b),
		"JWT_PRIVATE_KEY_PEM": keys.private, "JWT_PUBLIC_KEY_PEM": keys.public, "JWT_KID": "bench",
	}
	for _, m := range append([]env{unlimited}, more...) {
		for k, v := range m {
			c[k] = v
		}
	}
	t := launchTarget(b, exec.Command(path), c, "/health/ready")
	t.db = db
	return t
}

// launchTarget starts a server and waits until it answers 200 on path.
func launchTarget(b *testing.B, cmd *exec.Cmd, c env, path string) *target {
	t := &target{b: b, base: "http://127.0.0.1:" + c["PORT"], client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 3000}}}
	cmd.Env = c.list()
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	t.pid = cmd.Process.Pid
	t.stop = sync.OnceFunc(func() {
		t.client.CloseIdleConnections()
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
	})
	b.Cleanup(t.stop)
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		resp, err := t.client.Get(t.base + path)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == 200 {
				return t
			}
		}
		if time.Now().After(end) {
			b.Fatal("server is not ready")
		}
	}
}

// bareHandler is net/http with one handler and nothing around it, in a process
// of its own: this test binary started again.
func bareHandler(b *testing.B) *target {
	return launchTarget(b, exec.Command(os.Args[0]), env{"PORT": freePort(b), bareProcess: "1"}, "/health/live")
}

const bareProcess = "IDENTITY_AUTH_E2E_BARE_HANDLER"

// serveBare is what the process of bareHandler does, until it is ended.
func serveBare() error {
	return http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"bare"`)
		if r.Header.Get("If-None-Match") != "" {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"status":"live"}`)
	}))
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

// run keeps workers busy with call for as long as is said.
func (t *target) run(workers int, loadTime time.Duration, call func(worker int) (ok bool)) reading {
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
