package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/7d-solutions/identity-auth/db/dbtest"
	"github.com/7d-solutions/identity-auth/natsbus/natstest"
)

// aBcryptHash is of the password U*U.
const aBcryptHash = "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"

// knownHashes are answers from public documents: the tests of the argon2
// reference implementation and of crypt_blowfish, RFC 7914 sections 11 and 12
// in the encodings of each library, and the manuals of passlib and Django.
var knownHashes = []struct{ name, hash, password string }{
	{"argon2id, 256 KiB", "$argon2id$v=19$m=256,t=2,p=1$c29tZXNhbHQ$nf65EOgLrQMR/uIPnA4rEsF5h7TKyQwu9U1bMCHGi/4", "password"},
	{"argon2id, two lanes", "$argon2id$v=19$m=256,t=2,p=2$c29tZXNhbHQ$bQk8UB/VmZZF4Oo79iDXuL5/0ttZwg2f/5U52iv1cDc", "password"},
	{"argon2id, 64 MiB", "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc", "password"},
	{"argon2id, another password", "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$C4TWUs9rDEvq7w3+J4umqA32aWKB1+DSiRuBfYxFj94", "differentpassword"},
	{"argon2i", "$argon2i$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$wWKIMhR9lyDFvRz9YTZweHKfbftvj+qf+YFY4NeBbtA", "password"},
	{"bcrypt 2a", aBcryptHash, "U*U"},
	{"bcrypt 2b", "$2b$" + aBcryptHash[len("$2a$"):], "U*U"},
	{"bcrypt 2y", "$2y$" + aBcryptHash[len("$2a$"):], "U*U"},
	{"bcrypt, another salt", "$2a$05$XXXXXXXXXXXXXXXXXXXXXOAcXxm9kjPGEMsLznoKqmqw7tc8WCx4a", "U*U*U"},
	{"bcrypt, 72 bytes", "$2a$05$abcdefghijklmnopqrstuu5s2v8.iXieOjg/.AySBTTZIIVFJeBui", "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"},
	{"scrypt PHC", "$scrypt$ln=14,r=8,p=1$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf046/2o+7qQT44+qbVD9lRdofLVQylVYT8Pz2LUlwUkKpr55h6F3A1lHkDfzwF7RVdYhw", "pleaseletmein"},
	{"scrypt passlib", "$scrypt$ln=16,r=8,p=1$aM15713r3Xsvxbi31lqr1Q$nFNh2CVHVjNldFVKDHDlm4CbdRSCdEBsjjJxD+iCs5E", "password"},
	{"scrypt Werkzeug", "scrypt:16384:8:1$SodiumChloride$7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887", "pleaseletmein"},
	{"PBKDF2-SHA256 Werkzeug", "pbkdf2:sha256:80000$NaCl$4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56a1d425a1225833549adb841b51c9b3176a272bdebba1d078478f62b397f33c8d", "Password"},
	{"PBKDF2-SHA256 passlib", "$pbkdf2-sha256$6400$0ZrzXitFSGltTQnBWOsdAw$Y11AchqV4b0sUisdZd0Xr97KWoymNE0LNNrnEgY4H9M", "password"},
	{"PBKDF2-SHA256 passlib, a dot for a plus", "$pbkdf2-sha256$6400$.6UI/S.nXIk8jcbdHx3Fhg$98jZicV16ODfEsEZeYPGHU3kbrUrvUEXOPimVSQDD44", "password"},
	{"PBKDF2-SHA256 PHC", "$pbkdf2-sha256$i=6400$0ZrzXitFSGltTQnBWOsdAw$Y11AchqV4b0sUisdZd0Xr97KWoymNE0LNNrnEgY4H9M", "password"},
	{"PBKDF2-SHA256 Django", "pbkdf2_sha256$10000$seasalt$CWWFdHOWwPnki7HvkcqN9iA2T3KLW1cf2uZ5kvArtVY=", "lètmein"},
	{"PBKDF2-SHA512 Werkzeug", "pbkdf2:sha512:1000$SodiumChloride$5f7e949365a818ec5259876d0ce488b744a83854fc5188ce826197be3f425151a9d6ee9f99a9a29bc20c312d6f255fd68339c607d4cf7543fcad4c4f8a1fc13a", "pleaseletmein"},
	{"PBKDF2-SHA512 passlib", "$pbkdf2-sha512$1000$U29kaXVtQ2hsb3JpZGU$X36Uk2WoGOxSWYdtDOSIt0SoOFT8UYjOgmGXvj9CUVGp1u6fmamim8IMMS1vJV/WgznGB9TPdUP8rUxPih/BOg", "pleaseletmein"},
	{"PBKDF2-SHA512 PHC", "$pbkdf2-sha512$i=1000$U29kaXVtQ2hsb3JpZGU$X36Uk2WoGOxSWYdtDOSIt0SoOFT8UYjOgmGXvj9CUVGp1u6fmamim8IMMS1vJV/WgznGB9TPdUP8rUxPih/BOg", "pleaseletmein"},
	{"PBKDF2-SHA512 Django", "pbkdf2_sha512$1000$SodiumChloride$X36Uk2WoGOxSWYdtDOSIt0SoOFT8UYjOgmGXvj9CUVGp1u6fmamim8IMMS1vJV/WgznGB9TPdUP8rUxPih/BOg==", "pleaseletmein"},
}

