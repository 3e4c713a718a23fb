package e2e

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// story is a history written by hand. One call follows the other, 10 ms each,
// unless a call says otherwise.
type story struct{ history }

// call adds a call and the events that it causes, in the database and
// delivered. The result follows from the status; 0 is no answer.
func (s *story) call(c call, events ...string) {
	n := len(s.calls)
	c.trace, c.client = fmt.Sprint("trace-", n), "client"
	if c.user == "" {
		c.user = "ada"
	}
	if c.end == 0 {
		c.begin, c.end = s.history.end()+time.Millisecond, s.history.end()+10*time.Millisecond
	}
	switch {
	case c.status == 0 || c.status >= 500 && c.code != "hash_busy":
		c.result = unknown
	case c.status < 300:
		c.result = ok
	default:
		c.result = fail
	}
	if c.got != "" {
		c.gotSession = parseRefresh(c.got).session
	}
	if c.token != "" && c.session == "" {
		c.session = parseRefresh(c.token).session
	}
	s.calls = append(s.calls, c)
	for _, eventType := range events {
		e := published{id: fmt.Sprintf("event-%d", len(s.outbox)+1), eventType: eventType, trace: c.trace, user: c.user}
		switch eventType {
		case evLoggedIn:
			e.session = c.gotSession
		case evRefreshed, evReplay, evLoggedOut, evRevoked:
			e.session = c.session
		}
		s.outbox = append(s.outbox, row{int64(len(s.outbox) + 1), e})
		s.events = append(s.events, e)
	}
}

// token is a refresh token of a session: one of a generation for each step.
func token(session, family, generation, step byte) string {
	b := make([]byte, 92)
	b[0], b[24], b[56] = session, family, step
	binary.BigEndian.PutUint64(b[16:], uint64(generation))
	return "iar_" + base64.RawURLEncoding.EncodeToString(b)
}

// newStory begins with an account, and a session that was refreshed once.
func newStory(grace time.Duration) *story {
	s := &story{history{grace: grace, threshold: 3, lockout: time.Second}}
	s.call(call{kind: opRegister, status: 201, right: "first"}, evRegistered)
	s.call(call{kind: opLogin, status: 200, right: "first", got: token(1, 1, 0, 1)}, evLoggedIn)
	s.call(call{kind: opRefresh, status: 200, token: token(1, 1, 0, 1), got: token(1, 1, 1, 2)}, evRefreshed)
	return s
}

func (s *story) in(password string) {
	s.call(call{kind: opLogin, status: 200, right: password, got: token(9, 9, 0, 9), last: true}, evLoggedIn)
}

func (s *story) refresh(status int, from, to string, events ...string) {
	s.call(call{kind: opRefresh, status: status, token: from, got: to}, events...)
}

var (
	t0, t1, t2 = token(1, 1, 0, 1), token(1, 1, 1, 2), token(1, 1, 2, 3)
	session1   = parseRefresh(t0).session
)

