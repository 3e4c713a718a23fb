package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/7d-solutions/identity-auth/db/dbtest"
)

// finished is what a command left behind.
type finished struct {
	code           int
	stdout, stderr string
}

// execute runs the shipped binary with no environment but c until it ends.
func execute(t *testing.T, c env, args ...string) finished {
	t.Helper()
	path, err := plainBinary()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = c.list()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if ctx.Err() != nil {
		t.Fatalf("identity-auth %q does not end", args)
	}
	return finished{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// write makes a file in a folder of the test's own.
func write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// bare is a configuration that has all it must, for servers that are not
// there: enough for what ends before it connects.
func bare(t *testing.T, more ...env) env {
	t.Helper()
	keys := keyPair()
	c := env{
		"DATABASE_URL": "postgres://nobody@127.0.0.1:1/none", "NATS_URL": "nats://127.0.0.1:1",
		"JWT_PRIVATE_KEY_PEM": keys.private, "JWT_PUBLIC_KEY_PEM": keys.public, "JWT_KID": "test-1",
		"HOST": "127.0.0.1", "PORT": freePort(t), "MAX_CONCURRENT_HASHES": "1",
	}
	for _, m := range more {
		maps.Copy(c, m)
	}
	return c
}

// wantNamed fails unless the start with c is refused with exit code 2, naming
// every one of names at the beginning of a line and no other variable.
func wantNamed(t *testing.T, what string, c env, names ...string) string {
	t.Helper()
	got := execute(t, c)
	if got.code != 2 {
		t.Errorf("%s: got exit code %d, want 2\n%s%s", what, got.code, got.stdout, got.stderr)
	}
	var named []string
	for line := range strings.Lines(got.stderr) {
		// Variables that are wrong together are named together.
		if m := regexp.MustCompile(`^([A-Z][A-Z0-9_]+(?:, [A-Z][A-Z0-9_]+)*): `).FindStringSubmatch(line); m != nil {
			named = append(named, strings.Split(m[1], ", ")...)
		}
	}
	slices.Sort(named)
	slices.Sort(names)
	if !slices.Equal(slices.Compact(named), names) {
		t.Errorf("%s: named %q, want %q\n%s", what, named, names, got.stderr)
	}
	return got.stderr
}

// TestEveryVariableWrong: all mistakes come back in one go, and no value does.
func TestEveryVariableWrong(t *testing.T) {
	t.Parallel()
	const value = "zz9value"
	rounds := []struct {
		name string
		bad  env
	}{
		{"nonsense", env{
			"DATABASE_URL": "postgres://user:" + value + "@%%%", "NATS_URL": "http://user:" + value + "@nats",
			"NATS_CREDS_FILE": "/nowhere/" + value, "NATS_CA_FILE": "/nowhere/" + value,
			"JWT_PRIVATE_KEY_PEM": value, "JWT_PUBLIC_KEY_PEM": value, "JWT_KID": value + "\n",
			"JWT_PREV_PUBLIC_KEY_PEM": value, "JWT_PREV_KID": strings.Repeat(value, 30), "JWT_NEXT_PUBLIC_KEY_PEM": value, "JWT_NEXT_KID": "ü" + value,
			"JWT_ISSUER": " " + value, "JWT_AUDIENCE": value + "\n",
			"ACCESS_TOKEN_TTL": value, "REFRESH_TOKEN_TTL": value, "SESSION_MAX_AGE": value, "REFRESH_REUSE_GRACE": value, "MAX_SESSIONS_PER_USER": value,
			"HOST": " " + value, "PORT": value, "TLS_CERT_FILE": "/nowhere/" + value, "TLS_KEY_FILE": "/nowhere/" + value,
			"ADMIN_ADDR": value, "ADMIN_TOKEN": value, "TRUSTED_PROXIES": value, "CORS_ORIGINS": value,
			"DATABASE_MAX_CONNECTIONS": value, "MIGRATE_ON_START": value,
			"ARGON2_MEMORY_KIB": value, "ARGON2_ITERATIONS": value, "ARGON2_PARALLELISM": value, "MAX_CONCURRENT_HASHES": value, "HASH_ACQUIRE_TIMEOUT": value,
			"PASSWORD_MIN_LENGTH": value, "PASSWORD_BLOCKLIST_FILE": "/nowhere/" + value,
			"LOCKOUT_THRESHOLD": value, "LOCKOUT_DURATION": value,
			"LOGIN_PER_MIN_PER_EMAIL": value, "REGISTER_PER_MIN_PER_EMAIL": value, "REFRESH_PER_MIN_PER_TOKEN": value, "FORGOT_PER_HOUR_PER_EMAIL": value,
			"IP_RATE_PER_SECOND": value, "IP_RATE_BURST": value, "LOGIN_FAILURES_PER_HOUR_PER_IP": value,
			"PASSWORD_RESET_TTL": value, "SESSION_RETENTION": value, "OUTBOX_RETENTION": value,
			"READY_REQUIRES_NATS": value, "NATS_STREAM_REPLICAS": value, "SHUTDOWN_DELAY": value, "SHUTDOWN_TIMEOUT": value, "LOG_LEVEL": value,
		}},
		{"zero", env{
			"ACCESS_TOKEN_TTL": "0", "REFRESH_TOKEN_TTL": "0s", "SESSION_MAX_AGE": "0", "PORT": "0", "DATABASE_MAX_CONNECTIONS": "0", "MIGRATE_ON_START": "0",
			"ARGON2_MEMORY_KIB": "0", "ARGON2_ITERATIONS": "0", "ARGON2_PARALLELISM": "0", "MAX_CONCURRENT_HASHES": "0", "HASH_ACQUIRE_TIMEOUT": "0",
			"PASSWORD_MIN_LENGTH": "0", "LOCKOUT_THRESHOLD": "0", "LOCKOUT_DURATION": "0",
			"SESSION_RETENTION": "0", "OUTBOX_RETENTION": "0", "NATS_STREAM_REPLICAS": "0", "SHUTDOWN_TIMEOUT": "0",
		}},
		{"negative", env{
			"ACCESS_TOKEN_TTL": "-15m", "REFRESH_TOKEN_TTL": "-1h", "SESSION_MAX_AGE": "-1h", "REFRESH_REUSE_GRACE": "-1s", "MAX_SESSIONS_PER_USER": "-1", "PORT": "-1",
			"DATABASE_MAX_CONNECTIONS": "-8", "ARGON2_MEMORY_KIB": "-65536", "ARGON2_ITERATIONS": "-3", "ARGON2_PARALLELISM": "-1", "MAX_CONCURRENT_HASHES": "-1",
			"HASH_ACQUIRE_TIMEOUT": "-2s", "PASSWORD_MIN_LENGTH": "-12", "LOCKOUT_THRESHOLD": "-5", "LOCKOUT_DURATION": "-15m",
			"LOGIN_PER_MIN_PER_EMAIL": "-1", "REGISTER_PER_MIN_PER_EMAIL": "-1", "REFRESH_PER_MIN_PER_TOKEN": "-1", "FORGOT_PER_HOUR_PER_EMAIL": "-1",
			"IP_RATE_PER_SECOND": "-1", "IP_RATE_BURST": "-1", "LOGIN_FAILURES_PER_HOUR_PER_IP": "-1",
			"PASSWORD_RESET_TTL": "-30m", "SESSION_RETENTION": "-1h", "OUTBOX_RETENTION": "-1h", "NATS_STREAM_REPLICAS": "-1", "SHUTDOWN_DELAY": "-1s", "SHUTDOWN_TIMEOUT": "-1s",
		}},
		{"absurd", env{
			"ACCESS_TOKEN_TTL": "100000h", "REFRESH_TOKEN_TTL": "1000000h", "SESSION_MAX_AGE": "1000000h", "REFRESH_REUSE_GRACE": "61m", "MAX_SESSIONS_PER_USER": "99999999999",
			"PORT": "65536", "DATABASE_MAX_CONNECTIONS": "1000000", "ARGON2_MEMORY_KIB": "4294967295", "ARGON2_ITERATIONS": "100000", "ARGON2_PARALLELISM": "256",
			"HASH_ACQUIRE_TIMEOUT": "24h", "PASSWORD_MIN_LENGTH": "100000", "LOCKOUT_THRESHOLD": "1000000", "LOCKOUT_DURATION": "1000000h",
			"PASSWORD_RESET_TTL": "100000h", "SESSION_RETENTION": "1000000h", "OUTBOX_RETENTION": "1000000h", "NATS_STREAM_REPLICAS": "6", "SHUTDOWN_DELAY": "100h", "SHUTDOWN_TIMEOUT": "100h",
		}},
		{"other notations", env{
			"ACCESS_TOKEN_TTL": "15", "REFRESH_TOKEN_TTL": "14d", "SESSION_MAX_AGE": "1w", "MAX_SESSIONS_PER_USER": "1e2", "PORT": "0x1F90", "DATABASE_MAX_CONNECTIONS": "8.0",
			"ARGON2_MEMORY_KIB": "64MiB", "ARGON2_ITERATIONS": "+3", "PASSWORD_MIN_LENGTH": " 12", "LOCKOUT_THRESHOLD": "5_0", "LOCKOUT_DURATION": "15 minutes",
			"MIGRATE_ON_START": "True", "READY_REQUIRES_NATS": "yes", "LOG_LEVEL": "WARNING", "TRUSTED_PROXIES": "10.0.0.0/33", "CORS_ORIGINS": "*",
			"ADMIN_ADDR": "127.0.0.1", "NATS_URL": "ws://127.0.0.1:4222",
		}},
		{"the least of one", env{
			"PASSWORD_MIN_LENGTH": "7", "ARGON2_MEMORY_KIB": "19455", "ARGON2_ITERATIONS": "1", "ADMIN_TOKEN": strings.Repeat("x", 31), "ADMIN_ADDR": "127.0.0.1:0",
			"CORS_ORIGINS": "https://app.example.com/", "TRUSTED_PROXIES": "10.0.0.0/8,,",
		}},
	}
	for _, round := range rounds {
		names := slices.Collect(maps.Keys(round.bad))
		stderr := wantNamed(t, round.name, bare(t, round.bad), names...)
		if strings.Contains(stderr, value) {
			t.Errorf("%s: a value is printed:\n%s", round.name, stderr)
		}
	}
	wantNamed(t, "nothing at all", env{}, "DATABASE_URL", "NATS_URL", "JWT_PRIVATE_KEY_PEM", "JWT_PUBLIC_KEY_PEM", "JWT_KID")
	wantNamed(t, "an empty DATABASE_URL", bare(t, env{"DATABASE_URL": ""}), "DATABASE_URL")

	// Every variable of the README's table stands in the first round, but for
	// the one that cannot be wrong.
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `?([A-Z][A-Z0-9_]{3,})`? \\|").FindAllSubmatch(readme, -1) {
		documented = append(documented, string(m[1]))
	}
	tried := append(slices.Collect(maps.Keys(rounds[0].bad)), "REGISTER_TOKEN")
	slices.Sort(documented)
	if slices.Sort(tried); !slices.Equal(documented, tried) {
		t.Errorf("variables tried: got %q\nwant those of README.md, %q", tried, documented)
	}
}

// TestOldNames: a name of the first version is refused, naming its successor.
func TestOldNames(t *testing.T) {
	t.Parallel()
	successors := map[string]string{
		"ARGON_MEMORY_KB": "ARGON2_MEMORY_KIB", "ARGON_ITERATIONS": "ARGON2_ITERATIONS", "ARGON_PARALLELISM": "ARGON2_PARALLELISM",
		"ACCESS_TOKEN_TTL_MINUTES": "ACCESS_TOKEN_TTL", "REFRESH_TOKEN_TTL_DAYS": "REFRESH_TOKEN_TTL", "HASH_ACQUIRE_TIMEOUT_MS": "HASH_ACQUIRE_TIMEOUT",
		"LOCKOUT_MINUTES": "LOCKOUT_DURATION", "IP_RL_PER_SECOND": "IP_RATE_PER_SECOND", "IP_RL_BURST": "IP_RATE_BURST",
	}
	old := env{}
	for name := range successors {
		old[name] = "64"
	}
	stderr := wantNamed(t, "all old names", bare(t, old), slices.Collect(maps.Keys(old))...)
	for name, successor := range successors {
		if !regexp.MustCompile(`(?m)^` + name + `: .*\b` + successor + `\b`).MatchString(stderr) {
			t.Errorf("%s is refused without naming %s:\n%s", name, successor, stderr)
		}
	}
	wantNamed(t, "one old name", bare(t, env{"LOCKOUT_MINUTES": "15"}), "LOCKOUT_MINUTES")
}

// TestKeyConfiguration: what does not add up is refused before anything opens.
func TestKeyConfiguration(t *testing.T) {
	t.Parallel()
	other := newKeyPair()
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	curveDER, err := x509.MarshalPKCS8PrivateKey(curve)
	if err != nil {
		t.Fatal(err)
	}
	curvePublic, err := x509.MarshalPKIXPublicKey(&curve.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(label string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: label, Bytes: der}))
	}
	for _, row := range []struct {
		name string
		bad  env
		want []string
	}{
		{"another pair's public key", env{"JWT_PUBLIC_KEY_PEM": other.public}, []string{"JWT_PRIVATE_KEY_PEM", "JWT_PUBLIC_KEY_PEM"}},
		{"the private key as the public one", env{"JWT_PUBLIC_KEY_PEM": keyPair().private}, []string{"JWT_PUBLIC_KEY_PEM"}},
		{"the public key as the private one", env{"JWT_PRIVATE_KEY_PEM": keyPair().public}, []string{"JWT_PRIVATE_KEY_PEM"}},
		{"a small key", env{"JWT_PRIVATE_KEY_PEM": encode("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(small))}, []string{"JWT_PRIVATE_KEY_PEM"}},
		{"another kind of key", env{"JWT_PRIVATE_KEY_PEM": encode("PRIVATE KEY", curveDER), "JWT_PUBLIC_KEY_PEM": encode("PUBLIC KEY", curvePublic)}, []string{"JWT_PRIVATE_KEY_PEM", "JWT_PUBLIC_KEY_PEM"}},
		{"two keys", env{"JWT_PRIVATE_KEY_PEM": keyPair().private + other.private}, []string{"JWT_PRIVATE_KEY_PEM"}},
		{"text behind the key", env{"JWT_PUBLIC_KEY_PEM": keyPair().public + "more"}, []string{"JWT_PUBLIC_KEY_PEM"}},
		{"half a key", env{"JWT_PRIVATE_KEY_PEM": keyPair().private[:600]}, []string{"JWT_PRIVATE_KEY_PEM"}},
		{"a previous key without name", env{"JWT_PREV_PUBLIC_KEY_PEM": other.public}, []string{"JWT_PREV_PUBLIC_KEY_PEM", "JWT_PREV_KID"}},
		{"a previous name without key", env{"JWT_PREV_KID": "test-0"}, []string{"JWT_PREV_PUBLIC_KEY_PEM", "JWT_PREV_KID"}},
		{"a coming key without name", env{"JWT_NEXT_PUBLIC_KEY_PEM": other.public}, []string{"JWT_NEXT_PUBLIC_KEY_PEM", "JWT_NEXT_KID"}},
		{"the previous key has the current name", env{"JWT_PREV_PUBLIC_KEY_PEM": other.public, "JWT_PREV_KID": "test-1"}, []string{"JWT_PREV_KID"}},
		{"the coming key has the previous name", env{
			"JWT_PREV_PUBLIC_KEY_PEM": other.public, "JWT_PREV_KID": "test-0", "JWT_NEXT_PUBLIC_KEY_PEM": other.public, "JWT_NEXT_KID": "test-0",
		}, []string{"JWT_NEXT_KID"}},
		{"a certificate without key", env{"TLS_CERT_FILE": write(t, "cert", newCertificate(t, "one").cert)}, []string{"TLS_CERT_FILE", "TLS_KEY_FILE"}},
		{"a certificate with another key", env{
			"TLS_CERT_FILE": write(t, "cert", newCertificate(t, "one").cert), "TLS_KEY_FILE": write(t, "key", newCertificate(t, "two").key),
		}, []string{"TLS_CERT_FILE", "TLS_KEY_FILE"}},
		{"a token for an address that is not there", env{"ADMIN_TOKEN": strings.Repeat("x", 32)}, []string{"ADMIN_TOKEN"}},
		{"more lanes than memory", env{"ARGON2_MEMORY_KIB": "19456", "ARGON2_PARALLELISM": "65"}, []string{"ARGON2_PARALLELISM"}},
	} {
		stderr := wantNamed(t, row.name, bare(t, row.bad), row.want...)
		if strings.Contains(stderr, "-----BEGIN") || strings.Contains(stderr, "MII") {
			t.Errorf("%s: a key is printed:\n%s", row.name, stderr)
		}
	}
}

// TestValuesFromFiles: every variable can be NAME_FILE.
func TestValuesFromFiles(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const token = "a-token-for-the-registering-backend"
	c := w.config(cheap, unlimited, env{"REGISTER_TOKEN": token, "JWT_ISSUER": "from-a-file", "LOG_LEVEL": "info"})
	files := env{}
	endings := []string{"", "\n", "\r\n"}
	for i, name := range slices.Sorted(maps.Keys(c)) {
		files[name+"_FILE"] = write(t, name, c[name]+endings[i%len(endings)])
	}
	s := w.launch(racyBinary, files)
	s.base = "http://127.0.0.1:" + c["PORT"]
	s.waitReady()
	wantCode(t, "register with the token", s.post(registerPath, newPerson(), "Authorization", "Bearer "+token), 201, "")
	wantCode(t, "register without", s.post(registerPath, newPerson()), 401, "unauthorized")

	secret := write(t, "secret", "postgres://user:zz9secret@127.0.0.1:1/none")
	for _, row := range []struct {
		name string
		c    env
		want string
	}{
		{"both", env{"DATABASE_URL_FILE": secret}, "DATABASE_URL"},
		{"both, the same", env{"JWT_KID_FILE": write(t, "kid", "test-1")}, "JWT_KID"},
		{"no such file", env{"REGISTER_TOKEN_FILE": "/nowhere/zz9secret"}, "REGISTER_TOKEN"},
		{"a folder", env{"REGISTER_TOKEN_FILE": t.TempDir()}, "REGISTER_TOKEN"},
		{"an empty file: a token that went missing opens no door", env{"REGISTER_TOKEN_FILE": write(t, "empty", "")}, "REGISTER_TOKEN"},
		{"an empty line", env{"REGISTER_TOKEN_FILE": write(t, "empty", "\n")}, "REGISTER_TOKEN"},
		{"an empty file for what has a default", env{"LOCKOUT_THRESHOLD_FILE": write(t, "empty", "")}, "LOCKOUT_THRESHOLD"},
		{"a bad value in a file", env{"LOCKOUT_THRESHOLD_FILE": write(t, "bad", "zz9secret")}, "LOCKOUT_THRESHOLD"},
		{"2 MiB", env{"REGISTER_TOKEN_FILE": write(t, "large", strings.Repeat("x", 2<<20))}, "REGISTER_TOKEN"},
		{"an old name", env{"LOCKOUT_MINUTES_FILE": secret}, "LOCKOUT_MINUTES_FILE"},
	} {
		if stderr := wantNamed(t, row.name, bare(t, row.c), row.want); strings.Contains(stderr, "zz9secret") || strings.Contains(stderr, "/nowhere") {
			t.Errorf("%s: a value is printed:\n%s", row.name, stderr)
		}
	}

	// PEM on one line, as compose files and unit files need it.
	oneLine := env{
		"JWT_PRIVATE_KEY_PEM": strings.ReplaceAll(keyPair().private, "\n", `\n`),
		"JWT_PUBLIC_KEY_PEM":  strings.ReplaceAll(keyPair().public, "\n", `\n`),
	}
	s = w.start(cheap, unlimited, oneLine)
	s.login(s.register())
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"frobnicate"}, {"Serve"}, {"serve", "now"}, {"migrate", "down"}, {"migrate", "status", "now"}, {"keygen"}, {"keygen", "a", "b"}, {"keygen", "--if-absent"}, {"keygen", "--if-absent", "a", "b"},
		{"healthcheck", "now"}, {"version", "now"}, {"user"}, {"user", "get", "tenant"}, {"import"}, {"outbox"}, {"outbox", "frobnicate"}, {"--frobnicate"}, {"-x", "serve"}, {""},
	} {
		got := execute(t, bare(t), args...)
		if got.code != 2 || !strings.Contains(got.stderr, "usage: identity-auth") || got.stdout != "" {
			t.Errorf("identity-auth %q: got exit code %d, %q, %q, want 2 and the usage on stderr", args, got.code, got.stdout, got.stderr)
		}
	}
	for _, args := range [][]string{{"help"}, {"-h"}, {"--help"}} {
		got := execute(t, env{}, args...)
		if got.code != 0 || !strings.Contains(got.stdout, "usage: identity-auth") {
			t.Errorf("identity-auth %q: got exit code %d, %q, want 0 and the usage on stdout", args, got.code, got.stdout)
		}
	}
	got := execute(t, env{}, "version")
	if got.code != 0 || !regexp.MustCompile(`^identity-auth \S+ commit \S+ go1\.\d+(\.\d+)?\S*\n$`).MatchString(got.stdout) {
		t.Errorf("version: got exit code %d, %q, want version, commit and Go version", got.code, got.stdout)
	}
}

