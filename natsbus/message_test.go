package natsbus

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Every event type has a schema and every schema is one of a type, strict from
// top to bottom. Validators hold events against them in testdata/e2e.
func TestSchemas(t *testing.T) {
	files, err := filepath.Glob("schemas/*")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for eventType := range subjects {
		want = append(want, "schemas/"+string(eventType)+".json")
	}
	slices.Sort(want)
	if !slices.Equal(files, want) {
		t.Errorf("got %q, want %q", files, want)
	}
	type object struct {
		Additional *bool `json:"additionalProperties"`
		Required   []string
		Properties map[string]json.RawMessage
	}
	strict := func(t *testing.T, o object) {
		t.Helper()
		if o.Additional == nil || *o.Additional || len(o.Required) != len(o.Properties) {
			t.Errorf("not strict: %d of %d members are required, additional ones allowed unless false: %v", len(o.Required), len(o.Properties), o.Additional)
		}
	}
	for _, file := range files {
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var schema struct {
				Schema string `json:"$schema"`
				object
			}
			if err := json.Unmarshal(text, &schema); err != nil {
				t.Fatal(err)
			}
			if schema.Schema != "https://json-schema.org/draft/2020-12/schema" {
				t.Errorf("$schema: got %q", schema.Schema)
			}
			strict(t, schema.object)
			eventType := strings.TrimSuffix(filepath.Base(file), ".json")
			if got, want := string(schema.Properties["event_type"]), `{"const": "`+eventType+`"}`; got != want {
				t.Errorf("event_type: got %s, want %s", got, want)
			}
			var data object
			if err := json.Unmarshal(schema.Properties["data"], &data); err != nil {
				t.Fatal(err)
			}
			strict(t, data)
			event, err := json.Marshal(envelope{})
			if err != nil {
				t.Fatal(err)
			}
			var members map[string]any
			if err := json.Unmarshal(event, &members); err != nil {
				t.Fatal(err)
			}
			for name := range members {
				if !slices.Contains(schema.Required, name) {
					t.Errorf("the schema does not know %s", name)
				}
			}
			if len(members) != len(schema.Required) {
				t.Errorf("got %d members, want %d", len(members), len(schema.Required))
			}
		})
	}
}

func TestSubjects(t *testing.T) {
	for eventType, subject := range subjects {
		pattern := map[string]string{eventsStream: "auth.events.>", secretsStream: "auth.secrets.>"}[streamOf(eventType)]
		if !covers(pattern, subject) {
			t.Errorf("%s goes to %s, which its stream does not have", eventType, subject)
		}
	}
	for _, t2 := range db.EventTypes {
		if subjects[t2] == "" {
			t.Errorf("%s has no subject", t2)
		}
	}
}

func TestCovers(t *testing.T) {
	for _, c := range []struct {
		pattern, subject string
		want             bool
	}{
		{"a.b.>", "a.b", false},
		{"a.b.*", "a.b.c.d", false},
		{"a.*", "a", false},
		{"a.b", "a.b.c", false},
		{"a.b.c", "a.b", false},
		{"b.>", "a.b", false},
		{"", "a", false},
		{">", "a.b", true},
		{"a.>", "a.b.c", true},
		{"*.b.*", "a.b.c", true},
		{"a.b.c", "a.b.c", true},
	} {
		if got := covers(c.pattern, c.subject); got != c.want {
			t.Errorf("covers(%q, %q): got %v, want %v", c.pattern, c.subject, got, c.want)
		}
	}
}

func TestTraceparent(t *testing.T) {
	for trace, want := range map[string]string{
		"":                                     "",
		"4bf92f3577b34da6a3ce929d0e0e473":      "",
		"4bf92f3577b34da6a3ce929d0e0e47366":    "",
		"4bf92f3577b34da6a3ce929d0e0e473g":     "",
		"00000000000000000000000000000000":     "",
		"4bf92f3577b34da6a3ce929d0e0e4736":     "00-4bf92f3577b34da6a3ce929d0e0e4736-",
		"4BF92F35-77B3-4DA6-A3CE-929D0E0E4736": "00-4bf92f3577b34da6a3ce929d0e0e4736-",
	} { // TestMessage has the span
		got, ok := traceparent(trace, db.EventID{})
		if ok != (want != "") || !strings.HasPrefix(got, want) {
			t.Errorf("traceparent(%q): got %q, %v, want %q", trace, got, ok, want)
		}
	}
}

