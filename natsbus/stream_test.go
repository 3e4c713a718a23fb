package natsbus_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/natsbus"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
	"github.com/nats-io/nats.go/jetstream"
)

func info(w *world, js jetstream.JetStream, stream string) *jetstream.StreamInfo {
	w.Helper()
	s, err := js.Stream(w.Context(), stream)
	if err != nil {
		w.Fatal(err)
	}
	return s.CachedInfo()
}

func TestStreamIsMade(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.start(func(c *natsbus.Config) { c.SecretsMaxAge = 5 * time.Minute })
	w.within(3*time.Second, "up", w.bus.Up)
	js := w.jetStream()
	for name, want := range map[string]jetstream.StreamConfig{
		"AUTH_EVENTS":  {Subjects: []string{"auth.events.>"}, MaxAge: 14 * 24 * time.Hour, Duplicates: 10 * time.Minute},
		"AUTH_SECRETS": {Subjects: []string{"auth.secrets.>"}, MaxAge: 5 * time.Minute, Duplicates: 5 * time.Minute},
	} {
		got := info(w, js, name).Config
		if !slices.Equal(got.Subjects, want.Subjects) || got.MaxAge != want.MaxAge || got.Duplicates != want.Duplicates || got.Storage != jetstream.FileStorage || got.Replicas != 1 {
			t.Errorf("%s: got %+v", name, got)
		}
	}

	// Another PASSWORD_RESET_TTL, and the feature off.
	w.stop()
	w.start(func(c *natsbus.Config) { c.SecretsMaxAge = time.Hour })
	w.within(3*time.Second, "the new age", func() bool { return info(w, js, "AUTH_SECRETS").Config.MaxAge == time.Hour })
	w.stop()
	if err := js.DeleteStream(t.Context(), "AUTH_SECRETS"); err != nil {
		t.Fatal(err)
	}
	w.start()
	w.within(3*time.Second, "up", w.bus.Up)
	if _, err := js.Stream(t.Context(), "AUTH_SECRETS"); err == nil {
		t.Error("AUTH_SECRETS was made with PASSWORD_RESET_TTL = 0")
	}
}

func TestStreamIsWidened(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	js := w.jetStream()
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "AUTH_EVENTS", Subjects: []string{"auth.events.*", "auth.events.user.*", "audit.>"},
		Description: "ours", MaxMsgs: 1234, MaxAge: time.Hour, Duplicates: time.Minute, DenyDelete: true, Compression: jetstream.S2Compression,
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "auth.events.old", nil); err != nil {
		t.Fatal(err)
	}
	w.write("1")
	w.start()
	w.drained(5 * time.Second)
	got := info(w, js, "AUTH_EVENTS")
	if !slices.Equal(got.Config.Subjects, []string{"audit.>", "auth.events.>"}) {
		t.Errorf("subjects: got %q", got.Config.Subjects)
	}
	if c := got.Config; c.Description != "ours" || c.MaxMsgs != 1234 || c.MaxAge != time.Hour || c.Duplicates != time.Minute || !c.DenyDelete || c.Compression != jetstream.S2Compression {
		t.Errorf("the operator's settings changed: got %+v", c)
	}
	if got.State.Msgs != 2 {
		t.Errorf("got %d messages, want the old one and ours", got.State.Msgs)
	}
	if n := len(w.log.of("nats.stream_widened")); n != 1 {
		t.Errorf("got %d lines, want 1:\n%s", n, w.log)
	}
}

