package e2e

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// from is s as a client at another loopback address sees it.
func (s *service) from(addr string) *service {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(addr)}}
	return &service{t: s.t, base: s.base, cmd: s.cmd, exited: s.exited, client: &http.Client{
		Timeout:   60 * time.Second,
		Transport: &http.Transport{DialContext: dialer.DialContext, MaxIdleConnsPerHost: 100},
	}}
}

// holdings are what an attack may not leave behind in the process.
type holdings struct{ goroutines, files float64 }

func (s *service) holdings() holdings {
	m := samples(s.get("/metrics"))
	// Connections to PostgreSQL stay for a while; the pool bounds them.
	pool := m[`auth_db_pool_connections{state="idle"}`] + m[`auth_db_pool_connections{state="used"}`]
	return holdings{m["go_goroutines"], m["process_open_fds"] - pool}
}

// serverErrors counts the answers 500 and above.
func (s *service) serverErrors() (n float64) {
	for sample, value := range samples(s.get("/metrics")) {
		if strings.HasPrefix(sample, "auth_http_request_duration_seconds_count") && strings.Contains(sample, `status="5`) {
			n += value
		}
	}
	return n
}

// undisturbed runs an attack on s and holds s to what an attack may cost: a
// neighbour, a client at another address, is served all the time; nothing is
// answered with 500 or above, or logged as an ERROR; and when it is over the
// memory, the goroutines and the files are what they were. s must be a
// startPlain whose sessions may refresh as often as they like.
func undisturbed(t *testing.T, s *service, attack func()) {
	t.Helper()
	neighbour := s.from("127.0.0.200")
	p := neighbour.register()
	token := neighbour.login(p).RefreshToken
	neighbour.client.CloseIdleConnections()
	s.client.CloseIdleConnections()
	// Closed connections take the service a moment to notice.
	before := s.holdings()
	for quiet := 0; quiet < 5; quiet++ {
		time.Sleep(50 * time.Millisecond)
		if now := s.holdings(); now.goroutines < before.goroutines || now.files < before.files {
			before, quiet = now, 0
		}
	}
	errorsBefore, linesBefore := s.serverErrors(), len(s.tail(1<<30))

	stop, stopped := make(chan struct{}), make(chan struct{})
	b := bystander{pause: 100 * time.Millisecond}
	go func() { defer close(stopped); b.watch(neighbour, token, stop) }()
	attack()
	close(stop)
	<-stopped
	for what, n := range b.bad {
		t.Errorf("a neighbour of the attack got %d times %s, want 200; dependencies went as follows: %v", n, what, s.logged("dependency.changed"))
	}
	neighbour.login(p)
	neighbour.client.CloseIdleConnections()
	s.client.CloseIdleConnections()

	if n := s.serverErrors() - errorsBefore; n != 0 {
		t.Errorf("answers of 500 and above: got %v, want 0", n)
	}
	for _, line := range s.tail(1 << 30)[linesBefore:] {
		if wrong := wrongLine(line); wrong != "" || strings.Contains(line, `"level":"ERROR"`) {
			t.Errorf("log line %.500q: want no ERROR, and the form of a log line: %s", line, wrong)
		}
	}
	over := time.Now()
	var now holdings
	var rss int
	defer func() {
		_, peak := s.rss()
		t.Logf("the neighbour's %d rounds: median refresh %v; %v after the attack %v goroutines and %v files (%v and %v before), RSS %.1f MiB, peak %.1f",
			len(b.took["/health/live"]), median(b.took[refreshPath]), time.Since(over).Round(time.Second), now.goroutines, now.files, before.goroutines, before.files, float64(rss)/mib, float64(peak)/mib)
	}()
	eventually(t, "goroutines, files and memory are what they were", 4*time.Minute, func() bool {
		now = s.holdings()
		rss, _ = s.rss()
		// A few: the neighbour's and this scrape's own connections come and go.
		return now.goroutines <= before.goroutines+5 && now.files <= before.files+5 && rss <= idleRSS+restRSS
	})
}

