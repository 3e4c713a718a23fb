// Package natstest gives tests a real NATS server of their own, with
// JetStream, on 127.0.0.1. It is a process that can be killed, stopped and
// paused, and it is gone with the test process, however that ends.
package natstest

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience bounds everything here that waits for the server.
const patience = 20 * time.Second

// Options are what a server differs in from a plain one.
type Options struct {
	Config    string        // more lines of the configuration file, such as an authorization or a tls block
	JetStream string        // more lines of its jetstream block, such as "sync_interval: always"
	Scheme    string        // of URL; nats when empty
	User      *url.Userinfo // of URL
}

// Server is one NATS server. Its methods belong to the test's goroutine and
// fail the test when they do not succeed.
type Server struct {
	t       testing.TB
	bin     string
	dir     string // holds the configuration, the log and the store; removed by the janitor
	port    int
	options Options
	told    io.WriteCloser // the janitor's standard input
	process *os.Process
	exited  chan struct{} // closed once process has been waited for
}

// New starts a server without authentication.
func New(t testing.TB) *Server {
	t.Helper()
	return Start(t, Options{})
}

// Start starts a server; it is removed with its store when the test is over.
func Start(t testing.TB, options Options) *Server {
	t.Helper()
	bin, err := findBinary()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{t: t, bin: bin, options: options}
	if s.dir, err = os.MkdirTemp("", "identity-auth-natstest-"); err != nil {
		t.Fatal(err)
	}
	s.startJanitor()
	for range 5 { // another process may take a free port before the server does
		s.port = freePort(t)
		if err = s.start(); err == nil || !strings.Contains(err.Error(), "address already in use") {
			break
		}
	}
	s.must(err)
	return s
}

// findBinary returns NATS_SERVER_BIN, or what `make tools` built at the root
// of the module. Tests of nested modules find it too.
func findBinary() (string, error) {
	if bin := os.Getenv("NATS_SERVER_BIN"); bin != "" {
		return bin, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir != filepath.Dir(dir) {
		text, _ := os.ReadFile(filepath.Join(dir, "go.mod"))
		bin := filepath.Join(dir, ".bin", "nats-server")
		if _, err := os.Stat(bin); err == nil && bytes.HasPrefix(text, []byte("module github.com/7d-solutions/identity-auth\n")) {
			return bin, nil
		}
		dir = filepath.Dir(dir)
	}
	return "", errors.New("nats-server not found: run `make tools`")
}

// freePort stays below the ports that systems give to outgoing connections:
// nobody takes it while the server is down for a while.
func freePort(t testing.TB) int {
	t.Helper()
	var err error
	for range 100 {
		port := 10000 + rand.IntN(10000)
		var l net.Listener
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal(err)
	return 0
}

// janitorScript outlives the test process: its input ends when the test is
// over or when that process dies, be it of kill -9. Its last line is the
// server's pid, or empty when there is none.
const janitorScript = `
while read -r line; do pid=$line; done
if [ -n "$pid" ]; then
	kill -KILL $pid
	n=0
	while kill -0 $pid && [ $n -lt 100 ]; do sleep 0.05; n=$((n + 1)); done
fi
rm -rf "$1"`

func (s *Server) startJanitor() {
	s.t.Helper()
	cmd := exec.Command("/bin/sh", "-c", janitorScript, "janitor", s.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // out of reach of a terminal's Ctrl-C
	told, err := cmd.StdinPipe()
	s.must(err)
	s.must(cmd.Start())
	s.told = told
	s.t.Cleanup(func() {
		told.Close()
		cmd.Wait()
	})
}

// start starts the server and waits until it greets clients, which it does
// after it has recovered its streams.
func (s *Server) start() error {
	config := fmt.Sprintf("listen: \"127.0.0.1:%d\"\nserver_name: natstest\njetstream {\nstore_dir: %q\nmax_file: 1GB\nmax_mem: 64MB\n%s\n}\n%s\n",
		s.port, s.StoreDir(), s.options.JetStream, s.options.Config)
	if err := os.WriteFile(filepath.Join(s.dir, "nats.conf"), []byte(config), 0o600); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(s.dir, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(s.bin, "-c", filepath.Join(s.dir, "nats.conf"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	s.process, s.exited = cmd.Process, exited
	fmt.Fprintln(s.told, cmd.Process.Pid)
	go func() {
		cmd.Wait()
		fmt.Fprintln(s.told)
		close(exited)
	}()
	for end := time.Now().Add(patience); time.Now().Before(end) && s.running(); time.Sleep(5 * time.Millisecond) {
		if s.greets() {
			return nil
		}
	}
	text, _ := os.ReadFile(log.Name())
	return fmt.Errorf("nats-server did not start:\n%s", text[max(0, len(text)-4096):])
}

func (s *Server) greets() bool {
	conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", s.port), time.Second)
	if err != nil {
		return false
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Second))
	line, err := bufio.NewReader(conn).ReadString('\n')
	return err == nil && strings.HasPrefix(line, "INFO ") && strings.Contains(line, `"jetstream":true`)
}

func (s *Server) running() bool {
	select {
	case <-s.exited:
		return false
	default:
		return true
	}
}

// URL is the server's NATS_URL; it stays the same over restarts.
func (s *Server) URL() string {
	u := url.URL{Scheme: s.options.Scheme, User: s.options.User, Host: fmt.Sprintf("127.0.0.1:%d", s.port)}
	if u.Scheme == "" {
		u.Scheme = "nats"
	}
	return u.String()
}

// StoreDir is JetStream's directory. A test may copy it while the server is
// down, and so cut a store back to an earlier state.
func (s *Server) StoreDir() string { return filepath.Join(s.dir, "store") }

// Pid is the server's process id.
func (s *Server) Pid() int { return s.process.Pid }

// Kill ends the server with SIGKILL.
func (s *Server) Kill() { s.t.Helper(); s.end(syscall.SIGKILL) }

// Stop shuts the server down cleanly.
func (s *Server) Stop() { s.t.Helper(); s.end(syscall.SIGTERM) }

func (s *Server) end(sig syscall.Signal) {
	s.t.Helper()
	s.must(s.process.Signal(sig))
	select {
	case <-s.exited:
	case <-time.After(patience):
		s.t.Fatal("nats-server did not end")
	}
}

// Restart starts the server again, on what its store now holds, and returns
// when it takes clients; one that still runs is stopped first.
func (s *Server) Restart() {
	s.t.Helper()
	if s.running() {
		s.Stop()
	}
	s.must(s.start())
}

// Pause freezes the server: connections stay open and nothing answers.
func (s *Server) Pause() {
	s.t.Helper()
	s.must(s.process.Signal(syscall.SIGSTOP))
	var status syscall.WaitStatus // tells when the last thread has stopped
	if _, err := syscall.Wait4(s.process.Pid, &status, syscall.WUNTRACED, nil); err != nil || !status.Stopped() {
		s.t.Fatalf("pausing nats-server: %v, status %#x", err, status)
	}
}

// Resume ends a Pause.
func (s *Server) Resume() { s.t.Helper(); s.must(s.process.Signal(syscall.SIGCONT)) }

// DeleteStore removes every stream of a server that is down.
func (s *Server) DeleteStore() {
	s.t.Helper()
	if s.running() {
		s.t.Fatal("DeleteStore: the server is running")
	}
	s.must(os.RemoveAll(s.StoreDir()))
}

func (s *Server) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}
