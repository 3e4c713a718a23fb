package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// fenced is the first fenced block behind a text of a paper, so that what the
// paper says is what is tested.
func fenced(t *testing.T, file, behind string) string {
	t.Helper()
	text, err := os.ReadFile("../../" + file)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(text), behind)
	_, rest, opened := strings.Cut(rest, "\n```")
	_, rest, _ = strings.Cut(rest, "\n") // the language
	block, _, closed := strings.Cut(rest, "\n```")
	if !found || !opened || !closed {
		t.Fatalf("%s: no fenced block behind %q", file, behind)
	}
	return block
}

// as is a database's URL for another role.
func as(t *testing.T, db, role string) string {
	t.Helper()
	u, err := url.Parse(db)
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.User(role)
	return u.String()
}

// natsPassword stands for each "..." of README.md's NATS permissions.
const natsPassword = "a password of NATS"

// natsOfReadme is a server with the users and permissions that README.md gives.
func natsOfReadme(t *testing.T) *natstest.Server {
	t.Helper()
	config := fenced(t, "README.md", "### NATS permissions")
	return natstest.Start(t, natstest.Options{
		Config: strings.ReplaceAll(config, `"..."`, `"`+natsPassword+`"`),
		User:   url.UserPassword("identity-auth", natsPassword),
	})
}