// TestPortInUse is a failure at run time, not a mistake in the configuration.
func TestPortInUse(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, taken, _ := net.SplitHostPort(l.Addr().String())
	for _, c := range []env{{"PORT": taken}, {"ADMIN_ADDR": l.Addr().String()}} {
		got := execute(t, bare(t, c))
		if got.code != 1 || !strings.Contains(got.stdout+got.stderr, "address already in use") {
			t.Errorf("%v: got exit code %d, %q, %q, want 1 and address already in use", c, got.code, got.stdout, got.stderr)
		}
	}
}

func TestKeygen(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "new", "keys")
	read := func(name string) []byte {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	if got := execute(t, env{}, "keygen", dir); got.code != 0 {
		t.Fatalf("keygen: got exit code %d, %q, want 0", got.code, got.stderr)
	}
	for name, want := range map[string]os.FileMode{"private.pem": 0o600, "public.pem": 0o644} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got&^want != 0 {
			t.Errorf("mode of %s: got %o, want %o", name, got, want)
		}
	}
	private, public := read("private.pem"), read("public.pem")
	block, _ := pem.Decode(private)
	if block == nil {
		t.Fatal("private.pem holds no PEM")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if rsaKey, ok := key.(*rsa.PrivateKey); !ok || rsaKey.N.BitLen() != 3072 {
		t.Errorf("got a key %T, want RSA of 3072 bits", key)
	}

	// A pair that the service takes.
	w := newWorld(t)
	s := w.start(cheap, unlimited, env{"JWT_PRIVATE_KEY_PEM": string(private), "JWT_PUBLIC_KEY_PEM": string(public)})
	token := s.login(s.register()).AccessToken
	for _, v := range verifiers(t, s, "identity-auth", "identity-auth") {
		if _, err := v.verify(token); err != nil {
			t.Errorf("%s: %v", v.name, err)
		}
	}

	// Never overwritten, not by halves.
	if got := execute(t, env{}, "keygen", dir); got.code != 1 {
		t.Errorf("keygen again: got exit code %d, want 1", got.code)
	}
	if !bytes.Equal(read("private.pem"), private) || !bytes.Equal(read("public.pem"), public) {
		t.Error("keygen again: the pair has changed")
	}
	if err := os.Remove(filepath.Join(dir, "private.pem")); err != nil {
		t.Fatal(err)
	}
	if got := execute(t, env{}, "keygen", dir); got.code != 1 {
		t.Errorf("keygen beside a public key: got exit code %d, want 1", got.code)
	}
	if _, err := os.Stat(filepath.Join(dir, "private.pem")); !errors.Is(err, os.ErrNotExist) || !bytes.Equal(read("public.pem"), public) {
		t.Error("keygen beside a public key: it left half a pair")
	}
	if err := os.WriteFile(filepath.Join(dir, "private.pem"), []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "public.pem")); err != nil {
		t.Fatal(err)
	}
	if got := execute(t, env{}, "keygen", dir); got.code != 1 || string(read("private.pem")) != "precious" {
		t.Errorf("keygen beside a private key: got exit code %d and %q, want 1 and the old file", got.code, read("private.pem"))
	}
}

