// Package e2e drives the built binary from outside, with a real PostgreSQL, a
// real NATS server and third-party peers that no one here wrote.
package e2e

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

func TestMain(m *testing.M) {
	if os.Getenv(bareProcess) != "" {
		panic(serveBare())
	}
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "identity-auth-e2e-")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	binDir = dir
	return dbtest.Main(m)
}

// binDir holds the binaries built by this run.
var binDir string

// plainBinary is what ships; racyBinary has the race detector and stops with
// exit code 66 when it finds a race.
var (
	plainBinary = sync.OnceValues(func() (string, error) { return build("identity-auth", "CGO_ENABLED=0") })
	racyBinary  = sync.OnceValues(func() (string, error) { return build("identity-auth-race", "CGO_ENABLED=1", "-race") })
)

func build(name, env string, flags ...string) (string, error) {
	path := filepath.Join(binDir, name)
	cmd := exec.Command("go", append(append([]string{"build"}, flags...), "-o", path, ".")...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), env)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %v\n%s", err, out)
	}
	return path, nil
}

// env is a configuration; a value of "" takes the variable away.
type env map[string]string

// keyPair is a JWT key pair of 2048 bits, made once for speed.
var keyPair = sync.OnceValue(newKeyPair)

type pair struct {
	private, public string // PEM
	key             *rsa.PrivateKey
}

func newKeyPair() pair {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		panic(err)
	}
	return pair{
		private: string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
		public:  string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})),
		key:     key,
	}
}

// world is what one or several replicas share.
type world struct {
	t    *testing.T
	db   string // DATABASE_URL
	nats *natstest.Server
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, db: dbtest.New(t), nats: natstest.New(t)}
	t.Cleanup(func() { w.checkEvents() }) // after the services have stopped and flushed
	return w
}

// jetStream is a connection of the test's own to the world's NATS.
func (w *world) jetStream() jetstream.JetStream {
	w.t.Helper()
	nc, err := nats.Connect(w.nats.URL())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		w.t.Fatal(err)
	}
	return js
}

// unlimited turns the limits off that a test of something else would meet.
var unlimited = env{
	"IP_RATE_PER_SECOND": "0", "LOGIN_FAILURES_PER_HOUR_PER_IP": "0",
	"LOGIN_PER_MIN_PER_EMAIL": "0", "REGISTER_PER_MIN_PER_EMAIL": "0", "REFRESH_PER_MIN_PER_TOKEN": "0",
}

// config is a working configuration on a free port, changed by more.
func (w *world) config(more ...env) env {
	keys := keyPair()
	c := env{
		"DATABASE_URL": w.db, "NATS_URL": w.nats.URL(),
		"JWT_PRIVATE_KEY_PEM": keys.private, "JWT_PUBLIC_KEY_PEM": keys.public, "JWT_KID": "test-1",
		"HOST": "127.0.0.1", "PORT": freePort(w.t),
		"DATABASE_MAX_CONNECTIONS": "16",
		"MAX_CONCURRENT_HASHES":    "2",
	}
	for _, m := range more {
		for k, v := range m {
			c[k] = v
		}
	}
	return c
}

// portsGiven counts the calls of freePort.
var portsGiven atomic.Uint32