// conversation sends bytes on one connection and reads every answer until the
// service closes the connection or has been silent for a while.
func conversation(t *testing.T, s *service, sent string) (answers []int, closed bool) {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
	if err != nil {
		t.Error(err)
		return nil, false
	}
	defer conn.Close()
	go io.WriteString(conn, sent) // it may answer and close before it has read everything
	in := bufio.NewReader(conn)
	for {
		conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		if len(answers) > 0 {
			conn.SetReadDeadline(time.Now().Add(3 * time.Second)) // whoever answered one has the next bytes already
		}
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			var timeout net.Error
			return answers, !errors.As(err, &timeout) || !timeout.Timeout()
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		answers = append(answers, resp.StatusCode)
	}
}

// TestRequestSmuggling: where one request ends and the next begins has one
// reading. What could have a second one is refused, or is the last on its
// connection, so that nothing behind it is taken for a request.
func TestRequestSmuggling(t *testing.T) {
	t.Parallel()
	s := newWorld(t).startPlain(cheap, unlimited)
	const body = `{"refresh_token":"iar_none"}` // 28 bytes: answered with 401
	const chunked = "Transfer-Encoding: chunked\r\n"
	const chunks = "1c\r\n" + body + "\r\n0\r\n\r\n"
	post := func(headers string) string {
		return "POST " + refreshPath + " HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + headers + "\r\n"
	}
	const (
		refused = iota // one answer and the end
		last           // answered in order, and the end
		inOrder        // the next request on the connection is a request, and it is the sender's
	)
	rows := []struct {
		name, request string
		status, then  int
	}{
		{"a length", post("Content-Length: 28\r\n") + body, 401, inOrder},
		{"no length", post(""), 400, inOrder},
		{"the same length twice", post("Content-Length: 28\r\nContent-Length: 28\r\n") + body, 401, inOrder},
		{"two lengths", post("Content-Length: 28\r\nContent-Length: 5\r\n") + body, 400, refused},
		{"two lengths, the longer behind", post("Content-Length: 0\r\nContent-Length: 28\r\n") + body, 400, refused},
		{"two lengths in a list", post("Content-Length: 28, 5\r\n") + body, 400, refused},
		{"the same length in a list", post("Content-Length: 28, 28\r\n") + body, 400, refused},
		{"a length with a sign", post("Content-Length: +28\r\n") + body, 400, refused},
		{"a negative length", post("Content-Length: -1\r\n") + body, 400, refused},
		{"a length in hexadecimal", post("Content-Length: 0x1c\r\n") + body, 400, refused},
		{"a length of two words", post("Content-Length: 2 8\r\n") + body, 400, refused},
		{"an empty length", post("Content-Length: \r\n") + body, 400, refused},
		{"a length beyond 64 bits", post("Content-Length: 18446744073709551644\r\n") + body, 400, refused},
		{"a length that Connection names", post("Connection: Content-Length\r\nContent-Length: 28\r\n") + body, 401, inOrder},
		{"an unusual name", post("Content_Length: 5\r\nContent-Length: 28\r\n") + body, 401, inOrder},

		{"chunks", post(chunked) + chunks, 401, last},
		{"a length and chunks", post("Content-Length: 5\r\n"+chunked) + "0\r\n\r\n", 400, last},
		{"chunks and a length", post(chunked+"Content-Length: 33\r\n") + chunks, 401, last},
		{"chunks in HTTP/1.0", strings.Replace(post("Connection: keep-alive\r\n"+chunked), "HTTP/1.1", "HTTP/1.0", 1), 400, last},
		{"chunks and a length in HTTP/1.0", strings.Replace(post("Connection: keep-alive\r\nContent-Length: 28\r\n"+chunked), "HTTP/1.1", "HTTP/1.0", 1) + body, 401, last},
		{"chunked twice", post(chunked+chunked) + chunks, 501, refused},
		{"chunked, chunked", post("Transfer-Encoding: chunked, chunked\r\n") + chunks, 501, refused},
		{"chunked, identity", post("Transfer-Encoding: chunked, identity\r\n") + chunks, 501, refused},
		{"identity", post("Transfer-Encoding: identity\r\nContent-Length: 28\r\n") + body, 501, refused},
		{"gzip, chunked", post("Transfer-Encoding: gzip, chunked\r\n") + chunks, 501, refused},
		{"an unknown coding", post("Transfer-Encoding: xchunked\r\nContent-Length: 28\r\n") + body, 501, refused},
		{"a coding in quotes", post("Transfer-Encoding: \"chunked\"\r\nContent-Length: 28\r\n") + body, 501, refused},
		{"a coding behind a comma", post("Transfer-Encoding: ,chunked\r\nContent-Length: 28\r\n") + body, 501, refused},
		{"a coding behind a vertical tab", post("Transfer-Encoding: \x0bchunked\r\nContent-Length: 28\r\n") + body, 400, refused},
		{"a coding in upper case", post("Transfer-Encoding: CHUNKED\r\n") + chunks, 401, last},
		{"a coding behind a tab", post("Transfer-Encoding:\tchunked\r\n") + chunks, 401, last},
		{"a space before the colon", post("Transfer-Encoding : chunked\r\nContent-Length: 28\r\n") + body, 400, refused},
		{"NUL in the name", post("Transfer-Encoding\x00: chunked\r\nContent-Length: 28\r\n") + body, 400, refused},
		{"a header without a colon", post("Transfer-Encoding chunked\r\nContent-Length: 28\r\n") + body, 400, refused},

		{"a folded coding", post("Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n") + chunks, 401, last},
		{"a folded header", post("X-Fold: a\r\n b\r\nContent-Length: 28\r\n") + body, 401, inOrder},
		{"a coding folded into another header", post("X-Fold: a\r\n Transfer-Encoding: chunked\r\nContent-Length: 28\r\n") + body, 401, inOrder},
		{"a name that is folded", post("Transfer-Encoding\r\n : chunked\r\nContent-Length: 28\r\n") + body, 400, refused},
		{"the first header folded", "POST " + refreshPath + " HTTP/1.1\r\n Content-Length: 5\r\nHost: a\r\nContent-Length: 28\r\n\r\n" + body, 400, refused},
		// A single LF may end a header line (RFC 9112 section 2.2); the header it hides is read.
		{"a coding behind a bare LF", post("X-A: b\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n") + chunks, 401, last},
		{"a length behind a bare LF", post("Content-Length: 28\r\nX-A: b\nContent-Length: 5\r\n") + body, 400, refused},
		{"a bare CR", post("X-A: b\rTransfer-Encoding: chunked\r\nContent-Length: 28\r\n") + body, 400, refused},
		{"a header behind two CR", post("X-A: b\r\r\nContent-Length: 28\r\n") + body, 400, refused},

		{"a chunk extension", post(chunked) + "1c;a=b\r\n" + body + "\r\n0;c=\"d\"\r\n\r\n", 401, last},
		{"a chunk extension with a bare LF", post(chunked) + "1c;a\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a chunk extension that hides a line", post(chunked) + "1c;\nxx" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a chunk extension with a bare CR", post(chunked) + "1c;a\rb\r\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a chunk extension of 1 MiB", post(chunked) + "1c;" + strings.Repeat("a", mib) + "\r\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a thousand chunks of more extension than content", post(chunked) + strings.Repeat("1;"+strings.Repeat("a", 1000)+"\r\n \r\n", 1000) + "0\r\n\r\n", 400, refused},
		{"a chunk size that ends in LF", post(chunked) + "1c\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a chunk that ends in LF", post(chunked) + "1c\r\n" + body + "\n0\r\n\r\n", 400, refused},
		{"a chunk longer than its size", post(chunked) + "1b\r\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a chunk size of no digits", post(chunked) + "zz\r\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a chunk size with 0x", post(chunked) + "0x1c\r\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a negative chunk size", post(chunked) + "-1c\r\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a chunk size beyond 64 bits", post(chunked) + "1000000000000001c\r\n" + body + "\r\n0\r\n\r\n", 400, refused},
		{"a length in the trailer", post(chunked) + "1c\r\n" + body + "\r\n0\r\nContent-Length: 900\r\n\r\n", 401, last},
		{"a length in the trailer, announced", post("Trailer: Content-Length\r\n"+chunked) + chunks, 400, refused},

		// A body that nobody asked for is still not a request.
		{"a body to GET", "GET /health/live HTTP/1.1\r\nHost: a\r\nContent-Length: 28\r\n\r\n" + body, 200, inOrder},
		{"a body to a path that is not there", "POST /none HTTP/1.1\r\nHost: a\r\nContent-Length: 28\r\n\r\n" + body, 404, inOrder},
		{"a body of the wrong type", strings.Replace(post("Content-Length: 28\r\n"), "application/json", "text/plain", 1) + body, 415, inOrder},
		{"a body after 100-continue", "POST /none HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 28\r\n\r\n" + body, 404, refused},
		{"an expectation that is none", post("Expect: 100-continuex\r\nContent-Length: 28\r\n") + body, 417, refused},
		{"an upgrade to HTTP/2", "GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n", 200, inOrder},
		{"an upgrade to another protocol", "GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", 200, inOrder},
		{"the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404, refused},
		{"HTTP/0.9", "GET /health/live\r\n\r\n", 400, refused},
		{"HTTP/2 by name", "GET /health/live HTTP/2.0\r\nHost: a\r\n\r\n", 505, refused},
		{"two spaces in the request line", "GET  /health/live HTTP/1.1\r\nHost: a\r\n\r\n", 400, refused},
		{"a tab in the request line", "GET\t/health/live\tHTTP/1.1\r\nHost: a\r\n\r\n", 400, refused},
	}
	undisturbed(t, s, func() {
		marks := make([]string, len(rows))
		together(len(rows), func(i int) {
			// What lies behind the request is a well-formed one that would leave
			// a line in the log.
			row := rows[i]
			marks[i] = newUUID()
			behind := "POST " + refreshPath + " HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nX-Trace-Id: " + marks[i] + "\r\nContent-Length: 28\r\n\r\n" + body
			answers, closed := conversation(t, s, row.request+behind)
			want := []int{row.status}
			if row.then == inOrder {
				want = append(want, 401)
			}
			if !slices.Equal(answers, want) || closed != (row.then != inOrder) {
				t.Errorf("%s: got answers %v and the connection closed: %v, want %v and %v", row.name, answers, closed, want, row.then != inOrder)
			}
		})
		for i, row := range rows {
			if row.then == inOrder {
				eventually(t, row.name+": the next request has its line", 10*time.Second, func() bool { return s.linesWith(marks[i]) == 1 })
			} else if s.linesWith(marks[i]) != 0 {
				t.Errorf("%s: what was behind it was taken for a request", row.name)
			}
		}
	})
}

// needFiles makes room for many connections in this process and those it
// starts from now on.
func needFiles(t *testing.T, n uint64) {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	limit.Cur, limit.Max = max(limit.Cur, n), max(limit.Max, n)
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatalf("this test opens %d files: as root, or after 'ulimit -Hn %d'", n, n)
	}
}

// dialNarrow connects with a window of 4 KiB: what the service has to say does
// not fit.
func dialNarrow(host string) (net.Conn, error) {
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
	}}
	return dialer.Dial("tcp", host)
}

