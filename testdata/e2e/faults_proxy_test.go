package e2e

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"
)

// proxy stands between the replicas and one PostgreSQL and knows enough of the
// wire protocol to break it where it hurts.
type proxy struct {
	listener net.Listener

	mu     sync.Mutex // guards the rest
	passes *sync.Cond // signalled when silent ends
	target string     // host:port; "" refuses
	silent bool       // takes connections and bytes, and passes nothing on
	cuts   float64    // chance that the answer to a commit is cut off
	done   int        // how many were
	conns  map[*proxied]struct{}
}

// proxied is one connection.
type proxied struct {
	p              *proxy
	client, server net.Conn
	muted          bool // guarded by p.mu: what the server says is dropped, and its next ReadyForQuery ends the connection
	idle           bool // guarded by p.mu: outside a transaction
}

func newProxy(t *testing.T) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: l, conns: map[*proxied]struct{}{}}
	p.passes = sync.NewCond(&p.mu)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(conn)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		p.pointAt("")
		p.hang(false)
		p.reset()
	})
	return p
}

// pointAt makes new connections go to the server of a DATABASE_URL.
func (p *proxy) pointAt(database string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = ""
	if u, err := url.Parse(database); err == nil {
		p.target = u.Host
	}
}

// hang makes the proxy accept and never answer, or ends that: what had been
// said meanwhile is passed on.
func (p *proxy) hang(silent bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent = silent
	p.passes.Broadcast()
}

// cut makes the given share of commits lose their answer.
func (p *proxy) cut(share float64) (done int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cuts = share
	done, p.done = p.done, 0
	return done
}

// reset closes every connection.
func (p *proxy) reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.close()
	}
}

func (c *proxied) close() {
	c.client.Close()
	if c.server != nil {
		c.server.Close()
	}
}

// await waits while the proxy is silent.
func (p *proxy) await() (target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.silent {
		p.passes.Wait()
	}
	return p.target
}

func (p *proxy) serve(client net.Conn) {
	c := &proxied{p: p, client: client, idle: true}
	p.mu.Lock()
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		c.close()
		delete(p.conns, c)
	}()
	target := p.await()
	if target == "" {
		return
	}
	server, err := net.DialTimeout("tcp", target, 10*time.Second)
	if err != nil {
		return
	}
	p.mu.Lock()
	c.server = server
	p.mu.Unlock()
	go func() {
		c.answers()
		p.mu.Lock()
		defer p.mu.Unlock()
		c.close()
	}()
	c.requests()
}

// readMessage reads one message of the protocol, with its type unless it is
// the first one of a connection, which has none.
func readMessage(r *bufio.Reader, first bool) ([]byte, error) {
	head := 5
	if first {
		head = 4
	}
	msg := make([]byte, head)
	if _, err := io.ReadFull(r, msg); err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint32(msg[head-4:]))
	if size < 4 || size > 1<<26 {
		return nil, io.ErrUnexpectedEOF
	}
	msg = append(msg, make([]byte, size-4)...)
	_, err := io.ReadFull(r, msg[head:])
	return msg, err
}

// requests passes on what the client says. The message that commits is a COMMIT
// in a transaction, or outside one the Sync after an Execute.
func (c *proxied) requests() {
	r, w := bufio.NewReader(c.client), bufio.NewWriter(c.server)
	executed := false
	for first := true; ; first = false {
		msg, err := readMessage(r, first)
		if err != nil {
			return
		}
		c.p.await()
		commits := false
		if !first {
			switch msg[0] {
			case 'E':
				executed = true
			case 'S':
				commits = executed && c.isIdle()
				executed = false
			case 'Q':
				commits = bytes.EqualFold(bytes.TrimRight(msg[5:], "\x00"), []byte("commit"))
			}
		}
		atOnce := commits && c.drawCut()
		w.Write(msg)
		if r.Buffered() == 0 || commits {
			if w.Flush() != nil {
				return
			}
		}
		if atOnce {
			return // PostgreSQL reads it all the same
		}
	}
}

func (c *proxied) isIdle() bool {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	return c.idle
}

// drawCut decides whether a commit loses its answer: by a connection that is
// closed as soon as the commit was sent, or once it has been answered.
func (c *proxied) drawCut() (atOnce bool) {
	c.p.mu.Lock()
	defer c.p.mu.Unlock()
	if c.p.cuts == 0 || rand.Float64() >= c.p.cuts {
		return false
	}
	c.p.done++
	c.muted = true
	return rand.IntN(3) == 0
}

// answers passes on what the server says.
func (c *proxied) answers() {
	r, w := bufio.NewReader(c.server), bufio.NewWriter(c.client)
	for {
		msg, err := readMessage(r, false)
		if err != nil {
			return
		}
		c.p.await()
		c.p.mu.Lock()
		muted := c.muted
		if msg[0] == 'Z' {
			c.idle = msg[5] == 'I'
		}
		c.p.mu.Unlock()
		if muted && msg[0] == 'Z' {
			return
		}
		if muted {
			continue
		}
		w.Write(msg)
		if r.Buffered() == 0 && w.Flush() != nil {
			return
		}
	}
}