// What may happen is no violation of anything.
func TestFaultCheckersAreContent(t *testing.T) {
	for _, test := range []struct {
		name   string
		grace  time.Duration
		events func(s *story)
	}{
		{"a session goes on", 0, func(s *story) { s.refresh(200, t1, t2, evRefreshed) }},
		{"an answer was lost and had again", time.Minute, func(s *story) {
			s.refresh(503, t1, "", evRefreshed)
			s.refresh(200, t1, t2)
		}},
		{"an answer was lost and the retry is a replay", 0, func(s *story) {
			s.refresh(503, t1, "", evRefreshed)
			s.refresh(401, t1, "", evReplay, evRevoked)
			s.refresh(401, t1, "")
		}},
		{"a replay", 0, func(s *story) {
			s.refresh(401, t0, "", evReplay, evRevoked)
			s.refresh(401, t1, "")
		}},
		{"a logout", 0, func(s *story) {
			s.call(call{kind: opLogout, status: 204, token: t1}, evLoggedOut, evRevoked)
			s.refresh(401, t1, "")
		}},
		{"a second logout changes nothing", 0, func(s *story) {
			s.call(call{kind: opLogout, status: 503, token: t1}, evLoggedOut, evRevoked)
			s.call(call{kind: opLogout, status: 204, token: t1})
		}},
		{"a logout without an answer that did not happen", 0, func(s *story) {
			s.call(call{kind: opLogout, status: 0, token: t1, begin: time.Second, end: 2 * time.Second})
			s.killed = []span{{0, time.Second, 3 * time.Second}}
			s.refresh(200, t1, t2, evRefreshed)
		}},
		{"a registration without an answer", 0, func(s *story) {
			s.call(call{kind: opRegister, user: "bob", status: 503}, evRegistered)
			s.call(call{kind: opRegister, user: "cleo", status: 503})
		}},
		{"a password changed without an answer", 0, func(s *story) {
			s.call(call{kind: opChangePassword, status: 503, right: "first", next: "second", session: session1})
			s.call(call{kind: opLogin, status: 401, right: "second", last: true})
		}},
		{"a change of the password", 0, func(s *story) {
			s.call(call{kind: opChangePassword, status: 200, right: "first", next: "second", session: session1, got: token(1, 2, 0, 1)}, evChanged)
			s.refresh(401, t1, "")
			s.call(call{kind: opLogin, status: 401, right: "first"})
			s.in("second")
		}},
		{"guesses up to the threshold in each period", 0, func(s *story) {
			for at := range 8 {
				begin := time.Duration(at/3) * 1100 * time.Millisecond
				s.call(call{kind: opGuess, status: 401, begin: begin, end: begin + 10*time.Millisecond})
			}
		}},
		{"a guess that took long", 0, func(s *story) {
			s.call(call{kind: opGuess, status: 401, begin: 0, end: 1100 * time.Millisecond})
			for range 3 {
				s.call(call{kind: opGuess, status: 401, begin: time.Second, end: 1100 * time.Millisecond})
			}
		}},
		{"a stopped replica answers late", 0, func(s *story) {
			s.stopped = []span{{0, time.Second, 11 * time.Second}}
			s.call(call{kind: opListSessions, status: 200, begin: 2 * time.Second, end: 12 * time.Second})
		}},
		{"a slow machine", 0, func(s *story) {
			s.control = []span{{0, 2 * time.Second, 4 * time.Second}}
			s.call(call{kind: opListSessions, status: 200, begin: time.Second, end: 14 * time.Second})
		}},
		{"a slow machine, on which a guess is cut off", 0, func(s *story) {
			s.control = []span{{0, 2 * time.Second, 4 * time.Second}}
			s.call(call{kind: opGuess, status: 0, begin: time.Second, end: 19 * time.Second})
		}},
		{"an account is deleted and its events with it", 0, func(s *story) {
			s.call(call{kind: opDeleteAccount, status: 200, session: session1}, evRevoked, evDeleted)
			s.outbox = nil
			s.in("first")
			s.outbox = nil
		}},
		{"disabled twice, the first time without an answer", 0, func(s *story) {
			s.call(call{kind: opDisable, status: 503, session: session1}, evDisabled, evRevoked)
			s.call(call{kind: opDisable, status: 200})
			s.call(call{kind: opEnable, status: 200, last: true}, evEnabled)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newStory(test.grace)
			test.events(s)
			if !slices.ContainsFunc(s.calls, func(c call) bool { return c.kind == opLogin && c.last && c.result == ok }) {
				s.in("first")
			}
			for _, c := range checkers {
				for _, v := range c.check(&s.history) {
					t.Errorf("%s: got a violation, want none: %s", c.promise, v)
				}
			}
		})
	}
}

