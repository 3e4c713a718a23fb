package jwt

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestNewRemoteKeySetRefuses(t *testing.T) {
	for _, url := range []string{
		"", "jwks.json", "/.well-known/jwks.json", "https:", "https://", "https:///jwks.json", "https://:443/",
		"http://issuer.example/jwks.json", "http://10.0.0.1/", "http://127.0.0.1.evil.example/", "http://localhost.evil.example/",
		"http://0.0.0.0/", "http://[::]/", "http://2130706433/", "ftp://127.0.0.1/", "file:///etc/jwks.json", "unix:///run/x",
		"https://user:secret@issuer.example/", "http://user@127.0.0.1/", "http://127.0.0.1@evil.example/", "https://a b/", "\x00",
	} {
		if _, err := NewRemoteKeySet(url, nil); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("NewRemoteKeySet(%q): %v, want an error that does not quote it", url, err)
		}
	}
	for _, url := range []string{
		"https://issuer.example/.well-known/jwks.json", "https://10.0.0.1:8443/", "HTTPS://issuer.example/",
		"http://127.0.0.1:8080/jwks.json", "http://127.1.2.3/", "http://[::1]:80/", "http://localhost:8080/",
	} {
		if _, err := NewRemoteKeySet(url, nil); err != nil {
			t.Errorf("NewRemoteKeySet(%q): %v", url, err)
		}
	}
}

// An answer of a server that is not a good JWKS leaves the set unknown.
func TestRemoteKeySetRefusesAnswers(t *testing.T) {
	body := jwks(goodJWK())
	reached := false
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached = true
		io.WriteString(w, body)
	}))
	defer elsewhere.Close()
	for name, tc := range map[string]struct {
		answer http.HandlerFunc
		want   string // part of the error
	}{
		"redirect": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusFound)
		}, "status 302"},
		"redirect with a good body": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", elsewhere.URL)
			w.WriteHeader(http.StatusPermanentRedirect)
			io.WriteString(w, body)
		}, "status 308"},
		"not found with a good body": {func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusNotFound)
			io.WriteString(w, body)
		}, "status 404"},
		"created": {func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusCreated)
			io.WriteString(w, body)
		}, "status 201"},
		"empty":         {func(w http.ResponseWriter, r *http.Request) {}, "not one JSON object"},
		"HTML":          {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "<html>") }, "not one JSON object"},
		"no usable key": {func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, jwks()) }, "1 to 64 RS256 keys"},
		"1 MiB and a byte": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, body+strings.Repeat(" ", maxJWKS+1-len(body)))
		}, "larger than 1 MiB"},
		"without an end": {func(w http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				io.WriteString(w, strings.Repeat(" ", 1<<16))
			}
		}, "larger than 1 MiB"},
		"Content-Length too large": {func(w http.ResponseWriter, r *http.Request) {
			raw(w, "HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n"+body)
		}, "unexpected EOF"},
		"Content-Length too small": {func(w http.ResponseWriter, r *http.Request) {
			raw(w, "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n"+body)
		}, "not one JSON object"},
		"Content-Length negative": {func(w http.ResponseWriter, r *http.Request) {
			raw(w, "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"+body)
		}, "bad Content-Length"},
		"huge header": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 128<<10))
			io.WriteString(w, body)
		}, "server response headers exceeded"},
		"compressed": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			z := gzip.NewWriter(w)
			io.WriteString(z, body)
			z.Close()
		}, "not one JSON object"},
		"cut off": {func(w http.ResponseWriter, r *http.Request) {
			panic(http.ErrAbortHandler)
		}, "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(tc.answer)
			defer server.Close()
			defer server.CloseClientConnections()
			set, err := NewRemoteKeySet(server.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			key, err := set.Key(t.Context(), "k1")
			if key != nil || !errors.Is(err, ErrUnavailable) || !strings.Contains(fmt.Sprint(err), tc.want) {
				t.Errorf("Key = %v, %v; want ErrUnavailable with %q", key, err, tc.want)
			}
		})
	}
	if reached {
		t.Error("a redirect was followed")
	}
}

