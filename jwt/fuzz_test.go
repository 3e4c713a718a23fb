package jwt

import (
	"crypto/x509"
	"encoding/json"
	"testing"
	"time"
)

// The compact tokens printed in RFC 7515, appendix A, and RFC 7519: the one of
// A.2 is verified by a test of its own.
var rfc7515Tokens = []string{
	"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",                              // A.1, RFC 7519 3.1
	"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",       // A.3
	"eyJhbGciOiJFUzUxMiJ9.UGF5bG9hZA.AdwMgeerwtHoh-l192l60hp9wAHZFVJbLfD_UxMi70cwnZOYaRI1bKPWROc-mZZqwqT2SI-KGDKB34XO0aw_7XdtAG8GaSwFKdCAPZgoXD2YBJZCPEX3xKpRwcdOO8KpEHwJjyqOgzDO7iKvU8vcnwNrmxYbSW9ERBXukOXolLzeO_Jn", // A.4
	"eyJhbGciOiJub25lIn0.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.",                                                                                              // A.5, RFC 7519 6.1
}

// Headers and claims as RFCs print them.
var rfcHeaders = []string{
	"{\"typ\":\"JWT\",\r\n \"alg\":\"HS256\"}", // RFC 7515 A.1
	`{"alg":"none"}`, // A.5
	"{\"alg\":\"none\",\r\n \"crit\":[\"http://example.com/UNDEFINED\"],\r\n \"http://example.com/UNDEFINED\":true\r\n}", // E
	`{"typ":"at+JWT","alg":"RS256","kid":"RjEwOwOA"}`,                                                                    // RFC 9068 2.1
}

const (
	rfc7519Claims = "{\"iss\":\"joe\",\r\n \"exp\":1300819380,\r\n \"http://example.com/is_root\":true}"
	rfc9068Claims = `{"iss":"https://authorization-server.example.com/","sub":"5ba552d67","aud":"https://rs.example.com/","exp":1639528912,"iat":1618354090,"jti":"dbe39bf3a3ba4238a513f51d6e1691c4","client_id":"s6BhdRkqt3","scope":"openid profile reademail"}`
)

// The symmetric keys of RFC 7517 A.3, and the EC key of A.1.
const (
	rfc7517A3 = `{"keys":[{"kty":"oct","alg":"A128KW","k":"GawgguFyGrWKav7AX4VKUg"},{"kty":"oct","k":"AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow","kid":"HMAC key used in JWS spec Appendix A.1 example"}]}`
	rfc7517EC = `{"keys":[{"kty":"EC","crv":"P-256","x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4","y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM","use":"enc","kid":"1"}]}`
)

// A private key that is accepted signs, and its public half is accepted too.
func FuzzParsePrivateKeyPEM(f *testing.F) {
	f.Add([]byte(pkcs8Private()))
	f.Add([]byte(pkcs1Public()))
	f.Add([]byte(block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(testKey()))))
	f.Add([]byte(block("EC PRIVATE KEY", []byte{0x30, 0})))
	f.Add([]byte("-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END RSA PRIVATE KEY-----\n")) // RFC 1421
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := ParsePrivateKeyPEM(data)
		if err != nil {
			return
		}
		signer, err := NewSigner("k", key)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParsePublicKeyPEM([]byte(block("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(&key.PublicKey))))); err != nil {
			t.Fatal(err)
		}
		if signer.KeyID() != "k" {
			t.Fatal("another kid")
		}
	})
}

// An event either revokes the session it names or changes nothing.
func FuzzHandleEvent(f *testing.F) {
	f.Add([]byte(`{"event_id":"e","event_type":"auth.session.revoked","data":{"session_id":"s-1","access_tokens_expire_at":"2999-01-01T00:00:00Z"}}`))
	f.Add([]byte(`{"event_type":"auth.session.revoked","data":{"session_id":"s-1","access_tokens_expire_at":"1985-04-12T23:20:50.52Z"}}`)) // RFC 3339 5.8
	f.Add([]byte(`{"event_type":"auth.session.revoked","data":{"session_id":"s-1","access_tokens_expire_at":"1990-12-31T15:59:60-08:00"}}`))
	f.Add([]byte(`{"event_type":"auth.user.logged_in","data":[]}`))
	f.Fuzz(func(t *testing.T, payload []byte) {
		l := NewRevocationList()
		err := l.HandleEvent(payload)
		var event struct {
			Type string `json:"event_type"`
			Data struct {
				SessionID string    `json:"session_id"`
				ExpireAt  time.Time `json:"access_tokens_expire_at"`
			} `json:"data"`
		}
		named := json.Unmarshal(payload, &event) == nil && event.Type == "auth.session.revoked" && event.Data.SessionID != "" && event.Data.ExpireAt.After(time.Now().Add(time.Minute))
		if named && (err != nil || !l.Revoked(event.Data.SessionID)) {
			t.Fatalf("%q: %v, not revoked", payload, err)
		}
		if !named && len(l.until) > 0 && event.Type != "auth.session.revoked" {
			t.Fatalf("%q revoked %v", payload, l.until)
		}
	})
}