// What a container does at each start: the first makes the pair, all others
// keep it, and nothing that is no pair is taken for one.
func TestKeygenIfAbsent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	both := func() string {
		t.Helper()
		private, err := os.ReadFile(path("private.pem"))
		public, err2 := os.ReadFile(path("public.pem"))
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		return string(private) + string(public)
	}
	var pair string
	for i := range 2 {
		if got := execute(t, env{}, "keygen", "--if-absent", dir); got.code != 0 {
			t.Fatalf("run %d: got exit code %d, %q, want 0", i+1, got.code, got.stderr)
		}
		if now := both(); i == 0 {
			pair = now
		} else if now != pair {
			t.Error("the second run has changed the pair")
		}
	}
	other := newKeyPair()
	for _, row := range []struct{ name, file, content string }{
		{"the public key of another pair", "public.pem", other.public},
		{"an empty public key", "public.pem", ""},
		{"an unreadable private key", "private.pem", "precious"},
	} {
		old, err := os.ReadFile(path(row.file))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path(row.file), []byte(row.content), 0o600); err != nil {
			t.Fatal(err)
		}
		before := both()
		if got := execute(t, env{}, "keygen", "--if-absent", dir); got.code != 1 || both() != before {
			t.Errorf("%s: got exit code %d, files kept: %v, want 1 and the files as they were", row.name, got.code, both() == before)
		}
		if err := os.WriteFile(path(row.file), old, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(path("public.pem")); err != nil {
		t.Fatal(err)
	}
	if got := execute(t, env{}, "keygen", "--if-absent", dir); got.code != 1 {
		t.Errorf("half a pair: got exit code %d, want 1", got.code)
	}
}