// importLine is a line of the file, with what else it shall have.
func importLine(p person, hash string, more map[string]any) []byte {
	line := map[string]any{"tenant_id": p.TenantID, "user_id": p.UserID, "email": p.Email, "password_hash": hash}
	for name, value := range more {
		line[name] = value
	}
	return append(toJSON(line), '\n')
}

const storedHash = `SELECT password_hash FROM accounts WHERE tenant_id = $1 AND user_id = $2`

// TestImportedHashes: everyone logs in with the password they have, and then
// has a hash of today's algorithm and costs.
func TestImportedHashes(t *testing.T) {
	t.Parallel()
	const todays = `^\$argon2id\$v=19\$m=19456,t=2,p=1\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}$`
	w := newWorld(t)
	s := held(t, w.startPlain(cheap, unlimited))
	own := s.register()
	ownHash := dbtest.Value[string](t, w.db, storedHash, own.TenantID, own.UserID)

	var file []byte
	people := make([]person, len(knownHashes))
	for i, row := range knownHashes {
		people[i] = newPerson().with(row.password)
		file = append(file, importLine(people[i], row.hash, nil)...)
	}
	disabled, same, claimed := newPerson().with("U*U"), newPerson(), newPerson().with("U*U")
	file = append(file, importLine(disabled, aBcryptHash, map[string]any{"disabled": true})...)
	file = append(file, importLine(same, ownHash, map[string]any{"disabled": false, "claims": nil})...)
	file = append(file, importLine(claimed, aBcryptHash, map[string]any{"claims": map[string]any{"roles": []string{"editor"}}})...)
	n := len(knownHashes) + 3
	if got, want := w.mustCommand(t, file, "import", "-"), fmt.Sprintf("%d lines: %d created, 0 there already, 0 bad\n", n, n); got != want {
		t.Errorf("got %q, want %q", got, want)
	}

	for i, row := range knownHashes {
		p := people[i]
		wantCode(t, row.name+": a wrong password", s.do("POST", loginPath, p.loginBody("not "+p.Password)), 401, "invalid_credentials")
		// bcrypt cuts at 72 bytes; two passwords are not one because of that.
		wantCode(t, row.name+": a longer password", s.do("POST", loginPath, p.loginBody(p.Password+"chars after 72 are ignored")), 401, "invalid_credentials")
		if got := dbtest.Value[string](t, w.db, storedHash, p.TenantID, p.UserID); got != row.hash {
			t.Errorf("%s: a wrong password changed the hash to %q", row.name, got)
		}
		if a := s.do("POST", loginPath, p.loginBody(p.Password)); a.status != 200 {
			t.Errorf("%s: got %d %s, want 200", row.name, a.status, a.body)
			continue
		}
		fresh := dbtest.Value[string](t, w.db, storedHash, p.TenantID, p.UserID)
		if !regexp.MustCompile(todays).MatchString(fresh) {
			t.Errorf("%s: the hash after a login: got %q, want one of today's costs", row.name, fresh)
		}
		wantCode(t, row.name+": a wrong password, afterwards", s.do("POST", loginPath, p.loginBody("not "+p.Password)), 401, "invalid_credentials")
		tok := s.login(p)
		wantLives(t, row.name, tok, s)
		if got := dbtest.Value[string](t, w.db, storedHash, p.TenantID, p.UserID); got != fresh {
			t.Errorf("%s: a second login changed the hash again", row.name)
		}
	}
	s.login(same)
	if got := dbtest.Value[string](t, w.db, storedHash, same.TenantID, same.UserID); got != ownHash {
		t.Error("a hash of today's costs was replaced")
	}
	if got := claims(t, s.login(claimed).AccessToken)["roles"]; fmt.Sprint(got) != "[editor]" {
		t.Errorf("roles: got %v, want editor", got)
	}
	wantCode(t, "a disabled account", s.do("POST", loginPath, disabled.loginBody(disabled.Password)), 401, "invalid_credentials")
	w.mustCommand(t, nil, "user", "enable", disabled.TenantID, disabled.UserID)
	s.login(disabled)
	events := wantEvents(t, w, disabled, "auth.user.imported", "auth.user.enabled", "auth.user.logged_in")
	if got := events[0].Data["email"]; got != disabled.Email {
		t.Errorf("auth.user.imported: got email %v, want %s", got, disabled.Email)
	}
}