// unread is the most that the kernel holds of answers on one of the service's
// connections, in bytes.
func (s *service) unread() (most uint64) {
	s.t.Helper()
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		s.t.Fatal(err)
	}
	n, err := strconv.Atoi(s.base[strings.LastIndex(s.base, ":")+1:])
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line) // number, local, remote, state, sent:received, ...
		if !strings.HasSuffix(f[1], fmt.Sprintf(":%04X", n)) {
			continue
		}
		queued, _, _ := strings.Cut(f[4], ":")
		bytes, err := strconv.ParseUint(queued, 16, 64)
		if err != nil {
			s.t.Fatalf("/proc/net/tcp: %q: %v", line, err)
		}
		most = max(most, bytes)
	}
	return most
}

// TestUnreadAnswers: of the answers that a client does not read, little waits in
// the kernel. Left alone it is megabytes, and some hundred clients starve the
// host.
func TestUnreadAnswers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cert := newCertificate(t, "unread")
	encrypted := w.launch(plainBinary, w.config(cheap, env{"TLS_CERT_FILE": write(t, "cert", cert.cert), "TLS_KEY_FILE": write(t, "key", cert.key)}))
	encrypted.base = strings.Replace(encrypted.base, "http:", "https:", 1)
	encrypted.client.Transport.(*http.Transport).TLSClientConfig = trusting(t, cert)
	encrypted.waitReady()
	for name, s := range map[string]*service{"plain": w.startPlain(cheap), "TLS": encrypted} {
		t.Run(name, func(t *testing.T) {
			_, host, _ := strings.Cut(s.base, "://")
			conn, err := dialNarrow(host)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if s == encrypted {
				config := trusting(t, cert)
				config.ServerName = "127.0.0.1"
				conn = tls.Client(conn, config)
			}
			go io.WriteString(conn, strings.Repeat("GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n", 200))
			var held uint64
			unchanged := 0
			eventually(t, "the service has written what it can", 15*time.Second, func() bool {
				before := held
				if held = s.unread(); held == 0 || held != before {
					unchanged = 0
				}
				unchanged++
				return unchanged == 20
			})
			t.Logf("%d KiB wait", held>>10)
			if held > 256<<10 {
				t.Errorf("bytes that wait: got %d, want at most 256 KiB", held)
			}
		})
	}
}