// certificate is a self-signed one for 127.0.0.1.
type certificate struct{ cert, key string } // PEM

func newCertificate(t *testing.T, name string) certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{name + ".example.com"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return certificate{
		string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})),
	}
}

func TestHealthcheck(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.config(cheap, unlimited)
	check := func(what string, c env, want int) {
		t.Helper()
		if got := execute(t, c, "healthcheck"); got.code != want || got.code != 0 && got.stderr == "" {
			t.Errorf("healthcheck, %s: got exit code %d, %q, want %d", what, got.code, got.stderr, want)
		}
	}
	check("nothing there", c, 1)
	s := w.launch(racyBinary, c)
	s.waitReady()
	check("ready", c, 0)
	check("ready, with no more configuration than it needs", env{"PORT": c["PORT"]}, 0)
	check("a bad PORT", env{"PORT": "x"}, 2)
	w.nats.Stop()
	eventually(t, "not ready", 10*time.Second, func() bool { return s.get("/health/ready").status == 503 })
	check("not ready", c, 1)

	one := newCertificate(t, "one")
	lenient := w.config(cheap, unlimited, env{
		"TLS_CERT_FILE": write(t, "cert", one.cert), "TLS_KEY_FILE": write(t, "key", one.key), "READY_REQUIRES_NATS": "false",
	})
	secure := w.launch(racyBinary, lenient)
	secure.base = "https://127.0.0.1:" + lenient["PORT"]
	secure.client.Transport.(*http.Transport).TLSClientConfig = trusting(t, one)
	secure.waitReady()
	check("ready, TLS", lenient, 0)
	two := newCertificate(t, "two")
	check("a certificate renewed and not yet reloaded", env{"PORT": lenient["PORT"], "TLS_CERT_FILE": write(t, "cert", two.cert)}, 0)
	check("TLS asked without", env{"PORT": lenient["PORT"]}, 1)
}

