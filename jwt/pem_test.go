package jwt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
)

func block(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// must is for the encoders below, whose input is ours.
func must(der []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return der
}

func pkcs1Private() string { return block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(testKey())) }
func pkcs8Private() string { return block("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(testKey()))) }
func pkcs1Public() string {
	return block("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&testKey().PublicKey))
}
func pkixPublic() string {
	return block("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(&testKey().PublicKey)))
}

const (
	notOneBlock = "not exactly one PEM block"
	notDER      = "the PEM block does not hold one DER value"
	sizeRange   = "the RSA key must have 2048 to 8192 bits"
)

// The whole of each error is given: no part of a key can be in it.
func TestParsePrivateKeyPEMRefuses(t *testing.T) {
	good := pkcs8Private()
	const (
		notPrivate   = "the PEM block is not an unencrypted PRIVATE KEY or RSA PRIVATE KEY"
		malformed    = "not a well-formed RSA private key"
		inconsistent = "not a consistent RSA private key of two primes"
	)
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// Each of these is well-formed DER; its numbers do not belong together.
	otherD := &rsa.PrivateKey{PublicKey: testKey().PublicKey, D: new(big.Int).Add(testKey().D, big.NewInt(2)), Primes: testKey().Primes}
	otherN := &rsa.PrivateKey{PublicKey: otherKey().PublicKey, D: testKey().D, Primes: testKey().Primes}
	lines := strings.SplitAfter(good, "\n")
	for name, tc := range map[string]struct{ data, want string }{
		"empty":                {"", notOneBlock},
		"white space":          {" \n", notOneBlock},
		"a path":               {"/run/secrets/private.pem", notOneBlock},
		"bare base64":          {strings.Join(lines[1:len(lines)-2], ""), notOneBlock},
		"cut off":              {good[:len(good)/2], notOneBlock},
		"no end":               {strings.Join(lines[:len(lines)-2], ""), notOneBlock},
		"text before it":       {"Bag Attributes\n" + good, notOneBlock},
		"text after it":        {good + "x", notOneBlock},
		"NUL after it":         {good + "\x00", notOneBlock},
		"twice":                {good + good, notOneBlock},
		"the public key too":   {good + pkixPublic(), notOneBlock},
		"a broken one first":   {"-----BEGIN PRIVATE KEY-----\nx\n" + good, notOneBlock},
		"byte order mark":      {"\uFEFF" + good, notOneBlock},
		"over 16 KiB":          {edit(good, "KEY-----\nM", "KEY-----\n"+strings.Repeat("\n", 16<<10)+"M"), notOneBlock},
		"the public key":       {pkixPublic(), notPrivate},
		"a certificate":        {block("CERTIFICATE", []byte{0x30, 0}), notPrivate},
		"EC by its name":       {block("EC PRIVATE KEY", must(x509.MarshalECPrivateKey(ec))), notPrivate},
		"OpenSSH":              {block("OPENSSH PRIVATE KEY", []byte("openssh-key-v1\x00")), notPrivate},
		"encrypted PKCS#8":     {block("ENCRYPTED PRIVATE KEY", []byte{0x30, 0}), notPrivate},
		"encrypted PKCS#1":     {edit(pkcs1Private(), "KEY-----\nM", "KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nM"), notPrivate},
		"not DER":              {block("PRIVATE KEY", []byte("key")), notDER},
		"no content":           {block("PRIVATE KEY", nil), notDER},
		"PKCS#8 and more":      {block("PRIVATE KEY", append(must(x509.MarshalPKCS8PrivateKey(testKey())), 0)), notDER},
		"PKCS#1 and more":      {block("RSA PRIVATE KEY", append(x509.MarshalPKCS1PrivateKey(testKey()), 5, 0)), notDER},
		"EC in PKCS#8":         {block("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(ec))), malformed},
		"PKCS#1 called PKCS#8": {block("PRIVATE KEY", x509.MarshalPKCS1PrivateKey(testKey())), malformed},
		"PKCS#8 called PKCS#1": {block("RSA PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(testKey()))), malformed},
		"public called so":     {block("PRIVATE KEY", must(x509.MarshalPKIXPublicKey(&testKey().PublicKey))), malformed},
		"another exponent":     {block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(otherD)), malformed},
		"another modulus":      {block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(otherN)), malformed},
		"1024 bits":            {block("PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(small))), sizeRange},
		"three primes":         {block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(threePrimes(t))), inconsistent},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := ParsePrivateKeyPEM([]byte(tc.data))
			if err == nil || err.Error() != tc.want || key != nil {
				t.Errorf("got key %t, error %v\nwant %s", key != nil, err, tc.want)
			}
		})
	}
}

func TestParsePublicKeyPEMRefuses(t *testing.T) {
	good := pkixPublic()
	const (
		notPublic = "the PEM block is not an unencrypted PUBLIC KEY or RSA PUBLIC KEY"
		malformed = "not a well-formed RSA public key"
		exponent  = "the RSA exponent must be odd, at least 3 and below 2^31"
	)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	odd := func(bits uint) *big.Int { return new(big.Int).SetBit(new(big.Int).Lsh(big.NewInt(1), bits-1), 0, 1) }
	key := func(n *big.Int, e int) string {
		return block("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(&rsa.PublicKey{N: n, E: e})))
	}
	n := testKey().N
	for name, tc := range map[string]struct{ data, want string }{
		"empty":           {"", notOneBlock},
		"twice":           {good + good, notOneBlock},
		"text before it":  {"x\n" + good, notOneBlock},
		"text after it":   {good + "x", notOneBlock},
		"the private key": {pkcs8Private(), notPublic},
		"a certificate":   {block("CERTIFICATE", []byte{0x30, 0}), notPublic},
		"headers":         {edit(good, "KEY-----\nM", "KEY-----\nA: b\n\nM"), notPublic},
		"and more":        {block("PUBLIC KEY", append(must(x509.MarshalPKIXPublicKey(&testKey().PublicKey)), 0)), notDER},
		"EC":              {block("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(&ec.PublicKey))), malformed},
		"PKCS#1 as PKIX":  {block("PUBLIC KEY", x509.MarshalPKCS1PublicKey(&testKey().PublicKey)), malformed},
		"PKIX as PKCS#1":  {block("RSA PUBLIC KEY", must(x509.MarshalPKIXPublicKey(&testKey().PublicKey))), malformed},
		"negative":        {key(new(big.Int).Neg(n), 65537), malformed},
		"2047 bits":       {key(odd(2047), 65537), sizeRange},
		"8193 bits":       {key(odd(8193), 65537), sizeRange},
		"even":            {key(new(big.Int).SetBit(n, 0, 0), 65537), "the RSA modulus is even"},
		"e zero":          {key(n, 0), malformed},
		"e one":           {key(n, 1), exponent},
		"e two":           {key(n, 2), exponent},
		"e even":          {key(n, 65536), exponent},
		"e 2^31+1":        {block("RSA PUBLIC KEY", largeExponent()), malformed},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := ParsePublicKeyPEM([]byte(tc.data))
			if err == nil || err.Error() != tc.want || key != nil {
				t.Errorf("got %v, error %v\nwant %s", key, err, tc.want)
			}
		})
	}
}

func TestParsePEMAccepts(t *testing.T) {
	crlf := strings.NewReplacer("\n", "\r\n")
	for name, data := range map[string]string{
		"PKCS#1":             pkcs1Private(),
		"PKCS#8":             pkcs8Private(),
		"CRLF":               crlf.Replace(pkcs8Private()),
		"white space around": "\n  " + pkcs8Private() + "\n\n",
		"no last newline":    strings.TrimSpace(pkcs1Private()),
	} {
		if key, err := ParsePrivateKeyPEM([]byte(data)); err != nil || !key.Equal(testKey()) {
			t.Errorf("private, %s: %v", name, err)
		}
	}
	for name, data := range map[string]string{
		"PKCS#1":             pkcs1Public(),
		"PKIX":               pkixPublic(),
		"CRLF":               crlf.Replace(pkixPublic()),
		"white space around": "\n  " + pkixPublic() + "\n\n",
		"no last newline":    strings.TrimSpace(pkcs1Public()),
	} {
		if key, err := ParsePublicKeyPEM([]byte(data)); err != nil || !key.Equal(&testKey().PublicKey) {
			t.Errorf("public, %s: %v", name, err)
		}
	}
	for _, e := range []int{3, 17, 65539, 1<<31 - 1} {
		want := rsa.PublicKey{N: testKey().N, E: e}
		data := block("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(&want)))
		if key, err := ParsePublicKeyPEM([]byte(data)); err != nil || !key.Equal(&want) {
			t.Errorf("e = %d: %v", e, err)
		}
	}
}

// What is accepted is a key that NewKeySet takes, and is read the same again.
func FuzzParsePublicKeyPEM(f *testing.F) {
	f.Add([]byte(pkixPublic()))
	f.Add([]byte(pkcs1Public()))
	f.Add([]byte(pkcs8Private()))
	f.Add([]byte(block("RSA PUBLIC KEY", largeExponent())))
	n := new(big.Int).SetBytes(decode(rfc7517A1Modulus))
	f.Add([]byte(block("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&rsa.PublicKey{N: n, E: 65537}))))
	f.Fuzz(func(t *testing.T, data []byte) {
		key, err := ParsePublicKeyPEM(data)
		if err != nil {
			return
		}
		if _, err := NewKeySet(Key{"k", key}); err != nil {
			t.Fatal(err)
		}
		again, err := ParsePublicKeyPEM([]byte(block("PUBLIC KEY", must(x509.MarshalPKIXPublicKey(key)))))
		if err != nil || !again.Equal(key) {
			t.Fatalf("got %v, %v; want %v", again, err, key)
		}
	})
}

// largeExponent is a PKCS#1 public key with e = 2^31+1, which the encoder
// writes on 64-bit machines only: the last bytes are 02 04 7fffffff, and
// 02 05 0080000001 stands in their place.
func largeExponent() []byte {
	der := x509.MarshalPKCS1PublicKey(&rsa.PublicKey{N: testKey().N, E: 1<<31 - 1})
	der = bytes.TrimSuffix(der, []byte{2, 4, 0x7f, 0xff, 0xff, 0xff})
	der = append(der, 2, 5, 0, 0x80, 0, 0, 1)
	der[3]++ // the length of the sequence, 30 82 hi lo
	return der
}

// threePrimes is a correct key of three primes (RFC 8017 section 3.2).
func threePrimes(t *testing.T) *rsa.PrivateKey {
	t.Helper()
	one, e := big.NewInt(1), big.NewInt(65537)
	for {
		key := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: big.NewInt(1), E: 65537}}
		phi := big.NewInt(1)
		for range 3 {
			p, err := rand.Prime(rand.Reader, 684)
			if err != nil {
				t.Fatal(err)
			}
			key.Primes = append(key.Primes, p)
			key.N.Mul(key.N, p)
			phi.Mul(phi, new(big.Int).Sub(p, one))
		}
		if key.D = new(big.Int).ModInverse(e, phi); key.D != nil {
			return key
		}
	}
}
