package jwt

import (
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	fetchTimeout  = 10 * time.Second // for a whole fetch of the JWKS
	pause         = time.Minute      // between fetches for unknown kids, after a failed fetch, and the least max-age
	firstPause    = time.Second      // after a failed fetch, while there is no set yet
	defaultMaxAge = 5 * time.Minute  // of a response that says nothing
	longestMaxAge = time.Hour        // a withdrawn key is gone by then, whatever the response said
)

// RemoteKeySet is the key set behind a JWKS URL. It implements Keys and is safe
// for concurrent use.
//
// The set is fetched when it is first needed, and again by the first request
// after its max-age; that request does not wait. A fetch that fails, or whose
// answer has no usable key, changes nothing: known keys are served as long as
// the process lives, since an outage of the issuer must not become one of its
// resource servers. So a key is withdrawn for certain only from a server that
// reaches the URL.
type RemoteKeySet struct {
	url    string
	client *http.Client

	// mu guards the fields below. It is not held while fetching.
	mu        sync.Mutex
	keys      *KeySet       // nil until the first fetch that succeeds
	err       error         // of the last fetch
	refreshAt time.Time     // no fetch before, but for an unknown kid
	unknownAt time.Time     // no fetch for an unknown kid before
	running   chan struct{} // closed when the fetch under way is over; nil: none is
}

// NewRemoteKeySet returns the set behind rawURL, which is https, or http on the
// loopback interface. It does not fetch yet. A nil client stands for one that
// suits; redirects are refused whatever another one's policy is.
func NewRemoteKeySet(rawURL string, client *http.Client) (*RemoteKeySet, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Hostname() == "" || u.User != nil {
		return nil, errors.New("jwt: JWKS URL: not a URL without credentials")
	}
	// Who can answer in the issuer's place can sign in its place.
	if u.Scheme != "https" && (u.Scheme != "http" || !isLoopback(u.Hostname())) {
		return nil, errors.New("jwt: JWKS URL: neither https nor http on loopback")
	}
	c := http.Client{Transport: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		MaxResponseHeaderBytes: 64 << 10,
		ForceAttemptHTTP2:      true,
		DisableCompression:     true, // 1 MiB received is 1 MiB parsed
		IdleConnTimeout:        30 * time.Second,
	}}
	if client != nil {
		c = *client
	}
	// A redirect could lead to plain http, or to anyone.
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &RemoteKeySet{url: u.String(), client: &c}, nil
}

func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback() || host == "localhost"
}

// Key returns the key that kid names. A known key never waits. For an unknown
// one the set is fetched, at most once a minute however many tokens name one,
// so that nobody can turn invented kids into load on the issuer. When ctx ends
// the caller stops waiting; the fetch goes on for those who still do.
func (r *RemoteKeySet) Key(ctx context.Context, kid string) (*rsa.PublicKey, error) {
	r.mu.Lock()
	now := time.Now()
	key, err, running := r.keys.find(kid), r.err, r.running
	switch {
	case running != nil: // one at a time
	case !now.Before(r.refreshAt):
		running = r.start()
	case key == nil && r.keys != nil && !now.Before(r.unknownAt):
		r.unknownAt = now.Add(pause)
		running = r.start()
	}
	r.mu.Unlock()

	if key == nil && running != nil {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", ErrUnavailable, ctx.Err())
		case <-running:
		}
		r.mu.Lock()
		key, err = r.keys.find(kid), r.err
		r.mu.Unlock()
	}
	switch {
	case key != nil:
		return key, nil
	case err != nil: // the key may well exist: an outage is no verdict on a token
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	default:
		return nil, errUnknownKey
	}
}

// start starts a fetch; r.mu is held. Its goroutine ends by itself, after
// fetchTimeout at the latest.
func (r *RemoteKeySet) start() chan struct{} {
	done := make(chan struct{})
	r.running = done
	go func() {
		keys, wait, err := r.fetch()
		r.mu.Lock()
		defer r.mu.Unlock()
		switch {
		case err == nil:
			r.keys = keys
		case r.keys != nil:
			wait = pause
		default:
			wait = firstPause
		}
		r.err = err
		r.refreshAt = time.Now().Add(wait)
		r.running = nil
		close(done)
	}()
	return done
}