func trusting(t *testing.T, c certificate) *tls.Config {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(c.cert)) {
		t.Fatal("no certificate")
	}
	return &tls.Config{RootCAs: roots}
}

// TestTLS: served by the service itself, TLS 1.2 or later, and exchanged by
// SIGHUP.
func TestTLS(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := newCertificate(t, "one"), newCertificate(t, "two")
	certFile, keyFile := write(t, "cert", one.cert), write(t, "key", one.key)
	c := w.config(cheap, unlimited, env{"TLS_CERT_FILE": certFile, "TLS_KEY_FILE": keyFile})
	s := w.launch(racyBinary, c)
	address := strings.TrimPrefix(s.base, "http://")
	s.base = "https://" + address
	s.client.Transport.(*http.Transport).TLSClientConfig = trusting(t, one)
	s.waitReady()
	held(t, s)
	s.login(s.register())

	dial := func(c certificate, version uint16) error {
		config := trusting(t, c)
		config.MinVersion, config.MaxVersion = version, version
		conn, err := tls.Dial("tcp", address, config)
		if err == nil {
			conn.Close()
		}
		return err
	}
	for version, ok := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		if err := dial(one, version); (err == nil) != ok {
			t.Errorf("%s: got %v, want accepted: %v", tls.VersionName(version), err, ok)
		}
	}
	if resp, err := http.Get("http://" + address + "/health/live"); err == nil {
		resp.Body.Close()
		if resp.StatusCode != 400 {
			t.Errorf("plain HTTP on the TLS port: got %d, want 400", resp.StatusCode)
		}
	}

	reload := func(cert, key string) {
		for path, text := range map[string]string{certFile: cert, keyFile: key} {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		s.cmd.Process.Signal(syscall.SIGHUP)
	}
	reload(two.cert, one.key)
	eventually(t, "a mismatch is told", 10*time.Second, func() bool { return len(s.logged("config.reload_failed")) == 1 })
	if err := dial(one, tls.VersionTLS13); err != nil {
		t.Errorf("the old certificate after a bad reload: %v", err)
	}
	reload(two.cert, two.key)
	eventually(t, "the new certificate is served", 10*time.Second, func() bool { return dial(two, tls.VersionTLS13) == nil })
	if dial(one, tls.VersionTLS13) == nil {
		t.Error("the old certificate is still served")
	}
}