func raw(w http.ResponseWriter, response string) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		panic(err)
	}
	io.WriteString(conn, response)
	conn.Close()
}

// jwksHost is the issuer's host in a synctest bubble, without a network.
type jwksHost struct {
	calls  atomic.Int32
	mu     sync.Mutex // guards the fields below
	body   string     // "": away
	header http.Header
	takes  time.Duration
}

func (h *jwksHost) set(body string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.body = body
}

func (h *jwksHost) RoundTrip(r *http.Request) (*http.Response, error) {
	h.calls.Add(1)
	h.mu.Lock()
	body, takes, header := h.body, h.takes, h.header
	h.mu.Unlock()
	if takes > 0 {
		select {
		case <-time.After(takes):
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
	}
	if body == "" {
		return nil, errors.New("connection refused")
	}
	return &http.Response{StatusCode: http.StatusOK, Header: header, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
}

func (h *jwksHost) expectCalls(t *testing.T, want int32) {
	t.Helper()
	synctest.Wait()
	if got := h.calls.Load(); got != want {
		t.Errorf("%d fetches, want %d", got, want)
	}
}

func remoteKeySet(t *testing.T, h *jwksHost) *RemoteKeySet {
	t.Helper()
	set, err := NewRemoteKeySet("https://issuer.example/.well-known/jwks.json", &http.Client{Transport: h})
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// What Key can answer.
const (
	known       = "known"
	unknown     = "unknown kid"
	unavailable = "unavailable"
)

func expectKey(t *testing.T, set *RemoteKeySet, kid, want string) {
	t.Helper()
	key, err := set.Key(t.Context(), kid)
	got := known
	switch {
	case errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrInvalid) && key == nil:
		got = unavailable
	case errors.Is(err, ErrInvalid) && !errors.Is(err, ErrUnavailable) && key == nil:
		got = unknown
	case err != nil || key == nil:
		got = fmt.Sprint(key, err)
	}
	if got != want {
		t.Errorf("Key(%q): %s (%v), want %s", kid, got, err, want)
	}
}

// pass lets time pass in a synctest bubble.
func pass(d time.Duration) { <-time.After(d) }

func TestRemoteKeySetAwayAtFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := &jwksHost{}
		set := remoteKeySet(t, host)
		host.expectCalls(t, 0)
		for range 100 {
			expectKey(t, set, "k1", unavailable)
		}
		host.expectCalls(t, 1)
		host.set(jwks(goodJWK()))
		expectKey(t, set, "k1", unavailable)
		pass(firstPause)
		expectKey(t, set, "k1", known)
		expectKey(t, set, "k1", known)
		host.expectCalls(t, 2)
	})
}

func TestRemoteKeySetSingleFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := &jwksHost{body: jwks(goodJWK()), takes: 3 * time.Second}
		set := remoteKeySet(t, host)
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() { expectKey(t, set, "k1", known) })
			all.Go(func() { expectKey(t, set, "k9", unknown) })
		}
		all.Wait()
		host.expectCalls(t, 1)
	})
}

func TestRemoteKeySetCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := &jwksHost{body: jwks(goodJWK()), takes: 3 * time.Second}
		set := remoteKeySet(t, host)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if _, err := set.Key(ctx, "k1"); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want ErrUnavailable and the deadline", err)
		}
		if waited := time.Since(start); waited != time.Second {
			t.Errorf("waited %v, want 1s", waited)
		}
		expectKey(t, set, "k1", known) // by the fetch of the caller who left
		host.expectCalls(t, 1)
	})
}

func TestRemoteKeySetHangingHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := &jwksHost{body: jwks(goodJWK()), takes: 24 * time.Hour}
		start := time.Now()
		expectKey(t, remoteKeySet(t, host), "k1", unavailable)
		if waited := time.Since(start); waited != fetchTimeout {
			t.Errorf("waited %v, want %v", waited, fetchTimeout)
		}
	})
}

func TestRemoteKeySetRefreshes(t *testing.T) {
	for _, tc := range []struct {
		cacheControl string
		after        time.Duration
	}{
		{"", 5 * time.Minute},
		{"public", 5 * time.Minute},
		{"max-age=x", 5 * time.Minute},
		{"max-age=-1", 5 * time.Minute},
		{"max-age=99999999999999999999", 5 * time.Minute},
		{"public, max-age=300", 5 * time.Minute},
		{"max-age=600, public", 10 * time.Minute},
		{"Public,MAX-AGE=120", 2 * time.Minute},
		{"max-age=0", time.Minute},
		{"max-age=31536000", time.Hour},
	} {
		synctest.Test(t, func(t *testing.T) {
			host := &jwksHost{body: jwks(goodJWK()), header: http.Header{"Cache-Control": {tc.cacheControl}}}
			set := remoteKeySet(t, host)
			expectKey(t, set, "k1", known)
			pass(tc.after - 1)
			expectKey(t, set, "k1", known)
			host.expectCalls(t, 1)
			pass(1)
			expectKey(t, set, "k1", known)
			host.expectCalls(t, 2)
			if t.Failed() {
				t.Logf("with Cache-Control %q", tc.cacheControl)
			}
		})
	}
}

// Nobody waits for the refresh of a key that is known; what it brings counts.
func TestRemoteKeySetRefreshesInTheBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := &jwksHost{body: jwks(goodJWK())}
		set := remoteKeySet(t, host)
		expectKey(t, set, "k1", known)
		host.takes = 5 * time.Second
		host.set(jwks(otherJWK())) // k1 is withdrawn
		pass(defaultMaxAge)
		start := time.Now()
		for range 100 {
			expectKey(t, set, "k1", known)
		}
		if waited := time.Since(start); waited != 0 {
			t.Errorf("a known key waited %v", waited)
		}
		pass(6 * time.Second)
		host.expectCalls(t, 2)
		expectKey(t, set, "k2", known)
		host.expectCalls(t, 2)
		expectKey(t, set, "k1", unknown)
	})
}

func TestRemoteKeySetUnknownKid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := &jwksHost{body: jwks(goodJWK()), header: http.Header{"Cache-Control": {"max-age=3600"}}}
		set := remoteKeySet(t, host)
		expectKey(t, set, "k1", known)
		pass(time.Second)
		host.set(jwks(goodJWK(), otherJWK())) // a new key, much before the next refresh
		expectKey(t, set, "k2", known)
		host.expectCalls(t, 2)
		for i := range 1000 {
			expectKey(t, set, fmt.Sprint("invented-", i), unknown)
			expectKey(t, set, "k1", known)
		}
		host.expectCalls(t, 2)
		pass(time.Minute - 1)
		expectKey(t, set, "invented", unknown)
		host.expectCalls(t, 2)
		pass(1)
		for range 10 {
			expectKey(t, set, "invented", unknown)
		}
		host.expectCalls(t, 3)
	})
}

func TestRemoteKeySetURLAway(t *testing.T) {
	for name, body := range map[string]string{
		"no connection": "", "no JSON": "<html>", "no key": jwks(), "a key for something else": jwks(edit(goodJWK(), `"sig"`, `"enc"`)),
		"too large": strings.Repeat(" ", maxJWKS+1), "a private key": jwks(edit(goodJWK(), `"kid"`, `"d":"AQAB","kid"`)),
	} {
		synctest.Test(t, func(t *testing.T) {
			host := &jwksHost{body: jwks(goodJWK())}
			set := remoteKeySet(t, host)
			expectKey(t, set, "k1", known)
			host.set(body)
			for range 60 {
				pass(time.Minute)
				expectKey(t, set, "k1", known)
				synctest.Wait()
			}
			expectKey(t, set, "k2", unavailable) // it may be new: an outage is no verdict
			pass(1000 * time.Hour)
			expectKey(t, set, "k1", known)
			host.expectCalls(t, 1+56+1+1) // at most one a minute
			host.set(jwks(otherJWK()))
			pass(time.Minute)
			expectKey(t, set, "k2", known)
			expectKey(t, set, "k1", unknown)
			if t.Failed() {
				t.Log("with ", name)
			}
		})
	}
}

