package e2e

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"
)

// client is one of the concurrent users of the service. It never has two
// changes of one account under way, but for refreshes that race on purpose.
type client struct {
	*recorder
	name     string
	rng      *rand.Rand
	accounts []*knownAccount
	all      []*knownAccount // that it has asked to register
	settled  bool            // no fault comes any more, and nothing is under way
	refused  bool            // the last call found the service busy or away
}

// knownAccount is what its client knows of it.
type knownAccount struct {
	person
	next     int // passwords made so far
	disabled bool
	sessions []*knownSession
}

type knownSession struct {
	id     string
	token  string // the newest one known
	spent  []string
	bearer string
}

func newClient(r *recorder, name string, seed uint64) *client {
	var sum uint64
	for _, c := range name {
		sum = sum*31 + uint64(c)
	}
	return &client{recorder: r, name: name, rng: rand.New(rand.NewPCG(seed, sum))}
}

func (c *client) as(kind string, a *knownAccount) call {
	return call{kind: kind, client: c.name, replica: c.rng.IntN(len(c.base)), user: a.UserID}
}

func (c *client) do(made call, method, path string, body any, bearer string) call {
	made = c.recorder.do(made, method, path, body, bearer)
	c.refused = made.status == 503 || made.status == 0
	return made
}

func (c *client) pause(longest time.Duration) {
	time.Sleep(time.Duration(c.rng.Int64N(int64(longest))))
}

// live uses accounts of its own until stop is closed.
func (c *client) live(stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		c.step()
		c.pause(30 * time.Millisecond)
		if c.refused {
			c.pause(300 * time.Millisecond)
		}
	}
}

func (c *client) step() {
	dice := c.rng.IntN(100)
	if len(c.accounts) == 0 || dice < 2 && len(c.accounts) < 5 {
		c.register()
		return
	}
	a := c.accounts[c.rng.IntN(len(c.accounts))]
	if a.disabled {
		if c.operate(opEnable, a).result == ok {
			a.disabled = false
		}
		return
	}
	if len(a.sessions) == 0 || dice < 14 && len(a.sessions) < 4 {
		c.login(a)
		return
	}
	s := a.sessions[c.rng.IntN(len(a.sessions))]
	switch {
	case dice < 73:
		c.refresh(a, s)
	case dice < 76:
		c.race(a, s)
	case dice < 78:
		c.replay(a, s)
	case dice < 84:
		call := c.as(opLogout, a)
		call.session, call.token = s.id, s.token
		call = c.do(call, http.MethodPost, "/api/auth/logout", map[string]string{"refresh_token": s.token}, "")
		if call.result != fail {
			a.drop(s)
		}
	case dice < 87:
		call := c.as(opListSessions, a)
		call.session = s.id
		if c.do(call, http.MethodGet, "/api/auth/sessions", nil, s.bearer).status == 401 {
			a.drop(s)
		}
	case dice < 90:
		c.changePassword(a, s)
	case dice < 92:
		call := c.as(opLogoutAll, a)
		call.session = s.id
		if call = c.do(call, http.MethodPost, "/api/auth/logout-all", nil, s.bearer); call.result != fail {
			a.sessions = nil
		} else {
			a.drop(s)
		}
	case dice < 94:
		if c.operate(opRevokeSessions, a).result != fail {
			a.sessions = nil
		}
	case dice < 96:
		if c.operate(opDisable, a).result != fail {
			a.sessions, a.disabled = nil, true
		}
	case dice < 98:
		c.operate(opSetClaims, a)
	case dice < 99:
		if c.operate(opDeleteAccount, a).result != fail {
			c.forget(a)
		}
	default: // goes on without its client
		c.forget(a)
	}
}

func (c *client) forget(a *knownAccount) {
	c.accounts = slices.DeleteFunc(c.accounts, func(b *knownAccount) bool { return a == b })
}

func (a *knownAccount) drop(s *knownSession) {
	a.sessions = slices.DeleteFunc(a.sessions, func(t *knownSession) bool { return s == t })
}

// password is a strong one that the account has not had.
func (a *knownAccount) password() string {
	a.next++
	return fmt.Sprintf("%s of %s, number %d", password, a.UserID[:8], a.next)
}

func (c *client) register() *knownAccount {
	id := newUUID()
	a := &knownAccount{person: person{TenantID: newUUID(), UserID: id, Email: fmt.Sprintf("%s-%d-%s@example.com", c.name, len(c.all), id[:8])}}
	a.Password = a.password()
	c.all = append(c.all, a)
	call := c.as(opRegister, a)
	call.right = a.Password
	if call = c.do(call, http.MethodPost, "/api/auth/register", a.person, ""); call.result != ok {
		return nil
	}
	c.accounts = append(c.accounts, a)
	return a
}