func TestMigrateCommands(t *testing.T) {
	t.Parallel()
	c := env{"DATABASE_URL": dbtest.Empty(t)} // all that they need
	files, err := filepath.Glob("../../sql/*.sql")
	if err != nil || len(files) == 0 {
		t.Fatalf("no migrations: %v", err)
	}
	status := func(want string) {
		t.Helper()
		got := execute(t, c, "migrate", "status")
		if got.code != 0 {
			t.Errorf("migrate status: got exit code %d, %q, want 0", got.code, got.stderr)
		}
		lines := strings.Split(strings.TrimSpace(got.stdout), "\n")
		for i, file := range files {
			if i >= len(lines) || !strings.Contains(lines[i], filepath.Base(file)) || !strings.Contains(lines[i], want) {
				t.Errorf("migrate status: got\n%s\nwant a line for each of %q with %s", got.stdout, files, want)
				return
			}
		}
		if len(lines) != len(files) {
			t.Errorf("migrate status: got %d lines, want %d", len(lines), len(files))
		}
	}
	status("pending")
	if got := execute(t, c, "migrate"); got.code != 0 || strings.Count(got.stdout, "applied") != len(files) {
		t.Errorf("migrate: got exit code %d, %q, %q, want 0 and %d applied", got.code, got.stdout, got.stderr, len(files))
	}
	status("applied")
	if got := execute(t, c, "migrate"); got.code != 0 || strings.Contains(got.stdout, ".sql") {
		t.Errorf("migrate again: got exit code %d, %q, want 0 and nothing applied", got.code, got.stdout)
	}
	for _, args := range [][]string{{"migrate"}, {"migrate", "status"}} {
		if got := execute(t, env{"DATABASE_URL": "postgres://nobody:zz9secret@127.0.0.1:1/none"}, args...); got.code != 1 || got.stderr == "" || strings.Contains(got.stderr, "zz9secret") {
			t.Errorf("%q without a database: got exit code %d, %q, want 1 and why", args, got.code, got.stderr)
		}
		if got := execute(t, env{}, args...); got.code != 2 || !strings.Contains(got.stderr, "DATABASE_URL") {
			t.Errorf("%q without DATABASE_URL: got exit code %d, %q, want 2", args, got.code, got.stderr)
		}
	}

	// A migration that was changed after it ran stops the service.
	dbtest.Exec(t, c["DATABASE_URL"], `UPDATE schema_migrations SET checksum = sha256('edited') WHERE version = 1`)
	if got := execute(t, bare(t, c)); got.code != 1 || !strings.Contains(got.stdout, "0001") {
		t.Errorf("serve on a changed migration: got exit code %d, %q, want 1 and its name", got.code, got.stdout)
	}
	if got := execute(t, c, "migrate"); got.code != 1 {
		t.Errorf("migrate on a changed migration: got exit code %d, want 1", got.code)
	}
}

