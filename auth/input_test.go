package auth

import (
	"net/netip"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestClientText(t *testing.T) {
	for _, row := range []struct{ in, want string }{
		{"curl/8.14.1", "curl/8.14.1"},
		{"a\r\nb=ERROR", "a\ufffd\ufffdb=ERROR"},
		{"a\u0085b\u2028c\u2029d", "a\ufffdb\ufffdc\ufffdd"},
		{"\u202eevil", "\ufffdevil"},
		{"a\x00b\xffc", "a\ufffdb\ufffdc"},
		{strings.Repeat("x", 15) + "é", strings.Repeat("x", 15)}, // half a letter
		{strings.Repeat("\xff", 16), strings.Repeat("\ufffd", 5)},
		{strings.Repeat("x", 14) + "é", strings.Repeat("x", 14) + "é"},
		{strings.Repeat("x", 40), strings.Repeat("x", 16)},
	} {
		if got := clientText(row.in, 16); got != row.want {
			t.Errorf("%q: got %q, want %q", row.in, got, row.want)
		}
	}
}

func FuzzClientText(f *testing.F) {
	f.Add("a\u2028\xff")
	f.Fuzz(func(t *testing.T, s string) {
		got := clientText(s, 64)
		if !utf8.ValidString(got) || len(got) > 64 || strings.ContainsFunc(got, unicode.IsControl) {
			t.Fatalf("%q gave %q", s, got)
		}
	})
}

func TestClientAddr(t *testing.T) {
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	for _, row := range []struct {
		peer      string
		forwarded []string
		want      string
		forged    bool
	}{
		{"203.0.113.9", []string{"198.51.100.1"}, "203.0.113.9", false}, // anyone may write a header
		{"192.168.1.2", []string{"198.51.100.1"}, "192.168.1.2", true},  // a proxy that is not configured
		{"10.0.0.1", nil, "10.0.0.1", false},
		{"10.0.0.1", []string{"198.51.100.1"}, "198.51.100.1", false},
		{"10.0.0.1", []string{"6.6.6.6, 198.51.100.1"}, "198.51.100.1", false}, // the left one is the client's invention
		{"10.0.0.1", []string{"6.6.6.6", "198.51.100.1, 10.2.2.2"}, "198.51.100.1", false},
		{"10.0.0.1", []string{"10.1.1.1, 10.2.2.2"}, "10.1.1.1", false},
		{"10.0.0.1", []string{"198.51.100.1, nonsense"}, "10.0.0.1", false},
		{"10.0.0.1", []string{"198.51.100.1:80"}, "198.51.100.1", false},
		{"10.0.0.1", []string{"::ffff:198.51.100.1"}, "198.51.100.1", false},
		{"fd00::1", []string{"2001:db8::5"}, "2001:db8::5", false},
		{"10.0.0.1", []string{""}, "10.0.0.1", false},
	} {
		got, forged := clientAddr(netip.MustParseAddr(row.peer), row.forwarded, trusted)
		if got.String() != row.want || forged != row.forged {
			t.Errorf("%s %q: got %s, %v; want %s, %v", row.peer, row.forwarded, got, forged, row.want, row.forged)
		}
	}
}

func FuzzClientAddr(f *testing.F) {
	f.Add("198.51.100.1, 10.2.2.2")
	f.Add("fe80::1%eth0, ,")
	for _, list := range []string{ // as RFC 7239 sections 4, 6 and 7.4 have them
		`"_gazonk"`, `"[2001:db8:cafe::17]:4711"`, "192.0.2.60", "192.0.2.43, 198.51.100.17", "192.0.2.43, 2001:db8:cafe::17", "unknown, _hidden, _SEVKISEK", "192.0.2.43:47011",
	} {
		f.Add(list)
	}
	trusted := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	f.Fuzz(func(t *testing.T, header string) {
		peer := netip.MustParseAddr("10.0.0.1")
		got, _ := clientAddr(peer, []string{header}, trusted)
		if !got.IsValid() || got.Zone() != "" || got.Is4In6() {
			t.Fatalf("%q gave %v", header, got)
		}
		if got, _ := clientAddr(netip.MustParseAddr("203.0.113.9"), []string{header}, trusted); got.String() != "203.0.113.9" {
			t.Fatalf("%q moved an untrusted peer to %v", header, got)
		}
	})
}

func TestLimitKey(t *testing.T) {
	if a, b := limitKey(netip.MustParseAddr("2001:db8:1:2:3::4")), limitKey(netip.MustParseAddr("2001:db8:1:2:ffff::1")); a != b {
		t.Errorf("one /64 has two keys: %v, %v", a, b)
	}
	if a, b := limitKey(netip.MustParseAddr("2001:db8:1:2::")), limitKey(netip.MustParseAddr("2001:db8:1:3::")); a == b {
		t.Error("two /64 have one key")
	}
}

func TestTraceID(t *testing.T) {
	const uuid, id = "6F9619FF-8B86-D011-B42D-00C04FC964FF", "0af7651916cd43dd8448eb211c80319c"
	for _, row := range []struct{ traceparent, x, want string }{
		{"00-" + id + "-b7ad6b7169203331-01", uuid, id},
		{"cc-" + id + "-b7ad6b7169203331-01-what-the-future-brings", "", id},
		{"00-" + id + "-b7ad6b7169203331-01-more", uuid, strings.ToLower(uuid)},
		{"ff-" + id + "-b7ad6b7169203331-01", uuid, strings.ToLower(uuid)},
		{"00-" + strings.ToUpper(id) + "-b7ad6b7169203331-01", uuid, strings.ToLower(uuid)},
		{"00-" + strings.Repeat("0", 32) + "-b7ad6b7169203331-01", uuid, strings.ToLower(uuid)},
		{"00-" + id + "-0000000000000000-01", uuid, strings.ToLower(uuid)},
		{"00-" + id + "-b7ad6b7169203331-0", uuid, strings.ToLower(uuid)},
		{"", uuid, strings.ToLower(uuid)},
		{"", "not a uuid", ""},
		{"", "{" + uuid + "}", ""},
	} {
		got := traceID(row.traceparent, row.x)
		if row.want == "" {
			if len(got) != 36 || got == row.x {
				t.Errorf("%q %q: got %q, want a fresh UUID", row.traceparent, row.x, got)
			}
		} else if got != row.want {
			t.Errorf("%q %q: got %q, want %q", row.traceparent, row.x, got, row.want)
		}
	}
}

func FuzzTraceparent(f *testing.F) {
	f.Add("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	f.Add("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-x")
	f.Add("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01") // W3C Trace Context 3.2.4
	f.Add("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")
	f.Add("00-00000000000000000000000000000000-00f067aa0ba902b7-01") // what 3.2.2.3 and 3.2.2.4 forbid
	f.Add("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01")
	f.Add("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	f.Fuzz(func(t *testing.T, s string) {
		id, ok := parseTraceparent(s)
		if ok && (len(id) != 32 || !isLowerHex(id) || !strings.Contains(s, "-"+id+"-")) {
			t.Fatalf("%q gave %q", s, id)
		}
	})
}