func TestUnsafeStream(t *testing.T) {
	ours := []string{"auth.events.>"}
	for _, c := range []struct {
		name, field string
		stream      jetstream.StreamConfig
		seal        bool
	}{
		{name: "memory", field: "storage", stream: jetstream.StreamConfig{Subjects: ours, Storage: jetstream.MemoryStorage}},
		{name: "first version's, in memory", field: "storage", stream: jetstream.StreamConfig{Subjects: []string{"auth.events.*"}, Storage: jetstream.MemoryStorage}},
		{name: "asynchronous", field: "persist_mode", stream: jetstream.StreamConfig{Subjects: ours, PersistMode: jetstream.AsyncPersistMode}},
		{name: "foreign subjects", field: "subjects", stream: jetstream.StreamConfig{Subjects: []string{"orders.>"}}},
		{name: "some subjects", field: "subjects", stream: jetstream.StreamConfig{Subjects: []string{"auth.events.user.*", "auth.events.session.*", "auth.events.token.*"}}},
		{name: "mirror", field: "subjects", stream: jetstream.StreamConfig{Mirror: &jetstream.StreamSource{Name: "SOURCE"}}},
		{name: "another stream has them", field: "subjects", stream: jetstream.StreamConfig{Name: "OTHER", Subjects: []string{"auth.events.user.>"}}},
		{name: "no acknowledgements", field: "no_ack", stream: jetstream.StreamConfig{Subjects: ours, NoAck: true}},
		{name: "sealed", field: "sealed", stream: jetstream.StreamConfig{Subjects: ours}, seal: true},
		{name: "transformed", field: "subject_transform", stream: jetstream.StreamConfig{Subjects: ours, SubjectTransform: &jetstream.SubjectTransformConfig{Source: ">", Destination: "x.>"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, natstest.New(t))
			js := w.jetStream()
			if c.stream.Name == "" {
				c.stream.Name = "AUTH_EVENTS"
			}
			if c.stream.Mirror != nil {
				if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "SOURCE", Subjects: []string{"source"}}); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := js.CreateStream(t.Context(), c.stream); err != nil {
				t.Fatal(err)
			}
			if c.seal {
				c.stream.Sealed = true
				if _, err := js.UpdateStream(t.Context(), c.stream); err != nil {
					t.Fatal(err)
				}
			}
			w.write("1")
			w.start()
			w.within(5*time.Second, "the finding is logged", func() bool { return len(w.log.of("nats.stream_unsafe")) > 0 })
			time.Sleep(1500 * time.Millisecond) // several looks later
			if got := w.log.of("nats.stream_unsafe"); len(got) != 1 || !strings.Contains(got[0], `"field":"`+c.field+`"`) || !strings.Contains(got[0], `"level":"ERROR"`) {
				t.Errorf("got %q, want one ERROR line naming %s", got, c.field)
			}
			if w.bus.Up() {
				t.Error("nats is up")
			}
			if w.pending() != 1 {
				t.Error("the event was sent")
			}
			// Set right by the operator, all goes on by itself.
			if err := js.DeleteStream(t.Context(), c.stream.Name); err != nil {
				t.Fatal(err)
			}
			w.within(3*time.Second, "up", w.bus.Up)
			w.drained(3 * time.Second)
		})
	}
}

func TestUpFollowsTheStream(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.nats.Kill()
	w.start()
	if w.bus.Up() {
		t.Error("up without a server")
	}
	down := func() bool { return !w.bus.Up() }
	w.nats.Restart()
	w.within(3*time.Second, "up after the start", w.bus.Up)
	w.nats.Kill()
	w.within(time.Second, "down after the kill", down)
	w.nats.Restart()
	w.within(3*time.Second, "up after the restart", w.bus.Up)
	w.nats.Pause() // the socket stays open
	w.within(2*time.Second, "down in the pause", down)
	w.nats.Resume()
	w.within(3*time.Second, "up after the pause", w.bus.Up)
	w.stop()
	if w.bus.Up() {
		t.Error("up after the end of Run")
	}
}