// TestImportReports: bad lines are named by number and reason, good ones land,
// and a second run changes nothing.
func TestImportReports(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	taken := newPerson()
	const otherHash = "$2b$05$XXXXXXXXXXXXXXXXXXXXXOAcXxm9kjPGEMsLznoKqmqw7tc8WCx4a"
	var file []byte
	good, number := []person{}, 0
	add := func(line []byte) int {
		file = append(file, bytes.TrimSuffix(line, []byte("\n"))...)
		file = append(file, '\n')
		number++
		return number
	}
	addGood := func(p person, more map[string]any) {
		good = append(good, p)
		add(importLine(p, aBcryptHash, more))
	}
	bad := map[int]string{} // line to what its reason has in it
	addBad := func(reason string, line []byte) { bad[add(line)] = reason }
	line := func(hash string, more map[string]any) []byte { return importLine(newPerson(), hash, more) }

	addGood(taken, nil)
	addBad("body", []byte(`{"tenant_id":`))
	add(nil)
	addBad("body", []byte(`[]`))
	addBad("body", []byte(`{} {}`))
	addBad("tenant_id", line(aBcryptHash, map[string]any{"tenant_id": "x"}))
	addBad("user_id", line(aBcryptHash, map[string]any{"user_id": "x"}))
	addBad("email", line(aBcryptHash, map[string]any{"email": "no e-mail"}))
	addBad("email", line(aBcryptHash, map[string]any{"email": nil}))
	addBad("password_hash", line("", nil))
	addBad("password_hash", line("a password", nil))
	addBad("more", line(aBcryptHash, map[string]any{"more": 1}))
	addBad("disabled", line(aBcryptHash, map[string]any{"disabled": "yes"}))
	addBad("claims", line(aBcryptHash, map[string]any{"claims": map[string]any{"sub": "x"}}))
	addBad("claims", line(aBcryptHash, map[string]any{"claims": []string{}}))
	addBad("claims", line(aBcryptHash, map[string]any{"claims": map[string]any{"x": strings.Repeat("x", 4<<10)}}))
	addBad("password_hash", []byte(strings.Replace(string(line(aBcryptHash, nil)), `"password_hash"`, `"password_hash":"$2a$","password_hash"`, 1)))
	addBad("email", []byte(strings.Replace(string(line(aBcryptHash, nil)), "@", "\xff@", 1)))
	addBad("64 KiB", line(strings.Repeat("x", 65<<10), nil))
	addBad("64 KiB", line(strings.Repeat("x", 300<<10), nil))
	addGood(newPerson(), map[string]any{"disabled": nil, "claims": map[string]any{}})
	// What no row can hold must not take the good ones of its batch along.
	addBad("password_hash", line("pbkdf2_sha256$1000$sea\x00salt$CWWFdHOWwPnki7HvkcqN9iA2T3KLW1cf2uZ5kvArtVY=", nil))
	addBad("claims", line(aBcryptHash, map[string]any{"claims": json.RawMessage(`{"x":1e200000}`)}))
	addBad("password_hash", line("$scrypt$ln=63,r=8,p=1$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf045w", nil))
	// More than four times today's memory, or more than the ceilings of time.
	for _, hash := range []string{
		"$argon2id$v=19$m=77825,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
		"$argon2id$v=19$m=4294967295,t=1,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
		"$argon2id$v=19$m=19456,t=4294967295,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
		"$argon2i$v=19$m=77825,t=2,p=1$c29tZXNhbHQ$wWKIMhR9lyDFvRz9YTZweHKfbftvj+qf+YFY4NeBbtA",
		"$2b$15$" + aBcryptHash[len("$2a$05$"):],
		"$2b$31$" + aBcryptHash[len("$2a$05$"):],
		"$scrypt$ln=17,r=8,p=1$U29kaXVtQ2hsb3JpZGU$cCO9yzr9c0hGHAbNgf045w",
		"scrypt:16384:8:1000$SodiumChloride$7023bdcb3afd7348461c06cd81fd38eb",
		"$pbkdf2-sha256$5000001$0ZrzXitFSGltTQnBWOsdAw$Y11AchqV4b0sUisdZd0Xr97KWoymNE0LNNrnEgY4H9M",
		"pbkdf2_sha512$4294967295$seasalt$CWWFdHOWwPnki7HvkcqN9iA2T3KLW1cf2uZ5kvArtVY=",
	} {
		addBad("too much memory or time", line(hash, nil))
	}
	upper := newPerson()
	good = append(good, upper)
	shouted := upper
	shouted.TenantID, shouted.UserID, shouted.Email = strings.ToUpper(upper.TenantID), strings.ToUpper(upper.UserID), strings.ToUpper(upper.Email)
	add(append(bytes.TrimSuffix(importLine(shouted, aBcryptHash, nil), []byte("\n")), '\r'))
	add(importLine(upper, otherHash, nil)) // there already, from the line before
	sameEmail, sameUser := newPerson(), newPerson()
	sameEmail.TenantID, sameEmail.Email = taken.TenantID, taken.Email
	addBad("another account", importLine(sameEmail, aBcryptHash, nil))
	sameUser.TenantID, sameUser.UserID = taken.TenantID, taken.UserID
	addBad("another account", importLine(sameUser, aBcryptHash, nil))
	addGood(newPerson(), nil)
	file = bytes.TrimSuffix(file, []byte("\n"))

	path := filepath.Join(t.TempDir(), "accounts.jsonl")
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
	const everything = `SELECT md5(string_agg(a::text, '|' ORDER BY user_id)) FROM accounts AS a`
	var before string
	for run := range 2 {
		code, stdout, stderr := w.command(t, nil, nil, "import", path)
		created, present := len(good), 1
		if run == 1 {
			created, present = 0, len(good)+1
		}
		want := fmt.Sprintf("%d lines: %d created, %d there already, %d bad\n", number, created, present, len(bad))
		if code != 1 || stdout != want {
			t.Errorf("run %d: got exit code %d, %q; want 1, %q", run+1, code, stdout, want)
		}
		var named []int
		lines, ended := strings.CutSuffix(stderr, "identity-auth: the bad lines are not imported\n")
		if !ended {
			t.Errorf("run %d: got %q, want it to end with why the exit code is 1", run+1, stderr)
		}
		for text := range strings.Lines(lines) {
			var n int
			if _, err := fmt.Sscanf(text, "line %d:", &n); err != nil || bad[n] == "" || !strings.Contains(text, bad[n]) {
				t.Errorf("run %d: got %q, want %q in the reason of a bad line", run+1, text, bad[n])
			}
			named = append(named, n)
		}
		for n, reason := range bad {
			if !slices.Contains(named, n) {
				t.Errorf("run %d: line %d is not named, want %q", run+1, n, reason)
			}
		}
		for _, secret := range []string{"CCCCCCCCCCCCCCCCCCCCC", taken.Email} {
			if strings.Contains(stderr, secret) {
				t.Errorf("run %d: the report holds %q", run+1, secret)
			}
		}
		after := dbtest.Value[string](t, w.db, everything)
		if run == 1 && after != before {
			t.Error("the second run changed accounts")
		}
		before = after
	}
	ids := dbtest.Query[string](t, w.db, `SELECT user_id::text FROM accounts ORDER BY 1`)
	var want []string
	for _, p := range good {
		want = append(want, p.UserID)
	}
	if slices.Sort(want); !slices.Equal(ids, want) {
		t.Errorf("accounts: got %q, want the good lines, %q", ids, want)
	}
	if n := dbtest.Value[int](t, w.db, `SELECT count(*) FROM outbox WHERE event_type = 'auth.user.imported'`); n != len(good) {
		t.Errorf("auth.user.imported: got %d, want %d", n, len(good))
	}

	// Whether or not this value is taken, its neighbours are.
	neighbours := slices.Concat(importLine(newPerson(), aBcryptHash, nil), line(aBcryptHash, map[string]any{"claims": map[string]any{"x": "a\x00b"}}), importLine(newPerson(), aBcryptHash, nil))
	if _, stdout, stderr := w.command(t, nil, neighbours, "import", "-"); !strings.HasPrefix(stdout, "3 lines: ") || !strings.Contains(stdout, " 0 there already") || strings.Contains(stderr, "SQLSTATE") || strings.Contains(stdout, " 0 created") {
		t.Errorf("a NUL in a claim: got %q, %q; want its neighbours created", stdout, stderr)
	}

	if code, _, stderr := w.command(t, nil, nil, "import", filepath.Join(t.TempDir(), "absent")); code != 1 || stderr == "" {
		t.Errorf("a file that is absent: got exit code %d, %q; want 1 and why", code, stderr)
	}
	for _, args := range [][]string{{"import"}, {"import", path, path}} {
		if code, _, stderr := w.command(t, nil, nil, args...); code != 2 || !strings.Contains(stderr, "usage:") {
			t.Errorf("%q: got exit code %d, %q; want 2 and the usage", args, code, stderr)
		}
	}
	if code, _, stderr := w.command(t, env{"DATABASE_URL": ""}, nil, "import", path); code != 2 || !strings.Contains(stderr, "DATABASE_URL") {
		t.Errorf("no DATABASE_URL: got exit code %d, %q; want 2, naming it", code, stderr)
	}
	if got, want := w.mustCommand(t, nil, "import", "-"), "0 lines: 0 created, 0 there already, 0 bad\n"; got != want {
		t.Errorf("nothing: got %q, want %q", got, want)
	}
}

