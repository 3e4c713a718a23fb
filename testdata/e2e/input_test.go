package e2e

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"
)

// TestInput: whatever is sent, each request gets its answer, none is a 5xx,
// and the process lives on.
func TestInput(t *testing.T) {
	t.Parallel()
	s := held(t, newWorld(t).start(cheap, unlimited, env{"LOCKOUT_THRESHOLD": "100"}))
	for _, group := range []struct {
		name string
		test func(*testing.T, *service)
	}{
		{"members", members},
		{"an optional member", optionalMember},
		{"ids", ids},
		{"e-mail addresses", emails},
		{"passwords are bytes", passwordsAreBytes},
		{"bodies", bodies},
		{"size of bodies", bodySize},
		{"content types", contentTypes},
		{"paths", paths},
		{"methods", methods},
		{"raw requests", rawRequests},
		{"trace ids", traceIDs},
	} {
		t.Run(group.name, func(t *testing.T) { group.test(t, s) })
	}
	select {
	case <-s.exited:
		t.Fatal("the service has died")
	default:
	}
	wantCode(t, "ready at the end", s.get("/health/ready"), 200, "")
	for _, operation := range []string{"register", "login", "refresh"} {
		if got := s.metric("auth_" + operation + `_total{result="error"}`); got != 0 {
			t.Errorf("auth_%s_total of errors: got %v, want 0", operation, got)
		}
	}
	for _, event := range []string{"http.panic", "http.internal_error"} {
		if got := s.logged(event); len(got) != 0 {
			t.Errorf("got %d %s lines, want none: %v", len(got), event, got[0])
		}
	}
}