// freePort stays above the ports that systems give to outgoing connections, and
// gives each once: nobody takes it before the service does, or while that is
// down for a while.
func freePort(t testing.TB) string {
	t.Helper()
	const first, n = 61000, 4500
	var err error
	for range n {
		port := strconv.Itoa(first + (os.Getpid()+int(portsGiven.Add(1)))%n)
		var l net.Listener
		if l, err = net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal(err)
	return ""
}

// service is one running replica.
type service struct {
	t       *testing.T
	base    string // http://127.0.0.1:port
	cmd     *exec.Cmd
	client  *http.Client
	exited  chan struct{}
	stopped bool

	mu     sync.Mutex
	lines  []string // stdout
	stderr bytes.Buffer
}

// start runs the race-detecting binary until the test ends and waits for ready.
func (w *world) start(more ...env) *service {
	w.t.Helper()
	s := w.launch(racyBinary, w.config(more...))
	s.waitReady()
	return s
}

// startPlain is start with the binary that ships: for memory and time.
func (w *world) startPlain(more ...env) *service {
	w.t.Helper()
	s := w.launch(plainBinary, w.config(more...))
	s.waitReady()
	return s
}

// launch starts a process and does not wait.
func (w *world) launch(binary func() (string, error), c env) *service {
	w.t.Helper()
	path, err := binary()
	if err != nil {
		w.t.Fatal(err)
	}
	s := &service{t: w.t, base: "http://127.0.0.1:" + c["PORT"], exited: make(chan struct{})}
	s.client = &http.Client{
		Timeout:       60 * time.Second,
		Transport:     &http.Transport{MaxIdleConnsPerHost: 2000, MaxConnsPerHost: 0},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	s.cmd = exec.Command(path)
	s.cmd.Env = c.list()
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	s.cmd.Stderr = &lockedWriter{s: s}
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	go func() {
		lines := bufio.NewScanner(stdout)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			s.mu.Lock()
			s.lines = append(s.lines, lines.Text())
			s.mu.Unlock()
		}
		s.cmd.Wait()
		close(s.exited)
	}()
	w.t.Cleanup(func() {
		if !s.stopped {
			if code := s.stop(); code != 0 {
				w.t.Errorf("service ended with exit code %d", code)
			}
		}
		s.client.CloseIdleConnections()
		if w.t.Failed() {
			w.t.Logf("stderr: %s\nlast log lines:\n%s", s.errors(), strings.Join(s.tail(15), "\n"))
		}
	})
	return s
}

// list keeps PATH out: the binary needs nothing but its configuration.
func (c env) list() []string {
	var list []string
	for k, v := range c {
		if v != "" {
			list = append(list, k+"="+v)
		}
	}
	slices.Sort(list)
	return list
}

type lockedWriter struct{ s *service }

func (w *lockedWriter) Write(b []byte) (int, error) {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	return w.s.stderr.Write(b)
}

func (s *service) errors() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stderr.String()
}

func (s *service) tail(n int) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.lines[max(0, len(s.lines)-n):])
}

// linesWith counts the log lines so far that hold a text, such as a trace id.
func (s *service) linesWith(text string) (n int) {
	for _, line := range s.tail(1 << 30) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// logged returns the log lines of one event so far.
func (s *service) logged(event string) []map[string]any {
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []map[string]any
	for _, line := range s.lines {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			s.t.Errorf("log line is no JSON object: %q", line)
			continue
		}
		if m["event"] == event {
			found = append(found, m)
		}
	}
	return found
}