// TestSlowClients: who is slow holds a connection, and not for long; others
// notice nothing, also of 5,000.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	needFiles(t, 16_000)
	s := newWorld(t).startPlain(cheap, unlimited)
	host := strings.TrimPrefix(s.base, "http://")
	post := "POST " + refreshPath + " HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/json\r\n"
	get := "GET /openapi.json HTTP/1.1\r\nHost: " + host + "\r\n\r\n"
	const header, body, request, idle = 5 * time.Second, 10 * time.Second, 15 * time.Second, 60 * time.Second
	// late is granted to a machine that is busy; a client without a deadline
	// would stay for ever, or for the next longer one.
	const late = 25 * time.Second
	rows := []struct {
		name, begin, drip string
		status            int // 0: closed without an answer
		limit             time.Duration
	}{
		{"nothing at all", "", "", 0, header},
		{"half a header", "GET /health/live HTTP/1.1\r\nHost: a\r\nX-Slow: ", "", 0, header},
		{"a header, byte by byte", "GET /health/live HTTP/1.1\r\nHost: a\r\nX-Slow: ", "x", 0, header},
		{"no body", post + "Content-Length: 28\r\n\r\n", "", 408, body},
		{"a body, byte by byte", post + "Content-Length: 2800\r\n\r\n", " ", 408, body},
		{"chunks, byte by byte", post + "Transfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n", 408, body},
	}
	undisturbed(t, s, func() {
		var all sync.WaitGroup
		for _, row := range rows {
			all.Go(func() {
				conn, err := net.Dial("tcp", host)
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				begun := time.Now()
				done := make(chan struct{})
				defer close(done)
				io.WriteString(conn, row.begin)
				go func() {
					for row.drip != "" {
						select {
						case <-done:
							return
						case <-time.After(500 * time.Millisecond):
							io.WriteString(conn, row.drip)
						}
					}
				}()
				conn.SetReadDeadline(begun.Add(row.limit + late))
				resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
				took := time.Since(begun)
				var timeout net.Error
				switch {
				case errors.As(err, &timeout) && timeout.Timeout():
					t.Errorf("%s: still open after %v, want it closed after %v", row.name, took, row.limit)
				case took < row.limit-time.Second:
					t.Errorf("%s: closed after %v, want it left %v", row.name, took, row.limit)
				case err == nil && resp.StatusCode != row.status, err != nil && row.status != 0:
					t.Errorf("%s: got answer %v, %v, want %d", row.name, resp, err, row.status)
				}
				if err == nil {
					body, _ := io.ReadAll(resp.Body)
					resp.Body.Close()
					a := answer{resp.StatusCode, resp.Header, body}
					for _, wrong := range append(wrongHeaders("POST", refreshPath, a), wrongProblem("POST", a)...) {
						t.Errorf("%s: %s", row.name, wrong)
					}
				}
			})
		}
		all.Wait()
	})

	// kind opens n connections, says the same on each, and never reads.
	type kind struct {
		name, begin string
		n           int
		limit       time.Duration
	}
	open := func(k kind) (conns []net.Conn) {
		for range k.n {
			conn, err := dialNarrow(host)
			if err != nil {
				t.Fatalf("%s: connection %d: %v", k.name, len(conns)+1, err)
			}
			conns = append(conns, conn)
			conn.SetWriteDeadline(time.Now().Add(idle))
			go io.WriteString(conn, k.begin)
		}
		return conns
	}
	undisturbed(t, s, func() {
		before := s.holdings()
		var kept []net.Conn
		defer func() {
			for _, conn := range kept {
				conn.Close()
			}
		}()
		begun := time.Now()
		longest := time.Duration(0)
		for _, k := range []kind{
			{"nothing at all", "", 1000, header},
			{"half a header", "POST " + loginPath + " HTTP/1.1\r\n", 1500, header},
			{"most of a body of 64 KiB", post + "Content-Length: 65536\r\n\r\n" + strings.Repeat(" ", 60<<10), 1500, body},
			{"who reads nothing", strings.Repeat(get, 200), 500, request},
		} {
			kept = append(kept, open(k)...)
			longest = max(longest, k.limit)
		}
		silent := open(kind{"kept alive", "GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n", 500, idle})
		kept = append(kept, silent...)
		held := s.holdings().files - before.files
		s.login(s.register()) // beside all of them
		t.Logf("%d connections opened in %v, of which the service had %v then", len(kept), time.Since(begun).Round(time.Millisecond), held)
		if held < 2000 {
			t.Errorf("connections that the service held: got %v, want thousands", held)
		}
		var left float64
		eventually(t, "only those are left that had an answer and are idle", longest+late, func() bool {
			left = s.holdings().files - before.files
			return left <= float64(len(silent))+20
		})
		t.Logf("%v connections are left after %v", left, time.Since(begun).Round(time.Second))
		if time.Since(begun) < idle-5*time.Second && left < float64(len(silent))-20 {
			t.Errorf("idle connections: got %v left, want the %d that may stay %v", left, len(silent), idle)
		}
		for _, conn := range silent { // closed by the service, not by this test
			conn.SetReadDeadline(begun.Add(idle + 2*late))
			if _, err := io.Copy(io.Discard, conn); err != nil {
				t.Errorf("an idle connection was not closed after %v: %v", idle, err)
				break
			}
		}
	})
	if _, peak := s.rss(); peak > peakRSS {
		t.Errorf("peak RSS: got %.1f MiB, want at most %d", float64(peak)/mib, peakRSS/mib)
	}
}