// natsUser connects as one of them.
func natsUser(t *testing.T, server *natstest.Server, user string, more ...nats.Option) (*nats.Conn, jetstream.JetStream) {
	t.Helper()
	u, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	prefix := "_INBOX"
	if user != "identity-auth" {
		prefix += "_" + user
	}
	options := append([]nats.Option{nats.UserInfo(user, natsPassword), nats.CustomInboxPrefix(prefix)}, more...)
	nc, err := nats.Connect("nats://"+u.Host, options...)
	if err != nil {
		t.Fatalf("NATS as %s: %v", user, err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return nc, js
}

// office is a service with its admin API.
type office struct {
	*world
	s, admin *service
}

// everything does what the service can do, once each. step is told what came
// of each; it returns false to end it early.
func (o office) everything(t *testing.T, step func(what string, a answer, want int) bool) {
	form := []string{"Authorization", "Bearer " + adminToken, "Content-Type", "application/x-www-form-urlencoded"}
	p, newPassword := newPerson(), "another horse, another battery"
	var first, second, third tokens
	take := func(into *tokens, a answer) answer {
		json.Unmarshal(a.body, into)
		return a
	}
	action := func(action string, body any) func() answer {
		return func() answer {
			var b []byte
			if body != nil {
				b = toJSON(body)
			}
			return o.admin.do("POST", adminPath(p, action), b, bearer(adminToken)...)
		}
	}
	command := func(stdin []byte, args ...string) func() answer {
		return func() answer { // 200 for exit code 0
			code, stdout, stderr := o.command(t, nil, stdin, args...)
			return answer{status: 200 + code, body: []byte(stdout + stderr)}
		}
	}
	imported := newPerson()
	line := importLine(imported, aBcryptHash, nil)
	since := time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)
	session := func(tok *tokens) string {
		if tok.AccessToken == "" {
			return newUUID() // the login before has failed
		}
		return sessionID(t, *tok)
	}
	for _, x := range []struct {
		what string
		want int
		do   func() answer
	}{
		{"ready", 200, func() answer { return o.s.get("/health/ready") }},
		{"register", 201, func() answer { return o.s.post(registerPath, p) }},
		{"register again", 409, func() answer { return o.s.post(registerPath, p) }},
		{"login", 200, func() answer { return take(&first, o.s.do("POST", loginPath, p.loginBody(p.Password))) }},
		{"a wrong password", 401, func() answer { return o.s.do("POST", loginPath, p.loginBody("wrong")) }},
		{"an unknown e-mail", 401, func() answer { return o.s.do("POST", loginPath, newPerson().loginBody("wrong")) }},
		{"another login", 200, func() answer { return take(&second, o.s.do("POST", loginPath, p.loginBody(p.Password))) }},
		{"a third login", 200, func() answer { return take(&third, o.s.do("POST", loginPath, p.loginBody(p.Password))) }},
		{"sessions", 200, func() answer { return o.s.get(sessionsPath, bearer(first.AccessToken)...) }},
		{"refresh", 200, func() answer { return o.s.refresh(third.RefreshToken) }},
		{"replay", 401, func() answer { return o.s.refresh(third.RefreshToken) }},
		{"end a session", 204, func() answer {
			return o.s.do("DELETE", sessionsPath+"/"+session(&second), nil, bearer(first.AccessToken)...)
		}},
		{"password", 200, func() answer { return take(&first, o.s.changePassword(first, p.Password, newPassword)) }},
		{"logout", 204, func() answer { return o.s.logout(first.RefreshToken) }},
		{"forgot", 202, func() answer {
			return o.s.post(forgotPath, map[string]string{"tenant_id": p.TenantID, "email": p.Email})
		}},
		{"reset with another token", 400, func() answer { return o.s.reset("no token", newPassword) }},
		{"login with the new password", 200, func() answer { return take(&first, o.s.do("POST", loginPath, p.loginBody(newPassword))) }},
		{"logout-all", 204, func() answer { return o.s.do("POST", logoutAllPath, nil, bearer(first.AccessToken)...) }},
		{"get", 200, func() answer { return o.admin.get(adminPath(p, ""), bearer(adminToken)...) }},
		{"introspect", 200, func() answer {
			return o.admin.do("POST", "/api/admin/introspect", []byte("token="+first.AccessToken), form...)
		}},
		{"disable", 200, action("disable", nil)},
		{"enable", 200, action("enable", nil)},
		{"unlock", 200, action("unlock", nil)},
		{"revoke-sessions", 200, action("revoke-sessions", nil)},
		{"set-email", 200, action("set-email", map[string]string{"email": "other-" + p.Email})},
		{"set-claims", 200, action("set-claims", map[string]any{"claims": map[string]any{"roles": []string{"x"}}})},
		{"force-reset", 200, action("force-reset", nil)},
		{"export", 200, func() answer { return o.admin.get(adminPath(p, "export"), bearer(adminToken)...) }},
		{"delete", 200, func() answer { return o.admin.do("DELETE", adminPath(p, ""), nil, bearer(adminToken)...) }},
		{"import", 200, command(line, "import", "-")},
		{"the command user get", 200, command(nil, "user", "get", imported.TenantID, imported.UserID)},
		{"the command user delete", 200, command(nil, "user", "delete", imported.TenantID, imported.UserID)},
		{"the command outbox status", 200, command(nil, "outbox", "status")},
		{"the command outbox replay", 200, command(nil, "outbox", "replay", "--since", since)},
		{"the command migrate status", 200, command(nil, "migrate", "status")},
	} {
		if !step(x.what, x.do(), x.want) {
			return
		}
	}
}

// TestLeastPrivilege: the service does all it does as a role that has no more
// than RUNBOOK.md grants, and as a NATS user that has no more than README.md
// permits; each right is needed, and what is not granted cannot be done.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	w := &world{t: t, db: dbtest.Empty(t), nats: natsOfReadme(t)}
	superuser := w.db
	name := dbtest.Value[string](t, superuser, `SELECT current_database()::text`)
	owner, role := name+"_owner", name+"_service"
	dbtest.Exec(t, superuser, fmt.Sprintf(`CREATE ROLE %s LOGIN; ALTER DATABASE %s OWNER TO %s; CREATE ROLE %s LOGIN`, owner, name, owner, role))
	t.Cleanup(func() {
		dbtest.Exec(t, superuser, fmt.Sprintf(`ALTER DATABASE %s OWNER TO postgres; DROP OWNED BY %s, %s CASCADE; DROP ROLE %s, %s`, name, role, owner, role, owner))
	})
	w.db = as(t, superuser, owner)
	w.mustCommand(t, nil, "migrate")
	grants := strings.ReplaceAll(fenced(t, "RUNBOOK.md", "To serve under a role without DDL rights"), "identity_auth_service", role)
	dbtest.Exec(t, w.db, grants)

	w.db = as(t, superuser, role)
	port := freePort(t)
	s := w.start(cheap, unlimited, env{
		"MIGRATE_ON_START": "false", "ADMIN_ADDR": "127.0.0.1:" + port, "ADMIN_TOKEN": adminToken, "LOCKOUT_THRESHOLD": "100", "FORGOT_PER_HOUR_PER_EMAIL": "1000",
	})
	o := office{w, s, &service{t: t, base: "http://127.0.0.1:" + port, client: s.client}}

	t.Run("all works", func(t *testing.T) {
		o.everything(t, func(what string, a answer, want int) bool {
			if a.status != want {
				t.Errorf("%s: got %d %s, want %d", what, a.status, a.body, want)
			}
			return true
		})
		eventually(t, "the outbox is empty", 30*time.Second, func() bool {
			return dbtest.Value[int](t, superuser, `SELECT count(*)::int FROM outbox WHERE sent_at IS NULL`) == 0
		})
		for _, line := range s.tail(1 << 30) {
			if strings.Contains(line, "denied") || strings.Contains(line, "iolation") || strings.Contains(line, `"level":"ERROR"`) {
				t.Errorf("got %s, want no refusal and no ERROR", line)
			}
		}
	})
	t.Run("what NATS permits", func(t *testing.T) { natsPermits(t, o) })
	t.Run("what PostgreSQL refuses", func(t *testing.T) {
		for _, sql := range []string{
			`CREATE TABLE identity_auth.x (y int)`, `CREATE TABLE public.x (y int)`, `CREATE SCHEMA x`, `CREATE ROLE x`,
			`CREATE FUNCTION identity_auth.x() RETURNS int LANGUAGE sql RETURN 1`,
			`ALTER TABLE identity_auth.accounts ADD COLUMN x int`, `ALTER TABLE identity_auth.accounts DROP CONSTRAINT accounts_pkey`,
			`DROP TABLE identity_auth.outbox`, `TRUNCATE identity_auth.outbox`, `CREATE INDEX ON identity_auth.accounts (email)`,
			`CREATE TRIGGER x BEFORE INSERT ON identity_auth.accounts EXECUTE FUNCTION suppress_redundant_updates_trigger()`,
			`INSERT INTO identity_auth.schema_migrations (version, name, checksum) VALUES (9999, 'x', sha256('x'))`,
			`UPDATE identity_auth.schema_migrations SET checksum = sha256('x')`, `DELETE FROM identity_auth.schema_migrations`,
			`INSERT INTO identity_auth.relay DEFAULT VALUES`, `DELETE FROM identity_auth.relay`, `DELETE FROM identity_auth.relay_streams`,
			`SELECT setval('identity_auth.outbox_seq_seq', 1)`,
			`COPY identity_auth.accounts TO PROGRAM 'true'`, `SELECT pg_read_file('/etc/passwd')`, `SET ROLE ` + owner, `ALTER DATABASE ` + name + ` SET work_mem = '1MB'`,
		} {
			// 42501: insufficient_privilege.
			if err := execAs(t, w.db, sql); errorCode(err) != "42501" {
				t.Errorf("%s: got %v, want it refused for want of privilege", sql, err)
			}
		}
		if code, _, stderr := w.command(t, nil, nil, "migrate"); code != 0 { // nothing to apply, and so nothing to be refused
			t.Errorf("migrate as the service's role: got exit code %d, %q, want 0", code, stderr)
		}
	})
	t.Run("a later table", func(t *testing.T) {
		dbtest.Exec(t, as(t, superuser, owner), `CREATE TABLE identity_auth.later (one int)`)
		if err := execAs(t, w.db, `INSERT INTO identity_auth.later VALUES (1); UPDATE identity_auth.later SET one = 2; DELETE FROM identity_auth.later; TABLE identity_auth.later`); err != nil {
			t.Errorf("DML on a table of a later migration: %v", err)
		}
		dbtest.Exec(t, as(t, superuser, owner), `DROP TABLE identity_auth.later`)
	})
	t.Run("each grant is used", func(t *testing.T) {
		rights := dbtest.Query[string](t, superuser, `
SELECT format('%s ON identity_auth.%I', p, relname) FROM pg_class, unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS p
 WHERE relnamespace = 'identity_auth'::regnamespace AND relkind = 'r' AND has_table_privilege($1, oid, p) ORDER BY relname, p`, role)
		rights = append(rights, "USAGE ON SCHEMA identity_auth")
		for _, right := range rights {
			_, object, _ := strings.Cut(right, "identity_auth")
			// What the log says, and what commands say on standard error.
			told := regexp.MustCompile(`permission denied for (table|schema) ` + strings.TrimPrefix(object, ".") + `\b`)
			if strings.HasPrefix(right, "USAGE") {
				told = regexp.MustCompile(`permission denied for schema identity_auth|relation .* does not exist|42P01`)
			}
			from := len(s.tail(1 << 30))
			by := ""
			denied := func() bool {
				lines := s.tail(1 << 30)
				return slices.ContainsFunc(lines[from:], told.MatchString)
			}
			dbtest.Exec(t, as(t, superuser, owner), fmt.Sprintf(`REVOKE %s FROM %s`, right, role))
			if strings.Contains(right, "relay_streams") {
				w.nats.Restart() // the streams are compared with it at each connection
			}
			o.everything(t, func(what string, a answer, want int) bool {
				if told.Match(a.body) || denied() {
					by = what
				}
				return by == ""
			})
			// The relay and pruning come by themselves, every ten seconds.
			for end := time.Now().Add(time.Minute); by == "" && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				if denied() {
					by = "what goes on by itself"
				}
			}
			if by == "" {
				t.Errorf("without %s nothing fails: it is granted and not used", right)
			} else {
				t.Logf("%s: needed by %s", right, by)
			}
			dbtest.Exec(t, as(t, superuser, owner), fmt.Sprintf(`GRANT %s TO %s`, right, role))
		}
		// And with all of them again all works again.
		eventually(t, "it works again", time.Minute, func() bool {
			good := true
			o.everything(t, func(what string, a answer, want int) bool {
				good = good && a.status == want
				return good
			})
			return good
		})
	})
}

