package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// outcome is what a client knows of a call.
type outcome string

const (
	ok      outcome = "ok"      // it happened, and is durable
	fail    outcome = "fail"    // it was refused: nothing of it happened
	unknown outcome = "unknown" // no answer, or 503 unavailable: it may happen still
)

// Kinds of calls. guess is a login with a wrong password.
const (
	opRegister       = "register"
	opLogin          = "login"
	opGuess          = "guess"
	opRefresh        = "refresh"
	opLogout         = "logout"
	opLogoutAll      = "logout-all"
	opChangePassword = "password"
	opListSessions   = "sessions"
	opDisable        = "disable"
	opEnable         = "enable"
	opRevokeSessions = "revoke-sessions"
	opSetClaims      = "set-claims"
	opUnlock         = "unlock"
	opDeleteAccount  = "delete"
)

// call is one request and what came of it. Times are since the beginning of
// the run.
type call struct {
	kind    string
	client  string
	replica int
	trace   string // its trace id, which its events carry
	user    string
	session string // of the token presented, or of the bearer
	token   string // refresh: presented
	right   string // the password presented
	next    string // the password to be

	begin, end time.Duration
	result     outcome
	status     int    // 0: no answer
	code       string // of the problem
	err        string

	got        string // the refresh token handed out
	gotSession string // of the access token handed out
	bearer     string // the access token handed out
	last       bool   // made after the faults, with everything settled
}

func (c call) String() string {
	s := fmt.Sprintf("%.3fs-%.3fs %s %s on replica %d: %s", c.begin.Seconds(), c.end.Seconds(), c.client, c.kind, c.replica, c.result)
	if c.status != 0 {
		s += fmt.Sprintf(" %d %s", c.status, c.code)
	}
	if c.err != "" {
		s += " " + c.err
	}
	s += " trace " + c.trace + " user " + c.user
	if session := c.session + c.gotSession; session != "" {
		s += " session " + session[:min(36, len(session))]
	}
	return s
}

// hashes tells whether a call of this kind may compute a hash.
func (c call) hashes() bool {
	return slices.Contains([]string{opRegister, opLogin, opGuess, opChangePassword}, c.kind)
}

// published is an event as a consumer saw it first.
type published struct {
	id, eventType, trace, user, session string
}

// row is an event in the database.
type row struct {
	seq int64
	published
}

// span is a part of a run, of one replica.
type span struct {
	replica    int
	begin, end time.Duration // end 0: not over
}

func (s span) overlaps(begin, end time.Duration) bool {
	return s.begin <= end && (s.end == 0 || s.end >= begin)
}

// history is what a run leaves to be judged.
type history struct {
	grace     time.Duration // REFRESH_REUSE_GRACE
	threshold int           // LOCKOUT_THRESHOLD
	lockout   time.Duration // LOCKOUT_DURATION

	calls     []call
	events    []published // in the order of their first delivery
	outbox    []row       // by seq
	killed    []span      // replicas that were dead
	stopped   []span      // replicas that were stopped
	control   []span      // requests that need nothing: how slow the machine was
	storeLost bool        // NATS's store was deleted
}

// recorder writes a history while it happens.
type recorder struct {
	base  []string // of each replica
	admin []string
	http  []*http.Client
	zero  time.Time

	mu sync.Mutex // guards h
	h  history
}

const faultAdminToken = "fault-recorder-admin-token-of-32-bytes"

func (r *recorder) now() time.Duration { return time.Since(r.zero) }

// do makes a call and notes what it came to.
func (r *recorder) do(c call, method, path string, body any, bearer string) call {
	c.trace, c.begin = newUUID(), r.now()
	base := r.base[c.replica]
	if strings.HasPrefix(path, "/api/admin/") {
		base, bearer = r.admin[c.replica], faultAdminToken
	}
	var payload []byte
	if body != nil {
		payload = toJSON(body)
	}
	req, err := http.NewRequest(method, base+path, bytes.NewReader(payload))
	if err != nil {
		panic(err)
	}
	req.Header.Set("X-Trace-Id", c.trace)
	if method == http.MethodPost {
		req.Header.Set("Content-Type", "application/json")
	}
	if bearer != "" {
		req.Header.Set("Authorization", "Bearer "+bearer)
	}
	resp, err := r.http[c.replica].Do(req)
	var text []byte
	if err == nil {
		text, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	c.end = r.now()
	c.judge(resp, text, err)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.h.calls = append(r.h.calls, c)
	return c
}

// judge turns an answer into an outcome.
func (c *call) judge(resp *http.Response, body []byte, err error) {
	var dial *net.OpError
	switch {
	case errors.As(err, &dial) && dial.Op == "dial":
		c.result, c.err = fail, err.Error()
		return
	case err != nil:
		c.result, c.err = unknown, err.Error()
		return
	}
	c.status = resp.StatusCode
	var answer struct {
		Code         string `json:"code"`
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"`
	}
	json.Unmarshal(body, &answer)
	c.code = answer.Code
	switch {
	case c.status < 300:
		c.result, c.got, c.bearer = ok, answer.RefreshToken, answer.AccessToken
		if c.got != "" {
			c.gotSession = parseRefresh(c.got).session
		}
	case c.status >= 500 && c.code != "hash_busy":
		c.result = unknown
	default:
		c.result = fail
	}
}

// refreshParts are what a refresh token is made of; only this test looks inside.
type refreshParts struct {
	session, family string
	generation      uint64
}

func parseRefresh(token string) refreshParts {
	b, err := base64.RawURLEncoding.DecodeString(strings.TrimPrefix(token, "iar_"))
	if err != nil || len(b) < 88 {
		return refreshParts{}
	}
	h := fmt.Sprintf("%x", b[:16])
	return refreshParts{
		session:    h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:],
		family:     string(b[24:56]),
		generation: binary.BigEndian.Uint64(b[16:24]),
	}
}

// watch asks a replica again and again for what needs neither database nor
// hash: as slow as that is the machine, whatever the service does.
func (r *recorder) watch(replica int, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		case <-time.After(50 * time.Millisecond):
		}
		begin := r.now()
		resp, err := r.http[replica].Get(r.base[replica] + "/health/live")
		if err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		if end := r.now(); end-begin > 20*time.Millisecond {
			r.mu.Lock()
			r.h.control = append(r.h.control, span{replica, begin, end})
			r.mu.Unlock()
		}
	}
}