// Each checker sees the violations of its promise.
func TestFaultCheckersSeeViolations(t *testing.T) {
	const registered, chains, revoked, events, guesses, answers = 0, 1, 2, 3, 4, 5
	forget := func(s *story, eventType string) {
		s.events = slices.DeleteFunc(s.events, func(e published) bool { return e.eventType == eventType })
		s.outbox = slices.DeleteFunc(s.outbox, func(r row) bool { return r.eventType == eventType })
	}
	for _, test := range []struct {
		checker int
		want    string
		grace   time.Duration
		happens func(s *story)
	}{
		{registered, "told 201, and no login at the end", 0, func(s *story) {}},
		{registered, "told 201, and no login at the end", 0, func(s *story) {
			s.call(call{kind: opLogin, status: 401, right: "first", last: true})
		}},
		{registered, "the right password was refused", 0, func(s *story) {
			s.call(call{kind: opLogin, status: 401, right: "first"})
			s.in("first")
		}},
		{registered, "the right password was refused", 0, func(s *story) {
			s.call(call{kind: opChangePassword, status: 200, right: "first", next: "second", session: session1, got: token(1, 2, 0, 1)}, evChanged)
			s.call(call{kind: opLogin, status: 401, right: "second"})
		}},

		{chains, "two tokens of generation 2", time.Minute, func(s *story) {
			s.refresh(200, t1, t2, evRefreshed)
			s.refresh(200, t1, token(1, 1, 2, 4), evRefreshed)
		}},
		{chains, "a token was exchanged twice", 0, func(s *story) {
			s.refresh(200, t1, t2, evRefreshed)
			s.refresh(200, t1, t2)
		}},
		{chains, "a spent token was exchanged", time.Minute, func(s *story) {
			s.refresh(200, t1, t2, evRefreshed)
			s.refresh(200, t0, t1)
		}},
		{chains, "does not follow the one presented", 0, func(s *story) { s.refresh(200, t1, token(1, 1, 3, 1), evRefreshed) }},
		{chains, "does not follow the one presented", 0, func(s *story) { s.refresh(200, t1, token(2, 1, 2, 1), evRefreshed) }},
		{chains, "the current token was refused", 0, func(s *story) { s.refresh(401, t1, "") }},

		{revoked, "went on", 0, func(s *story) {
			s.call(call{kind: opLogout, status: 204, token: t1}, evLoggedOut, evRevoked)
			s.refresh(200, t1, t2, evRefreshed)
		}},
		{revoked, "went on", 0, func(s *story) {
			s.call(call{kind: opDisable, status: 200, session: session1}, evDisabled, evRevoked)
			s.refresh(200, t1, t2, evRefreshed)
		}},
		{revoked, "went on", 0, func(s *story) { // another session's change of the password
			s.call(call{kind: opLogin, status: 200, right: "first", got: token(2, 2, 0, 1)}, evLoggedIn)
			s.call(call{kind: opChangePassword, status: 200, session: parseRefresh(token(2, 2, 0, 1)).session, got: token(2, 3, 0, 1)}, evChanged)
			s.refresh(200, t1, t2, evRefreshed)
		}},
		{revoked, "went on", 0, func(s *story) { // its own change of the password
			s.call(call{kind: opChangePassword, status: 200, session: session1, got: token(1, 2, 0, 1)}, evChanged)
			s.refresh(200, t1, t2, evRefreshed)
		}},
		{revoked, "went on", 0, func(s *story) { // a replay
			s.refresh(401, t0, "", evReplay, evRevoked)
			s.refresh(200, t1, t2, evRefreshed)
		}},
		{revoked, "went on", time.Minute, func(s *story) { // a replay, in spite of a grace
			s.refresh(200, t1, t2, evRefreshed)
			s.refresh(401, t0, "", evReplay, evRevoked)
			s.refresh(200, t2, token(1, 1, 3, 4), evRefreshed)
		}},

		{events, "no event auth.user.registered", 0, func(s *story) { forget(s, evRegistered) }},
		{events, "no event auth.user.logged_in", 0, func(s *story) { forget(s, evLoggedIn) }},
		{events, "0 events auth.token.refreshed", 0, func(s *story) { forget(s, evRefreshed) }},
		{events, "2 events auth.token.refreshed", 0, func(s *story) { s.refresh(401, t0, "", evRefreshed) }},
		{events, "tells of", 0, func(s *story) { s.call(call{kind: opLogin, status: 401, right: "x"}, evLoggedIn) }},
		{events, "tells of", 0, func(s *story) { s.call(call{kind: opRegister, user: "bob", status: 409}, evRegistered) }},
		{events, "tells of", 0, func(s *story) { s.call(call{kind: opRefresh, status: 429, token: t1}, evRefreshed) }},
		{events, "no event auth.session.revoked", 0, func(s *story) {
			s.call(call{kind: opLogout, status: 204, token: t1})
		}},
		{events, "no event auth.user.logged_out", 0, func(s *story) {
			s.call(call{kind: opLogout, status: 204, token: t1}, evRevoked)
		}},
		{events, "no event auth.session.revoked", 0, func(s *story) { s.call(call{kind: opRevokeSessions, status: 200}) }},
		{events, "was revoked 2 times", 0, func(s *story) {
			s.call(call{kind: opLogout, status: 204, token: t1}, evLoggedOut, evRevoked)
			s.call(call{kind: opLogoutAll, status: 204, session: session1}, evRevoked)
		}},
		{events, "1 replays were told and 0 revocations", 0, func(s *story) { s.refresh(401, t0, "", evReplay) }},
		{events, "no event auth.user.disabled", 0, func(s *story) { s.call(call{kind: opDisable, status: 200, session: session1}, evRevoked) }},
		{events, "no event auth.user.enabled", 0, func(s *story) {
			s.call(call{kind: opDisable, status: 200, session: session1}, evDisabled, evRevoked)
			s.call(call{kind: opEnable, status: 200})
		}},
		{events, "no event auth.user.password_changed", 0, func(s *story) {
			s.call(call{kind: opChangePassword, status: 200, session: session1, got: token(1, 2, 0, 1)})
		}},
		{events, "never delivered", 0, func(s *story) { s.events = s.events[:2] }},
		{events, "was rolled back", 0, func(s *story) { s.outbox = s.outbox[:2] }},
		{events, "differs from its row", 0, func(s *story) { s.outbox[1].session = "another" }},
		{events, "that nobody made", 0, func(s *story) { s.calls = s.calls[:2] }},
		{events, "told twice", 0, func(s *story) {
			again := s.events[2]
			again.id = "event-again"
			s.events, s.outbox = append(s.events, again), append(s.outbox, row{9, again})
		}},
		{events, "delivered after one of a later", 0, func(s *story) { slices.Reverse(s.events) }},
		{events, "delivered after a later one of its session", 0, func(s *story) {
			s.refresh(0, t1, "", evRefreshed)
			s.refresh(401, t1, "", evReplay, evRevoked)
			slices.Reverse(s.events[len(s.events)-3:])
		}},

		{guesses, "4 guesses of user ada were checked within 1s", 0, func(s *story) {
			for range 4 {
				s.call(call{kind: opGuess, status: 401})
			}
		}},
		{guesses, "5 guesses of user ada were checked within 1s", 0, func(s *story) { // about the border of two seconds
			for _, at := range []time.Duration{0, 700, 1400, 1450, 1500, 1550, 2500} {
				s.call(call{kind: opGuess, status: 401, begin: at * time.Millisecond, end: (at + 10) * time.Millisecond})
			}
		}},
		{guesses, "a wrong password got in", 0, func(s *story) { s.call(call{kind: opGuess, status: 200, got: token(2, 2, 0, 1)}) }},

		{answers, "an error of the service's own", 0, func(s *story) { s.call(call{kind: opRefresh, status: 500, token: t1}) }},
		{answers, "no answer from a replica that is up", 0, func(s *story) { s.call(call{kind: opRefresh, status: 0, token: t1}) }},
		{answers, "no answer from a replica that is up", 0, func(s *story) { // another one was dead
			s.killed = []span{{1, 0, 0}}
			s.call(call{kind: opRefresh, status: 0, token: t1})
		}},
		{answers, "took 6.5s, want at most 5s", 0, func(s *story) {
			s.call(call{kind: opRefresh, status: 503, token: t1, begin: time.Second, end: 7500 * time.Millisecond})
		}},
		{answers, "took 18s, want at most 15s", 0, func(s *story) { // and was cut off
			s.call(call{kind: opGuess, status: 0, begin: time.Second, end: 19 * time.Second})
		}},
		{answers, "took 10s, want at most 8s", 0, func(s *story) {
			s.call(call{kind: opLogin, status: 503, begin: time.Second, end: 11 * time.Second})
		}},
	} {
		t.Run(test.want, func(t *testing.T) {
			s := newStory(test.grace)
			test.happens(s)
			violations := checkers[test.checker].check(&s.history)
			if !strings.Contains(strings.Join(violations, "\n"), test.want) {
				t.Errorf("%s: got %q, want a violation %q", checkers[test.checker].promise, violations, test.want)
			}
		})
	}
}