// execAs runs SQL and returns PostgreSQL's opinion of it.
func execAs(t *testing.T, db, sql string) error {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), db)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	_, err = conn.Exec(t.Context(), sql)
	return err
}

func errorCode(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// natsPermits: the mailer gets reset tokens and nothing else, a consumer gets
// events and nothing else, the service publishes and reads neither.
func natsPermits(t *testing.T, o office) {
	p := o.s.register()
	o.s.forgot(p)
	_, billing := natsUser(t, o.nats, "billing")
	_, mailer := natsUser(t, o.nats, "mailer")

	// As README.md's consumer and as its mailer would.
	fetch := func(js jetstream.JetStream, stream string, config jetstream.ConsumerConfig, wanted string) {
		t.Helper()
		config.AckPolicy = jetstream.AckExplicitPolicy
		consumer, err := js.CreateOrUpdateConsumer(t.Context(), stream, config)
		if err != nil {
			t.Fatalf("%s of %s: %v", config.Durable, stream, err)
		}
		for {
			msg, err := consumer.Next(jetstream.FetchMaxWait(30 * time.Second))
			if err != nil {
				t.Fatalf("%s of %s: %v", config.Durable, stream, err)
			}
			if err := msg.DoubleAck(t.Context()); err != nil {
				t.Fatalf("%s of %s: acknowledging: %v", config.Durable, stream, err)
			}
			if strings.Contains(string(msg.Data()), wanted) {
				break
			}
		}
		if _, err := consumer.Info(t.Context()); err != nil {
			t.Errorf("%s of %s: %v", config.Durable, stream, err)
		}
	}
	fetch(billing, "AUTH_EVENTS", jetstream.ConsumerConfig{Durable: "billing", FilterSubjects: []string{"auth.events.user.registered", "auth.events.session.revoked"}}, p.UserID)
	fetch(mailer, "AUTH_SECRETS", jetstream.ConsumerConfig{Durable: "mailer", FilterSubject: "auth.secrets.password_reset"}, p.Email)

	type attempt func(ctx context.Context, nc *nats.Conn, js jetstream.JetStream)
	consume := func(stream, durable string, filters ...string) attempt {
		config := jetstream.ConsumerConfig{Durable: durable, AckPolicy: jetstream.AckExplicitPolicy, FilterSubjects: filters}
		if len(filters) == 1 {
			config.FilterSubject, config.FilterSubjects = filters[0], nil
		}
		return func(ctx context.Context, _ *nats.Conn, js jetstream.JetStream) {
			js.CreateOrUpdateConsumer(ctx, stream, config)
		}
	}
	api := func(subject, body string) attempt {
		return func(ctx context.Context, nc *nats.Conn, _ jetstream.JetStream) {
			nc.RequestWithContext(ctx, subject, []byte(body))
		}
	}
	publish := func(subject string) attempt {
		return func(_ context.Context, nc *nats.Conn, _ jetstream.JetStream) { nc.Publish(subject, []byte("{}")) }
	}
	subscribe := func(subject string) attempt {
		return func(_ context.Context, nc *nats.Conn, _ jetstream.JetStream) { nc.SubscribeSync(subject) }
	}
	shared := map[string]attempt{
		"delete AUTH_EVENTS":              api("$JS.API.STREAM.DELETE.AUTH_EVENTS", ""),
		"purge AUTH_EVENTS":               api("$JS.API.STREAM.PURGE.AUTH_EVENTS", ""),
		"delete a message":                api("$JS.API.STREAM.MSG.DELETE.AUTH_EVENTS", `{"seq":1}`),
		"delete AUTH_SECRETS":             api("$JS.API.STREAM.DELETE.AUTH_SECRETS", ""),
		"read a message of AUTH_SECRETS":  api("$JS.API.STREAM.MSG.GET.AUTH_SECRETS", `{"seq":1}`),
		"read one of AUTH_SECRETS direct": api("$JS.API.DIRECT.GET.AUTH_SECRETS", `{"seq":1}`),
		"read a message of AUTH_EVENTS":   api("$JS.API.STREAM.MSG.GET.AUTH_EVENTS", `{"seq":1}`),
		"make a stream that sources it":   api("$JS.API.STREAM.CREATE.COPY", `{"name":"COPY","sources":[{"name":"AUTH_SECRETS"}]}`),
		"listen to reset tokens":          subscribe("auth.secrets.>"),
		"listen to events":                subscribe("auth.events.>"),
		"listen to everything":            subscribe(">"),
		"listen to the API":               subscribe("$JS.>"),
	}
	rows := map[string]map[string]attempt{
		"identity-auth": {
			"consume AUTH_SECRETS":           consume("AUTH_SECRETS", "mailer", "auth.secrets.password_reset"),
			"consume AUTH_EVENTS":            consume("AUTH_EVENTS", "billing"),
			"listen to the mailer's inbox":   subscribe("_INBOX_mailer.>"),
			"listen to billing's inbox":      subscribe("_INBOX_billing.>"),
			"publish elsewhere":              publish("elsewhere"),
			"delete the mailer's consumer":   api("$JS.API.CONSUMER.DELETE.AUTH_SECRETS.mailer", ""),
			"take the mailer's next message": api("$JS.API.CONSUMER.MSG.NEXT.AUTH_SECRETS.mailer", ""),
		},
		"billing": {
			"consume AUTH_SECRETS":            consume("AUTH_SECRETS", "billing", "auth.secrets.password_reset"),
			"consume AUTH_SECRETS unfiltered": consume("AUTH_SECRETS", "billing"),
			"consume as someone else":         consume("AUTH_EVENTS", "other"),
			"take the mailer's next message":  api("$JS.API.CONSUMER.MSG.NEXT.AUTH_SECRETS.mailer", ""),
			"forge an event":                  publish("auth.events.user.registered"),
			"forge a reset token":             publish("auth.secrets.password_reset"),
			"listen to all inboxes":           subscribe("_INBOX.>"),
			"listen to the mailer's inbox":    subscribe("_INBOX_mailer.>"),
		},
		"mailer": {
			"consume AUTH_EVENTS":       consume("AUTH_EVENTS", "mailer", "auth.events.user.registered"),
			"consume as someone else":   consume("AUTH_SECRETS", "other", "auth.secrets.password_reset"),
			"forge an event":            publish("auth.events.user.registered"),
			"forge a reset token":       publish("auth.secrets.password_reset"),
			"listen to all inboxes":     subscribe("_INBOX.>"),
			"listen to billing's inbox": subscribe("_INBOX_billing.>"),
		},
	}
	for user := range rows {
		for _, attempts := range []map[string]attempt{shared, rows[user]} {
			for what, try := range attempts {
				// A connection of its own, on which the refusal comes.
				refused := make(chan error, 100)
				nc, js := natsUser(t, o.nats, user, nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { refused <- err }))
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				go try(ctx, nc, js)
				select {
				case err := <-refused:
					if !errors.Is(err, nats.ErrPermissionViolation) {
						t.Errorf("%s tries to %s: got %v, want a permissions violation", user, what, err)
					}
				case <-ctx.Done():
					t.Errorf("%s may %s", user, what)
				}
				cancel()
				nc.Close()
			}
		}
	}
}