// newTestRelayer has one message of a lane of two under way.
func newTestRelayer() (r *relayer, msg *nats.Msg, row db.OutboxRow) {
	bus := &Bus{
		log:     slog.New(slog.NewJSONHandler(io.Discard, nil)),
		obs:     Observer{Published: func(string) {}, PublishFailed: func(string) {}},
		cutBack: map[string]uint64{},
	}
	row = db.OutboxRow{Seq: 5, Type: db.EventLockout}
	msg = &nats.Msg{}
	r = &relayer{
		Bus: bus, live: 1, held: map[db.Lane]backoff{}, acks: map[string][]db.Ack{},
		streams:  map[string]*streamMark{eventsStream: {generation: 1, lastSeq: 10}},
		underWay: map[*nats.Msg]*flight{msg: {rows: []db.OutboxRow{row, {Seq: 6, Type: db.EventLockout}}, after: 10}},
	} // leaseEnds is zero: the lane's second row is not published
	return r, msg, row
}

// What an answer means, row by row.
func TestSettle(t *testing.T) {
	for _, c := range []struct {
		name string
		ack  *jetstream.PubAck
		err  error
		want string
	}{
		{"error", nil, errors.New("no"), "held"},
		{"another stream's acknowledgement", &jetstream.PubAck{Stream: "OTHER", Sequence: 11}, nil, "held"},
		{"a place given out before", &jetstream.PubAck{Stream: eventsStream, Sequence: 10}, nil, "cut back"},
		{"a second copy", &jetstream.PubAck{Stream: eventsStream, Sequence: 3, Duplicate: true}, nil, "recorded"},
		{"stored", &jetstream.PubAck{Stream: eventsStream, Sequence: 12}, nil, "recorded"},
	} {
		r, msg, row := newTestRelayer()
		r.acks[eventsStream] = []db.Ack{{Seq: 1, StreamSeq: 9}}
		err := r.settle(result{msg, c.ack, c.err})
		got := "nothing"
		switch acks := r.acks[eventsStream]; {
		case errors.Is(err, errDrop) && len(acks) == 0 && r.cutBack[eventsStream] == 9:
			got = "cut back"
		case err != nil:
		case r.held[row.Lane()].until.After(time.Now()) && len(acks) == 1:
			got = "held"
		case len(acks) == 2 && acks[1] == db.Ack{Seq: 5, StreamSeq: int64(c.ack.Sequence)} && len(r.held) == 0:
			got = "recorded"
		}
		if got != c.want || r.live != 0 || len(r.underWay) != 0 {
			t.Errorf("%s: got %s (%v), %d live, %d under way; want %s, none, none", c.name, got, err, r.live, len(r.underWay), c.want)
		}
	}
}

// The same row is tried again after 100 ms to 5 s, without end, and a success
// begins anew.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _, row := newTestRelayer()
		var waits []time.Duration
		for range 30 {
			r.hold(row, errors.New("no"))
			wait := time.Until(r.held[row.Lane()].until)
			waits = append(waits, wait)
			if wait < 100*time.Millisecond || wait > 5*time.Second {
				t.Errorf("got a wait of %v", wait)
			}
			if len(r.excluded()) != 2 { // the held lane, and the same under way
				t.Error("a lane that waits is not excluded")
			}
			time.Sleep(wait)
		}
		if waits[0] > 200*time.Millisecond || waits[29] < 2500*time.Millisecond {
			t.Errorf("got %v first and %v last, want them to grow", waits[0], waits[29])
		}
		if slices.Min(waits[10:]) == slices.Max(waits[10:]) {
			t.Error("no jitter")
		}
		clear(r.underWay)
		if len(r.excluded()) != 0 {
			t.Error("a lane whose time is over is excluded")
		}
		time.Sleep(2 * time.Minute)
		r.excluded()
		if len(r.held) != 0 {
			t.Error("a lane without rows is remembered for ever")
		}
	})
}

func TestSampler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s sampler
		count := func(texts ...string) (n int) {
			for i := range 1000 { // 20 s
				if s.take(texts[i%len(texts)]) {
					n++
				}
				time.Sleep(20 * time.Millisecond)
			}
			return n
		}
		if n := count("a"); n != 2 {
			t.Errorf("one text for 20 s: got %d lines, want 2", n)
		}
		if n := count("b", "c"); n > 20 {
			t.Errorf("two texts for 20 s: got %d lines, want one a second at most", n)
		}
	})
}