// TestMigrateOnStart: true applies, false waits until someone has.
func TestMigrateOnStart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.db = dbtest.Empty(t)
	s := held(t, w.launch(racyBinary, w.config(cheap, unlimited, env{"MIGRATE_ON_START": "false"})))
	eventually(t, "the process says that it waits", 30*time.Second, func() bool { return len(s.logged("migrate.failed")) > 0 })
	wantCode(t, "live", s.get("/health/live"), 200, "")
	if a := s.get("/health/ready"); a.status != 503 {
		t.Errorf("ready without a schema: got %d, want 503", a.status)
	}
	wantCode(t, "register", s.post(registerPath, newPerson()), 503, "unavailable")
	if got := dbtest.Query[string](t, w.db, `SELECT nspname::text FROM pg_namespace WHERE nspname = 'identity_auth'`); len(got) != 0 {
		t.Error("MIGRATE_ON_START=false has made a schema")
	}
	if got := execute(t, env{"DATABASE_URL": w.db}, "migrate"); got.code != 0 {
		t.Fatalf("migrate: got exit code %d, %q, want 0", got.code, got.stderr)
	}
	s.waitReady()
	s.login(s.register())

	w.db = dbtest.Empty(t)
	s = held(t, w.start(cheap, unlimited))
	s.login(s.register())
	if got := s.logged("migrate.applied"); len(got) != 1 {
		t.Errorf("migrate.applied lines: got %d, want 1", len(got))
	}
}

// TestReload: SIGHUP takes over new keys, tokens and lists from their files; a
// bad one changes nothing and is told.
func TestReload(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first, second := keyPair(), newKeyPair()
	dir := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c := env{"JWT_PRIVATE_KEY_PEM": "", "JWT_PUBLIC_KEY_PEM": "", "JWT_KID": ""}
	for _, name := range []string{"JWT_PRIVATE_KEY_PEM", "JWT_PUBLIC_KEY_PEM", "JWT_KID", "JWT_PREV_PUBLIC_KEY_PEM", "JWT_PREV_KID", "REGISTER_TOKEN"} {
		c[name+"_FILE"] = filepath.Join(dir, name)
	}
	c["PASSWORD_BLOCKLIST_FILE"] = filepath.Join(dir, "blocklist")
	put("JWT_PRIVATE_KEY_PEM", first.private)
	put("JWT_PUBLIC_KEY_PEM", first.public)
	put("JWT_KID", "test-1\n")
	put("JWT_PREV_PUBLIC_KEY_PEM", newKeyPair().public)
	put("JWT_PREV_KID", "test-0")
	put("REGISTER_TOKEN", "the first token")
	put("blocklist", "a sentence of the first list")
	s := held(t, w.start(cheap, unlimited, c))

	register := func(token, password string) answer {
		p := newPerson()
		p.Password = password
		return s.post(registerPath, p, "Authorization", "Bearer "+token)
	}
	kids := func() (kids []string) {
		list, _ := s.get("/.well-known/jwks.json").json(t)["keys"].([]any)
		for _, k := range list {
			m, _ := k.(map[string]any)
			kids = append(kids, fmt.Sprint(m["kid"]))
		}
		return kids
	}
	reload := func(event string) {
		t.Helper()
		before := len(s.logged(event))
		s.cmd.Process.Signal(syscall.SIGHUP)
		eventually(t, event, 10*time.Second, func() bool { return len(s.logged(event)) == before+1 })
	}
	p := newPerson()
	wantCode(t, "register", s.post(registerPath, p, "Authorization", "Bearer the first token"), 201, "")
	tok := s.login(p)
	etag := s.get("/.well-known/jwks.json").header.Get("ETag")

	// Every bad value keeps all the old ones.
	for _, row := range []struct {
		name string
		bad  map[string]string
	}{
		{"half a key", map[string]string{"JWT_PRIVATE_KEY_PEM": first.private[:500]}},
		{"a key that is no pair with the other", map[string]string{"JWT_PRIVATE_KEY_PEM": second.private}},
		{"a key that changes while its name stays", map[string]string{"JWT_PRIVATE_KEY_PEM": second.private, "JWT_PUBLIC_KEY_PEM": second.public}},
		{"an empty key", map[string]string{"JWT_PRIVATE_KEY_PEM": ""}},
		{"an empty token", map[string]string{"REGISTER_TOKEN": ""}},
		{"an empty token and a good list", map[string]string{"REGISTER_TOKEN": "\n", "blocklist": "another sentence of words"}},
	} {
		kept := map[string]string{}
		for name, text := range row.bad {
			old, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			kept[name] = string(old)
			put(name, text)
		}
		reload("config.reload_failed")
		if got, want := kids(), []string{"test-1", "test-0"}; !slices.Equal(got, want) {
			t.Errorf("%s: keys: got %q, want %q", row.name, got, want)
		}
		wantCode(t, row.name+": register with the old token", register("the first token", password), 201, "")
		wantCode(t, row.name+": register without", s.post(registerPath, newPerson()), 401, "unauthorized")
		wantCode(t, row.name+": the old list", register("the first token", "a sentence of the first list"), 400, "weak_password")
		for name, text := range kept {
			put(name, text)
		}
	}
	for _, line := range s.logged("config.reload_failed") {
		if text := string(toJSON(line)); line["level"] != "ERROR" || strings.Contains(text, dir) || strings.Contains(text, "MII") {
			t.Errorf("got %s, want an ERROR without a value", text)
		}
	}

	// A rotation as in the runbook.
	put("JWT_PRIVATE_KEY_PEM", second.private)
	put("JWT_PUBLIC_KEY_PEM", second.public)
	put("JWT_KID", "test-2")
	put("JWT_PREV_PUBLIC_KEY_PEM", first.public)
	put("JWT_PREV_KID", "test-1")
	put("REGISTER_TOKEN", "the second token")
	put("blocklist", "a sentence of the second list")
	reload("config.reloaded")
	if got, want := kids(), []string{"test-2", "test-1"}; !slices.Equal(got, want) {
		t.Errorf("keys after the rotation: got %q, want %q", got, want)
	}
	if got := s.get("/.well-known/jwks.json", "If-None-Match", etag); got.status != 200 {
		t.Errorf("JWKS with the old ETag: got %d, want 200", got.status)
	}
	if got := samples(s.get("/metrics")); got[`auth_jwt_key_info{kid="test-2",role="current"}`] != 1 || got[`auth_jwt_key_info{kid="test-1",role="previous"}`] != 1 {
		t.Error("auth_jwt_key_info does not show the rotation")
	}
	renewed := s.refresh(tok.RefreshToken).tokens(t)
	if got := header(t, renewed.AccessToken)["kid"]; got != "test-2" {
		t.Errorf("kid after the rotation: got %v, want test-2", got)
	}
	for _, v := range verifiers(t, s, "identity-auth", "identity-auth") {
		for name, token := range map[string]string{"before": tok.AccessToken, "after": renewed.AccessToken} {
			if _, err := v.verify(token); err != nil {
				t.Errorf("%s: a token of %s the rotation: %v", v.name, name, err)
			}
		}
	}
	wantCode(t, "the old register token", register("the first token", password), 401, "unauthorized")
	wantCode(t, "the new register token", register("the second token", password), 201, "")
	wantCode(t, "the new list", register("the second token", "a sentence of the second list"), 400, "weak_password")
	wantCode(t, "what was on the old list", register("the second token", "a sentence of the first list"), 201, "")
}

