package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
)

// signing is a key pair under its kid.
type signing struct {
	pair
	kid string
}

// keyFiles is a replica's folder of secrets, as JWT_*_FILE variables.
type keyFiles string

func (f keyFiles) env() env {
	e := env{}
	for _, name := range []string{"JWT_PRIVATE_KEY_PEM", "JWT_PUBLIC_KEY_PEM", "JWT_KID", "JWT_NEXT_PUBLIC_KEY_PEM", "JWT_NEXT_KID", "JWT_PREV_PUBLIC_KEY_PEM", "JWT_PREV_KID"} {
		e[name], e[name+"_FILE"] = "", filepath.Join(string(f), name)
	}
	return e
}

// write replaces the files; an empty one counts as a variable that is not set.
func (f keyFiles) write(t *testing.T, current, next, prev signing) {
	t.Helper()
	for name, text := range map[string]string{
		"JWT_PRIVATE_KEY_PEM": current.private, "JWT_PUBLIC_KEY_PEM": current.public, "JWT_KID": current.kid,
		"JWT_NEXT_PUBLIC_KEY_PEM": next.public, "JWT_NEXT_KID": next.kid,
		"JWT_PREV_PUBLIC_KEY_PEM": prev.public, "JWT_PREV_KID": prev.kid,
	} {
		if err := os.WriteFile(filepath.Join(string(f), name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// reload sends SIGHUP and waits until the service has told what came of it.
func (s *service) reload(event string) {
	s.t.Helper()
	before := len(s.logged(event))
	s.cmd.Process.Signal(syscall.SIGHUP)
	eventually(s.t, event, 10*time.Second, func() bool { return len(s.logged(event)) > before })
}

// fetchKeys reads the key set of a replica and how long it may be kept.
func fetchKeys(s *service) (set jose.JSONWebKeySet, keep time.Duration, err error) {
	a, err := s.try("GET", "/.well-known/jwks.json", nil)
	if err != nil || a.status != 200 {
		return set, 0, fmt.Errorf("JWKS: got %d, %v", a.status, err)
	}
	seconds, ok := strings.CutPrefix(a.header.Get("Cache-Control"), "public, max-age=")
	n, err := strconv.Atoi(seconds)
	if !ok || err != nil {
		return set, 0, fmt.Errorf("JWKS: Cache-Control is %q", a.header.Get("Cache-Control"))
	}
	return set, time.Duration(n) * time.Second, json.Unmarshal(a.body, &set)
}

var errUnknownKid = errors.New("unknown kid")

// verify is a resource server's check, by a library of others.
func verify(set jose.JSONWebKeySet, token string) error {
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256})
	if err != nil {
		return err
	}
	kid := parsed.Headers[0].KeyID
	keys := set.Key(kid)
	if len(keys) == 0 {
		return fmt.Errorf("%w %q", errUnknownKid, kid)
	}
	var claims jwt.Claims
	if err := parsed.Claims(keys[0], &claims); err != nil {
		return err
	}
	return claims.ValidateWithLeeway(jwt.Expected{Issuer: "identity-auth", AnyAudience: jwt.Audience{"identity-auth"}, Time: time.Now()}, 0)
}

// resourceServer keeps a key set as long as it may and asks again for a kid
// that it does not know, of whatever replica it meets.
type resourceServer struct {
	name     string
	replicas []*service

	mu      sync.Mutex
	set     jose.JSONWebKeySet
	until   time.Time
	fetches int
}

func (r *resourceServer) fetch() (err error) {
	var keep time.Duration
	r.set, keep, err = fetchKeys(r.replicas[rand.IntN(len(r.replicas))])
	r.until = time.Now().Add(keep)
	r.fetches++
	return err
}

func (r *resourceServer) verify(token string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Now().After(r.until) {
		if err := r.fetch(); err != nil {
			return err
		}
	}
	err := verify(r.set, token)
	if errors.Is(err, errUnknownKid) {
		if err := r.fetch(); err != nil {
			return err
		}
		err = verify(r.set, token)
	}
	return err
}

// The runbook's rotation on three replicas that are reloaded one after the
// other, under load: no valid token is ever refused and no session ends.
func TestKeyRotationUnderLoad(t *testing.T) {
	const ttl = 3 * time.Second
	w := newWorld(t)
	old, fresh := signing{keyPair(), "2026-01"}, signing{newKeyPair(), "2026-02"}
	var rs []*service
	var files []keyFiles
	for i := range 3 {
		f := keyFiles(t.TempDir())
		f.write(t, old, signing{}, signing{})
		start := w.startPlain
		if i == 0 {
			start = w.start
		}
		rs, files = append(rs, start(unlimited, cheapHashes, env{"ACCESS_TOKEN_TTL": ttl.String()}, f.env())), append(files, f)
	}
	p := rs[0].register()
	begun := logins(t, rs, p, 6)

	var mu sync.Mutex // guards servers and issued
	var servers []*resourceServer
	var issued []string
	kids := map[string]int{}
	addServer := func(name string) {
		r := &resourceServer{name: name, replicas: rs}
		if err := r.fetch(); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		servers = append(servers, r)
	}
	// check holds one token against every resource server's keys and against
	// every replica's at this moment.
	check := func(token string, all []*resourceServer) {
		for _, r := range all {
			if err := r.verify(token); err != nil && !errors.Is(err, jwt.ErrExpired) {
				t.Errorf("%s: %v", r.name, err)
			}
		}
		for i, s := range rs {
			set, _, err := fetchKeys(s)
			if err == nil {
				err = verify(set, token)
			}
			if err != nil && !errors.Is(err, jwt.ErrExpired) {
				t.Errorf("keys of replica %d: %v", i, err)
			}
		}
	}

	stop := make(chan struct{})
	var load sync.WaitGroup
	running := func() bool {
		select {
		case <-stop:
			return false
		default:
			return !t.Failed()
		}
	}
	sessions := make([]int, len(begun))
	for i, b := range begun {
		load.Go(func() {
			for token := b.RefreshToken; running(); {
				s := rs[rand.IntN(len(rs))]
				a, err := s.try("POST", "/api/auth/refresh", refreshBody(token))
				var got tokens
				if err != nil || a.status != 200 || json.Unmarshal(a.body, &got) != nil {
					t.Errorf("refresh: got %d %s, %v, want 200", a.status, a.body, err)
					return
				}
				token = got.RefreshToken
				sessions[i]++
				parsed, err := jwt.ParseSigned(got.AccessToken, []jose.SignatureAlgorithm{jose.RS256})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				issued = append(issued, got.AccessToken)
				kids[parsed.Headers[0].KeyID]++
				all := servers[:len(servers):len(servers)]
				mu.Unlock()
				check(got.AccessToken, all)
			}
		})
	}
	load.Go(func() { // tokens stay good for their whole life
		for running() {
			mu.Lock()
			n := len(issued)
			all := servers[:len(servers):len(servers)]
			recent := issued[max(0, n-400):n:n]
			mu.Unlock()
			for range min(20, len(recent)) {
				check(recent[rand.IntN(len(recent))], all)
			}
		}
	})

	signs := func(kid string) int {
		mu.Lock()
		defer mu.Unlock()
		return kids[kid]
	}
	addServer("resource server from before the rotation")
	eventually(t, "tokens signed with the old key", 30*time.Second, func() bool { return signs(old.kid) > 20 || t.Failed() })
	stage := func(name string, current, next, prev signing) {
		for i, s := range rs {
			files[i].write(t, current, next, prev)
			s.reload("config.reloaded")
			addServer(fmt.Sprintf("resource server since %s on replica %d", name, i))
			seen := signs(old.kid) + signs(fresh.kid) // some load at every step
			eventually(t, "load goes on", 30*time.Second, func() bool { return signs(old.kid)+signs(fresh.kid) > seen+20 || t.Failed() })
		}
	}
	stage("next", old, fresh, signing{})
	if n := signs(fresh.kid); n != 0 {
		t.Errorf("tokens signed with a key that is only announced: got %d, want 0", n)
	}
	stage("current", fresh, signing{}, old)
	last := time.Now()
	eventually(t, "2 x ACCESS_TOKEN_TTL since the last token of the old key", 30*time.Second, func() bool { return time.Since(last) > 2*ttl || t.Failed() })
	stage("previous removed", fresh, signing{}, signing{})
	close(stop)
	load.Wait()

	t.Logf("tokens by kid %v, refreshes by session %v", kids, sessions)
	for _, r := range servers {
		if r.fetches > 2 {
			t.Errorf("%s: fetched the key set %d times, want once and at most once more for an unknown kid", r.name, r.fetches)
		}
	}
	want := map[string]bool{fresh.kid: true}
	for i, s := range rs {
		set, _, err := fetchKeys(s)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]bool{}
		for _, k := range set.Keys {
			got[k.KeyID] = true
		}
		if !maps.Equal(got, want) {
			t.Errorf("kids of replica %d after the rotation: got %v, want %v", i, got, want)
		}
	}
}

// A bad new value keeps the old keys and says so, without showing it.
func TestBadKeysAreNotReloaded(t *testing.T) {
	w := newWorld(t)
	old, other := signing{keyPair(), "a"}, signing{newKeyPair(), "b"}
	f := keyFiles(t.TempDir())
	f.write(t, old, signing{}, signing{})
	s := w.start(unlimited, cheapHashes, f.env())
	token := s.login(s.register()).RefreshToken
	published := string(s.get("/.well-known/jwks.json").body)
	for name, bad := range map[string][3]signing{
		"not a pair":              {{pair{private: old.private, public: other.public}, "c"}, {}, {}},
		"same kid, other key":     {{other.pair, "a"}, {}, {}},
		"no private key":          {{pair{public: other.public}, "b"}, {}, {}},
		"kid without a key":       {old, {kid: "c"}, {}},
		"two keys under one kid":  {old, {other.pair, "a"}, {}},
		"no PEM in the next slot": {old, {pair{public: "mumble"}, "b"}, {}},
	} {
		t.Run(name, func(t *testing.T) {
			f.write(t, bad[0], bad[1], bad[2])
			s.reload("config.reload_failed")
			if got := string(s.get("/.well-known/jwks.json").body); got != published {
				t.Errorf("JWKS after a bad reload: got %s, want %s", got, published)
			}
			got := s.refresh(token).tokens(t)
			token = got.RefreshToken
			set, _, err := fetchKeys(s)
			if err != nil {
				t.Fatal(err)
			}
			if err := verify(set, got.AccessToken); err != nil {
				t.Errorf("token after a bad reload: %v", err)
			}
		})
	}
	for _, line := range s.tail(1000) {
		if strings.Contains(line, "mumble") || strings.Contains(line, "BEGIN") {
			t.Errorf("log shows a value: %s", line)
		}
	}
	f.write(t, other, signing{}, old)
	s.reload("config.reloaded")
	if got := s.refresh(token).tokens(t); !strings.Contains(string(s.get("/.well-known/jwks.json").body), `"kid":"b"`) {
		t.Errorf("JWKS after a good reload lacks the new key; token %s", got.AccessToken)
	}
}
