package auth

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/7d-solutions/identity-auth/db"
)

// Secret is text that must not be printed: fmt, slog and json show
// "[redacted]". Reveal is the one way to the text.
type Secret struct{ s string }

const redacted = "[redacted]"

func (Secret) String() string               { return redacted }
func (Secret) GoString() string             { return redacted }
func (Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Reveal is the secret's text.
func (s Secret) Reveal() string { return s.s }

// Config is everything an operator can set. Its manual is the table in
// variables; README.md shows the same table, held to it by a test.
type Config struct {
	DatabaseURL   Secret
	NATSURL       Secret
	NATSCredsFile string
	NATSCAFile    string
	Keys          KeyRing
	Issuer        string
	Audience      string

	AccessTokenTTL  time.Duration
	RefreshTokenTTL time.Duration
	SessionMaxAge   time.Duration
	ReuseGrace      time.Duration
	MaxSessions     int

	Host, Port     string
	TLSCertFile    string
	TLSKeyFile     string
	TLSCertificate *tls.Certificate // nil: plain HTTP
	AdminAddr      string
	AdminToken     Secret
	RegisterToken  Secret
	TrustedProxies []netip.Prefix
	CORSOrigins    []string

	DatabaseMaxConnections int
	MigrateOnStart         bool
	Argon2                 Argon2Params
	MaxConcurrentHashes    int
	HashAcquireTimeout     time.Duration

	PasswordMinLength int
	Blocklist         *Blocklist // nil: none

	LockoutThreshold       int
	LockoutDuration        time.Duration
	LoginPerMinute         int
	RegisterPerMinute      int
	RefreshPerMinute       int
	ForgotPerHour          int
	IPRatePerSecond        int
	IPRateBurst            int
	LoginFailuresPerHourIP int

	PasswordResetTTL   time.Duration
	SessionRetention   time.Duration
	OutboxRetention    time.Duration
	ReadyRequiresNATS  bool
	NATSStreamReplicas int
	ShutdownDelay      time.Duration
	ShutdownTimeout    time.Duration
	LogLevel           slog.Level

	blocklistFile string
	pems          map[string]string // PEM and kid variables until the key ring is built
}

// variable is one row of the table that drives parsing. A variable whose
// Default is empty is required if Required is set, else absent by default.
type variable struct {
	Name      string
	Default   string
	Required  bool
	emptyFile bool // an empty file means not set, as an empty variable does
	set       func(value string) error
}

// cpus is what the machine and its control group give, read before serve asks
// the runtime for one more.
var cpus = runtime.GOMAXPROCS(0)

// variables is the whole configuration; what they are set to is in c.
func variables(c *Config) []variable {
	opt := func(name, def string, set func(string) error) variable {
		return variable{Name: name, Default: def, set: set}
	}
	pem := func(name string, required bool) variable {
		return variable{Name: name, Required: required, emptyFile: !required, set: func(v string) error {
			c.pems[name] = v
			return nil
		}}
	}
	return []variable{
		{Name: "DATABASE_URL", Required: true, set: func(v string) error {
			c.DatabaseURL = Secret{v}
			return db.CheckURL(v)
		}},
		{Name: "NATS_URL", Required: true, set: natsServers(&c.NATSURL)},
		opt("NATS_CREDS_FILE", "", readableFile(&c.NATSCredsFile)),
		opt("NATS_CA_FILE", "", readableFile(&c.NATSCAFile)),
		pem("JWT_PRIVATE_KEY_PEM", true),
		pem("JWT_PUBLIC_KEY_PEM", true),
		pem("JWT_KID", true),
		pem("JWT_PREV_PUBLIC_KEY_PEM", false),
		pem("JWT_PREV_KID", false),
		pem("JWT_NEXT_PUBLIC_KEY_PEM", false),
		pem("JWT_NEXT_KID", false),
		opt("JWT_ISSUER", "identity-auth", text(&c.Issuer)),
		opt("JWT_AUDIENCE", "identity-auth", text(&c.Audience)),
		opt("ACCESS_TOKEN_TTL", "15m", duration(&c.AccessTokenTTL, time.Second, 24*time.Hour)),
		opt("REFRESH_TOKEN_TTL", "336h", duration(&c.RefreshTokenTTL, time.Second, 10*365*24*time.Hour)),
		opt("SESSION_MAX_AGE", "720h", duration(&c.SessionMaxAge, time.Second, 10*365*24*time.Hour)),
		opt("REFRESH_REUSE_GRACE", "0s", duration(&c.ReuseGrace, 0, time.Hour)),
		opt("MAX_SESSIONS_PER_USER", "100", number(&c.MaxSessions, 0, 100_000)),
		opt("HOST", "0.0.0.0", text(&c.Host)),
		opt("PORT", "8080", func(v string) error {
			var port int
			err := number(&port, 1, 65535)(v)
			c.Port = v
			return err
		}),
		opt("TLS_CERT_FILE", "", readableFile(&c.TLSCertFile)),
		opt("TLS_KEY_FILE", "", readableFile(&c.TLSKeyFile)),
		opt("ADMIN_ADDR", "", func(v string) error {
			c.AdminAddr = v
			_, port, err := net.SplitHostPort(v)
			if n, perr := strconv.Atoi(port); err != nil || perr != nil || n < 1 || n > 65535 {
				return errors.New("must be host:port")
			}
			return nil
		}),
		opt("ADMIN_TOKEN", "", secret(&c.AdminToken, 32)),
		opt("REGISTER_TOKEN", "", secret(&c.RegisterToken, 1)),
		opt("TRUSTED_PROXIES", "", trustedProxies(&c.TrustedProxies)),
		opt("CORS_ORIGINS", "", corsOrigins(&c.CORSOrigins)),
		opt("DATABASE_MAX_CONNECTIONS", strconv.Itoa(max(8, 4*cpus)), number(&c.DatabaseMaxConnections, 2, 10_000)),
		opt("MIGRATE_ON_START", "true", boolean(&c.MigrateOnStart)),
		// OWASP Password Storage Cheat Sheet: m=19 MiB, t=2, p=1 is the floor.
		opt("ARGON2_MEMORY_KIB", "65536", number(&c.Argon2.MemoryKiB, 19456, 4<<20)),
		opt("ARGON2_ITERATIONS", "3", number(&c.Argon2.Iterations, 2, 64)),
		opt("ARGON2_PARALLELISM", "1", number(&c.Argon2.Parallelism, 1, 64)),
		opt("MAX_CONCURRENT_HASHES", strconv.Itoa(cpus), number(&c.MaxConcurrentHashes, 1, 1024)),
		opt("HASH_ACQUIRE_TIMEOUT", "2s", duration(&c.HashAcquireTimeout, time.Millisecond, requestTimeout)),
		opt("PASSWORD_MIN_LENGTH", "12", number(&c.PasswordMinLength, 8, 128)),
		opt("PASSWORD_BLOCKLIST_FILE", "", readableFile(&c.blocklistFile)),
		opt("LOCKOUT_THRESHOLD", "5", number(&c.LockoutThreshold, 1, 100)),
		opt("LOCKOUT_DURATION", "15m", duration(&c.LockoutDuration, time.Second, 30*24*time.Hour)),
		opt("LOGIN_PER_MIN_PER_EMAIL", "10", number(&c.LoginPerMinute, 0, 100_000)),
		opt("REGISTER_PER_MIN_PER_EMAIL", "5", number(&c.RegisterPerMinute, 0, 100_000)),
		opt("REFRESH_PER_MIN_PER_TOKEN", "20", number(&c.RefreshPerMinute, 0, 100_000)),
		opt("FORGOT_PER_HOUR_PER_EMAIL", "5", number(&c.ForgotPerHour, 0, 100_000)),
		opt("IP_RATE_PER_SECOND", "20", number(&c.IPRatePerSecond, 0, 1_000_000)),
		opt("IP_RATE_BURST", "60", number(&c.IPRateBurst, 0, 1_000_000)),
		opt("LOGIN_FAILURES_PER_HOUR_PER_IP", "100", number(&c.LoginFailuresPerHourIP, 0, 1_000_000)),
		opt("PASSWORD_RESET_TTL", "30m", func(v string) error {
			if v == "0" || v == "0s" {
				return nil // no reset by e-mail
			}
			return duration(&c.PasswordResetTTL, time.Second, 7*24*time.Hour)(v)
		}),
		opt("SESSION_RETENTION", "720h", duration(&c.SessionRetention, time.Second, 10*365*24*time.Hour)),
		opt("OUTBOX_RETENTION", "72h", duration(&c.OutboxRetention, time.Second, 365*24*time.Hour)),
		opt("READY_REQUIRES_NATS", "true", boolean(&c.ReadyRequiresNATS)),
		opt("NATS_STREAM_REPLICAS", "1", number(&c.NATSStreamReplicas, 1, 5)),
		opt("SHUTDOWN_DELAY", "0s", duration(&c.ShutdownDelay, 0, 10*time.Minute)),
		opt("SHUTDOWN_TIMEOUT", "30s", duration(&c.ShutdownTimeout, time.Second, time.Hour)),
		opt("LOG_LEVEL", "info", func(v string) error {
			switch v {
			case "debug", "info", "warn", "error":
				return c.LogLevel.UnmarshalText([]byte(v))
			}
			return errors.New("must be debug, info, warn or error")
		}),
	}
}

// successors are names of the first version. Ignoring one would silently run
// with our default, which may be weaker than what the operator had asked for.
var successors = []struct{ old, new string }{
	{"ARGON_MEMORY_KB", "ARGON2_MEMORY_KIB"},
	{"ARGON_ITERATIONS", "ARGON2_ITERATIONS"},
	{"ARGON_PARALLELISM", "ARGON2_PARALLELISM"},
	{"ACCESS_TOKEN_TTL_MINUTES", "ACCESS_TOKEN_TTL"},
	{"REFRESH_TOKEN_TTL_DAYS", "REFRESH_TOKEN_TTL"},
	{"HASH_ACQUIRE_TIMEOUT_MS", "HASH_ACQUIRE_TIMEOUT"},
	{"LOCKOUT_MINUTES", "LOCKOUT_DURATION"},
	{"IP_RL_PER_SECOND", "IP_RATE_PER_SECOND"},
	{"IP_RL_BURST", "IP_RATE_BURST"},
}

// LoadConfig reads the named variables, for subcommands that need no more, or
// without names the whole configuration. Its error joins every mistake, each
// beginning with the variable's name; no value is ever part of it.
func LoadConfig(lookup func(string) (string, bool), names ...string) (Config, error) {
	c, errs := loadVariables(lookup, names)
	if len(names) > 0 {
		return c, errors.Join(errs...)
	}
	errs = append(errs, c.resolve()...)
	for _, s := range successors {
		for _, name := range []string{s.old, s.old + "_FILE"} {
			if v, ok := lookup(name); ok && v != "" {
				errs = append(errs, fmt.Errorf("%s: no longer used, set %s", name, s.new))
			}
		}
	}
	return c, errors.Join(errs...)
}

func loadVariables(lookup func(string) (string, bool), names []string) (Config, []error) {
	c := Config{pems: map[string]string{}}
	var errs []error
	for _, v := range variables(&c) {
		if len(names) > 0 && !slices.Contains(names, v.Name) {
			continue
		}
		value, err := valueOf(lookup, v)
		switch {
		case err != nil:
		case value == "" && v.Required:
			err = errors.New("required")
		case value == "" && v.Default == "":
			continue
		case value == "":
			err = v.set(v.Default)
		default:
			err = v.set(value)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", v.Name, err))
		}
	}
	return c, errs
}

// valueOf is the variable's value, or that of the file named by NAME_FILE
// without its last line break. An empty variable counts as not set, since
// compose files pass absent values on as empty ones.
func valueOf(lookup func(string) (string, bool), v variable) (string, error) {
	value, _ := lookup(v.Name)
	path, _ := lookup(v.Name + "_FILE")
	if path == "" {
		return value, nil
	}
	if value != "" {
		return "", errors.New("given twice, also as " + v.Name + "_FILE")
	}
	b, err := readBounded(path)
	if err != nil {
		return "", fmt.Errorf("%s_FILE: %w", v.Name, err)
	}
	value = strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if value == "" && !v.emptyFile { // a token that went missing must not open a door
		return "", fmt.Errorf("%s_FILE: file is empty", v.Name)
	}
	return value, nil
}

// readBounded reads a small file. Its errors name no path: a path may be a
// value that was meant for the variable without _FILE.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, errors.New("file cannot be opened")
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return nil, errors.New("file cannot be read")
	}
	if len(b) > maxConfigFile {
		return nil, errors.New("file is larger than 1 MiB")
	}
	return b, nil
}

const maxConfigFile = 1 << 20
