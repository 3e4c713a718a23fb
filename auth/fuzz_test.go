package auth

import (
	"bufio"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/7d-solutions/identity-auth/db"
)

// rfc8259Texts are the JSON texts printed in RFC 8259 section 13, and its
// section 8.2 example of a string that is no Unicode.
var rfc8259Texts = []string{
	`{"Image":{"Width":800,"Height":600,"Title":"View from 15th Floor","Thumbnail":{"Url":"http://www.example.com/image/481989943","Height":125,"Width":100},"Animated":false,"IDs":[116,943,234,38793]}}`,
	`[{"precision":"zip","Latitude":37.7668,"Longitude":-122.3959,"Address":"","City":"SAN FRANCISCO","State":"CA","Zip":"94107","Country":"US"}]`,
	`"Hello world!"`, `42`, `true`, `"\uDEAD"`,
}

// A line of an import is refused with a reason, or is what register would
// accept: ids and e-mail in one spelling, a hash that a login can check within
// its ceiling, claims that a token can carry.
func FuzzImportLine(f *testing.F) {
	const good = `{"tenant_id":"919108f7-52d1-4320-9bac-f847db4148a8","user_id":"017F22E2-79B0-7CC3-98C4-DC0C0C07398F","email":"jdoe@machine.example","password_hash":"HASH","disabled":true,"claims":{"roles":["a"]}}` // RFC 9562, RFC 5322
	for _, row := range storedHashes {
		f.Add([]byte(strings.Replace(good, "HASH", row.hash, 1) + "\n"))
	}
	for _, text := range rfc8259Texts {
		f.Add([]byte(text + "\n" + good + "\n"))
	}
	f.Add([]byte(strings.Replace(good, `{"roles":["a"]}`, `{"sub":"x"}`, 1)))
	f.Fuzz(func(t *testing.T, file []byte) {
		lines := bufio.NewReaderSize(strings.NewReader(string(file)), 2*maxBody)
		for range len(file) + 1 {
			line, tooLong, err := readLine(lines)
			if err != nil {
				return
			}
			var in importLine
			if tooLong || decodeObject(line, in.members()) != nil {
				continue
			}
			row, reason := in.row(today)
			if reason != "" {
				if in.PasswordHash != "" && len(in.PasswordHash) > 16 && strings.Contains(reason, in.PasswordHash) {
					t.Fatalf("the reason repeats the hash: %s", reason)
				}
				continue
			}
			if row.Tenant.String() != strings.ToLower(in.TenantID) || row.User.String() != strings.ToLower(in.UserID) || checkClaims(row.Claims) != "" {
				t.Fatalf("%q became %+v", line, row)
			}
			if again, err := db.ParseEmail(row.Email.String()); err != nil || again != row.Email {
				t.Fatalf("%q: e-mail %q: %v", line, row.Email, err)
			}
			if h, err := parseHash(row.PasswordHash, today); err != nil || uint64(h.params.MemoryKiB) > 4*uint64(today.MemoryKiB) {
				t.Fatalf("%q: hash: %v", line, err)
			}
		}
		t.Fatal("reading lines does not come to an end")
	})
}

// Claims that an operator may set are one JSON object of free names, short
// enough, and say the same to every parser.
func FuzzCheckClaims(f *testing.F) {
	for _, text := range rfc8259Texts {
		f.Add([]byte(text))
	}
	for _, text := range []string{
		`{}`, `{"roles":["editor"],"n":1e400}`, `{"sub":"someone"}`, `{"a":1,"a":2}`, `{"\u0073ub":1}`, `{"a":"\ud800"}`,
		`{"http://example.com/is_root":true}`,                                                 // RFC 7519 section 3.1
		`{"scope":"openid profile reademail"}`, `{"groups":["1234"],"entitlements":["2345"]}`, // RFC 9068, RFC 7643
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, claims []byte) {
		if checkClaims(claims) != "" {
			return
		}
		var m map[string]json.RawMessage
		if err := json.Unmarshal(claims, &m); err != nil || len(claims) > maxClaims || !utf8.Valid(claims) {
			t.Fatalf("%q: %v", claims, err)
		}
		for _, reserved := range []string{"iss", "sub", "aud", "exp", "iat", "nbf", "jti", "client_id", "tenant_id", "sid", "auth_time", "amr"} {
			if _, there := m[reserved]; there {
				t.Fatalf("%q sets %s", claims, reserved)
			}
		}
	})
}

// A body is read when its type is the one wanted, in UTF-8, and never beyond
// its bound; the token of a form is one.
func FuzzBody(f *testing.F) {
	f.Add("application/x-www-form-urlencoded", "", []byte("token=45ghiukldjahdnhzdauz&token_type_hint=refresh_token")) // RFC 7009
	f.Add("application/x-www-form-urlencoded", "", []byte("token=mF_9.B5f-4.1JqM&token_type_hint=access_token"))       // RFC 7662
	f.Add("application/x-www-form-urlencoded; charset=UTF-8", "", []byte("token=a&token=b"))
	f.Add("application/json; charset=utf-8", "", []byte(rfc8259Texts[0]))
	f.Add(`application/json; charset="us-ascii"`, "gzip", []byte("%zz"))
	f.Add("multipart/form-data; boundary=AaB03x", "identity", []byte("--AaB03x\r\n")) // RFC 7578
	f.Fuzz(func(t *testing.T, contentType, encoding string, body []byte) {
		const want = "application/x-www-form-urlencoded"
		r := httptest.NewRequest("POST", "/", strings.NewReader(string(body)))
		r.Header = http.Header{"Content-Type": {contentType}, "Content-Encoding": {encoding}}
		got, err := readBody(httptest.NewRecorder(), r, want)
		if err == nil && (string(got) != string(body) || len(body) > maxBody || encoding != "" || !strings.HasPrefix(strings.ToLower(strings.TrimSpace(contentType)), want)) {
			t.Fatalf("%q, %q: read %d of %d bytes", contentType, encoding, len(got), len(body))
		}
		r = httptest.NewRequest("POST", "/", strings.NewReader(string(body)))
		r.Header.Set("Content-Type", want)
		if token, err := readTokenForm(httptest.NewRecorder(), r); err == nil && !slices.Contains(strings.FieldsFunc(string(body), func(r rune) bool { return r == '&' || r == '=' }), "token") && !strings.Contains(string(body), "%") {
			t.Fatalf("%q: token %q from nowhere", body, token)
		}
	})
}

// Whatever a password is made of, the policy answers, and it does not matter
// in which ASCII case the common ones are written.
func FuzzPasswordPolicy(f *testing.F) {
	for _, password := range []string{"StrongPassword123", "correct horse battery staple", "p@ssw0rd2024!", "qwertyuiop[]", "aaaaaaaaaaaaaaaa", "jdoe@machine.example", "\u00e9\u00e9\u00e9\u00e9\u00e9\u00e9", "\x00\xff", strings.Repeat("ab", 600)} {
		f.Add(password)
	}
	email, err := db.ParseEmail("jdoe@machine.example")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, password string) {
		reasons := passwordPolicy{minLength: 12}.check(password, email)
		if short := utf8.RuneCountInString(password) < 12; short != slices.Contains(reasons, "too_short") {
			t.Fatalf("%q: %v", password, reasons)
		}
		if long := len(password) > maxPassword; long != slices.Contains(reasons, "too_long") {
			t.Fatalf("%q: %v", password, reasons)
		}
		if utf8.ValidString(password) && len(password) <= maxPassword && isCommon(password) != isCommon(strings.ToLower(password)) {
			t.Fatalf("%q is common in one case only", password)
		}
	})
}
