package db

import (
	"net/mail"
	"strings"
	"testing"
)

func TestParseEmail(t *testing.T) {
	for _, row := range []struct{ in, want string }{
		{"", ""},
		{"plain", ""},
		{"@example.com", ""},
		{"a@", ""},
		{"a@localhost", ""},
		{"a@b@example.com", ""},
		{"a..b@example.com", ""},
		{".a@example.com", ""},
		{`"a b"@example.com`, ""},
		{"a b@example.com", ""},
		{"a@[192.0.2.1]", ""},
		{"a@192.0.2.1", ""},
		{"a@-x.com", ""},
		{"a@x_y.com", ""},
		{"a@example.com.", ""},
		{"\u00e4@example.com", ""},
		{"a@ex\u00e4mple.com", ""},
		{"\u212a@example.com", ""}, // KELVIN SIGN would fold to k
		{"a\x00@example.com", ""},
		{"a\r\nb@example.com", ""},
		{"Ada <a@example.com>", ""},
		{strings.Repeat("a", 65) + "@example.com", ""},
		{"a@" + strings.Repeat("b", 64) + ".com", ""},
		{"a@" + strings.Repeat("bbbbbbb.", 40) + "com", ""},
		{" Ada.Lovelace+x@Example.COM\t", "ada.lovelace+x@example.com"},
		{"!#$%&'*+-/=?^_`{|}~@example.com", "!#$%&'*+-/=?^_`{|}~@example.com"},
		{"a@xn--exmple-cua.com", "a@xn--exmple-cua.com"},
		{strings.Repeat("a", 64) + "@" + strings.Repeat("b", 63) + ".com", strings.Repeat("a", 64) + "@" + strings.Repeat("b", 63) + ".com"},
	} {
		got, err := ParseEmail(row.in)
		if got.String() != row.want || (err == nil) != (row.want != "") {
			t.Errorf("%.40q: got %q, %v; want %q", row.in, got, err, row.want)
		}
	}
}

// What is accepted is in its stored form, and an address to the standard
// library too.
func FuzzParseEmail(f *testing.F) {
	for _, seed := range []string{"Ada@example.com", `"a b"@x.org`, "a@[192.0.2.1]", "\u212a@example.com"} {
		f.Add(seed)
	}
	for _, seed := range []string{
		// RFC 3696 section 3.
		`Abc\@def@example.com`, `Fred\ Bloggs@example.com`, `Joe.\\Blow@example.com`, `"Abc@def"@example.com`, `"Fred Bloggs"@example.com`,
		"user+mailbox@example.com", "customer/department=shipping@example.com", "$A12345@example.com", "!def!xyz%abc@example.com", "_somename@example.com",
		// RFC 5321 section 4.1.3 and appendix D.
		"Smith@bar.com", "JQP@bar.com", "<@hosta.int,@jkl.org:userc@d.bar.org>", "Smith@[IPv6:2001:db8::1]", "Postmaster",
		// RFC 5322 appendix A.
		"jdoe@machine.example", "john.q.public@example.com", "one@y.test", `"Joe Q. Public" <john.q.public@example.com>`, `Pete(A nice \) chap) <pete(his account)@silly.test(his host)>`,
		"sysservices@example.net", "jdoe@example.org, <boss@nil.test>", `"Giant; \"Big\" Box" <sysservices@example.net>`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		email, err := ParseEmail(s)
		if err != nil {
			return
		}
		again, err := ParseEmail(email.String())
		if err != nil || again != email || len(email.String()) > 254 {
			t.Fatalf("%q is stored as %q, which reads as %q, %v", s, email, again, err)
		}
		if a, err := mail.ParseAddress(email.String()); err != nil || a.Address != email.String() {
			t.Fatalf("%q: net/mail says %v, %v", email, a, err)
		}
		if looked, _ := LookupEmail(s); looked != email {
			t.Fatalf("%q is looked up as %q", s, looked)
		}
	})
}

func TestParseUUIDs(t *testing.T) {
	const good = "6F9619FF-8B86-D011-B42D-00C04FC964FF"
	if id, err := ParseTenantID(good); err != nil || id.String() != strings.ToLower(good) {
		t.Errorf("got %v, %v", id, err)
	}
	for _, bad := range []string{"", "x", good[1:], good + "0", "{" + good + "}", "urn:uuid:" + good, strings.ReplaceAll(good, "-", ""), strings.Replace(good, "F", "G", 1),
		strings.Replace(good, "-", "0", 1), " " + good} {
		if _, err := ParseTenantID(bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func FuzzParseUUID(f *testing.F) {
	f.Add("6F9619FF-8B86-D011-B42D-00C04FC964FF")
	for _, id := range []string{ // RFC 9562 section 4, 5.9, 5.10 and appendix A
		"f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "00000000-0000-0000-0000-000000000000", "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF",
		"C232AB00-9414-11EC-B3C8-9F6BDECED846", "5df41881-3aed-3515-88a7-2f4a814cf09e", "919108f7-52d1-4320-9bac-f847db4148a8", "1EC9414C-232A-6B00-B3C8-9F6BDECED846", "017F22E2-79B0-7CC3-98C4-DC0C0C07398F",
	} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := ParseUserID(s); err == nil && id.String() != strings.ToLower(s) {
			t.Fatalf("%q is written %q", s, id)
		}
	})
}
