package auth

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/7d-solutions/identity-auth/db"
)

// A panic is one 500 that tells nothing, and one ERROR line that tells all;
// the server goes on.
func TestPanicIsOneAnswer(t *testing.T) {
	var log bytes.Buffer
	s := &Server{
		log:     NewLogger(&log, slog.LevelInfo),
		metrics: newMetrics(Build{}, func() db.PoolStats { return db.PoolStats{} }, servedRoutes()),
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /early", func(http.ResponseWriter, *http.Request) { panic(errors.New("secret of the inside")) })
	mux.HandleFunc("GET /late", func(w http.ResponseWriter, _ *http.Request) {
		w.Write([]byte("half an ans"))
		panic("too late")
	})
	mux.HandleFunc("GET /good", func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("good")) })
	server := httptest.NewServer(s.wrap(mux, nil))
	defer server.Close()

	get := func(path string) (int, string, error) {
		t.Helper()
		resp, err := http.Get(server.URL + path)
		if err != nil {
			return 0, "", err
		}
		defer resp.Body.Close()
		var body bytes.Buffer
		_, err = body.ReadFrom(resp.Body)
		return resp.StatusCode, body.String(), err
	}
	status, body, err := get("/early")
	var p problemJSON
	if err != nil || status != http.StatusInternalServerError || json.Unmarshal([]byte(body), &p) != nil || p.Code != "internal" || strings.Contains(body, "inside") {
		t.Errorf("panic before an answer: got %d %s, %v, want 500 internal without its cause", status, body, err)
	}
	if lines := strings.Count(log.String(), "\n"); lines != 1 {
		t.Errorf("log lines: got %d, want 1:\n%s", lines, log.String())
	}
	for _, want := range []string{`"level":"ERROR"`, `"event":"http.panic"`, "secret of the inside", `"stack":`, p.TraceID} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the line lacks %q: %s", want, log.String())
		}
	}
	if status, body, err := get("/late"); err == nil {
		t.Errorf("panic in the middle of an answer: got %d %q as if it were whole, want the connection cut", status, body)
	}
	if status, body, err := get("/good"); status != http.StatusOK || body != "good" || err != nil {
		t.Errorf("after the panics: got %d %q, %v", status, body, err)
	}
}
