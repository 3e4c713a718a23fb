package natstest_test

import (
	"bufio"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// say opens a connection, sends one line and returns the first line of the
// answer after the greeting.
func say(t *testing.T, s *natstest.Server, line string, patience time.Duration) (string, error) {
	t.Helper()
	u, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", u.Host)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprintf(conn, "%s\r\n", line)
	r := bufio.NewReader(conn)
	if _, err := r.ReadString('\n'); err != nil {
		return "", err
	}
	return r.ReadString('\n')
}

const (
	soon = 10 * time.Second
	ping = `CONNECT {"verbose":false}` + "\r\nPING"
)

func TestFaults(t *testing.T) {
	s := natstest.New(t)
	answers := func(when string) {
		t.Helper()
		if got, err := say(t, s, ping, soon); got != "PONG\r\n" {
			t.Fatalf("%s: got %q, %v, want PONG", when, got, err)
		}
	}
	answers("new")
	url := s.URL()

	s.Pause()
	if got, err := say(t, s, ping, 100*time.Millisecond); err == nil {
		t.Errorf("paused: got %q, want a timeout", got)
	}
	s.Resume()
	answers("resumed")

	s.Kill()
	if _, err := say(t, s, ping, soon); err == nil {
		t.Error("a killed server takes connections")
	}
	marker := filepath.Join(s.StoreDir(), "jetstream", "marker")
	if err := os.WriteFile(marker, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.Restart()
	answers("restarted after kill")
	if s.URL() != url {
		t.Errorf("URL after restart: got %s, want %s", s.URL(), url)
	}
	s.Restart()
	s.Stop()
	if _, err := os.Stat(marker); err != nil {
		t.Errorf("the store did not survive restarts: %v", err)
	}
	s.DeleteStore()
	s.Restart()
	if _, err := os.Stat(marker); err == nil {
		t.Error("the store survived DeleteStore")
	}
	s.Pause() // the cleanup copes
}

func TestOptions(t *testing.T) {
	s := natstest.Start(t, natstest.Options{
		Config:    `authorization { user: alice, password: "correct horse" }`,
		JetStream: `sync_interval: always`,
		User:      url.UserPassword("alice", "correct horse"),
	})
	if !strings.HasPrefix(s.URL(), "nats://alice:correct%20horse@127.0.0.1:") {
		t.Errorf("URL: got %s", s.URL())
	}
	if got, _ := say(t, s, ping, soon); !strings.Contains(got, "Authorization Violation") {
		t.Errorf("without a password: got %q, want an authorization error", got)
	}
	if got, _ := say(t, s, `CONNECT {"verbose":false,"user":"alice","pass":"correct horse"}`+"\r\nPING", soon); got != "PONG\r\n" {
		t.Errorf("with the password: got %q, want PONG", got)
	}
}

// TestNothingOutlivesTheTests kills a test process whose server is frozen.
func TestNothingOutlivesTheTests(t *testing.T) {
	const victim = "NATSTEST_VICTIM"
	if os.Getenv(victim) != "" {
		s := natstest.New(t)
		fmt.Println(s.StoreDir())
		fmt.Println(s.URL())
		s.Pause()
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), victim+"=1")
	out, err := cmd.Output()
	lines := strings.Fields(string(out))
	if err == nil || len(lines) != 2 {
		t.Fatalf("victim: got %v, %q, want its death after two lines", err, out)
	}
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Dir(lines[0])); err != nil { // removed after the server has ended
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s is still there", lines[0])
		}
	}
	if conn, err := net.Dial("tcp", strings.TrimPrefix(lines[1], "nats://")); err == nil {
		conn.Close()
		t.Errorf("%s still takes connections", lines[1])
	}
}
