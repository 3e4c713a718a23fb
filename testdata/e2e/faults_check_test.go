package e2e

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// checkers hold a history against the contract. Each returns a sentence about
// every violation.
var checkers = []struct {
	promise string
	check   func(*history) []string
}{
	{"whoever was told 201 can log in", checkRegistered},
	{"the refresh tokens of a session form one chain", checkChains},
	{"what was revoked never refreshes again", checkRevoked},
	{"events equal the changes that were answered, and some of the unknown, in order", checkPublished},
	{"no more guesses are checked in a lock period than the threshold", checkGuesses},
	{"no 5xx but 503, and every answer in time", checkAnswers},
}

// byUser are the calls about each account, in the order of their beginning.
func (h *history) byUser() map[string][]call {
	users := map[string][]call{}
	for _, c := range h.calls {
		users[c.user] = append(users[c.user], c)
	}
	for _, calls := range users {
		slices.SortStableFunc(calls, func(a, b call) int { return cmp.Compare(a.begin, b.begin) })
	}
	return users
}

// credentials are what a login may need by now, as far as calls tell.
type credentials struct {
	told      bool     // 201
	passwords []string // one of these is right
	disabled  bool     // or may be: a call without an answer may still happen until everything is settled
	deleted   bool     // or may be
}

func (c *credentials) follow(done call) {
	happened := done.result == ok
	if done.result == fail {
		return
	}
	switch done.kind {
	case opRegister:
		c.told = happened
		c.passwords = []string{done.right}
	case opChangePassword:
		if happened {
			c.passwords = nil
		}
		c.passwords = append(c.passwords, done.next)
	case opDisable:
		c.disabled = true
	case opEnable:
		if done.last {
			c.disabled = false
		}
	case opDeleteAccount:
		c.deleted = true
	}
}

// 1. The right password of an account that is certainly there and enabled is
// never refused as wrong, and at the end everyone gets in.
func checkRegistered(h *history) (violations []string) {
	for user, calls := range h.byUser() {
		var known credentials
		in := false
		for _, c := range calls {
			if c.kind == opLogin {
				certain := known.told && len(known.passwords) == 1 && c.right == known.passwords[0] && !known.disabled && !known.deleted
				if certain && c.status == 401 {
					violations = append(violations, "the right password was refused: "+c.String())
				}
				in = in || c.last && c.result == ok
			}
			known.follow(c)
		}
		if known.told && !known.deleted && !in {
			violations = append(violations, "told 201, and no login at the end: user "+user)
		}
	}
	return violations
}

// chain is the refresh tokens that follow from one login or password change.
type chain struct {
	session, user, family string
	begun                 time.Duration
	replaced              time.Duration // a change of the password has begun another chain; 0: none was answered
	ended                 time.Duration // a revocation of the session had been answered; 0: none was
	how                   string        // what ended or replaced it
	refreshes             []call        // by beginning
}

// chains are the chains that were begun, by family.
func (h *history) chains() map[string]*chain {
	chains := map[string]*chain{}
	for _, c := range h.calls {
		if c.got != "" && (c.kind == opLogin || c.kind == opChangePassword) {
			t := parseRefresh(c.got)
			chains[t.family] = &chain{session: t.session, user: c.user, family: t.family, begun: c.end}
		}
	}
	for user, calls := range h.byUser() {
		var own []*chain
		for _, ch := range chains {
			if ch.user == user {
				own = append(own, ch)
			}
		}
		for _, c := range calls {
			if c.kind == opRefresh {
				if ch := chains[parseRefresh(c.token).family]; ch != nil {
					ch.refreshes = append(ch.refreshes, c)
				}
				continue
			}
			for _, ch := range own {
				if c.result == ok && ch.begun < c.begin && ch.endedBy(c) {
					at := &ch.ended
					if c.kind == opChangePassword && c.session == ch.session {
						at = &ch.replaced
					}
					if *at == 0 || c.end < *at {
						*at, ch.how = c.end, c.String()
					}
				}
			}
		}
		for _, ch := range own {
			for _, c := range ch.refreshes {
				if c.status == 401 && ch.replays(h, c) && (ch.ended == 0 || c.end < ch.ended) {
					ch.ended, ch.how = c.end, c.String()
				}
			}
		}
	}
	return chains
}

// endedBy tells whether the chain is over if the call happened.
func (ch *chain) endedBy(c call) bool {
	switch c.kind {
	case opLogout:
		return c.session == ch.session
	case opChangePassword:
		return parseRefresh(c.got).family != ch.family
	case opLogoutAll, opDisable, opRevokeSessions, opDeleteAccount:
		return true
	}
	return false
}