// TestShutdown: SIGTERM lets requests under way finish, refuses new ones, and
// exits 0.
func TestShutdown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	// A hash that takes long enough to be met under way.
	s := held(t, w.start(unlimited, env{"ARGON2_ITERATIONS": "10", "SHUTDOWN_DELAY": "3s", "HASH_ACQUIRE_TIMEOUT": "10s"}))
	p := s.register()
	idle, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()

	// One begins before the signal, one in the delay.
	var all sync.WaitGroup
	login := func(when string) {
		all.Go(func() {
			a, err := s.try("POST", loginPath, p.loginBody(password))
			if err != nil || a.status != 200 {
				t.Errorf("a login begun %s: got %d %s, %v, want 200", when, a.status, a.body, err)
			}
		})
	}
	hashing := func() bool { return s.metric("auth_password_hashes_in_flight") > 0 }
	login("before SIGTERM")
	eventually(t, "the hash is under way", 10*time.Second, hashing)
	s.cmd.Process.Signal(syscall.SIGTERM)
	eventually(t, "not ready", 5*time.Second, func() bool { return s.get("/health/ready").status == 503 })
	wantCode(t, "live in the delay", s.get("/health/live"), 200, "")
	login("in SHUTDOWN_DELAY")
	all.Wait()
	if code := s.wait(30 * time.Second); code != 0 {
		t.Errorf("exit code: got %d, want 0", code)
	}
	if a, err := s.try("GET", "/health/live", nil); err == nil {
		t.Errorf("a request afterwards: got %d, want no answer", a.status)
	}
	if b, err := io.ReadAll(idle); err != nil || len(b) != 0 {
		t.Errorf("an idle connection: got %q, %v, want it closed", b, err)
	}
	for _, event := range []string{"service.started", "service.stopping", "service.stopped"} {
		if got := len(s.logged(event)); got != 1 {
			t.Errorf("%s lines: got %d, want 1", event, got)
		}
	}
	if got := dbtest.Value[int](t, w.db, `SELECT count(*)::int FROM outbox WHERE sent_at IS NULL`); got != 0 {
		t.Errorf("events left in the outbox: got %d, want 0: it is flushed", got)
	}
	if got := s.errors(); got != "" {
		t.Errorf("stderr: got %q, want nothing", got)
	}
}

// TestPlaintext: a password that crosses a network in clear is told of.
func TestPlaintext(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, row := range []struct {
		name string
		c    env
		want int
	}{
		{"loopback", env{}, 0},
		// RFC 5737: addresses that are nowhere.
		{"PostgreSQL elsewhere", env{"DATABASE_URL": "postgres://u:p@192.0.2.1:5432/d"}, 1},
		{"PostgreSQL elsewhere, TLS", env{"DATABASE_URL": "postgres://u:p@192.0.2.1:5432/d?sslmode=require"}, 0},
		{"NATS elsewhere", env{"NATS_URL": "nats://192.0.2.1:4222"}, 1},
		{"NATS elsewhere, TLS", env{"NATS_URL": "tls://192.0.2.1:4222"}, 0},
		{"both elsewhere", env{"DATABASE_URL": "postgres://u:p@192.0.2.1:5432/d", "NATS_URL": "nats://127.0.0.1:4222,nats://192.0.2.1:4222"}, 1},
	} {
		s := w.launch(racyBinary, w.config(cheap, row.c))
		eventually(t, "started", 30*time.Second, func() bool { return len(s.logged("service.started")) == 1 })
		if got := len(s.logged("config.plaintext")); got != row.want {
			t.Errorf("%s: config.plaintext lines: got %d, want %d", row.name, got, row.want)
		}
		if code := s.stop(); code != 0 {
			t.Errorf("%s: exit code %d, want 0", row.name, code)
		}
	}
}
