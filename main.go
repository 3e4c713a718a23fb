// Command identity-auth is the authentication service. See README.md.
package main

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/7d-solutions/identity-auth/auth"
	"github.com/7d-solutions/identity-auth/db"
	"github.com/7d-solutions/identity-auth/jwt"
	"github.com/7d-solutions/identity-auth/migrate"
	"github.com/7d-solutions/identity-auth/natsbus"
	"github.com/7d-solutions/identity-auth/sql"
)

// Stamped by the linker.
var (
	version = "dev"
	commit  = "unknown"
)

// Exit codes.
const (
	exitOK      = 0
	exitFailure = 1 // at run time
	exitUsage   = 2 // bad usage or bad configuration
)

const usage = `usage: identity-auth [command]

  serve            apply migrations (MIGRATE_ON_START) and serve; the default
  migrate          apply migrations
  migrate status   list migrations
  user ACTION TENANT USER [VALUE]
                   ACTION is get, disable, enable, unlock, revoke-sessions, set-email,
                   set-claims, force-reset, delete or export; USER is a user id or
                   --email ADDRESS; VALUE is an e-mail or a JSON object of claims
  import FILE      create accounts with the hashes they have, JSON lines, - is stdin
  import --from-auth-rs
                   take over the accounts of a first version in the same database
  outbox status    how many events wait for NATS, and for how long
  outbox replay --since T [--until T]
                   send relayed events again, T in RFC 3339
  healthcheck      ask the local /health/ready; exit 0 or 1
  keygen [--if-absent] DIR
                   make an RSA-3072 pair, DIR/private.pem and DIR/public.pem;
                   with --if-absent a pair that is there is kept, and no error
  version          print version, commit and Go version

Configuration is by environment variables: see README.md.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.LookupEnv, os.Stdout, os.Stderr))
}

// run is the whole program but for the process: ctx ends when it shall stop.
func run(ctx context.Context, args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	if len(args) == 0 {
		args = []string{"serve"}
	}
	switch command, rest := args[0], args[1:]; {
	case command == "serve" && len(rest) == 0:
		return serve(ctx, lookup, stdout, stderr)
	case command == "migrate" && len(rest) == 0:
		return migrateNow(ctx, lookup, stdout, stderr)
	case command == "migrate" && len(rest) == 1 && rest[0] == "status":
		return migrateStatus(ctx, lookup, stdout, stderr)
	case command == "user" && len(rest) >= 3:
		return user(ctx, rest, lookup, stdout, stderr)
	case command == "import" && len(rest) == 1:
		return importAccounts(ctx, rest[0], lookup, stdout, stderr)
	case command == "outbox" && len(rest) > 0:
		return outbox(ctx, rest, lookup, stdout, stderr)
	case command == "healthcheck" && len(rest) == 0:
		return healthcheck(ctx, lookup, stderr)
	case command == "keygen" && len(rest) == 1 && rest[0] != "--if-absent":
		return keygen(rest[0], stdout, stderr)
	case command == "keygen" && len(rest) == 2 && rest[0] == "--if-absent":
		if holdsPair(rest[1]) {
			fmt.Fprintf(stdout, "kept the pair in %s\n", rest[1])
			return exitOK
		}
		return keygen(rest[1], stdout, stderr)
	case command == "version" && len(rest) == 0:
		b := auth.ReadBuild(version, commit)
		fmt.Fprintf(stdout, "identity-auth %s commit %s %s\n", b.Version, b.Revision, b.GoVersion)
		return exitOK
	case slices.Contains([]string{"help", "-h", "-help", "--help"}, command):
		fmt.Fprint(stdout, usage)
		return exitOK
	}
	fmt.Fprint(stderr, usage)
	return exitUsage
}

// runtimeReserve is what the process may hold besides the hash buffers before
// the runtime collects harder: RSS stays within slots x memory + 64 MiB.
const runtimeReserve = 32 << 20

// flushTimeout is for the outbox at the end, whatever draining has used up.
const flushTimeout = 5 * time.Second

// serve wires the service in the order of dependency and stops it in the
// opposite order.
func serve(ctx context.Context, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	cfg, err := auth.LoadConfig(lookup)
	if cfg.NATSURL.Reveal() != "" { // what the NATS files hold is named in the same go
		_, busErr := natsbus.New(natsConfig(cfg), nil, nil, natsbus.Observer{})
		err = errors.Join(err, busErr)
	}
	if err != nil {
		return usageError(stderr, err)
	}
	log := auth.NewLogger(stdout, cfg.LogLevel)
	migrations, err := migrate.Load(sql.FS)
	if err != nil { // unreachable in a tested build
		return failed(log, err)
	}
	// Hashes keep all of the runtime's processors busy, and one that is busy
	// looks at the network every 10 ms. One more than there are CPUs has the
	// system divide the time: beside a flood of logins a refresh takes a third,
	// and more than one more only costs.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	debug.SetMemoryLimit(int64(cfg.MaxConcurrentHashes)*int64(cfg.Argon2.MemoryKiB)*1024 + runtimeReserve + cfg.Blocklist.Bytes())

	store, err := openStore(cfg)
	if err != nil {
		return usageError(stderr, err)
	}
	defer store.Close()
	schemaReady := new(atomic.Bool)
	srv := auth.New(cfg, store, schemaReady, auth.ReadBuild(version, commit), log)
	busConfig := natsConfig(cfg)
	busConfig.Unseal, busConfig.Ready = srv.UnsealReset, schemaReady.Load
	bus, err := natsbus.New(busConfig, store, log, natsbus.Observer{Published: srv.EventPublished, PublishFailed: srv.EventPublishFailed})
	if err != nil {
		return usageError(stderr, err)
	}
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP) // before the ports open: its default is to end the process
	defer signal.Stop(hangup)
	listeners, err := listen(cfg, srv)
	if err != nil {
		return failed(log, err)
	}
	auth.WarnOfWeakness(cfg, store.PlaintextRemote(), log)

	background, stopBackground := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBackground()
	fatal := make(chan error, len(listeners)+1)
	var loops sync.WaitGroup
	loops.Go(func() { srv.Run(background, bus) })
	loops.Go(func() { bus.Run(background) })
	loops.Go(func() {
		if err := prepareSchema(background, store, cfg.MigrateOnStart, migrations, schemaReady, log); err != nil {
			fatal <- err
		}
	})
	loops.Go(func() { reloadOnHangup(background, hangup, lookup, srv, bus, log) })
	var servers []*http.Server
	for _, l := range listeners {
		server := auth.NewHTTPServer(l.handler, log)
		servers = append(servers, server)
		go func() { fatal <- server.Serve(l.Listener) }()
	}
	log.Info("service.started", "version", version, "addr", listeners[0].Addr().String())

	code := exitOK
	select {
	case <-ctx.Done():
	case err := <-fatal:
		code = failed(log, err)
	}
	log.Info("service.stopping")
	srv.BeginShutdown()
	if code == exitOK {
		time.Sleep(cfg.ShutdownDelay) // load balancers notice; requests are served meanwhile
	}
	drain(servers, cfg.ShutdownTimeout)
	flush, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	if err := bus.Flush(flush); err != nil {
		log.Warn("outbox.flush_failed", "err", err) // the rows wait for another replica or the next start
	}
	stopBackground()
	loops.Wait()
	log.Info("service.stopped")
	return code
}

// drain lets requests in flight finish, and cuts off what takes too long.
func drain(servers []*http.Server, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	var drained sync.WaitGroup
	for _, server := range servers {
		drained.Go(func() {
			if server.Shutdown(ctx) != nil {
				server.Close()
			}
		})
	}
	drained.Wait()
}

// withStore loads the named variables, or all when none is named, and runs f
// with the database they name.
func withStore(lookup func(string) (string, bool), stderr io.Writer, f func(auth.Config, *db.Store) error, names ...string) int {
	cfg, err := auth.LoadConfig(lookup, names...)
	if err != nil {
		return usageError(stderr, err)
	}
	store, err := openStore(cfg)
	if err != nil {
		return usageError(stderr, err)
	}
	defer store.Close()
	if err := f(cfg, store); err != nil {
		return commandFailed(stderr, err)
	}
	return exitOK
}

func openStore(cfg auth.Config) (*db.Store, error) {
	store, err := db.Open(cfg.DatabaseURL.Reveal(), cfg.DatabaseMaxConnections, db.Rules{
		LoginPerMinute: cfg.LoginPerMinute, RefreshPerMinute: cfg.RefreshPerMinute,
		LockoutThreshold: cfg.LockoutThreshold, LockoutDuration: cfg.LockoutDuration,
		AccessTokenTTL: cfg.AccessTokenTTL, RefreshTokenTTL: cfg.RefreshTokenTTL, SessionMaxAge: cfg.SessionMaxAge,
		ReuseGrace: cfg.ReuseGrace, MaxSessions: cfg.MaxSessions, ResetTTL: cfg.PasswordResetTTL,
		SessionRetention: cfg.SessionRetention, OutboxRetention: cfg.OutboxRetention,
	})
	if err != nil {
		return nil, fmt.Errorf("DATABASE_URL: %w", err)
	}
	return store, nil
}

func natsConfig(cfg auth.Config) natsbus.Config {
	return natsbus.Config{
		URL: cfg.NATSURL.Reveal(), CredsFile: cfg.NATSCredsFile, CAFile: cfg.NATSCAFile,
		Replicas: cfg.NATSStreamReplicas, SecretsMaxAge: cfg.PasswordResetTTL,
	}
}

func usageError(stderr io.Writer, err error) int {
	fmt.Fprintf(stderr, "identity-auth: bad configuration\n%v\n", err)
	return exitUsage
}

func commandFailed(stderr io.Writer, err error) int {
	fmt.Fprintln(stderr, "identity-auth:", err)
	return exitFailure
}

func failed(log *slog.Logger, err error) int {
	log.Error("service.failed", "err", err)
	return exitFailure
}

type listener struct {
	net.Listener
	addr    string
	handler http.Handler
}

// listen opens the ports: first PORT, then ADMIN_ADDR if it is set. With a
// certificate both speak TLS.
func listen(cfg auth.Config, srv *auth.Server) ([]listener, error) {
	listeners := []listener{{nil, net.JoinHostPort(cfg.Host, cfg.Port), srv.Handler()}}
	if cfg.AdminAddr != "" {
		listeners = append(listeners, listener{nil, cfg.AdminAddr, srv.AdminHandler()})
	}
	for i := range listeners {
		l, err := net.Listen("tcp", listeners[i].addr)
		if err != nil {
			return nil, err
		}
		if cfg.TLSCertificate != nil {
			l = tls.NewListener(l, srv.TLSConfig())
		}
		listeners[i].Listener = l
	}
	return listeners, nil
}

// prepareSchema brings the database's schema up to the binary's, or with
// MIGRATE_ON_START=false waits until someone has. PostgreSQL may be away: it
// tries until ctx is done. Only a changed migration is an error.
func prepareSchema(ctx context.Context, store *db.Store, apply bool, ms []migrate.Migration, ready *atomic.Bool, log *slog.Logger) error {
	for {
		applied, err := tryPrepareSchema(ctx, store, apply, ms)
		if len(applied) > 0 {
			log.Info("migrate.applied", "count", len(applied), "last", applied[len(applied)-1].String())
		}
		switch {
		case err == nil:
			ready.Store(true)
			return nil
		case errors.Is(err, migrate.ErrChanged):
			return err
		case ctx.Err() != nil:
			return nil
		}
		log.Warn("migrate.failed", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
}

func tryPrepareSchema(ctx context.Context, store *db.Store, apply bool, ms []migrate.Migration) (applied []migrate.Migration, err error) {
	err = store.Alone(ctx, func(conn *db.Conn) (err error) {
		if apply {
			applied, err = migrate.Apply(ctx, conn, ms)
			return err
		}
		pending, err := migrate.Pending(ctx, conn, ms)
		if err == nil && len(pending) > 0 {
			err = fmt.Errorf("MIGRATE_ON_START=false and %d migrations are pending", len(pending))
		}
		return err
	})
	return applied, err
}

// reloadOnHangup takes over a configuration read again at each SIGHUP. A bad
// one is told and changes nothing.
func reloadOnHangup(ctx context.Context, hangup <-chan os.Signal, lookup func(string) (string, bool), srv *auth.Server, bus *natsbus.Bus, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
		}
		cfg, err := auth.LoadConfig(lookup)
		if err == nil {
			err = srv.Reload(cfg, func() error { return bus.Reload(natsConfig(cfg)) })
		}
		if err != nil {
			log.Error("config.reload_failed", "err", err)
			continue
		}
		log.Info("config.reloaded", "kid", cfg.Keys.Signer.KeyID())
	}
}

// withDatabase runs f on a connection of its own for the migrate commands.
func withDatabase(ctx context.Context, lookup func(string) (string, bool), stderr io.Writer, f func(*db.Conn, []migrate.Migration) error) int {
	return withStore(lookup, stderr, func(_ auth.Config, store *db.Store) error {
		ms, err := migrate.Load(sql.FS)
		if err != nil {
			return err
		}
		return store.Alone(ctx, func(conn *db.Conn) error { return f(conn, ms) })
	}, "DATABASE_URL", "DATABASE_MAX_CONNECTIONS")
}

func migrateNow(ctx context.Context, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	return withDatabase(ctx, lookup, stderr, func(conn *db.Conn, ms []migrate.Migration) error {
		applied, err := migrate.Apply(ctx, conn, ms)
		for _, m := range applied {
			fmt.Fprintln(stdout, "applied", m)
		}
		if err == nil && len(applied) == 0 {
			fmt.Fprintln(stdout, "nothing to apply")
		}
		return err
	})
}

func migrateStatus(ctx context.Context, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	return withDatabase(ctx, lookup, stderr, func(conn *db.Conn, ms []migrate.Migration) error {
		states, err := migrate.Status(ctx, conn, ms)
		for _, st := range states {
			fmt.Fprintln(stdout, st)
		}
		return err
	})
}

// user does one action on an account and prints what it is now.
func user(ctx context.Context, args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	action, tenant, rest := args[0], args[1], args[2:]
	if rest[0] == "--email" {
		rest = rest[1:]
	}
	if !slices.Contains(auth.Actions, action) || len(rest) == 0 || auth.ActionTakesArgument(action) != (len(rest) == 2) || len(rest) > 2 {
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	return withStore(lookup, stderr, func(cfg auth.Config, store *db.Store) error {
		// The audit line goes to stderr: stdout is the answer.
		srv := auth.New(cfg, store, new(atomic.Bool), auth.ReadBuild(version, commit), auth.NewLogger(stderr, slog.LevelInfo))
		answer, err := srv.Act(ctx, action, tenant, rest[0], strings.Join(rest[1:], ""), db.Origin{ClientIP: "command line", TraceID: db.NewUUID()})
		if err != nil {
			return err
		}
		out := json.NewEncoder(stdout)
		out.SetIndent("", "  ")
		return out.Encode(answer)
	})
}

// importAccounts exits 1 when a line was bad; the good ones are in.
func importAccounts(ctx context.Context, from string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	progress, end := func(auth.ImportCounts) {}, ""
	if info, err := os.Stderr.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
		progress, end = func(c auth.ImportCounts) { fmt.Fprintf(stderr, "\r%d lines, %d created", c.Lines, c.Created) }, "\n"
	}
	return withStore(lookup, stderr, func(cfg auth.Config, store *db.Store) error {
		importer := auth.NewImporter(store, cfg.Argon2, func(line int, reason string) {
			fmt.Fprintf(stderr, "line %d: %s\n", line, reason)
		}, progress)
		counts, err := importFrom(ctx, importer, from)
		fmt.Fprint(stderr, end)
		if err == nil || counts.Lines > 0 {
			fmt.Fprintf(stdout, "%d lines: %d created, %d there already, %d bad\n", counts.Lines, counts.Created, counts.Present, counts.Bad)
		}
		if err == nil && counts.Bad > 0 {
			err = errors.New("the bad lines are not imported")
		}
		return err
	}, "DATABASE_URL", "DATABASE_MAX_CONNECTIONS", "ARGON2_MEMORY_KIB", "ARGON2_ITERATIONS", "ARGON2_PARALLELISM")
}

func importFrom(ctx context.Context, importer *auth.Importer, from string) (auth.ImportCounts, error) {
	switch from {
	case "--from-auth-rs":
		return importer.FirstVersion(ctx)
	case "-":
		return importer.JSONLines(ctx, os.Stdin)
	}
	in, err := os.Open(from)
	if err != nil {
		return auth.ImportCounts{}, err
	}
	defer in.Close()
	return importer.JSONLines(ctx, in)
}

// outbox shows the backlog, or makes relayed events of a span of time unsent
// again, for the relay of a running service to send.
func outbox(ctx context.Context, args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	since, until := time.Time{}, time.Now()
	flags := flag.NewFlagSet("outbox", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.TextVar(&since, "since", since, "")
	flags.TextVar(&until, "until", until, "")
	err := flags.Parse(args[1:])
	status, replay := args[0] == "status" && len(args) == 1, args[0] == "replay" && !since.IsZero() && flags.NArg() == 0
	if err != nil || !status && !replay {
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	return withStore(lookup, stderr, func(_ auth.Config, store *db.Store) error {
		if replay {
			n, err := replayAll(ctx, store, since, until)
			fmt.Fprintf(stdout, "%d events will be sent again\n", n)
			if err != nil {
				return err
			}
		}
		pending, oldest, err := store.OutboxBacklog(ctx)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(stdout, "%d events pending, the oldest for %v\n", pending, oldest.Round(time.Millisecond))
		return err
	}, "DATABASE_URL", "DATABASE_MAX_CONNECTIONS")
}

func replayAll(ctx context.Context, store *db.Store, since, until time.Time) (total int64, err error) {
	for after := int64(0); ; {
		n, next, err := store.Replay(ctx, since, until, after)
		total += n
		if err != nil || next == 0 {
			return total, err
		}
		after = next
	}
}

// healthcheck is for containers without a shell: exit 0 when ready.
func healthcheck(ctx context.Context, lookup func(string) (string, bool), stderr io.Writer) int {
	ctx, cancel := context.WithTimeout(ctx, 4*time.Second)
	defer cancel()
	cfg, err := auth.LoadConfig(lookup, "HOST", "PORT", "TLS_CERT_FILE")
	if err != nil {
		return usageError(stderr, err)
	}
	if err := askReady(ctx, cfg); err != nil {
		return commandFailed(stderr, err)
	}
	return exitOK
}

func askReady(ctx context.Context, cfg auth.Config) error {
	host, scheme := cfg.Host, "http"
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	transport := &http.Transport{}
	if cfg.TLSCertFile != "" {
		// It asks its own host and sends nothing; a certificate that was renewed
		// and not yet reloaded must not get the container killed.
		scheme, transport.TLSClientConfig = "https", &tls.Config{InsecureSkipVerify: true}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+net.JoinHostPort(host, cfg.Port)+"/health/ready", nil)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("not ready: %s", resp.Status)
	}
	return nil
}

// keygen makes a fresh pair. It never overwrites: O_EXCL makes the check and
// the act one call.
func keygen(dir string, stdout, stderr io.Writer) int {
	err := func() error {
		key, err := rsa.GenerateKey(rand.Reader, 3072)
		if err != nil {
			return err
		}
		private, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
		if err := writeNew(filepath.Join(dir, "private.pem"), 0o600, &pem.Block{Type: "PRIVATE KEY", Bytes: private}); err != nil {
			return err
		}
		if err := writeNew(filepath.Join(dir, "public.pem"), 0o644, &pem.Block{Type: "PUBLIC KEY", Bytes: public}); err != nil { // half a pair helps nobody
			return errors.Join(err, os.Remove(filepath.Join(dir, "private.pem")))
		}
		return nil
	}()
	if err != nil {
		return commandFailed(stderr, err)
	}
	fmt.Fprintf(stdout, "wrote %s and %s\n", filepath.Join(dir, "private.pem"), filepath.Join(dir, "public.pem"))
	return exitOK
}

// holdsPair tells whether dir has both halves of one pair. If it has anything
// else, keygen refuses to overwrite it.
func holdsPair(dir string) bool {
	private, privateErr := os.ReadFile(filepath.Join(dir, "private.pem"))
	public, publicErr := os.ReadFile(filepath.Join(dir, "public.pem"))
	if privateErr != nil || publicErr != nil {
		return false
	}
	key, privateErr := jwt.ParsePrivateKeyPEM(private)
	pub, publicErr := jwt.ParsePublicKeyPEM(public)
	return privateErr == nil && publicErr == nil && key.PublicKey.Equal(pub)
}

func writeNew(path string, mode os.FileMode, block *pem.Block) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	if err := pem.Encode(f, block); err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(f.Sync(), f.Close())
}