// wantErrors fails unless a is invalid_request with exactly these errors, each
// "field reason", in any order.
func wantErrors(t *testing.T, what string, a answer, want ...string) {
	t.Helper()
	var got []string
	if a.status == 400 {
		list, _ := a.json(t)["errors"].([]any)
		for _, e := range list {
			m, _ := e.(map[string]any)
			got = append(got, fmt.Sprint(m["field"], " ", m["reason"]))
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if a.status != 400 || a.code() != "invalid_request" || !slices.Equal(got, want) {
		t.Errorf("%s: got %d %q %q, want 400 invalid_request %q", what, a.status, a.code(), got, want)
	}
}

// field is one member of a request in the order of members.
type field struct{ name, value string } // value: raw JSON

// object writes the members as a JSON object.
func object(members ...field) []byte {
	var list []string
	for _, m := range members {
		list = append(list, fmt.Sprintf(`"%s":%s`, m.name, m.value))
	}
	return []byte("{" + strings.Join(list, ",") + "}")
}

// endpoint is one that takes a JSON object, with a body that is well-formed.
type endpoint struct {
	path    string
	members []field
	good    int // the answer to members
}

func endpoints() []endpoint {
	id := func() string { return `"` + newUUID() + `"` }
	return []endpoint{
		{registerPath, []field{{"tenant_id", id()}, {"user_id", id()}, {"email", `"someone@example.com"`}, {"password", `"` + password + `"`}}, 201},
		{loginPath, []field{{"tenant_id", id()}, {"email", `"someone@example.com"`}, {"password", `"` + password + `"`}}, 401},
		{refreshPath, []field{{"refresh_token", `"iar_none"`}}, 401},
	}
}

// members: every member of every request, wrong in every way, is named
// with what is wrong, and nothing else is.
func members(t *testing.T, s *service) {
	for _, e := range endpoints() {
		t.Run(strings.TrimPrefix(e.path, "/api/auth/"), func(t *testing.T) {
			for i, m := range e.members {
				// with replaces the member by others.
				with := func(others ...field) []byte {
					return object(slices.Replace(slices.Clone(e.members), i, i+1, others...)...)
				}
				own := string(m.value[1 : len(m.value)-1])
				escaped := fmt.Sprintf(`\u%04x`, m.name[0]) + m.name[1:]
				title := strings.ToUpper(m.name[:1]) + m.name[1:]
				upper := strings.ToUpper(m.name)
				for _, row := range []struct {
					name string
					body []byte
					want []string
				}{
					{"missing", with(), []string{m.name + " missing"}},
					{"null", with(field{m.name, `null`}), []string{m.name + " null"}},
					{"a number", with(field{m.name, `1`}), []string{m.name + " wrong_type"}},
					{"a negative fraction", with(field{m.name, `-1.5e300`}), []string{m.name + " wrong_type"}},
					{"a number beyond float64", with(field{m.name, `1e999999`}), []string{m.name + " wrong_type"}},
					{"true", with(field{m.name, `true`}), []string{m.name + " wrong_type"}},
					{"an array", with(field{m.name, `[` + m.value + `]`}), []string{m.name + " wrong_type"}},
					{"an object", with(field{m.name, `{"` + m.name + `":` + m.value + `}`}), []string{m.name + " wrong_type"}},
					{"nested 5000 deep", with(field{m.name, strings.Repeat("[", 5000) + strings.Repeat("]", 5000)}), []string{m.name + " wrong_type"}},
					{"twice", with(m, m), []string{m.name + " duplicate"}},
					{"twice, first null", with(field{m.name, `null`}, m), []string{m.name + " duplicate", m.name + " null"}},
					{"twice, once with an escape in its name", with(m, field{escaped, m.value}), []string{m.name + " duplicate"}},
					{"name in title case", with(field{title, m.value}), []string{title + " unknown", m.name + " missing"}},
					{"name in upper case", with(field{upper, m.value}), []string{upper + " unknown", m.name + " missing"}},
					{"name in title case as well", with(m, field{title, m.value}), []string{title + " unknown"}},
					{"name with a space", with(field{m.name + " ", m.value}), []string{m.name + "  unknown", m.name + " missing"}},
					{"name with NUL", with(m, field{m.name + `\u0000`, m.value}), []string{m.name + "\ufffd unknown"}},
					{"a long s for s in its name", with(m, field{strings.ReplaceAll(m.name+"s", "s", "ſ"), m.value}), []string{strings.ReplaceAll(m.name+"s", "s", "ſ") + " unknown"}},
					{"another member", with(m, field{"role", `"admin"`}), []string{"role unknown"}},
					{"a member without a name", with(m, field{"", `1`}), []string{" unknown"}},
					{"__proto__", with(m, field{"__proto__", `{"admin":true}`}), []string{"__proto__ unknown"}},
					{"invalid UTF-8, 0xff", with(field{m.name, `"` + own + "\xff" + `"`}), []string{m.name + " invalid_unicode"}},
					{"invalid UTF-8, cut off", with(field{m.name, `"` + own + "\xe2\x82" + `"`}), []string{m.name + " invalid_unicode"}},
					{"invalid UTF-8, overlong", with(field{m.name, `"` + own + "\xc0\xaf" + `"`}), []string{m.name + " invalid_unicode"}},
					{"invalid UTF-8, a surrogate", with(field{m.name, `"` + own + "\xed\xa0\x80" + `"`}), []string{m.name + " invalid_unicode"}},
					{"invalid UTF-8, beyond U+10FFFF", with(field{m.name, `"` + own + "\xf4\x90\x80\x80" + `"`}), []string{m.name + " invalid_unicode"}},
					{"a lone high surrogate", with(field{m.name, `"` + own + `\ud83d"`}), []string{m.name + " invalid_unicode"}},
					{"a lone high surrogate in upper case", with(field{m.name, `"` + own + `\uD83D"`}), []string{m.name + " invalid_unicode"}},
					{"a lone low surrogate", with(field{m.name, `"\udc00` + own + `"`}), []string{m.name + " invalid_unicode"}},
					{"surrogates in the wrong order", with(field{m.name, `"` + own + `\udc00\ud83d"`}), []string{m.name + " invalid_unicode"}},
					{"a high surrogate and a letter", with(field{m.name, `"` + own + `\ud83dx"`}), []string{m.name + " invalid_unicode"}},
					{"a high surrogate and an escape", with(field{m.name, `"` + own + `\ud83d\n"`}), []string{m.name + " invalid_unicode"}},
					{"a high surrogate and an escaped letter", with(field{m.name, `"` + own + `\ud83d\u0041"`}), []string{m.name + " invalid_unicode"}},
					{"two high surrogates", with(field{m.name, `"` + own + `\ud83d\ud83d"`}), []string{m.name + " invalid_unicode"}},
					{"a pair and a lone one", with(field{m.name, `"` + own + `\ud83d\ude00\ud83d"`}), []string{m.name + " invalid_unicode"}},
				} {
					wantErrors(t, m.name+" "+row.name, s.do("POST", e.path, row.body), row.want...)
				}
				// An escaped name is the same name, and an escaped backslash
				// begins no surrogate.
				if a := s.do("POST", e.path, with(field{escaped, m.value})); a.status != e.good && a.status != 409 {
					t.Errorf("%s with an escape in its name: got %d %s, want %d", m.name, a.status, a.body, e.good)
				}
				if m.name == "password" {
					if a := s.do("POST", e.path, with(field{m.name, `"` + own + `\\ud83d"`})); a.status != e.good && a.status != 409 {
						t.Errorf("%s with a backslash and ud83d: got %d %s, want %d", m.name, a.status, a.body, e.good)
					}
				}
			}

			// All mistakes come back at once.
			var bad []field
			want := []string{"role unknown"}
			for i, m := range e.members {
				bad = append(bad, field{m.name, []string{`1`, `null`}[i%2]})
				want = append(want, m.name+" "+[]string{"wrong_type", "null"}[i%2])
			}
			wantErrors(t, "everything wrong", s.do("POST", e.path, object(append(bad, field{"role", `1`})...)), want...)
			wantErrors(t, "nothing there", s.do("POST", e.path, []byte(`{}`)), allMissing(e.members)...)

			// Thousands of mistakes make no answer of thousands.
			var many []string
			for i := range 4000 {
				many = append(many, fmt.Sprintf(`"m%d":1`, i))
			}
			a := s.do("POST", e.path, []byte("{"+strings.Join(many, ",")+"}"))
			wantCode(t, "4000 unknown members", a, 400, "invalid_request")
			a2 := s.do("POST", e.path, object(field{strings.Repeat("n", 30000), `1`}, field{strings.Repeat("n", 30000), `1`}))
			wantCode(t, "a long unknown member, twice", a2, 400, "invalid_request")
			if len(a.body) > 8<<10 || len(a2.body) > 8<<10 {
				t.Errorf("got answers of %d and %d bytes, want at most 8 KiB", len(a.body), len(a2.body))
			}
		})
	}
}

func allMissing(members []field) (want []string) {
	for _, m := range members {
		want = append(want, m.name+" missing")
	}
	return want
}

// optionalMember: tenant_id of refresh may be absent or null, not wrong.
func optionalMember(t *testing.T, s *service) {
	token := field{"refresh_token", `"iar_none"`}
	wantCode(t, "absent", s.do("POST", refreshPath, object(token)), 401, "invalid_refresh_token")
	wantCode(t, "null", s.do("POST", refreshPath, object(token, field{"tenant_id", `null`})), 401, "invalid_refresh_token")
	for value, reason := range map[string]string{`1`: "wrong_type", `[]`: "wrong_type", `{}`: "wrong_type", `false`: "wrong_type", `"x"`: "not_a_uuid", `""`: "empty", `"\ud800"`: "invalid_unicode"} {
		wantErrors(t, value, s.do("POST", refreshPath, object(token, field{"tenant_id", value})), "tenant_id "+reason)
	}
	wantErrors(t, "twice", s.do("POST", refreshPath, object(token, field{"tenant_id", `null`}, field{"tenant_id", `null`})), "tenant_id duplicate")
}

func ids(t *testing.T, s *service) {
	good := newUUID()
	for _, row := range []struct{ name, id string }{
		{"empty", ""},
		{"a word", "tenant"},
		{"a digit too few", good[:35]},
		{"a digit too many", good + "0"},
		{"without hyphens", strings.ReplaceAll(good, "-", "")},
		{"hyphens in other places", good[:7] + "-" + good[7:8] + good[9:]},
		{"braces", "{" + good + "}"},
		{"a URN", "urn:uuid:" + good},
		{"a space before", " " + good},
		{"a line break behind", good + "\n"},
		{"NUL behind", good + "\x00"},
		{"a letter past f", "g" + good[1:]},
		{"a digit of another script", "٣" + good[1:]},
		{"wide digits", "１" + good[1:]},
		{"SQL", "'; DROP TABLE accounts; --           "},
		{"a path", "../../../../../../../../etc/passwd.."},
		{"60000 bytes", strings.Repeat("0", 60000)},
	} {
		p := newPerson()
		p.TenantID = row.id
		wantErrors(t, row.name+": tenant_id of register", s.post(registerPath, p), "tenant_id not_a_uuid")
		wantErrors(t, row.name+": tenant_id of login", s.do("POST", loginPath, p.loginBody(password)), "tenant_id not_a_uuid")
		p = newPerson()
		p.UserID = row.id
		wantErrors(t, row.name+": user_id of register", s.post(registerPath, p), "user_id not_a_uuid")
		reason := "not_a_uuid"
		if row.id == "" {
			reason = "empty"
		}
		wantErrors(t, row.name+": tenant_id of refresh", s.post(refreshPath, map[string]string{"refresh_token": "iar_none", "tenant_id": row.id}), "tenant_id "+reason)
	}
	// Every UUID is one, whatever its version.
	for _, id := range []string{"00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff", "00000000-0000-7000-8000-000000000001"} {
		p := newPerson()
		p.TenantID, p.UserID = id, id
		wantCode(t, id, s.post(registerPath, p), 201, "")
	}
	p := person{"x", "y", "z", password}
	wantErrors(t, "three wrong", s.post(registerPath, p), "tenant_id not_a_uuid", "user_id not_a_uuid", "email not_an_email")
}

func emails(t *testing.T, s *service) {
	tenant := newUUID()
	register := func(email string) answer {
		return s.post(registerPath, person{tenant, newUUID(), email, password})
	}
	long := strings.Repeat("a", 64) + "@" + strings.Repeat(strings.Repeat("b", 61)+".", 3)
	for _, row := range []struct{ name, email string }{
		{"empty", ""},
		{"white space", " \t"},
		{"no @", "someone.example.com"},
		{"two @", "someone@home@example.com"},
		{"nothing before the @", "@example.com"},
		{"nothing behind the @", "someone@"},
		{"a space within", "some one@example.com"},
		{"a space behind the @", "someone@ example.com"},
		{"a line break within", "someone@exam\nple.com"},
		{"a line and a header", "someone@example.com\r\nBcc: all@example.com"},
		{"NUL", "someone@example.com\x00"},
		{"DEL", "some\x7fone@example.com"},
		{"a vertical tab behind", "someone@example.com\v"},
		{"a no-break space behind", "someone@example.com\u00a0"},
		{"a quoted local part", `"someone"@example.com`},
		{"a comment", "someone(comment)@example.com"},
		{"a display name", "Some One <someone@example.com>"},
		{"brackets", "<someone@example.com>"},
		{"two addresses", "a@example.com,b@example.com"},
		{"a dot first", ".someone@example.com"},
		{"a dot last", "someone.@example.com"},
		{"two dots", "some..one@example.com"},
		{"a backslash", `some\one@example.com`},
		{"a domain literal", "someone@[127.0.0.1]"},
		{"an IPv4 address", "someone@127.0.0.1"},
		{"a domain that begins with a dot", "someone@.example.com"},
		{"a domain with two dots", "someone@example..com"},
		{"a domain that ends with a dot", "someone@example.com."},
		{"a label that begins with a hyphen", "someone@-example.com"},
		{"a label that ends with a hyphen", "someone@example-.com"},
		{"an underscore in the domain", "someone@ex_ample.com"},
		{"a label of 64 bytes", "someone@" + strings.Repeat("b", 64) + ".com"},
		{"a local part of 65 bytes", strings.Repeat("a", 65) + "@example.com"},
		{"255 bytes", long + strings.Repeat("c", 255-len(long)-2) + ".d"},
		{"60000 bytes", strings.Repeat("a", 60000) + "@example.com"},
		{"a letter beyond ASCII", "jürgen@example.com"},
		{"a domain beyond ASCII", "someone@exämple.com"},
		{"a Kelvin sign for K", "\u212aevin@example.com"},
		{"a long s for s", "ſomeone@example.com"},
		{"a wide @", "someone＠example.com"},
		{"a zero width space", "some\u200bone@example.com"},
		{"a byte order mark", "\ufeffsomeone@example.com"},
		{"a right-to-left override", "someone@\u202eexample.com"},
		{"an emoji", "🐎@example.com"},
	} {
		wantErrors(t, row.name, register(row.email), "email not_an_email")
	}
	// Login merely looks up: what no account can have is a wrong e-mail.
	for _, email := range []string{"", "someone", "someone@example.com\x00", "jürgen@example.com", strings.Repeat("a", 60000) + "@example.com"} {
		a := s.do("POST", loginPath, person{TenantID: tenant, Email: email}.loginBody(password))
		wantCode(t, fmt.Sprintf("login of %.30q", email), a, 401, "invalid_credentials")
	}
	for _, row := range []struct{ name, email, want string }{
		{"short", "a@b.co", "a@b.co"},
		{"plus", "someone+tag@example.com", "someone+tag@example.com"},
		{"without plus, another account", "someone@example.com", "someone@example.com"},
		{"dots", "s.o.m.e@example.com", "s.o.m.e@example.com"},
		{"without dots, another account", "some@example.com", "some@example.com"},
		{"every sign of an atom", "!#$%&'*+-/=?^_`{|}~@example.com", "!#$%&'*+-/=?^_`{|}~@example.com"},
		{"no LIKE wildcard: %", "%@example.com", "%@example.com"},
		{"no LIKE wildcard: _", "_@example.com", "_@example.com"},
		{"digits", "1@2.example", "1@2.example"},
		{"a domain in punycode", "someone@xn--exmple-cua.com", "someone@xn--exmple-cua.com"},
		{"hyphens", "some-one@ex-am--ple.co.uk", "some-one@ex-am--ple.co.uk"},
		{"upper case", "SOMEBODY@EXAMPLE.COM", "somebody@example.com"},
		{"white space around", " \t\r\nanyone@example.com\n ", "anyone@example.com"},
		{"254 bytes", long + strings.Repeat("c", 254-len(long)-2) + ".d", long + strings.Repeat("c", 254-len(long)-2) + ".d"},
	} {
		a := register(row.email)
		if a.status != 201 || a.json(t)["email"] != row.want {
			t.Errorf("%s: got %d %s, want 201 with e-mail %q", row.name, a.status, a.body, row.want)
			continue
		}
		wantCode(t, row.name+": login", s.do("POST", loginPath, person{TenantID: tenant, Email: row.email}.loginBody(password)), 200, "")
	}
}

// passwordsAreBytes: two different byte strings are two passwords; nothing
// is trimmed, folded or normalised.
func passwordsAreBytes(t *testing.T, s *service) {
	for _, row := range []struct {
		name, password string
		others         []string
	}{
		{"composed", "Caf\u00e9 au lait noir", []string{"Cafe\u0301 au lait noir", "Cafe au lait noir", "caf\u00e9 au lait noir"}},
		{"decomposed", "Cafe\u0301 au lait noir", []string{"Caf\u00e9 au lait noir"}},
		{"the replacement character", "nine lives of a cat \ufffd", []string{"nine lives of a cat ", "nine lives of a cat \ufffd\ufffd", "nine lives of a cat ?"}},
		{"spaces", " nine lives of a cat ", []string{"nine lives of a cat", " nine lives of a cat", "nine lives of a cat "}},
		{"NUL", "nine lives\x00 of a cat", []string{"nine lives", "nine lives of a cat", "nine lives\x00"}},
		{"wide letters", "ｎｉｎｅ lives of a cat", []string{"nine lives of a cat"}},
		{"a ligature", "\ufb01sh and chips again", []string{"fish and chips again"}},
		{"zero width", "nine\u200blives of a cat", []string{"ninelives of a cat"}},
		{"72 bytes and more", strings.Repeat("nine lives. ", 6) + "tail one", []string{strings.Repeat("nine lives. ", 6) + "tail two", strings.Repeat("nine lives. ", 6)}},
	} {
		p := newPerson()
		p.Password = row.password
		wantCode(t, row.name, s.post(registerPath, p), 201, "")
		for _, other := range row.others {
			wantCode(t, fmt.Sprintf("%s: login with %q", row.name, other), s.do("POST", loginPath, p.loginBody(other)), 401, "invalid_credentials")
		}
		wantCode(t, row.name+": login", s.do("POST", loginPath, p.loginBody(row.password)), 200, "")
	}
	// JSON has several spellings of one text.
	p := newPerson()
	p.Password = "horse 🐎 and é/cart"
	wantCode(t, "register", s.post(registerPath, p), 201, "")
	for _, spelling := range []string{`"horse 🐎 and é/cart"`, `"horse \ud83d\udc0e and \u00e9\/cart"`, `"\u0068orse \uD83D\uDC0E and é/cart"`} {
		body := object(field{"tenant_id", `"` + p.TenantID + `"`}, field{"email", `"` + p.Email + `"`}, field{"password", spelling})
		wantCode(t, "login with "+spelling, s.do("POST", loginPath, body), 200, "")
	}
}

// bodies: what is no JSON object is refused as a whole.
func bodies(t *testing.T, s *service) {
	utf16le := func(text string) []byte {
		b := []byte{0xff, 0xfe}
		for _, u := range utf16.Encode([]rune(text)) {
			b = append(b, byte(u), byte(u>>8))
		}
		return b
	}
	for _, e := range endpoints() {
		good := string(object(e.members...))
		for _, row := range []struct{ name, body, reason string }{
			{"empty", "", "not_json"},
			{"white space", " \n", "not_json"},
			{"null", "null", "not_an_object"},
			{"true", "true", "not_an_object"},
			{"a number", "42", "not_an_object"},
			{"a string", `"text"`, "not_an_object"},
			{"an empty array", "[]", "not_an_object"},
			{"an array of the object", "[" + good + "]", "not_an_object"},
			{"cut off", good[:len(good)-1], "not_json"},
			{"an opening brace", "{", "not_json"},
			{"two objects", good + good, "not_json"},
			{"an object and a brace", good + "}", "not_json"},
			{"an object and a letter", good + "x", "not_json"},
			{"an object and NUL", good + "\x00", "not_json"},
			{"a byte order mark", "\ufeff" + good, "not_json"},
			{"UTF-16", string(utf16le(good)), "not_json"},
			{"a comma at the end", good[:len(good)-1] + ",}", "not_json"},
			{"no comma", strings.Replace(good, `,"`, ` "`, 1) + map[bool]string{true: "x"}[e.path == refreshPath], "not_json"},
			{"single quotes", strings.ReplaceAll(good, `"`, `'`), "not_json"},
			{"no quotes", strings.ReplaceAll(good, `"`, ``), "not_json"},
			{"a comment", "/* hello */" + good, "not_json"},
			{"NaN", good[:len(good)-1] + `,"x":NaN}`, "not_json"},
			{"a leading zero", good[:len(good)-1] + `,"x":01}`, "not_json"},
			{"a raw line break in a string", good[:len(good)-1] + ",\"x\":\"\n\"}", "not_json"},
			{"a bad escape", good[:len(good)-1] + `,"x":"\x41"}`, "not_json"},
			{"a short escape", good[:len(good)-1] + `,"x":"\u00"}`, "not_json"},
			{"arrays 20000 deep", strings.Repeat("[", 20000) + strings.Repeat("]", 20000), "not_json"},
			{"objects 10000 deep", strings.Repeat(`{"a":`, 10900) + "1" + strings.Repeat("}", 10900), "not_json"},
			{"brackets without end", strings.Repeat("[", 60000), "not_json"},
			{"a form", "tenant_id=x&email=y", "not_json"},
			{"a JSON sequence", "\x1e" + good + "\n", "not_json"},
			{"gzip", "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "not_json"},
		} {
			wantErrors(t, e.path+" "+row.name, s.do("POST", e.path, []byte(row.body)), "body "+row.reason)
		}
		for _, body := range []string{" \t\r\n" + good + "\r\n", strings.ReplaceAll(good, `":"`, `" : "`)} {
			if a := s.do("POST", e.path, []byte(body)); a.status != e.good && a.status != 409 {
				t.Errorf("%s with white space: got %d %s, want %d", e.path, a.status, a.body, e.good)
			}
		}
	}
}

// bodySize: 64 KiB are taken, one byte more is not, however it is sent.
func bodySize(t *testing.T, s *service) {
	const limit = 64 << 10
	for _, e := range endpoints() {
		good := object(e.members...)
		padded := func(size int) []byte { return append(bytes.Clone(good), bytes.Repeat([]byte(" "), size-len(good))...) }
		for _, row := range []struct {
			name    string
			body    []byte
			chunked bool
			status  int
		}{
			{"64 KiB", padded(limit), false, e.good},
			{"64 KiB in chunks", padded(limit), true, e.good},
			{"64 KiB and a byte", padded(limit + 1), false, 413},
			{"64 KiB and a byte in chunks", padded(limit + 1), true, 413},
			{"4 MiB", padded(4 << 20), false, 413},
			{"4 MiB in chunks", padded(4 << 20), true, 413},
			{"4 MiB of something else", bytes.Repeat([]byte("x"), 4<<20), true, 413},
		} {
			var body io.Reader = bytes.NewReader(row.body)
			if row.chunked {
				body = struct{ io.Reader }{body} // of unknown length
			}
			req, err := http.NewRequest("POST", s.base+e.path, body)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			resp, err := s.client.Do(req)
			if err != nil {
				// Whoever sends megabytes may find the connection closed.
				if row.status == 413 && len(row.body) > 1<<20 {
					continue
				}
				t.Fatalf("%s, %s: %v", e.path, row.name, err)
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			a := answer{resp.StatusCode, resp.Header, b}
			if a.status == 409 { // registered by the row before
				a.status = e.good
			}
			if a.status != row.status || row.status == 413 && a.code() != "body_too_large" {
				t.Errorf("%s, %s: got %d %s, want %d", e.path, row.name, a.status, a.body, row.status)
			}
		}
	}
}

func contentTypes(t *testing.T, s *service) {
	for _, e := range endpoints() {
		for _, row := range []struct {
			name     string
			header   []string
			accepted bool
		}{
			{"application/json", []string{"Content-Type", "application/json"}, true},
			{"in upper case", []string{"Content-Type", "APPLICATION/JSON"}, true},
			{"with charset", []string{"Content-Type", "application/json; charset=utf-8"}, true},
			{"with charset in upper case and quotes", []string{"Content-Type", `application/json;charset="UTF-8"`}, true},
			{"none", []string{"Content-Type", ""}, false},
			{"another charset", []string{"Content-Type", "application/json; charset=iso-8859-1"}, false},
			{"UTF-16", []string{"Content-Type", "application/json; charset=utf-16"}, false},
			{"text", []string{"Content-Type", "text/plain"}, false},
			{"text/json", []string{"Content-Type", "text/json"}, false},
			{"a form: what a page of another origin can send", []string{"Content-Type", "application/x-www-form-urlencoded"}, false},
			{"parts", []string{"Content-Type", "multipart/form-data; boundary=x"}, false},
			{"another JSON", []string{"Content-Type", "application/merge-patch+json"}, false},
			{"problem+json", []string{"Content-Type", "application/problem+json"}, false},
			{"a longer name", []string{"Content-Type", "application/jsonp"}, false},
			{"two types", []string{"Content-Type", "application/json, text/plain"}, false},
			{"nonsense", []string{"Content-Type", ";;;"}, false},
			{"gzip", []string{"Content-Encoding", "gzip"}, false},
			{"deflate", []string{"Content-Encoding", "deflate"}, false},
			{"br", []string{"Content-Encoding", "br"}, false},
			{"identity", []string{"Content-Encoding", "identity"}, false},
		} {
			a := s.do("POST", e.path, object(e.members...), row.header...)
			if row.accepted {
				if a.status != e.good && a.status != 409 {
					t.Errorf("%s, %s: got %d %s, want %d", e.path, row.name, a.status, a.body, e.good)
				}
				continue
			}
			wantCode(t, e.path+", "+row.name, a, 415, "unsupported_media_type")
		}
	}
}

func paths(t *testing.T, s *service) {
	for _, path := range []string{
		"/", "//", "///", "/index.html", "/api", "/api/", "/api/auth", "/api/auth/", "/favicon.ico", "/robots.txt",
		"/api/auth/login/", "/api/auth/login//", "//api/auth/login", "/api//auth/login", "/api/auth//login",
		"/./api/auth/login", "/api/./auth/login", "/api/auth/../auth/login", "/api/auth/login/.", "/api/auth/login/..", "/../api/auth/login",
		"/api%2Fauth%2Flogin", "/api/auth%2Flogin", "/api/auth/login%2F", "/api/auth/%2e%2e/auth/login", "/api/auth/login%00", "/api/auth/login%20", "/api/auth/login;x=y",
		"/API/auth/login", "/api/auth/Login", "/api/auth/logins", "/api/auth/login.json", "/v1/api/auth/login",
		"/health", "/health/", "/health/live/", "//health/live", "/healthz", "/health/live/x", "/metrics/", "/openapi.json/", "/openapi.yaml",
		"/.well-known", "/.well-known/", "/.well-known/jwks.json/", "/.well-known//jwks.json", "/jwks.json", "/.well-known/jwks",
		"/debug/pprof/", "/debug/vars", "/debug/pprof/heap", "/.git/config", "/.env", "/etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
		"/" + strings.Repeat("a", 4000), "/" + strings.Repeat("a/", 1000),
	} {
		for _, method := range []string{"GET", "POST", "HEAD", "DELETE", "OPTIONS"} {
			a := s.do(method, path, nil)
			if a.status != 404 || method != "HEAD" && a.code() != "not_found" {
				t.Errorf("%s %.60s: got %d %s, want 404 not_found", method, path, a.status, a.body)
			}
			if a.header.Get("Location") != "" {
				t.Errorf("%s %.60s: a redirect", method, path)
			}
		}
	}
	// A query changes nothing.
	if a := s.get("/health/live?x=y&x=%zz"); a.status != 200 {
		t.Errorf("with a query: got %d, want 200", a.status)
	}
}

func methods(t *testing.T, s *service) {
	allowed := map[string][]string{}
	for _, route := range routes() {
		method, path, _ := strings.Cut(route, " ")
		path = strings.Replace(path, "{session_id}", newUUID(), 1)
		allowed[path] = append(allowed[path], method)
		if method == "GET" {
			allowed[path] = append(allowed[path], "HEAD")
		}
	}
	for path, methods := range allowed {
		slices.Sort(methods)
		allow := strings.Join(methods, ", ")
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "QUERY", "get", "X"} {
			a := s.do(method, path, nil)
			if slices.Contains(methods, method) {
				if a.status == 405 {
					t.Errorf("%s %s: got 405, want it to be served", method, path)
				}
				continue
			}
			if got := a.header.Get("Allow"); a.status != 405 || got != allow || method != "HEAD" && a.code() != "method_not_allowed" {
				t.Errorf("%s %s: got %d, Allow %q, want 405 and %q", method, path, a.status, got, allow)
			}
		}
	}
	for _, path := range []string{"/health/live", "/health/ready", "/.well-known/jwks.json", "/openapi.json", "/.well-known/openid-configuration"} {
		get, head := s.get(path), s.do("HEAD", path, nil)
		if head.status != get.status || len(head.body) != 0 {
			t.Errorf("HEAD %s: got %d and %d bytes, want %d and none", path, head.status, len(head.body), get.status)
		}
		for _, name := range []string{"Content-Type", "Content-Length", "ETag", "Cache-Control"} {
			// The length of a problem differs when its trace id does.
			if got, want := head.header.Get(name), get.header.Get(name); got != want {
				t.Errorf("HEAD %s: got %s %q, want %q as for GET", path, name, got, want)
			}
		}
	}
}

// raw sends bytes on a connection of its own and reads one answer.
func raw(t *testing.T, s *service, request string) answer {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	// The service may answer and close before it has read everything.
	go io.WriteString(conn, request)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatalf("%.60q: %v", request, err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, body}
}

// rawRequests: what no decent client sends.
func rawRequests(t *testing.T, s *service) {
	host := strings.TrimPrefix(s.base, "http://")
	post := func(headers, body string) string {
		return "POST " + refreshPath + " HTTP/1.1\r\nHost: " + host + "\r\nContent-Type: application/json\r\nConnection: close\r\n" + headers + "\r\n" + body
	}
	const body = `{"refresh_token":"iar_none"}`
	for _, row := range []struct {
		name, request string
		status        int
	}{
		{"in order", post("Content-Length: 28\r\n", body), 401},
		{"chunked", post("Transfer-Encoding: chunked\r\n", "1c\r\n"+body+"\r\n0\r\n\r\n"), 401},
		{"HTTP/1.0", "GET /health/live HTTP/1.0\r\n\r\n", 200},
		{"the absolute form", "GET http://" + host + "/health/live HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n", 200},
		{"the absolute form of another host", "GET http://other.example.com//health/live HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n", 404},
		{"OPTIONS *", "OPTIONS * HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n", 404},
		{"CONNECT", "CONNECT " + host + " HTTP/1.1\r\nHost: " + host + "\r\nConnection: close\r\n\r\n", 404},
		{"no Host", "GET /health/live HTTP/1.1\r\nConnection: close\r\n\r\n", 400},
		{"two Hosts", "GET /health/live HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n", 400},
		{"a bad escape in the path", "GET /health/%zz HTTP/1.1\r\nHost: a\r\n\r\n", 400},
		{"headers of 17 KiB", "GET /health/live HTTP/1.1\r\nHost: a\r\nX-Long: " + strings.Repeat("x", 17<<10) + "\r\n\r\n", 431},
		{"a thousand headers", "GET /health/live HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X-Many: 0123456789\r\n", 1000) + "\r\n", 431},
		{"no HTTP", "SSH-2.0-OpenSSH_9.6\r\n\r\n", 400},
		{"TLS", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400},
	} {
		a := raw(t, s, row.request)
		if a.status != row.status {
			t.Errorf("%s: got %d %.200q, want %d", row.name, a.status, a.body, row.status)
		}
		if a.header.Get("Server") != "" {
			t.Errorf("%s: got a Server header", row.name)
		}
	}
}

// traceIDs: the trace-id of a valid traceparent, else a UUID from
// X-Trace-Id, else a fresh UUID.
func traceIDs(t *testing.T, s *service) {
	const trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	const own = "6f9619ff-8b86-4011-b42d-00cf4fc964ff"
	for _, row := range []struct{ name, traceparent, xTraceID, want string }{ // want "": fresh
		{"neither", "", "", ""},
		{"traceparent", "00-" + trace + "-" + span + "-01", "", trace},
		{"traceparent, not sampled", "00-" + trace + "-" + span + "-00", "", trace},
		{"both", "00-" + trace + "-" + span + "-01", own, trace},
		{"X-Trace-Id", "", own, own},
		{"X-Trace-Id in upper case", "", strings.ToUpper(own), own},
		{"a coming version", "cc-" + trace + "-" + span + "-01", own, trace},
		{"a coming version with more behind", "cc-" + trace + "-" + span + "-01-what-the-future-brings", own, trace},
		{"a coming version with more, no hyphen", "cc-" + trace + "-" + span + "-01.what", own, own},
		{"version 00 with more behind", "00-" + trace + "-" + span + "-01-more", own, own},
		{"version ff", "ff-" + trace + "-" + span + "-01", own, own},
		{"a version of one digit", "0-" + trace + "-" + span + "-01", own, own},
		{"a trace-id of zeros", "00-00000000000000000000000000000000-" + span + "-01", own, own},
		{"a parent-id of zeros", "00-" + trace + "-0000000000000000-01", own, own},
		{"upper case", "00-" + strings.ToUpper(trace) + "-" + span + "-01", own, own},
		{"a trace-id too short", "00-" + trace[1:] + "-" + span + "-01", own, own},
		{"a trace-id too long", "00-" + trace + "0-" + span + "-01", own, own},
		{"no digits", "00-" + strings.Repeat("g", 32) + "-" + span + "-01", own, own},
		{"no flags", "00-" + trace + "-" + span, own, own},
		{"flags that are no digits", "00-" + trace + "-" + span + "-zz", own, own},
		{"other separators", "00_" + trace + "_" + span + "_01", own, own},
		{"nonsense", "'; DROP TABLE outbox; --", own, own},
		{"X-Trace-Id, 32 digits", "", trace, ""},
		{"X-Trace-Id, a word", "", "my-trace", ""},
		{"X-Trace-Id, braces", "", "{" + own + "}", ""},
		{"X-Trace-Id, too long", "", own + "0", ""},
		{"X-Trace-Id, HTML", "", "<script>alert(1)</script>", ""},
		{"both nonsense", "x", "y", ""},
	} {
		a := s.do("POST", refreshPath, []byte(`{"refresh_token":"none"}`), "traceparent", row.traceparent, "X-Trace-Id", row.xTraceID)
		got := a.header.Get("X-Trace-Id")
		switch {
		case row.want != "" && got != row.want:
			t.Errorf("%s: got %q, want %q", row.name, got, row.want)
		case row.want == "" && (!uuidForm.MatchString(got) || strings.EqualFold(got, row.xTraceID)):
			t.Errorf("%s: got %q, want a fresh UUID", row.name, got)
		}
		lineOf(t, s, "auth.refresh", got)
	}
	if a, b := s.get("/health/live"), s.get("/health/live"); a.header.Get("X-Trace-Id") == b.header.Get("X-Trace-Id") {
		t.Error("two requests have one fresh trace id")
	}
}