// replays tells whether a token was certainly spent when it was presented: it
// had a successor, and with a grace that successor had been used.
func (ch *chain) replays(h *history, c call) bool {
	child := ch.successor(c.token, c.begin)
	return child != "" && (h.grace == 0 || ch.successor(child, c.begin) != "")
}

// successor is what a token had been exchanged for by then.
func (ch *chain) successor(token string, by time.Duration) string {
	for _, c := range ch.refreshes {
		if c.token == token && c.result == ok && c.end < by {
			return c.got
		}
	}
	return ""
}

// 2. Of a session and generation there is one token, its parent's only child;
// without a grace it is handed out once; a token older than the one spent last
// is good for nothing; and the current one is never refused without a cause.
func checkChains(h *history) (violations []string) {
	users := h.byUser()
	tokens := map[refreshParts]string{}
	for _, c := range h.calls {
		if c.got == "" {
			continue
		}
		t := parseRefresh(c.got)
		if other := tokens[t]; other != "" && other != c.got {
			violations = append(violations, fmt.Sprintf("two tokens of generation %d: %s", t.generation, c))
		}
		tokens[t] = c.got
		if p := parseRefresh(c.token); c.kind == opRefresh && (p.session != t.session || p.family != t.family || p.generation+1 != t.generation) {
			violations = append(violations, "a token that does not follow the one presented: "+c.String())
		}
	}
	for _, ch := range h.chains() {
		spent := map[string]bool{}
		for _, c := range ch.refreshes {
			switch {
			case c.result == ok && h.grace == 0 && spent[c.token]:
				violations = append(violations, "a token was exchanged twice: "+c.String())
			case c.result == ok && ch.replays(h, c):
				violations = append(violations, "a spent token was exchanged: "+c.String())
			case c.status == 401 && ch.successor(c.token, h.end()) == "" && !ch.mayBeOver(c, users[ch.user]):
				violations = append(violations, "the current token was refused: "+c.String())
			}
			spent[c.token] = spent[c.token] || c.result == ok
		}
	}
	return violations
}

func (h *history) end() (end time.Duration) {
	for _, c := range h.calls {
		end = max(end, c.end+1)
	}
	return end
}

// mayBeOver tells whether anything that was asked for by then may have ended
// the chain or spent its current token.
func (ch *chain) mayBeOver(refused call, calls []call) bool {
	for _, x := range ch.refreshes {
		if x.trace != refused.trace && x.begin < refused.end && (x.result == unknown || x.status == 401 || x.end > refused.begin) {
			return true
		}
	}
	for _, x := range calls {
		// Without an answer it may still have happened after the chain began.
		if x.begin < refused.end && ch.endedBy(x) && (x.result == unknown || x.result == ok && x.end > ch.begun) {
			return true
		}
	}
	return false
}

// 3. A refresh that was begun after a revocation had been answered is refused.
func checkRevoked(h *history) (violations []string) {
	for _, ch := range h.chains() {
		for _, c := range ch.refreshes {
			if c.result == ok && (ch.ended != 0 && c.begin > ch.ended || ch.replaced != 0 && c.begin > ch.replaced) {
				violations = append(violations, "a session that had been revoked went on: "+c.String()+", after "+ch.how)
			}
		}
	}
	return violations
}

const (
	evRegistered = "auth.user.registered"
	evLoggedIn   = "auth.user.logged_in"
	evRefreshed  = "auth.token.refreshed"
	evLoggedOut  = "auth.user.logged_out"
	evRevoked    = "auth.session.revoked"
	evChanged    = "auth.user.password_changed"
	evDisabled   = "auth.user.disabled"
	evEnabled    = "auth.user.enabled"
	evClaims     = "auth.user.claims_changed"
	evUnlocked   = "auth.user.unlocked"
	evDeleted    = "auth.user.deleted"
	evLockout    = "auth.lockout"
	evReplay     = "security.refresh_replay_detected"
)