// refusal sends a request that the service may refuse before it has read all of
// it; then the answer may be lost with the connection, and is asked for again.
func refusal(t *testing.T, s *service, method, path string, body []byte, headers ...string) (a answer) {
	t.Helper()
	var err error
	for range 5 {
		if a, err = s.try(method, path, body, headers...); err == nil {
			return a
		}
	}
	t.Fatalf("%s %s: %v", method, path, err)
	return a
}

// TestHugeBearer: a token of any length is refused before any work: a megabyte
// of dots by the bound of headers, what fits into a header or a body by the
// bound of tokens.
func TestHugeBearer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	port := freePort(t)
	s := w.startPlain(cheap, unlimited)
	guarded := w.startPlain(cheap, unlimited, env{"REGISTER_TOKEN": strings.Repeat("r", 32), "ADMIN_ADDR": "127.0.0.1:" + port, "ADMIN_TOKEN": adminToken})
	admin := &service{t: t, base: "http://127.0.0.1:" + port, client: guarded.client}
	p := newPerson()
	change := toJSON(map[string]string{"current_password": password, "new_password": "another horse, another battery"})
	places := []struct {
		s            *service
		method, path string
		body         []byte
		code         string
	}{
		{s, "GET", sessionsPath, nil, "invalid_token"},
		{s, "DELETE", sessionsPath + "/" + newUUID(), nil, "invalid_token"},
		{s, "POST", logoutAllPath, nil, "invalid_token"},
		{s, "POST", passwordPath, change, "invalid_token"},
		{guarded, "POST", registerPath, toJSON(p), "unauthorized"},
		{admin, "GET", adminPath(p, ""), nil, "unauthorized"},
		{admin, "POST", adminPath(p, "disable"), nil, "unauthorized"},
		{admin, "POST", "/api/admin/introspect", []byte("token=x"), "unauthorized"},
	}
	undisturbed(t, s, func() {
		for _, place := range places {
			for _, row := range []struct {
				name, token string
				status      int
			}{
				{"1 MiB of dots", strings.Repeat(".", mib), 431},
				{"1 MiB of letters", strings.Repeat("a", mib), 431},
				{"12,000 dots", strings.Repeat(".", 12_000), 401},
				{"12,000 letters in three parts", strings.Repeat("a", 4000) + "." + strings.Repeat("a", 4000) + "." + strings.Repeat("a", 4000), 401},
			} {
				a := refusal(t, place.s, place.method, place.path, place.body, bearer(row.token)...)
				if a.status != row.status || row.status == 401 && a.code() != place.code {
					t.Errorf("%s to %s %s: got %d %q, want %d %s", row.name, place.method, place.path, a.status, a.code(), row.status, place.code)
				}
			}
		}
		// In bodies, of which 64 KiB are read.
		dots := strings.Repeat(".", 60_000)
		wantCode(t, "refresh", s.refresh(dots), 401, "invalid_refresh_token")
		wantCode(t, "refresh, with the prefix", s.refresh("iar_"+dots), 401, "invalid_refresh_token")
		wantCode(t, "logout", s.logout(dots), 401, "invalid_refresh_token")
		wantCode(t, "reset", s.reset(dots, "another horse, another battery"), 400, "invalid_reset_token")
		form := []string{"Authorization", "Bearer " + adminToken, "Content-Type", "application/x-www-form-urlencoded"}
		wantBody(t, "introspect", admin.do("POST", "/api/admin/introspect", []byte("token="+dots), form...), 200, map[string]any{"active": false})
		for path, member := range map[string]string{refreshPath: "refresh_token", resetPath: "token"} {
			a := refusal(t, s, "POST", path, toJSON(map[string]string{member: strings.Repeat(".", mib), "new_password": password}))
			wantCode(t, "1 MiB to "+path, a, 413, "body_too_large")
		}

		// Before any work: a split at 12,000 dots would make 200 kB of pieces.
		const requests = 300
		allocated := s.growth("go_memstats_alloc_bytes_total")
		for range requests {
			if a := s.get(sessionsPath, bearer(strings.Repeat(".", 12_000))...); a.status != 401 {
				t.Fatalf("12,000 dots: got %d, want 401", a.status)
			}
		}
		each := allocated() / requests / 1024
		t.Logf("12,000 dots cost %.1f KiB a request", each)
		if each > 128 {
			t.Errorf("12,000 dots cost %.1f KiB a request, want about the header's size", each)
		}
	})
}