func TestRevocationList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, start := NewRevocationList(), time.Now()
		expect := func(session string, want bool) {
			t.Helper()
			if got := l.Revoked(session); got != want {
				t.Errorf("after %v: Revoked(%q) = %v, want %v", time.Since(start), session, got, want)
			}
		}
		expect("s-1", false)
		expect("", false)
		l.Revoke("past", start.Add(-2*Leeway))
		expect("past", false)
		l.Revoke("s-1", start.Add(10*time.Minute))
		l.Revoke("s-1", start.Add(10*time.Minute)) // again
		l.Revoke("s-1", start.Add(time.Minute))    // an older event, late
		l.Revoke("s-2", start.Add(time.Minute))
		l.Revoke("s-2", start.Add(10*time.Minute)) // a newer one
		l.Revoke("s-3", start.Add(time.Minute))
		expect("s-1", true)
		expect("s-2", true)
		expect("s-3", true)
		expect("S-1", false)
		pass(time.Minute + 4*Leeway)
		expect("s-3", false)
		pass(10*time.Minute + Leeway - time.Since(start))
		expect("s-1", true)
		expect("s-2", true)
		pass(3 * Leeway)
		expect("s-1", false)
		expect("s-2", false)
		if len(l.until) != 0 {
			t.Errorf("%d entries are left", len(l.until))
		}
	})
}

// At no time is a revoked session's token accepted, its last moment included.
func TestVerifyRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewRevocationList()
		plain := testVerifier(t)
		v := plain.WithRevocations(l)
		c := testClaims()
		c.SessionID, c.IssuedAt = "s-1", time.Now()
		c.ExpiresAt = c.IssuedAt.Add(time.Minute)
		token, err := testSigner(t).Sign(c)
		if err != nil {
			t.Fatal(err)
		}
		c.SessionID = "s-2"
		other, err := testSigner(t).Sign(c)
		if err != nil {
			t.Fatal(err)
		}
		c.SessionID = ""
		without, err := testSigner(t).Sign(c)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.Verify(t.Context(), token); err != nil {
			t.Fatalf("before: %v", err)
		}
		if _, err := v.Verify(t.Context(), without); !errors.Is(err, ErrInvalid) {
			t.Errorf("a token without a session: %v, want ErrInvalid", err)
		}
		if _, err := plain.Verify(t.Context(), without); err != nil {
			t.Errorf("a token without a session, and no list: %v", err)
		}
		l.Revoke("s-1", c.ExpiresAt)
		for range 3 * 60 {
			if _, err := v.Verify(t.Context(), token); !errors.Is(err, ErrInvalid) {
				t.Errorf("%v after iat: %v, want ErrInvalid", time.Since(c.IssuedAt), err)
			}
			_, err := v.Verify(t.Context(), other)
			if now := time.Now(); (err == nil) != now.Before(c.ExpiresAt.Add(Leeway)) {
				t.Errorf("another session, %v after iat: %v", now.Sub(c.IssuedAt), err)
			}
			pass(time.Second)
		}
	})
}