// tells are the events that a call may cause. The first is the one that its
// success must have; a call that is refused may only cause the last ones.
var tells = map[string]struct{ success, refused []string }{
	opRegister:       {[]string{evRegistered}, nil},
	opLogin:          {[]string{evLoggedIn}, []string{evLockout}},
	opGuess:          {nil, []string{evLockout}},
	opRefresh:        {[]string{evRefreshed}, []string{evReplay, evRevoked}},
	opLogout:         {[]string{evLoggedOut, evRevoked}, nil},
	opLogoutAll:      {[]string{evRevoked}, nil},
	opChangePassword: {[]string{evChanged, evRevoked}, []string{evLockout}},
	opDisable:        {[]string{evDisabled, evRevoked}, nil},
	opEnable:         {[]string{evEnabled}, nil},
	opRevokeSessions: {[]string{evRevoked}, nil},
	opSetClaims:      {[]string{evClaims}, nil},
	opUnlock:         {[]string{evUnlocked}, nil},
	opDeleteAccount:  {[]string{evDeleted, evRevoked}, nil},
}

// 4. Every event tells of a call that may have happened, once; every call that
// was answered ok has its events; what the database holds was delivered; and
// first deliveries come in order.
func checkPublished(h *history) (violations []string) {
	bad := func(format string, args ...any) { violations = append(violations, fmt.Sprintf(format, args...)) }
	calls := map[string]call{}
	deleted := map[string]bool{} // what such an account leaves behind is gone with its acknowledgement
	for _, c := range h.calls {
		calls[c.trace] = c
		deleted[c.user] = deleted[c.user] || c.kind == opDeleteAccount && c.result != fail
	}
	rows := map[string]row{}
	for _, r := range h.outbox {
		rows[r.id] = r
	}

	type fact struct{ trace, eventType, session string }
	facts := map[fact]bool{}
	by := map[string]map[string]int{} // trace: event type: number
	revoked := map[string]int{}       // session: revocations told
	delivered := map[string]bool{}
	latest := map[string]call{}   // user: the call begun last of those whose events were delivered
	lastSeq := map[string]int64{} // session: of what was delivered
	for _, e := range h.events {
		delivered[e.id] = true
		c, asked := calls[e.trace]
		if !asked {
			bad("event %s %s of a request that nobody made, trace %q", e.eventType, e.id, e.trace)
			continue
		}
		told := tells[c.kind]
		may := c.result != fail && slices.Contains(told.success, e.eventType) || c.result != ok && slices.Contains(told.refused, e.eventType)
		if !may || e.user != c.user {
			bad("event %s of user %s tells of %s", e.eventType, e.user, c)
		}
		if named := cmp.Or(c.gotSession, c.session); e.session != "" && named != "" && e.session != named && e.eventType != evRevoked {
			bad("event %s of session %s tells of %s", e.eventType, e.session, c)
		}
		if r, kept := rows[e.id]; !kept && !deleted[c.user] {
			bad("event %s %s was rolled back: %s", e.eventType, e.id, c)
		} else if kept && r.published != e {
			bad("event %s differs from its row: got %+v, want %+v", e.id, e, r.published)
		}
		f := fact{e.trace, e.eventType, e.session}
		if facts[f] {
			bad("event %s was told twice: %s", e.eventType, c)
		}
		facts[f] = true
		if by[e.trace] == nil {
			by[e.trace] = map[string]int{}
		}
		by[e.trace][e.eventType]++
		if e.eventType == evRevoked {
			revoked[e.session]++
		}

		if before := latest[e.user]; c.result != unknown && before.begin > c.end {
			bad("event %s of an earlier request was delivered after one of a later: %s after %s", e.eventType, c, before)
		}
		if c.begin >= latest[e.user].begin {
			latest[e.user] = c
		}
		if seq := rows[e.id].seq; e.session != "" && seq != 0 {
			if seq < lastSeq[e.session] {
				bad("event %s was delivered after a later one of its session: %s", e.eventType, c)
			}
			lastSeq[e.session] = max(lastSeq[e.session], seq)
		}
	}
	for _, r := range h.outbox {
		if !delivered[r.id] {
			bad("event %s %s was never delivered: %s", r.eventType, r.id, calls[r.trace])
		}
	}

	// From here on, what is missing.
	forgotten := func(user string) bool { return h.storeLost && deleted[user] }
	for _, ch := range h.chains() {
		n := revoked[ch.session]
		if n > 1 {
			bad("session %s was revoked %d times", ch.session, n)
		}
		if n == 0 && ch.ended != 0 && !forgotten(ch.user) {
			bad("no event auth.session.revoked of session %s, ended by %s", ch.session, ch.how)
		}
		rotations := map[string]int{} // token: events
		rotated := map[string]call{}
		for _, c := range ch.refreshes {
			rotations[c.token] += by[c.trace][evRefreshed]
			if c.result == ok {
				rotated[c.token] = c
			}
		}
		for token, n := range rotations {
			if c, done := rotated[token]; n > 1 || n == 0 && done && !forgotten(ch.user) {
				bad("%d events auth.token.refreshed of one token: %s", n, c)
			}
		}
	}
	for user, calls := range h.byUser() {
		maybe, was := false, "" // of enable and disable
		for _, c := range calls {
			told := tells[c.kind]
			need := c.result == ok && len(told.success) > 0
			switch c.kind {
			case opRefresh, opLogoutAll, opRevokeSessions: // above
				need = false
			case opLogout:
				need = need && revoked[c.session] == 0 || by[c.trace][evRevoked] > 0
			case opEnable, opDisable:
				need = need && !maybe && (was == opDisable) == (c.kind == opEnable)
				if c.result != fail {
					maybe, was = maybe || c.result == unknown, c.kind
				}
			}
			if need && by[c.trace][told.success[0]] == 0 && !forgotten(user) {
				bad("no event %s: %s", told.success[0], c)
			}
			if n := by[c.trace]; n[evReplay] != n[evRevoked] && c.kind == opRefresh && !forgotten(user) {
				bad("%d replays were told and %d revocations: %s", n[evReplay], n[evRevoked], c)
			}
		}
	}
	return violations
}