// TestHostileJSON: the body is bounded before it is read and parsed in one
// pass: whatever it holds it is refused, and costs no more than its size.
func TestHostileJSON(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	port := freePort(t)
	s := w.startPlain(cheap, unlimited)
	operated := w.startPlain(cheap, unlimited, env{"ADMIN_ADDR": "127.0.0.1:" + port, "ADMIN_TOKEN": adminToken})
	admin := &service{t: t, base: "http://127.0.0.1:" + port, client: operated.client}
	const limit = 64 << 10
	p := s.register()
	tok := s.login(p)
	type target struct {
		s      *service
		path   string
		member string
		auth   []string
	}
	targets := []target{
		{s, registerPath, "password", nil},
		{s, loginPath, "email", nil},
		{s, refreshPath, "refresh_token", nil},
		{s, "/api/auth/logout", "refresh_token", nil},
		{s, forgotPath, "email", nil},
		{s, resetPath, "token", nil},
		{s, passwordPath, "new_password", bearer(tok.AccessToken)},
		{s, logoutAllPath, "x", bearer(tok.AccessToken)},
		{admin, adminPath(p, "set-email"), "email", bearer(adminToken)},
		{admin, adminPath(p, "set-claims"), "claims", bearer(adminToken)},
	}
	// filled repeats a piece until the body has just the limit.
	filled := func(before, piece, after string) string {
		return before + strings.Repeat(piece, (limit-len(before)-len(after))/len(piece)) + after
	}
	nested := func(before, open, inner, closing, after string) string {
		n := (limit - len(before) - len(inner) - len(after)) / (len(open) + len(closing))
		return before + strings.Repeat(open, n) + inner + strings.Repeat(closing, n) + after
	}
	attack := func() {
		bodies, sent := 0, 0
		for _, target := range targets {
			for name, body := range map[string]string{
				"brackets":                      filled("", "[", ""),
				"braces":                        filled("", "{", ""),
				"objects without end":           filled("", `{"`+target.member+`":`, ""),
				"closed arrays":                 nested("", "[", "", "]", ""),
				"closed objects":                nested("", `{"a":`, "0", "}", ""),
				"a member of arrays":            nested(`{"`+target.member+`":`, "[", "0", "]", "}"),
				"a member of objects":           nested(`{"`+target.member+`":`, `{"`+target.member+`":`, "0", "}", "}"),
				"a member of both":              nested(`{"`+target.member+`":`, `[{"a":`, "0", "}]", "}"),
				"an unknown member of arrays":   nested(`{"zz":`, "[", "", "]", "}"),
				"one member thousands of times": filled(`{"`+target.member+`":0`, `,"`+target.member+`":0`, "}"),
				"a number of 64 KiB":            filled(`{"`+target.member+`":`, "9", "}"),
				"a fraction of 64 KiB":          filled(`{"`+target.member+`":0.`, "1", "}"),
				"an exponent of 64 KiB":         filled(`{"`+target.member+`":1e`, "9", "}"),
				"a name of 64 KiB":              filled(`{"`, "n", `":0}`),
				"escapes":                       filled(`{"`+target.member+`":"`, `\u0000`, ""),
				"an escape without end":         filled(`{"`+target.member+`":"`, `\`, ""),
				"commas":                        filled(`{`, ",", "}"),
				"colons":                        filled(`{"`+target.member+`"`, ":", "}"),
				"quotes":                        filled("", `"`, ""),
				"spaces only":                   filled("", " ", ""),
				"objects one behind the other":  filled("", "{}", ""),
				"NUL":                           filled("", "\x00", ""),
				"bytes of no letter":            filled("", "\xff", ""),
				"a byte order mark":             "\ufeff{}",
				"comments":                      filled("/*", "*", "*/{}"),
				"not a number":                  `{"` + target.member + `":NaN}`,
				"a comma at the end":            `{"` + target.member + `":"x",}`,
			} {
				if len(body) > limit {
					t.Fatalf("%s: %d bytes", name, len(body))
				}
				a := target.s.do("POST", target.path, []byte(body), target.auth...)
				if bodies, sent = bodies+1, sent+len(body); a.status != 400 || a.code() != "invalid_request" {
					t.Errorf("%s to %s: got %d %.200s, want 400 invalid_request", name, target.path, a.status, a.body)
				}
				if len(a.body) > 8<<10 {
					t.Errorf("%s to %s: an answer of %d bytes, want at most 8 KiB", name, target.path, len(a.body))
				}
			}
			a := refusal(t, target.s, "POST", target.path, []byte(strings.Repeat("[", limit+1)), target.auth...)
			wantCode(t, fmt.Sprintf("%d brackets to %s", limit+1, target.path), a, 413, "body_too_large")
		}
		t.Logf("%d bodies, %d KiB", bodies, sent>>10)
	}
	undisturbed(t, s, attack)
	wantLives(t, "the account that was attacked", tok, s)
}