// eventually polls until ok, for what another process does in its own time.
func eventually(t *testing.T, what string, within time.Duration, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(within)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", within, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (s *service) waitReady() {
	s.t.Helper()
	eventually(s.t, "service ready", 30*time.Second, func() bool {
		select {
		case <-s.exited:
			s.t.Fatalf("service ended before it was ready: %s", s.errors())
		default:
		}
		resp, err := s.client.Get(s.base + "/health/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// stop sends SIGTERM and returns the exit code.
func (s *service) stop() int {
	s.t.Helper()
	s.cmd.Process.Signal(syscall.SIGTERM)
	return s.wait(60 * time.Second)
}

// kill is kill -9.
func (s *service) kill() {
	s.t.Helper()
	s.cmd.Process.Kill()
	s.wait(10 * time.Second)
}

func (s *service) wait(within time.Duration) int {
	s.t.Helper()
	s.stopped = true
	select {
	case <-s.exited:
	case <-time.After(within):
		s.cmd.Process.Kill()
		<-s.exited
		s.t.Errorf("service did not end within %v", within)
	}
	return s.cmd.ProcessState.ExitCode()
}

// answer is a response, read whole.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// json decodes the body.
func (a answer) json(t *testing.T) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(a.body, &m); err != nil {
		t.Fatalf("body of %d is no JSON object: %q", a.status, a.body)
	}
	return m
}

// code is the problem's code, or "".
func (a answer) code() string {
	var p struct{ Code string }
	json.Unmarshal(a.body, &p)
	return p.Code
}

// try sends one request; header pairs follow the body. It may be called from
// any goroutine.
func (s *service) try(method, path string, body []byte, headers ...string) (answer, error) {
	req, err := http.NewRequest(method, s.base+path, bytes.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
		if headers[i+1] == "" {
			req.Header.Del(headers[i])
		}
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, b}, err
}

// do is try that ends the test when there is no answer.
func (s *service) do(method, path string, body []byte, headers ...string) answer {
	s.t.Helper()
	a, err := s.try(method, path, body, headers...)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

func (s *service) get(path string, headers ...string) answer {
	s.t.Helper()
	return s.do(http.MethodGet, path, nil, headers...)
}

// post sends v as JSON.
func (s *service) post(path string, v any, headers ...string) answer {
	s.t.Helper()
	return s.do(http.MethodPost, path, toJSON(v), headers...)
}

func toJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

const password = "correct horse battery staple"

// person is an account to be.
type person struct {
	TenantID string `json:"tenant_id"`
	UserID   string `json:"user_id"`
	Email    string `json:"email"`
	Password string `json:"password"`
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

func newPerson() person {
	user := newUUID()
	return person{newUUID(), user, "p" + user[:13] + "@example.com", password}
}

// register makes a new account and returns it.
func (s *service) register() person {
	s.t.Helper()
	p := newPerson()
	if a := s.post("/api/auth/register", p); a.status != 201 {
		s.t.Fatalf("register: %d %s", a.status, a.body)
	}
	return p
}

func (p person) loginBody(password string) []byte {
	return toJSON(map[string]string{"tenant_id": p.TenantID, "email": p.Email, "password": password})
}

// tokens is the answer of login and refresh.
type tokens struct {
	AccessToken      string `json:"access_token"`
	TokenType        string `json:"token_type"`
	ExpiresIn        int    `json:"expires_in"`
	ExpiresInSeconds int    `json:"expires_in_seconds"`
	RefreshToken     string `json:"refresh_token"`
	RefreshExpiresIn int    `json:"refresh_expires_in"`
}

func (a answer) tokens(t *testing.T) tokens {
	t.Helper()
	var tok tokens
	if a.status != 200 || json.Unmarshal(a.body, &tok) != nil || tok.AccessToken == "" || tok.RefreshToken == "" {
		t.Fatalf("no tokens in answer %d %s", a.status, a.body)
	}
	return tok
}

func (s *service) login(p person) tokens {
	s.t.Helper()
	return s.do("POST", "/api/auth/login", p.loginBody(p.Password)).tokens(s.t)
}

func (s *service) refresh(token string) answer {
	s.t.Helper()
	return s.post("/api/auth/refresh", map[string]string{"refresh_token": token})
}

// metric reads one sample of /metrics by its name and labels as printed, for
// example `auth_login_total{result="success"}`.
func (s *service) metric(sample string) float64 {
	s.t.Helper()
	for line := range strings.Lines(string(s.get("/metrics").body)) {
		if rest, ok := strings.CutPrefix(line, sample+" "); ok {
			var v float64
			if _, err := fmt.Sscan(rest, &v); err != nil {
				s.t.Fatalf("sample %s: %v", sample, err)
			}
			return v
		}
	}
	s.t.Fatalf("no sample %s", sample)
	return 0
}

// rss is the resident set of the process in bytes: now, and at its peak.
func (s *service) rss() (now, peak int) {
	s.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			fmt.Sscan(rest, &now)
		}
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			fmt.Sscan(rest, &peak)
		}
	}
	return now << 10, peak << 10
}