// manyLines writes a file of n accounts.
func manyLines(t *testing.T, n int) (path string) {
	t.Helper()
	var file bytes.Buffer
	for range n {
		file.Write(importLine(newPerson(), aBcryptHash, nil))
	}
	path = filepath.Join(t.TempDir(), "accounts.jsonl")
	if err := os.WriteFile(path, file.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestImportOfMany is an import of 20,000 accounts, and one that is killed
// half-way and run again.
func TestImportOfMany(t *testing.T) {
	t.Parallel()
	const n = 20_000
	w := newWorld(t)
	path, err := plainBinary()
	if err != nil {
		t.Fatal(err)
	}
	run := func(file string) *exec.Cmd {
		cmd := exec.Command(path, "import", file)
		cmd.Env = w.config(cheap).list()
		return cmd
	}
	const accounts, imported = `SELECT count(*) FROM accounts`, `SELECT count(*) FROM outbox WHERE event_type = 'auth.user.imported'`

	file := manyLines(t, n)
	begun := time.Now()
	if out, err := run(file).CombinedOutput(); err != nil {
		t.Fatalf("import: %v: %s", err, out)
	}
	t.Logf("%d lines in %v: %.0f a minute", n, time.Since(begun), n/time.Since(begun).Minutes())
	if got := dbtest.Value[int](t, w.db, accounts); got != n {
		t.Fatalf("accounts: got %d, want %d", got, n)
	}

	file = manyLines(t, n)
	cmd := run(file)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a part of the file is in", 20*time.Second, func() bool { return dbtest.Value[int](t, w.db, accounts) > n })
	cmd.Process.Kill()
	cmd.Wait()
	const own = `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'identity-auth'`
	eventually(t, "PostgreSQL has ended the killed process's transaction", 20*time.Second, func() bool { return dbtest.Value[int](t, w.db, own) == 0 })
	part := dbtest.Value[int](t, w.db, accounts) - n
	if got := dbtest.Value[int](t, w.db, imported); got != n+part {
		t.Errorf("killed: got %d events for %d accounts", got, n+part)
	}
	if part <= 0 || part >= n {
		t.Fatalf("killed after %d of %d: not half-way", part, n)
	}
	out, err := run(file).Output()
	if want := fmt.Sprintf("%d lines: %d created, %d there already, 0 bad\n", n, n-part, part); err != nil || string(out) != want {
		t.Errorf("run again: got %q, %v; want %q", out, err, want)
	}
	if got := dbtest.Value[int](t, w.db, accounts); got != 2*n {
		t.Errorf("accounts: got %d, want %d", got, 2*n)
	}
	if got := dbtest.Value[int](t, w.db, imported); got != 2*n {
		t.Errorf("auth.user.imported: got %d, want one an account, %d", got, 2*n)
	}
	if got := dbtest.Value[int](t, w.db, `SELECT count(DISTINCT user_id) FROM outbox`); got != 2*n {
		t.Errorf("accounts with an event: got %d, want %d", got, 2*n)
	}
}

// TestImportProgress: a line on a terminal, and none in a file.
func TestImportProgress(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	file := manyLines(t, 1200)
	path, err := plainBinary()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "import", file)
	cmd.Env = w.config(cheap).list()
	screen, terminal := openTerminal(t)
	cmd.Stdout, cmd.Stderr = terminal, terminal
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	terminal.Close()
	var shown bytes.Buffer
	shown.ReadFrom(screen) // ends with an error when the process does
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	got := strings.ReplaceAll(shown.String(), "\r\n", "\n")
	want := "\r500 lines, 500 created\r1000 lines, 1000 created\r1200 lines, 1200 created\n1200 lines: 1200 created, 0 there already, 0 bad\n"
	if got != want {
		t.Errorf("terminal: got %q, want %q", got, want)
	}
	if code, _, stderr := w.command(t, nil, nil, "import", file); code != 0 || stderr != "" {
		t.Errorf("no terminal: got exit code %d, %q; want 0 and nothing", code, stderr)
	}
}

// openTerminal makes a pseudo-terminal (pty(7)).
func openTerminal(t *testing.T) (screen, terminal *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	var unlocked, number int32
	for request, arg := range map[uintptr]*int32{syscall.TIOCSPTLCK: &unlocked, syscall.TIOCGPTN: &number} {
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, screen.Fd(), request, uintptr(unsafe.Pointer(arg))); errno != 0 {
			t.Fatal(errno)
		}
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return screen, terminal
}

// firstVersion is the schema of the first version.
const firstVersion = `
CREATE TABLE public.credentials (
    id            uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id     uuid        NOT NULL,
    user_id       uuid        NOT NULL,
    email         text        NOT NULL,
    password_hash text        NOT NULL,
    is_active     boolean     NOT NULL DEFAULT true,
    failed_count  integer     NOT NULL DEFAULT 0,
    lock_until    timestamptz,
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant_id, user_id), UNIQUE (tenant_id, email)
);
CREATE TABLE public.refresh_tokens (
    id         uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL,
    token_hash text        NOT NULL UNIQUE,
    expires_at timestamptz NOT NULL,
    revoked_at timestamptz
);
CREATE TABLE public._sqlx_migrations (
    version        bigint      PRIMARY KEY,
    description    text        NOT NULL,
    installed_on   timestamptz NOT NULL DEFAULT now(),
    success        boolean     NOT NULL,
    checksum       bytea       NOT NULL,
    execution_time bigint      NOT NULL
);
INSERT INTO public._sqlx_migrations VALUES (1, 'init', now(), true, '\x00', 1), (2, 'refresh tokens', now(), true, '\x01', 1);
INSERT INTO public.refresh_tokens (tenant_id, user_id, token_hash, expires_at) VALUES (gen_random_uuid(), gen_random_uuid(), 'x', now());`

// TestTakeOver starts the service in the database of a first version.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	w := &world{t: t, db: dbtest.Empty(t), nats: natstest.New(t)}
	dbtest.Exec(t, w.db, firstVersion)
	var active, inactive []person
	tenant := newUUID()
	for i := range 8 {
		known := knownHashes[i%4]
		p := newPerson().with(known.password)
		if i < 6 {
			p.TenantID = tenant
		}
		spelt := p.Email
		if i == 1 {
			spelt = strings.ToUpper(p.Email)
		}
		dbtest.Exec(t, w.db, `INSERT INTO public.credentials (tenant_id, user_id, email, password_hash, is_active) VALUES ($1, $2, $3, $4, $5)`,
			p.TenantID, p.UserID, spelt, known.hash, i%4 != 3)
		if i%4 != 3 {
			active = append(active, p)
		} else {
			inactive = append(inactive, p)
		}
	}
	const theirs = `SELECT string_agg(t, E'\n' ORDER BY t) FROM (SELECT c::text FROM public.credentials AS c UNION ALL SELECT r::text FROM public.refresh_tokens AS r
		UNION ALL SELECT m::text FROM public._sqlx_migrations AS m) AS all_rows(t)`
	before := dbtest.Value[string](t, w.db, theirs)

	s := held(t, w.start(cheap, unlimited, env{"JWT_ISSUER": "auth-rs", "JWT_AUDIENCE": "7d-platform"}))
	newcomer := s.register()
	for run, want := range []string{"8 lines: 8 created, 0 there already, 0 bad\n", "8 lines: 0 created, 8 there already, 0 bad\n"} {
		if got := w.mustCommand(t, nil, "import", "--from-auth-rs"); got != want {
			t.Errorf("run %d: got %q, want %q", run+1, got, want)
		}
	}
	for _, p := range active {
		tok := s.login(p)
		if c := claims(t, tok.AccessToken); c["sub"] != p.UserID || c["tenant_id"] != p.TenantID || c["iss"] != "auth-rs" || c["aud"] != "7d-platform" {
			t.Errorf("claims: got %v, want those of %s", c, p.UserID)
		}
		wantLives(t, "one of the first version", tok, s)
		s.refresh(tok.RefreshToken).tokens(t)
		wantCode(t, "a wrong password", s.do("POST", loginPath, p.loginBody("not "+p.Password)), 401, "invalid_credentials")
	}
	for _, p := range inactive {
		wantCode(t, "an inactive one of the first version", s.do("POST", loginPath, p.loginBody(p.Password)), 401, "invalid_credentials")
	}
	s.login(newcomer)
	// The import after the first logins takes nobody's new hash away.
	w.mustCommand(t, nil, "import", "--from-auth-rs")
	if got := dbtest.Value[string](t, w.db, storedHash, active[0].TenantID, active[0].UserID); !strings.Contains(got, "m=19456,t=2") {
		t.Errorf("hash after a login and another import: got %q, want one of today's costs", got)
	}
	if after := dbtest.Value[string](t, w.db, theirs); after != before {
		t.Errorf("the first version's tables have changed:\n%s\nfrom\n%s", after, before)
	}
	if got := dbtest.Query[string](t, w.db, `SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1`); !slices.Equal(got, []string{"_sqlx_migrations", "credentials", "refresh_tokens"}) {
		t.Errorf("tables in schema public: got %q, want the first version's", got)
	}
	dbtest.Check(t, w.db)

	none := newWorld(t)
	if code, stdout, stderr := none.command(t, nil, nil, "import", "--from-auth-rs"); code != 1 || stderr == "" {
		t.Errorf("no first version there: got exit code %d, %q, %q; want 1 and why", code, stdout, stderr)
	}
}
