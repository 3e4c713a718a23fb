package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// pipelined sends n requests over a few connections without waiting for their
// answers, and counts these by status.
func pipelined(t *testing.T, s *service, n int, request func(i int) string) map[int]int {
	t.Helper()
	const connections = 4
	statuses := map[int]int{}
	var mu sync.Mutex
	var all sync.WaitGroup
	for c := range connections {
		all.Go(func() {
			lost := 0
			for i := c; i < n; {
				answered, err := pipe(s, i, n, connections, request)
				mu.Lock()
				for _, status := range answered {
					statuses[status]++
				}
				mu.Unlock()
				i += connections * len(answered)
				// A machine too busy to finish a request in time loses the
				// connection; then the rest goes over another one.
				if lost++; err != nil && lost > 20 {
					t.Errorf("request %d: %v", i, err)
					return
				}
			}
		})
	}
	all.Wait()
	return statuses
}

// pipe sends the requests first, first+step and so on over one connection, and
// returns the answers that came.
func pipe(s *service, first, n, step int, request func(i int) string) (answered []int, err error) {
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	go func() {
		out := bufio.NewWriterSize(conn, 1<<20)
		for i := first; i < n; i += step {
			if _, err := io.WriteString(out, request(i)); err != nil {
				return
			}
		}
		out.Flush()
	}()
	in := bufio.NewReader(conn)
	for i := first; i < n; i += step {
		conn.SetReadDeadline(time.Now().Add(time.Minute))
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			return answered, err
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		answered = append(answered, resp.StatusCode)
	}
	return answered, nil
}

// badRefresh is the cheapest request that counts for the limit by address: it
// is refused without a query.
func badRefresh(headers string) string {
	const body = `{"refresh_token":"iar_none"}`
	return "POST " + refreshPath + " HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n" + headers +
		fmt.Sprintf("Content-Length: %d\r\n\r\n", len(body)) + body
}

// clean fails if a text that was logged could mislead who reads it.
func clean(t *testing.T, what, text string) {
	t.Helper()
	if len(text) > 256 || !utf8.ValidString(text) {
		t.Errorf("%s: got a text of %d bytes, want at most 256 bytes of UTF-8", what, len(text))
	}
	for _, r := range text {
		if unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Zl, unicode.Zp) {
			t.Errorf("%s: got %q with %U in it", what, text, r)
		}
	}
}