// 5. A guess counts for LOCKOUT_DURATION, and a lock lasts as long: so of the
// guesses of any such time no more are checked than the threshold, unless a
// good login clears the count. An answer 401 lies after its guess, so guesses
// that were begun and answered within the time were made in it.
func checkGuesses(h *history) (violations []string) {
	const clocks = 10 * time.Millisecond // ours and PostgreSQL's need not run at one rate
	for user, calls := range h.byUser() {
		var checked, cleared []call
		for _, c := range calls {
			switch {
			case c.kind == opGuess && c.result == ok:
				violations = append(violations, "a wrong password got in: "+c.String())
			case (c.kind == opGuess || c.kind == opLogin) && c.status == 401:
				checked = append(checked, c)
			case (c.kind == opLogin || c.kind == opChangePassword || c.kind == opUnlock) && c.result != fail:
				cleared = append(cleared, c)
			}
		}
		for _, first := range checked {
			until := first.begin + h.lockout - clocks
			n, within := 0, true
			for _, c := range checked {
				if c.begin >= first.begin && c.end < until {
					n++
				}
			}
			for _, c := range cleared {
				within = within && (c.end < first.begin || c.begin > until)
			}
			if n > h.threshold && within {
				violations = append(violations, fmt.Sprintf("%d guesses of user %s were checked within %v, at most %d may be: from %s", n, user, h.lockout, h.threshold, first))
				break
			}
		}
	}
	return violations
}

// What an answer may take, beside what the machine itself takes: the contract's
// 5 s, and for a hash its wait for a slot (HASH_ACQUIRE_TIMEOUT) and its time.
// A guess waits for its turn within the request's deadline of 10 s, and is
// recorded even then.
const (
	answerTime = 5 * time.Second
	hashTime   = 3 * time.Second
	turnTime   = 7 * time.Second
	// The service closes a connection on which it could not answer in this time:
	// such a call is late, and judged by its time.
	cutTime = 15 * time.Second
)

// 6. Replicas that are up answer, in time, and with no error of their own.
func checkAnswers(h *history) (violations []string) {
	for _, c := range h.calls {
		over := func(spans []span) bool {
			return slices.ContainsFunc(spans, func(s span) bool { return s.replica == c.replica && s.overlaps(c.begin, c.end) })
		}
		dead, stopped := over(h.killed), over(h.stopped)
		if c.status >= 500 && c.status != 503 {
			violations = append(violations, "an error of the service's own: "+c.String())
		}
		if c.status == 0 && !dead && !stopped && c.end-c.begin < cutTime {
			violations = append(violations, "no answer from a replica that is up: "+c.String())
		}
		within := answerTime
		if c.hashes() {
			within += hashTime
		}
		if c.kind == opGuess {
			within += turnTime
		}
		if took := c.end - c.begin; took > within+h.slowness(c) && !stopped {
			violations = append(violations, fmt.Sprintf("took %v, want at most %v and what the machine takes, %v: %s", took, within, h.slowness(c), c))
		}
	}
	return violations
}

// slowness is what the machine may add to a call: a second, and four times what
// a request that needs nothing took on that replica meanwhile.
func (h *history) slowness(c call) time.Duration {
	worst := time.Duration(0)
	for _, s := range h.control {
		if s.replica == c.replica && s.overlaps(c.begin, c.end) {
			worst = max(worst, s.end-s.begin)
		}
	}
	return time.Second + 4*worst
}