func (c *client) login(a *knownAccount) call {
	return c.loginWith(a, a.Password)
}

func (c *client) loginWith(a *knownAccount, password string) call {
	call := c.as(opLogin, a)
	call.right, call.last = password, c.settled
	call = c.do(call, http.MethodPost, "/api/auth/login", map[string]string{"tenant_id": a.TenantID, "email": a.Email, "password": password}, "")
	if call.result == ok {
		a.sessions = append(a.sessions, &knownSession{id: call.gotSession, token: call.got, bearer: call.bearer})
	}
	return call
}

// guess is a login with a wrong password.
func (c *client) guess(a *knownAccount, replica int) call {
	call := c.as(opGuess, a)
	call.replica, call.right = replica, "not the password of this account"
	return c.do(call, http.MethodPost, "/api/auth/login", map[string]string{"tenant_id": a.TenantID, "email": a.Email, "password": call.right}, "")
}

func (c *client) present(a *knownAccount, s *knownSession, token string, replica int) call {
	call := c.as(opRefresh, a)
	call.replica, call.session, call.token, call.last = replica, s.id, token, c.settled
	return c.do(call, http.MethodPost, "/api/auth/refresh", map[string]string{"refresh_token": token}, "")
}

// refresh presents the newest token. Without an answer it stays the newest that
// is known: it may be spent by now, and the next refresh a replay.
func (c *client) refresh(a *knownAccount, s *knownSession) {
	c.took(a, s, c.present(a, s, s.token, c.rng.IntN(len(c.base))))
}

func (c *client) took(a *knownAccount, s *knownSession, call call) {
	switch {
	case call.result == ok && call.got != s.token:
		s.spent = append(s.spent, s.token)
		s.token, s.bearer = call.got, call.bearer
	case call.status == 401:
		a.drop(s)
	}
}

// race presents one token several times at once.
func (c *client) race(a *knownAccount, s *knownSession) {
	calls := make([]call, 2+c.rng.IntN(3))
	token, offset := s.token, c.rng.IntN(len(c.base))
	sub := make([]*client, len(calls)) // chance is for one goroutine
	for i := range sub {
		sub[i] = &client{recorder: c.recorder, name: c.name, rng: rand.New(rand.NewPCG(c.rng.Uint64(), 0))}
	}
	together(len(calls), func(i int) { calls[i] = sub[i].present(a, s, token, (offset+i)%len(c.base)) })
	for _, call := range calls {
		c.took(a, s, call)
	}
}

// replay presents a token that was spent before the last one was.
func (c *client) replay(a *knownAccount, s *knownSession) {
	if len(s.spent) < 2 {
		return
	}
	old := s.spent[c.rng.IntN(len(s.spent)-1)]
	if c.present(a, s, old, c.rng.IntN(len(c.base))).result != fail {
		return
	}
	c.refresh(a, s) // must be refused now
}

func (c *client) changePassword(a *knownAccount, s *knownSession) {
	call := c.as(opChangePassword, a)
	call.session, call.right, call.next = s.id, a.Password, a.password()
	call = c.do(call, http.MethodPost, "/api/auth/password", map[string]string{"current_password": call.right, "new_password": call.next}, s.bearer)
	switch {
	case call.result == ok:
		a.Password = call.next
		a.sessions = []*knownSession{{id: s.id, token: call.got, bearer: call.bearer}}
	case call.result == unknown: // either password may be right now: left to the end
		c.forget(a)
	case call.status == 401:
		a.drop(s)
	}
}

func (c *client) operate(kind string, a *knownAccount) call {
	path := "/api/admin/tenants/" + a.TenantID + "/users/" + a.UserID
	call := c.as(kind, a)
	call.last = c.settled
	switch kind {
	case opDeleteAccount:
		return c.do(call, http.MethodDelete, path, nil, "")
	case opSetClaims:
		return c.do(call, http.MethodPost, path+"/"+kind, map[string]any{"claims": map[string]any{"n": c.rng.IntN(1000)}}, "")
	}
	return c.do(call, http.MethodPost, path+"/"+kind, nil, "")
}

// attack guesses at one account, in bursts over all replicas, until stop is
// closed.
func (c *client) attack(a *knownAccount, stop <-chan struct{}) {
	for {
		burst := 6 + c.rng.IntN(8)
		seeds := c.rng.Uint64()
		var all sync.WaitGroup
		for i := range burst {
			sub := &client{recorder: c.recorder, name: c.name, rng: rand.New(rand.NewPCG(seeds, uint64(i)))}
			all.Go(func() { sub.guess(a, i%len(c.base)) })
		}
		all.Wait()
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(c.rng.Int64N(int64(1500 * time.Millisecond)))):
		}
	}
}