// TestLogInjection: one request is one line, whatever the client calls itself
// and wherever it says so; what cannot be printed is not, and no answer gets a
// header that the client has made.
func TestLogInjection(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := held(t, w.start(cheap, unlimited, env{"CORS_ORIGINS": "https://app.example.com"}))
	behind := held(t, w.start(cheap, unlimited, env{"TRUSTED_PROXIES": "127.0.0.1"}))
	t.Run("the name of the client", func(t *testing.T) {
		for _, row := range []struct{ name, agent, want string }{ // want "": only the rules of clean
			{"plain", "curl/8.5.0", "curl/8.5.0"},
			{"letters beyond ASCII", "Größe 日本 🐎", "Größe 日本 🐎"},
			{"quotes and a brace", `x","level":"ERROR","event":"forged","y":"`, `x","level":"ERROR","event":"forged","y":"`},
			{"escapes", `x\n{"event":"forged"}\u000a`, `x\n{"event":"forged"}\u000a`},
			{"NEL", "x\u0085{\"event\":\"forged\"}", ""},
			{"line separator", "x\u2028{\"event\":\"forged\"}", ""},
			{"paragraph separator", "x\u2029{\"event\":\"forged\"}", ""},
			{"right-to-left override", "x\u202eresu_nimda", ""},
			{"isolates", "x\u2066y\u2069", ""},
			{"zero width", "ad\u200bmin", ""},
			{"a tab", "x\ty", ""},
			{"invalid UTF-8", "x\xff\xfe\xc0\xaf", ""},
			{"invalid UTF-8 of 8 KiB", strings.Repeat("\xff", 8<<10), ""},
			{"continuation bytes of 8 KiB", strings.Repeat("\x80", 8<<10), ""},
			{"256 bytes", strings.Repeat("x", 256), strings.Repeat("x", 256)},
			{"257 bytes", strings.Repeat("x", 257), strings.Repeat("x", 256)},
			{"8 KiB", strings.Repeat("x", 8<<10), strings.Repeat("x", 256)},
			{"8 KiB of 2 bytes each, the cut between them", "x" + strings.Repeat("ö", 4<<10), "x" + strings.Repeat("ö", 127)},
			{"8 KiB of 4 bytes each, the cut between them", "xy" + strings.Repeat("🐎", 2<<10), "xy" + strings.Repeat("🐎", 63)},
		} {
			trace := newUUID()
			s.do("POST", refreshPath, []byte(`{"refresh_token":"none"}`), "User-Agent", row.agent, "X-Trace-Id", trace)
			got, _ := lineOf(t, s, "auth.refresh", trace)["user_agent"].(string)
			if row.want != "" && got != row.want {
				t.Errorf("%s: got user_agent %q, want %q", row.name, got, row.want)
			}
			clean(t, row.name, got)
			if n := s.linesWith(trace); n != 1 {
				t.Errorf("%s: got %d lines, want 1", row.name, n)
			}
		}
	})

	// What ends a line somewhere, or makes one look as it is not.
	texts := map[string]string{
		"CR LF": "\r\n", "LF": "\n", "CR": "\r", "NUL": "\x00", "escape": "\x1b[2J", "NEL": "\u0085", "LS": "\u2028", "PS": "\u2029", "override": "\u202e",
		"invalid UTF-8": "\xff", "CR LF in percent": "%0d%0a", "LF in a wider letter": "\u560a", "quotes": `","x":"`,
	}
	const forged = `{"time":"2026-01-01T00:00:00Z","level":"ERROR","event":"forged.line"}`
	t.Run("every place of a request", func(t *testing.T) {
		for _, s := range []*service{s, behind} {
			var traces []string
			for name, text := range texts {
				// In JSON, as bytes where these are allowed and escaped where not.
				id, escaped := newUUID(), strings.Trim(string(toJSON("x"+strings.ToValidUTF8(text, "")+forged)), `"`)
				for _, body := range []string{
					`{"tenant_id":"` + id + `","email":"` + escaped + `@example.com","password":"` + escaped + `"}`,
					`{"tenant_id":"` + escaped + `","email":"a@example.com","password":"x"}`,
					`{"` + escaped + `":1}`,
					"x" + text + forged,
				} {
					trace := newUUID()
					s.do("POST", loginPath, []byte(body), "X-Trace-Id", trace)
					traces = append(traces, trace)
				}
				// In each header, by the bytes: an answer comes, and it has no header of the client's.
				for _, header := range []string{"User-Agent", "X-Forwarded-For", "X-Trace-Id", "traceparent", "tracestate", "Referer", "Origin", "Authorization", "Host", "Content-Type", "Cookie", "X-Real-IP", "Forwarded"} {
					value := "x" + text + "X-Injected: yes" + text + text + forged
					request := "POST " + refreshPath + " HTTP/1.1\r\nConnection: close\r\n"
					if header != "Host" {
						request += "Host: a\r\n"
					}
					a := raw(t, s, request+header+": "+value+"\r\nContent-Length: 2\r\n\r\n{}")
					if a.header.Get("X-Injected") != "" || strings.Contains(fmt.Sprint(a.header), "forged") {
						t.Errorf("%s in %s: the answer has a header of the client's: %v", name, header, a.header)
					}
				}
				// In the path, the query and the method.
				escapedText := strings.NewReplacer("%", "%25", "\r", "%0d", "\n", "%0a", "\x00", "%00", "\x1b", "%1b", "\u0085", "%c2%85", "\u2028", "%e2%80%a8", "\xff", "%ff", `"`, "%22").Replace(text)
				for _, line := range []string{"GET /x" + escapedText + "X-Injected:%20yes", "GET /health/live?x" + escapedText + "X-Injected:%20yes", "POST " + loginPath + escapedText} {
					a := raw(t, s, line+" HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
					if a.header.Get("X-Injected") != "" || a.status >= 500 {
						t.Errorf("%s in %q: got %d %v", name, line, a.status, a.header)
					}
				}
			}
			for _, trace := range traces {
				eventually(t, "one line for a request", 10*time.Second, func() bool { return s.linesWith(trace) >= 1 })
				if n := s.linesWith(trace); n != 1 {
					t.Errorf("a login of hostile text: got %d lines, want 1", n)
				}
			}
		}
	})
	for _, s := range []*service{s, behind} {
		if got := s.logged("forged.line"); len(got) != 0 {
			t.Errorf("got %d forged lines", len(got))
		}
		for _, line := range s.tail(1 << 30) { // that each is one JSON object of our form held looks after
			clean(t, "a line", strings.Map(func(r rune) rune {
				if r < 0x80 && !unicode.IsControl(r) {
					return -1
				}
				return r
			}, line))
		}
	}
	t.Run("what is kept", func(t *testing.T) {
		// The session keeps the name it was given in the same form, and so do
		// the list of sessions and the event.
		p := s.register()
		tok := s.do("POST", loginPath, p.loginBody(password), "User-Agent", "x\u202e\u2028\u0085\xff"+strings.Repeat("y", 4<<10)).tokens(t)
		clean(t, "user_agent of the row", dbtest.Value[string](t, w.db, `SELECT user_agent FROM sessions WHERE user_id = $1`, p.UserID))
		listed, _ := s.sessions(tok)[0]["user_agent"].(string)
		clean(t, "user_agent of the list", listed)
		told, _ := wantEvents(t, w, p, "auth.user.registered", "auth.user.logged_in")[1].Data["user_agent"].(string)
		clean(t, "user_agent of the event", told)
		wantCode(t, "refresh", s.refresh(tok.RefreshToken), 200, "")
	})
}

// TestForgedForwardedFor: the client is who the last trusted proxy says, and
// nobody gets another limit, or another name in the log, by a header of their
// own.
func TestForgedForwardedFor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	t.Run("the name in the log", func(t *testing.T) {
		behind := held(t, w.start(cheap, unlimited, env{"TRUSTED_PROXIES": "127.0.0.1,10.0.0.0/8"}))
		direct := held(t, w.start(cheap, unlimited))
		for _, row := range []struct {
			name      string
			s         *service
			forwarded string
			want      string
		}{
			{"no header", behind, "", "127.0.0.1"},
			{"one entry", behind, "198.51.100.1", "198.51.100.1"},
			{"IPv6", behind, "2001:DB8::1", "2001:db8::1"},
			{"a chain of proxies", behind, "198.51.100.1,10.0.0.1, 10.255.0.1", "198.51.100.1"},
			{"the rightmost that is no proxy", behind, "203.0.113.1, 198.51.100.1", "198.51.100.1"},
			{"proxies only", behind, "10.0.0.2, 10.0.0.1", "10.0.0.2"},
			{"garbage", behind, "unknown", "127.0.0.1"},
			{"garbage behind a proxy", behind, "<script>, 10.0.0.1", "10.0.0.1"},
			{"an address with a port", behind, "198.51.100.1:4711", "198.51.100.1"},
			{"a peer that is not trusted", direct, "198.51.100.1", "127.0.0.1"},
			{"a peer that is not trusted, again", direct, "198.51.100.2", "127.0.0.1"},
		} {
			trace := newUUID()
			row.s.do("POST", refreshPath, []byte(`{"refresh_token":"none"}`), "X-Forwarded-For", row.forwarded, "X-Trace-Id", trace)
			if got := lineOf(t, row.s, "auth.refresh", trace)["client_ip"]; got != row.want {
				t.Errorf("%s: got client_ip %v, want %s", row.name, got, row.want)
			}
		}
		if got := len(direct.logged("config.untrusted_proxy")); got != 1 {
			t.Errorf("config.untrusted_proxy lines: got %d, want 1", got)
		}
		if got := len(behind.logged("config.untrusted_proxy")); got != 0 {
			t.Errorf("config.untrusted_proxy lines with the proxy trusted: got %d, want 0", got)
		}
	})

	// An attacker who says each time to be someone else has one address's
	// limit: the burst, and what a second gives.
	const requests, burst, perSecond = 5000, 50, 1
	for _, row := range []struct {
		name, proxies string
		forge         func(i int) string
		want          string // client_ip
	}{
		{"directly", "", func(i int) string { return fmt.Sprintf("X-Forwarded-For: 198.51.%d.%d\r\n", i>>8, i&255) }, "127.0.0.1"},
		{"directly, as if it were the proxy", "10.0.0.0/8", func(i int) string { return fmt.Sprintf("X-Forwarded-For: 198.51.%d.%d, 10.0.0.1\r\n", i>>8, i&255) }, "127.0.0.1"},
		{"directly, by other names of the header", "", func(i int) string {
			var all string
			for _, name := range []string{"X-Real-IP", "X-Client-IP", "True-Client-IP", "CF-Connecting-IP", "Fastly-Client-IP", "X-Cluster-Client-IP", "X-Originating-IP", "X_Forwarded_For"} {
				all += fmt.Sprintf("%s: 198.51.%d.%d\r\n", name, i>>8, i&255)
			}
			return all + fmt.Sprintf("Forwarded: for=198.51.%d.%d\r\n", i>>8, i&255)
		}, "127.0.0.1"},
		{"through the proxy, which adds the real one", "127.0.0.1", func(i int) string {
			return fmt.Sprintf("X-Forwarded-For: 203.0.%d.%d, 198.51.100.1\r\n", i>>8, i&255)
		}, "198.51.100.1"},
		{"through the proxy, which adds a header of its own", "127.0.0.1", func(i int) string {
			return fmt.Sprintf("X-Forwarded-For: 203.0.%d.%d, 127.0.0.1\r\nX-Forwarded-For: 198.51.100.2\r\n", i>>8, i&255)
		}, "198.51.100.2"},
		{"through the proxy, with garbage", "127.0.0.1", func(i int) string {
			return fmt.Sprintf("X-Forwarded-For: %d\"; DROP TABLE accounts, 198.51.100.3\r\n", i)
		}, "198.51.100.3"},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := w.startPlain(cheap, unlimited, env{"TRUSTED_PROXIES": row.proxies, "IP_RATE_PER_SECOND": fmt.Sprint(perSecond), "IP_RATE_BURST": fmt.Sprint(burst)})
			undisturbed(t, s, func() {
				begun := time.Now()
				answers := pipelined(t, s, requests, func(i int) string { return badRefresh(row.forge(i)) })
				limited := time.Since(begun)
				if got, most := answers[401], burst+1+int(limited.Seconds()*perSecond); got < burst || got > most || answers[401]+answers[429] != requests {
					t.Errorf("got answers %v, want the burst of %d, at most %d let in, and the others 429", answers, burst, most)
				}
			})
			var seen []string
			for _, line := range s.logged("auth.refresh") {
				if ip := fmt.Sprint(line["client_ip"]); line["result"] != "success" && !slices.Contains(seen, ip) {
					seen = append(seen, ip)
				}
			}
			if !slices.Equal(seen, []string{row.want}) {
				t.Errorf("client_ip of the attacker: got %q, want %s only", seen, row.want)
			}
			s.stop()
		})
	}
}

