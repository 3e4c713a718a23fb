package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// eventSchemas are the published schemas by event type, compiled by a
// validator that no one here wrote, formats included.
var eventSchemas = sync.OnceValues(func() (map[string]*jsonschema.Schema, error) {
	files, err := filepath.Glob("../../natsbus/schemas/*.json")
	schemas := map[string]*jsonschema.Schema{}
	compiler := jsonschema.NewCompiler()
	compiler.AssertFormat()
	for _, file := range files {
		if schemas[strings.TrimSuffix(filepath.Base(file), ".json")], err = compiler.Compile(file); err != nil {
			return nil, err
		}
	}
	return schemas, err
})

// checkEvents holds every event in the streams against its schema. newWorld
// runs it at the end of each test; where the test has left no NATS or no
// stream there is nothing to hold.
func (w *world) checkEvents() (published int) {
	w.t.Helper()
	schemas, err := eventSchemas()
	if err != nil {
		w.t.Fatalf("event schemas: %v", err)
	}
	conn, err := nats.Connect(w.nats.URL(), nats.Timeout(2*time.Second))
	if err != nil {
		return 0
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	seen := map[string]bool{}
	for _, name := range []string{"AUTH_EVENTS", "AUTH_SECRETS"} {
		stream, err := js.Stream(ctx, name)
		if err != nil {
			continue
		}
		info, err := stream.Info(ctx)
		if err != nil || info.State.Msgs == 0 {
			continue
		}
		consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
		if err != nil {
			w.t.Fatal(err)
		}
		messages, err := consumer.Messages()
		if err != nil {
			w.t.Fatal(err)
		}
		for range min(info.State.Msgs, 5000) {
			msg, err := messages.Next(jetstream.NextContext(ctx))
			if err != nil {
				w.t.Fatalf("%s: %v", name, err)
			}
			published++
			w.checkEvent(schemas, msg, seen)
		}
		messages.Stop()
	}
	return published
}

func (w *world) checkEvent(schemas map[string]*jsonschema.Schema, msg jetstream.Msg, seen map[string]bool) {
	w.t.Helper()
	var event struct {
		EventID   string `json:"event_id"`
		EventType string `json:"event_type"`
	}
	if err := json.Unmarshal(msg.Data(), &event); err != nil {
		w.t.Errorf("event is no JSON object: %q", msg.Data())
		return
	}
	schema := schemas[event.EventType]
	if schema == nil {
		w.t.Errorf("event type %q has no schema", event.EventType)
		return
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(msg.Data()))
	if err == nil {
		err = schema.Validate(value)
	}
	if err != nil {
		w.t.Errorf("event does not hold against its schema: %v\n%s", err, msg.Data())
	}
	if got := msg.Headers().Get("Nats-Msg-Id"); got != event.EventID || seen[got] {
		w.t.Errorf("event %s: Nats-Msg-Id %q, seen before %v", event.EventID, got, seen[got])
	}
	seen[event.EventID] = true
}

// Every type that the endpoints and operators can cause is published, and held
// against its schema.
func TestEveryEventHasItsSchema(t *testing.T) {
	w := newWorld(t)
	admin := freePort(t)
	s := w.start(unlimited, env{"ADMIN_ADDR": "127.0.0.1:" + admin, "ADMIN_TOKEN": strings.Repeat("t", 32), "LOCKOUT_THRESHOLD": "1", "MAX_SESSIONS_PER_USER": "1"})
	p := s.register()
	s.login(p)
	tok := s.login(p) // the first session goes with reason limit
	s.refresh(tok.RefreshToken).tokens(t)
	s.refresh(tok.RefreshToken) // a replay
	tok = s.login(p)
	s.post("/api/auth/logout", map[string]string{"refresh_token": tok.RefreshToken})
	tok = s.login(p)
	changed := p
	changed.Password = "another horse battery staple"
	if a := s.post("/api/auth/password", map[string]string{"current_password": p.Password, "new_password": changed.Password}, "Authorization", "Bearer "+tok.AccessToken); a.status != 200 {
		t.Fatalf("password change: %d %s", a.status, a.body)
	}
	s.post("/api/auth/forgot-password", map[string]string{"tenant_id": p.TenantID, "email": p.Email})
	s.do("POST", "/api/auth/login", p.loginBody("wrong")) // locks
	s.base = "http://127.0.0.1:" + admin
	account := "/api/admin/tenants/" + p.TenantID + "/users/" + p.UserID
	for _, step := range []struct {
		action string
		body   any
	}{
		{"disable", nil}, {"enable", nil}, {"unlock", nil}, {"set-email", map[string]string{"email": "other@example.com"}},
		{"set-claims", map[string]any{"claims": map[string]any{"roles": []string{"x"}}}}, {"force-reset", nil},
	} {
		body := []byte(nil)
		if step.body != nil {
			body = toJSON(step.body)
		}
		if a := s.do("POST", account+"/"+step.action, body, "Authorization", "Bearer "+strings.Repeat("t", 32)); a.status != 200 {
			t.Fatalf("%s: %d %s", step.action, a.status, a.body)
		}
	}
	if a := s.do("DELETE", account, nil, "Authorization", "Bearer "+strings.Repeat("t", 32)); a.status != 200 {
		t.Fatalf("delete: %d %s", a.status, a.body)
	}
	const want = 13 // distinct types; imported ones have a test of their own
	eventually(t, "all events are in the streams", 20*time.Second, func() bool {
		types := map[string]bool{}
		for line := range strings.Lines(string(s.get("/metrics").body)) {
			if rest, ok := strings.CutPrefix(line, "auth_events_published_total{type="); ok && !strings.HasSuffix(strings.TrimSpace(rest), " 0") {
				types[rest[:strings.Index(rest, "}")]] = true
			}
		}
		return len(types) >= want
	})
	if n := w.checkEvents(); n < want {
		t.Errorf("%d events published", n)
	}
}
