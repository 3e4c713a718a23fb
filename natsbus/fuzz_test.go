package natsbus

import (
	"net/url"
	"strings"
	"testing"

	"github.com/7d-solutions/identity-auth/db"
)

// A list of servers is one of nats:// and tls:// URLs with hosts, or an error
// that shows nothing of it.
func FuzzServers(f *testing.F) {
	for _, list := range []string{"nats://127.0.0.1:4222", "tls://u:p@a.example:4222, b.example", "nats://[2001:db8::7]:4222", "ldap://[2001:db8::7]/c=GB?objectClass?one", "urn:example:animal:ferret:nose", ",", "nats://%zz:secretsecret@h"} { // RFC 3986 1.1.2
		f.Add(list)
	}
	f.Fuzz(func(t *testing.T, list string) {
		got, err := servers(list)
		if err != nil {
			if len(list) > 8 && strings.Contains(err.Error(), list) && !strings.Contains("NATS_URL: not comma-separated nats:// or tls:// servers", list) {
				t.Fatal("the error repeats the value")
			}
			return
		}
		if len(got) != strings.Count(list, ",")+1 {
			t.Fatalf("%q: %d servers", list, len(got))
		}
		for _, s := range got {
			if u, err := url.Parse(s); err != nil || u.Hostname() == "" || u.Scheme != "nats" && u.Scheme != "tls" {
				t.Fatalf("%q: %q, %v", list, s, err)
			}
		}
	})
}

// Whatever trace id a request came with, the header made of it is a valid
// traceparent, or there is none.
func FuzzTraceparentOf(f *testing.F) {
	for _, id := range []string{"0af7651916cd43dd8448eb211c80319c", "4bf92f3577b34da6a3ce929d0e0e4736", "919108f7-52d1-4320-9bac-f847db4148a8", "00000000000000000000000000000000", "------------------------------------"} { // W3C Trace Context, RFC 9562
		f.Add(id)
	}
	var event db.EventID // its span is zero here; an event that is sent has a version
	f.Fuzz(func(t *testing.T, id string) {
		got, ok := traceparent(id, event)
		if !ok {
			return
		}
		parts := strings.Split(got, "-")
		if len(parts) != 4 || len(parts[1]) != 32 || strings.Trim(parts[1], "0123456789abcdef") != "" || strings.Trim(parts[1], "0") == "" || len(parts[2]) != 16 {
			t.Fatalf("%q gave %q", id, got)
		}
	})
}