// TestIPv6Rotation: who owns a /64 has one address's limit, however many of its
// addresses are used; who owns many has so many limits, but costs no more memory
// than a bound, and does not wash away the limit that another has spent.
func TestIPv6Rotation(t *testing.T) {
	t.Parallel()
	const burst, perSecond = 1000, 1
	w := newWorld(t)
	s := w.startPlain(cheap, unlimited, env{"TRUSTED_PROXIES": "127.0.0.1", "IP_RATE_PER_SECOND": fmt.Sprint(perSecond), "IP_RATE_BURST": fmt.Sprint(burst)})
	address := func(network, host uint64) string {
		var b [16]byte
		b[0], b[1], b[2], b[3] = 0x20, 0x01, 0x0d, 0xb8
		for i := range 4 {
			b[7-i] = byte(network >> (8 * i))
		}
		for i := range 8 {
			b[15-i] = byte(host >> (8 * i))
		}
		return netip.AddrFrom16(b).String()
	}
	from := func(addr string) string { return badRefresh("X-Forwarded-For: " + addr + "\r\n") }
	undisturbed(t, s, func() {
		const inOne = 10_000
		begun := time.Now()
		answers := pipelined(t, s, inOne, func(i int) string { return from(address(1, uint64(i)*0x9e3779b97f4a7c15)) })
		if got, most := answers[401], burst+1+int(time.Since(begun).Seconds()*perSecond); got < burst || got > most || answers[401]+answers[429] != inOne {
			t.Errorf("%d addresses of one /64: got %v, want the burst of %d, at most %d let in, and the others 429", inOne, answers, burst, most)
		}

		const networks = 80_000 // more than the 65,536 that are remembered
		answers = pipelined(t, s, networks, func(i int) string { return from(address(uint64(i)+2, 1)) })
		if answers[401] != networks {
			t.Errorf("%d networks, one request each: got %v, want each let in", networks, answers)
		}
		spent := int(time.Since(begun).Seconds() * perSecond)
		answers = pipelined(t, s, burst, func(i int) string { return from(address(1, uint64(i))) })
		if most := spent + 10; answers[401] > most {
			t.Errorf("the first network after the flood of others: got %v, want at most the %d that time has given back", answers, most)
		}
	})
}