func TestConfigMistakes(t *testing.T) {
	store, err := db.Open("postgres://127.0.0.1:1/x", 1, db.Rules{})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	bad := filepath.Join(t.TempDir(), "bad")
	if err := os.WriteFile(bad, []byte("hunter2"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := natsbus.Config{URL: "nats://u:hunter2@127.0.0.1:1, tls://b:4222,c", Replicas: 1}
	bus, err := natsbus.New(good, store, nil, silent)
	if err != nil {
		t.Fatalf("a good configuration: got %v", err)
	}
	for _, c := range []struct {
		name string
		cfg  natsbus.Config
		want []string
	}{
		{"no server", natsbus.Config{URL: ""}, []string{"NATS_URL"}},
		{"one is empty", natsbus.Config{URL: "nats://a,"}, []string{"NATS_URL"}},
		{"another scheme", natsbus.Config{URL: "http://u:hunter2@a"}, []string{"NATS_URL"}},
		{"not a URL", natsbus.Config{URL: "nats://u:hunter2@a:port"}, []string{"NATS_URL"}},
		{"all at once", natsbus.Config{URL: "nats://", CredsFile: bad, CAFile: bad}, []string{"NATS_URL", "NATS_CREDS_FILE", "NATS_CA_FILE"}},
		{"missing files", natsbus.Config{URL: "nats://a", CredsFile: bad + "x", CAFile: bad + "x"}, []string{"NATS_CREDS_FILE", "NATS_CA_FILE"}},
	} {
		_, err := natsbus.New(c.cfg, store, nil, silent)
		for _, err := range []error{err, bus.Reload(c.cfg)} {
			if err == nil {
				t.Errorf("%s: got no error", c.name)
				continue
			}
			for _, name := range []string{"NATS_URL", "NATS_CREDS_FILE", "NATS_CA_FILE"} {
				if got, want := strings.Contains(err.Error(), name), slices.Contains(c.want, name); got != want {
					t.Errorf("%s: got %q: names %s is %v, want %v", c.name, err, name, got, want)
				}
			}
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s: %q prints a value", c.name, err)
			}
		}
	}
}

// A password that was rotated is used after Reload, and never logged.
func TestCredentialsRotate(t *testing.T) {
	server := natstest.Start(t, natstest.Options{Config: `authorization { user: svc, password: hunter2 }`})
	w := newWorld(t, server)
	with := func(password string) natsbus.Config {
		return natsbus.Config{URL: strings.Replace(server.URL(), "//", "//svc:"+password+"@", 1), Replicas: 1}
	}
	w.start(func(c *natsbus.Config) { *c = with("wrong1") })
	w.within(5*time.Second, "refused", func() bool { return strings.Contains(w.log.String(), "Authorization Violation") })
	if err := w.bus.Reload(with("hunter2")); err != nil {
		t.Fatal(err)
	}
	w.within(3*time.Second, "up", w.bus.Up)
	if s := w.log.String(); strings.Contains(s, "hunter2") || strings.Contains(s, "wrong1") {
		t.Errorf("the log holds a password:\n%s", s)
	}
}

// TLS is never given up: not for a server without it, nor for a certificate
// of another authority.
func TestTLS(t *testing.T) {
	ca, cert, key := certificate(t)
	otherCA, _, _ := certificate(t)
	plain := natstest.New(t)
	secure := natstest.Start(t, natstest.Options{Scheme: "tls", Config: `tls { cert_file: "` + cert + `", key_file: "` + key + `" }`})
	for _, c := range []struct {
		name, url, ca string
		want          bool
	}{
		{"tls URL", secure.URL(), ca, true},
		{"the CA makes TLS required", strings.Replace(secure.URL(), "tls:", "nats:", 1), ca, true},
		{"another CA", secure.URL(), otherCA, false},
		{"no CA", secure.URL(), "", false},
		{"tls URL to a plain server", strings.Replace(plain.URL(), "nats:", "tls:", 1), "", false},
		{"CA and a plain server", plain.URL(), ca, false},
		{"one tls URL makes it required of all", plain.URL() + ",tls://127.0.0.1:1", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, secure)
			w.start(func(cfg *natsbus.Config) { cfg.URL, cfg.CAFile = c.url, c.ca })
			if c.want {
				w.within(5*time.Second, "up", w.bus.Up)
				return
			}
			w.within(5*time.Second, "it says why not", func() bool { return len(w.log.of("nats.disconnected")) > 0 })
			if w.bus.Up() || len(w.log.of("nats.connected")) > 0 {
				t.Errorf("connected:\n%s", w.log)
			}
		})
	}
}

// Of several servers any will do.
func TestSeveralServers(t *testing.T) {
	w := newWorld(t, natstest.New(t))
	w.start(func(c *natsbus.Config) { c.URL = "nats://127.0.0.1:1," + w.nats.URL() + ",127.0.0.1:2" })
	w.within(5*time.Second, "up", w.bus.Up)
}

func TestStopWithoutServers(t *testing.T) {
	server := natstest.New(t)
	w := newWorld(t, server)
	server.Pause() // it takes connections and never greets
	w.write("1")
	w.start()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	began := time.Now()
	if err := w.bus.Flush(ctx); err == nil || time.Since(began) > 4*time.Second {
		t.Errorf("Flush: got %v after %v, want an error after two seconds", err, time.Since(began))
	}
	began = time.Now()
	w.stop()
	if time.Since(began) > 4*time.Second {
		t.Errorf("Run ended after %v", time.Since(began))
	}
}
