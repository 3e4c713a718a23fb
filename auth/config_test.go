package auth

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type envMap map[string]string

func (e envMap) lookup(name string) (string, bool) {
	v, ok := e[name]
	return v, ok
}

func keyPEMs(t testing.TB) (private, public string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pub}))
}

func goodEnv(t testing.TB) envMap {
	private, public := keyPEMs(t)
	return envMap{
		"DATABASE_URL": "postgres://u:hush@127.0.0.1/x", "NATS_URL": "nats://127.0.0.1:4222",
		"JWT_PRIVATE_KEY_PEM": private, "JWT_PUBLIC_KEY_PEM": strings.ReplaceAll(public, "\n", `\n`), "JWT_KID": "k1",
	}
}

func TestDefaults(t *testing.T) {
	c, err := LoadConfig(goodEnv(t).lookup)
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprintln(c.AccessTokenTTL, c.RefreshTokenTTL, c.SessionMaxAge, c.ReuseGrace, c.MaxSessions, c.Argon2, c.HashAcquireTimeout,
		c.PasswordMinLength, c.LockoutThreshold, c.LockoutDuration, c.Host+":"+c.Port, c.MigrateOnStart, c.ReadyRequiresNATS)
	if want := "15m0s 336h0m0s 720h0m0s 0s 100 {65536 3 1} 2s 12 5 15m0s 0.0.0.0:8080 true true\n"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// Every variable with a value that is wrong for it. All are named in one go,
// and no value is printed.
func TestEveryMistakeIsNamed(t *testing.T) {
	wrong := map[string]string{
		"NATS_URL": "http://sesame", "NATS_CREDS_FILE": "/sesame", "NATS_CA_FILE": "/sesame",
		"JWT_PRIVATE_KEY_PEM": "sesame", "JWT_PUBLIC_KEY_PEM": "sesame", "JWT_PREV_KID": "sesame", "JWT_NEXT_PUBLIC_KEY_PEM": "sesame",
		"JWT_ISSUER": " sesame", "JWT_AUDIENCE": strings.Repeat("sesame", 50),
		"ACCESS_TOKEN_TTL": "sesame", "REFRESH_TOKEN_TTL": "-1h", "SESSION_MAX_AGE": "0", "REFRESH_REUSE_GRACE": "61m", "MAX_SESSIONS_PER_USER": "-1",
		"HOST": " sesame", "PORT": "0", "TLS_CERT_FILE": "/sesame", "TLS_KEY_FILE": "/sesame", "ADMIN_ADDR": "sesame", "ADMIN_TOKEN": "sesame",
		"TRUSTED_PROXIES": "sesame", "CORS_ORIGINS": "*", "DATABASE_MAX_CONNECTIONS": "1", "MIGRATE_ON_START": "sesame",
		"ARGON2_MEMORY_KIB": "19455", "ARGON2_ITERATIONS": "1", "ARGON2_PARALLELISM": "0", "MAX_CONCURRENT_HASHES": "0", "HASH_ACQUIRE_TIMEOUT": "11s",
		"PASSWORD_MIN_LENGTH": "7", "PASSWORD_BLOCKLIST_FILE": "/sesame", "LOCKOUT_THRESHOLD": "0", "LOCKOUT_DURATION": "1ms",
		"LOGIN_PER_MIN_PER_EMAIL": "-1", "REGISTER_PER_MIN_PER_EMAIL": "1e3", "REFRESH_PER_MIN_PER_TOKEN": "+1", "FORGOT_PER_HOUR_PER_EMAIL": "sesame",
		"IP_RATE_PER_SECOND": "1.5", "IP_RATE_BURST": "-1", "LOGIN_FAILURES_PER_HOUR_PER_IP": "sesame", "PASSWORD_RESET_TTL": "1000h",
		"SESSION_RETENTION": "0s", "OUTBOX_RETENTION": "sesame", "READY_REQUIRES_NATS": "1", "NATS_STREAM_REPLICAS": "6",
		"SHUTDOWN_DELAY": "-1s", "SHUTDOWN_TIMEOUT": "0s", "LOG_LEVEL": "sesame",
	}
	env := envMap{}
	for name, value := range wrong {
		env[name] = value
	}
	for _, s := range successors {
		env[s.old] = "sesame"
	}
	_, err := LoadConfig(env.lookup)
	if err == nil {
		t.Fatal("accepted")
	}
	said := err.Error()
	for _, v := range variables(&Config{}) {
		_, isWrong := wrong[v.Name]
		if (isWrong || v.Required) && !strings.Contains(said, v.Name+":") && !strings.Contains(said, v.Name+",") {
			t.Errorf("%s is not named", v.Name)
		}
		if !isWrong && !v.Required && v.Name != "REGISTER_TOKEN" && v.Name != "JWT_PREV_PUBLIC_KEY_PEM" && v.Name != "JWT_NEXT_KID" {
			t.Errorf("%s has no row in this test", v.Name)
		}
	}
	for _, s := range successors {
		if !strings.Contains(said, s.old+": no longer used, set "+s.new) {
			t.Errorf("%s is not named with %s", s.old, s.new)
		}
	}
	if strings.Contains(said, "sesame") {
		t.Errorf("a value is printed:\n%s", said)
	}
}

func TestKeysMustFit(t *testing.T) {
	private2, public2 := keyPEMs(t)
	for _, row := range []struct {
		change envMap
		want   string // "" for accepted
	}{
		{envMap{"JWT_PRIVATE_KEY_PEM": private2}, "JWT_PRIVATE_KEY_PEM, JWT_PUBLIC_KEY_PEM: not a pair"},
		{envMap{"JWT_PREV_PUBLIC_KEY_PEM": public2}, "JWT_PREV_PUBLIC_KEY_PEM, JWT_PREV_KID: set both or none"},
		{envMap{"JWT_PREV_PUBLIC_KEY_PEM": public2, "JWT_PREV_KID": "k1"}, "JWT_PREV_KID: names another key already"},
		{envMap{"JWT_PUBLIC_KEY_PEM": private2}, "JWT_PUBLIC_KEY_PEM:"},
		{envMap{"ADMIN_TOKEN": strings.Repeat("x", 32)}, "ADMIN_TOKEN: needs ADMIN_ADDR"},
		{envMap{"TLS_CERT_FILE": "config_test.go"}, "TLS_CERT_FILE, TLS_KEY_FILE: set both or none"},
		{envMap{"TLS_CERT_FILE": "config_test.go", "TLS_KEY_FILE": "config_test.go"}, "TLS_CERT_FILE, TLS_KEY_FILE: not a matching"},
		{envMap{"JWT_PREV_PUBLIC_KEY_PEM": public2, "JWT_PREV_KID": "k0", "JWT_NEXT_PUBLIC_KEY_PEM": "", "JWT_NEXT_KID": ""}, ""},
	} {
		env := goodEnv(t)
		for k, v := range row.change {
			env[k] = v
		}
		_, err := LoadConfig(env.lookup)
		if (err == nil) != (row.want == "") || err != nil && !strings.Contains(err.Error(), row.want) {
			t.Errorf("got %v, want %q", err, row.want)
		}
	}
}

func TestFileVariables(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kid")
	if err := os.WriteFile(path, []byte("from-file\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := goodEnv(t)
	env["JWT_KID"], env["JWT_KID_FILE"] = "", path
	c, err := LoadConfig(env.lookup)
	if err != nil || c.Keys.Signer.KeyID() != "from-file" {
		t.Errorf("got %v, %v", c.Keys.Signer, err)
	}
	env["JWT_KID"] = "k1"
	if _, err := LoadConfig(env.lookup); err == nil || !strings.Contains(err.Error(), "JWT_KID: given twice") {
		t.Errorf("both: got %v", err)
	}
	env["JWT_KID"], env["JWT_KID_FILE"] = "", path+".absent"
	if _, err := LoadConfig(env.lookup); err == nil || strings.Contains(err.Error(), path) {
		t.Errorf("absent: got %v", err)
	}
}

func TestReloadKeepsKidsHonest(t *testing.T) {
	old, err := LoadConfig(goodEnv(t).lookup)
	if err != nil {
		t.Fatal(err)
	}
	other, err := LoadConfig(goodEnv(t).lookup) // another key, the same kid
	if err != nil {
		t.Fatal(err)
	}
	if other.Keys.succeeds(old.Keys) == nil {
		t.Error("a kid was given to another key")
	}
	if err := old.Keys.succeeds(old.Keys); err != nil {
		t.Error(err)
	}
}

func TestCgroupMemoryLimit(t *testing.T) {
	write := func(root, path, content string) {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	v2, v1, none := t.TempDir(), t.TempDir(), t.TempDir()
	write(v2, "proc/self/cgroup", "0::/a/b\n")
	write(v2, "sys/fs/cgroup/a/b/memory.max", "max\n")
	write(v2, "sys/fs/cgroup/a/memory.max", "104857600\n")
	write(v1, "proc/self/cgroup", "5:cpu:/x\n4:memory:/docker/outside\n")
	write(v1, "sys/fs/cgroup/memory/memory.limit_in_bytes", "52428800\n")
	for _, row := range []struct {
		root string
		want uint64
	}{{v2, 104857600}, {v1, 52428800}, {none, 1<<64 - 1}} {
		if got := cgroupMemoryLimit(row.root); got != row.want {
			t.Errorf("got %d, want %d", got, row.want)
		}
	}
}

func TestSecretsAreNotPrinted(t *testing.T) {
	secret := Secret{"hush"}
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "secret", secret)
	asJSON, _ := json.Marshal(map[string]any{"s": secret})
	for _, printed := range []string{fmt.Sprint(secret), fmt.Sprintf("%+v %#v %q %s", secret, secret, secret, secret), log.String(), string(asJSON),
		fmt.Sprintf("%+v", struct{ S Secret }{secret})} {
		if strings.Contains(printed, "hush") {
			t.Errorf("printed: %s", printed)
		}
	}
}

func FuzzConfigValues(f *testing.F) {
	f.Add("15m")
	f.Add("10.0.0.0/8, fd00::/8")
	f.Add("https://app.example.com")
	f.Add("nats://u:p@h:4222,tls://x")
	f.Fuzz(func(t *testing.T, value string) {
		c := Config{pems: map[string]string{}}
		for _, v := range variables(&c) {
			if err := v.set(value); err != nil && len(value) > 8 && strings.Contains(err.Error(), value) {
				t.Fatalf("%s: the error repeats the value", v.Name)
			}
			if c.AccessTokenTTL < 0 || c.SessionMaxAge > 10*365*24*time.Hour {
				t.Fatalf("%s: %q is out of bounds", v.Name, value)
			}
		}
	})
}