// The list has the size of what is live, also when it is only asked.
func TestRevocationListForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewRevocationList()
		const perSecond, seconds = 10, 3600
		for i := range seconds {
			for j := range perSecond {
				l.Revoke(fmt.Sprint(i, "-", j), time.Now().Add(time.Minute))
			}
			if n, most := len(l.until), perSecond*int((time.Minute+3*Leeway)/time.Second+1); n > most {
				t.Fatalf("%d entries after %d s, want %d at most", n, i, most)
			}
			pass(time.Second)
		}
		pass(time.Minute + 2*Leeway)
		l.Revoked("x")
		if len(l.until) != 0 {
			t.Errorf("%d entries are left", len(l.until))
		}
	})
}

func TestRevocationListConcurrently(t *testing.T) {
	l := NewRevocationList()
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for j := range 200 {
				session := fmt.Sprint(i, "-", j)
				l.Revoke(session, time.Now().Add(time.Minute))
				if !l.Revoked(session) {
					t.Errorf("%s is not revoked", session)
				}
			}
		})
	}
	all.Wait()
}

func TestHandleEvent(t *testing.T) {
	expire := time.Now().Add(time.Hour).UTC().Format(time.RFC3339Nano)
	event := func(kind, data string) string {
		return `{"event_id":"e","event_type":"` + kind + `","schema_version":"1.0.0","data":` + data + `}`
	}
	const revoked = "auth.session.revoked"
	for name, payload := range map[string]string{
		"empty":         ``,
		"not JSON":      `session`,
		"null":          `null`,
		"array":         `[]`,
		"cut off":       event(revoked, `{"session_id":"s-1","access_tokens_expire_at":"`+expire+`"}`)[:60],
		"no type":       `{"data":{"session_id":"s-1","access_tokens_expire_at":"` + expire + `"}}`,
		"type a number": `{"event_type":1}`,
		"no data":       `{"event_type":"auth.session.revoked"}`,
		"data null":     event(revoked, `null`),
		"data a list":   event(revoked, `[]`),
		"no session":    event(revoked, `{"access_tokens_expire_at":"`+expire+`"}`),
		"session empty": event(revoked, `{"session_id":"","access_tokens_expire_at":"`+expire+`"}`),
		"session null":  event(revoked, `{"session_id":null,"access_tokens_expire_at":"`+expire+`"}`),
		"session list":  event(revoked, `{"session_id":["s-1"],"access_tokens_expire_at":"`+expire+`"}`),
		"no time":       event(revoked, `{"session_id":"s-1"}`),
		"time null":     event(revoked, `{"session_id":"s-1","access_tokens_expire_at":null}`),
		"time a number": event(revoked, `{"session_id":"s-1","access_tokens_expire_at":1800000000}`),
		"time a date":   event(revoked, `{"session_id":"s-1","access_tokens_expire_at":"2100-01-01"}`),
	} {
		l := NewRevocationList()
		if err := l.HandleEvent([]byte(payload)); err == nil || len(l.until) != 0 {
			t.Errorf("%s: error %v, %d entries; want an error and none", name, err, len(l.until))
		}
	}
	for name, tc := range map[string]struct {
		payload string
		revoked bool
	}{
		"another type":         {event("auth.user.logged_out", `{"session_id":"s-1"}`), false},
		"another type, odd":    {event("auth.user.logged_in", `"\ud800"`), false},
		"revoked long ago":     {event(revoked, `{"session_id":"s-1","access_tokens_expire_at":"2001-02-03T04:05:06Z"}`), false},
		"revoked":              {event(revoked, `{"user_id":"u","session_id":"s-1","reason":"logout","access_tokens_expire_at":"`+expire+`"}`), true},
		"in another time zone": {event(revoked, `{"session_id":"s-1","access_tokens_expire_at":"2999-01-01T00:00:00+14:00"}`), true},
	} {
		l := NewRevocationList()
		if err := l.HandleEvent([]byte(tc.payload)); err != nil || l.Revoked("s-1") != tc.revoked {
			t.Errorf("%s: error %v, Revoked = %v, want %v", name, err, l.Revoked("s-1"), tc.revoked)
		}
	}
}