// fetch gets the document and how long it may be used. It runs on a context of
// its own: all who wait share the result.
func (r *RemoteKeySet) fetch() (*KeySet, time.Duration, error) {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url, nil)
	if err != nil { // unreachable: NewRemoteKeySet has parsed the URL
		return nil, 0, err
	}
	req.Header.Set("Accept", "application/jwk-set+json, application/json")
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, 0, fmt.Errorf("JWKS: status %d", resp.StatusCode)
	}
	// Read one byte too many, for ParseJWKS to refuse; Content-Length is only
	// a claim. A body that ends before it is an error here.
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxJWKS+1))
	if err != nil {
		return nil, 0, err
	}
	keys, err := ParseJWKS(body)
	return keys, maxAge(resp.Header), err
}

// maxAge is how long a response may be used (RFC 9111 section 5.2.2.1).
func maxAge(h http.Header) time.Duration {
	for directive := range strings.SplitSeq(h.Get("Cache-Control"), ",") {
		value, found := strings.CutPrefix(strings.ToLower(strings.TrimSpace(directive)), "max-age=")
		if seconds, err := strconv.ParseUint(value, 10, 31); found && err == nil {
			return min(max(time.Duration(seconds)*time.Second, pause), longestMaxAge)
		}
	}
	return defaultMaxAge
}

// RevocationList holds the sessions that were revoked while access tokens of
// theirs are still in their time. It is safe for concurrent use, and its size
// follows the number of those sessions, not of all that ever were.
//
// It knows what it was told: before serving, feed it the auth.session.revoked
// events of the last access token lifetime and Leeway, then all that follow.
// The feed is trusted: who can write to it can end sessions, not begin them.
type RevocationList struct {
	mu      sync.Mutex           // guards the fields below
	until   map[string]time.Time // by session: when to forget it
	pruneAt time.Time
}

// NewRevocationList returns an empty list.
func NewRevocationList() *RevocationList {
	return &RevocationList{until: map[string]time.Time{}}
}

// Revoke adds a session whose last access token expires at accessTokensExpireAt.
// It may be told so repeatedly and in any order; the latest time counts.
func (l *RevocationList) Revoke(sessionID string, accessTokensExpireAt time.Time) {
	// One Leeway because verifiers accept a token for so long after it expires,
	// another for a verification that began before that and is still under way.
	until := accessTokensExpireAt.Add(2 * Leeway)
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	l.prune(now)
	if now.Before(until) && until.After(l.until[sessionID]) {
		l.until[sessionID] = until
	}
}

// Revoked tells whether the session was revoked.
func (l *RevocationList) Revoked(sessionID string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.prune(time.Now())
	_, revoked := l.until[sessionID]
	return revoked
}

// prune forgets what is over, once in a Leeway, so that its cost is shared by
// the calls in between; l.mu is held. A new map, since maps do not shrink.
func (l *RevocationList) prune(now time.Time) {
	if now.Before(l.pruneAt) {
		return
	}
	l.pruneAt = now.Add(Leeway)
	live := map[string]time.Time{}
	for session, until := range l.until {
		if now.Before(until) {
			live[session] = until
		}
	}
	l.until = live
}

// HandleEvent takes one event of the stream AUTH_EVENTS. Events of other types
// are ignored. An error means that a revocation could not be read and is not in
// the list: do not acknowledge the event silently.
func (l *RevocationList) HandleEvent(payload []byte) error {
	// Read leniently, unlike tokens: the producer is trusted, and may add members.
	var event struct {
		Type string          `json:"event_type"`
		Data json.RawMessage `json:"data"`
	}
	if json.Unmarshal(payload, &event) != nil || event.Type == "" {
		return errors.New("jwt: not an event")
	}
	if event.Type != "auth.session.revoked" {
		return nil
	}
	var data struct {
		SessionID string    `json:"session_id"`
		ExpireAt  time.Time `json:"access_tokens_expire_at"` // RFC 3339
	}
	if json.Unmarshal(event.Data, &data) != nil || data.SessionID == "" || data.ExpireAt.IsZero() {
		return errors.New("jwt: auth.session.revoked without session_id or access_tokens_expire_at")
	}
	l.Revoke(data.SessionID, data.ExpireAt)
	return nil
}
