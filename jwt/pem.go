package jwt

import (
	"bytes"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
)

const (
	minBits = 2048     // RFC 7518 section 3.3
	maxBits = 8192     // a verification costs the square of it
	maxPEM  = 16 << 10 // bytes; a private key of 8192 bits has 6.5 KiB
)

// ParsePrivateKeyPEM reads one RSA private key, PKCS#1 or PKCS#8, not
// encrypted. Its errors are constants: what the parsers below have to say
// could quote the key.
func ParsePrivateKeyPEM(data []byte) (*rsa.PrivateKey, error) {
	der, pkcs1, err := onePEM(data, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	var parsed any
	if pkcs1 {
		parsed, err = x509.ParsePKCS1PrivateKey(der)
	} else {
		parsed, err = x509.ParsePKCS8PrivateKey(der)
	}
	key, isRSA := parsed.(*rsa.PrivateKey)
	if err != nil || !isRSA {
		return nil, errors.New("not a well-formed RSA private key")
	}
	if err := checkPrivateKey(key); err != nil {
		return nil, err
	}
	return key, nil
}

// ParsePublicKeyPEM reads one RSA public key, PKIX or PKCS#1.
func ParsePublicKeyPEM(data []byte) (*rsa.PublicKey, error) {
	der, pkcs1, err := onePEM(data, "PUBLIC KEY")
	if err != nil {
		return nil, err
	}
	var parsed any
	if pkcs1 {
		parsed, err = x509.ParsePKCS1PublicKey(der)
	} else {
		parsed, err = x509.ParsePKIXPublicKey(der)
	}
	key, isRSA := parsed.(*rsa.PublicKey)
	if err != nil || !isRSA {
		return nil, errors.New("not a well-formed RSA public key")
	}
	if err := checkPublicKey(key); err != nil {
		return nil, err
	}
	return key, nil
}

// onePEM returns the content of the only PEM block in data, whose type is
// label, or, for PKCS#1, "RSA " and label. pem.Decode skips what stands before
// a block, broken blocks included, so "the first block" is not always the one
// that a person sees: there must be one, and only white space around it.
func onePEM(data []byte, label string) (der []byte, pkcs1 bool, err error) {
	data = bytes.TrimSpace(data)
	begin := []byte("-----BEGIN ")
	if len(data) > maxPEM || !bytes.HasPrefix(data, begin) || bytes.Count(data, begin) != 1 {
		return nil, false, errors.New("not exactly one PEM block")
	}
	block, rest := pem.Decode(data)
	if block == nil || len(rest) > 0 {
		return nil, false, errors.New("not exactly one PEM block")
	}
	pkcs1 = block.Type == "RSA "+label
	if !pkcs1 && block.Type != label || len(block.Headers) > 0 { // headers: RFC 1421 encryption
		return nil, false, errors.New("the PEM block is not an unencrypted " + label + " or RSA " + label)
	}
	var whole asn1.RawValue // x509 ignores what follows a PKCS#8 key
	if rest, err := asn1.Unmarshal(block.Bytes, &whole); err != nil || len(rest) > 0 {
		return nil, false, errors.New("the PEM block does not hold one DER value")
	}
	return block.Bytes, pkcs1, nil
}

// checkPrivateKey makes sure that the parts of the key belong together: with
// others, signatures would be wrong or give the key away.
func checkPrivateKey(key *rsa.PrivateKey) error {
	if key == nil {
		return errors.New("no RSA key")
	}
	if err := checkPublicKey(&key.PublicKey); err != nil {
		return err
	}
	// crypto/rsa promises constant time for keys of two primes only.
	if len(key.Primes) != 2 || key.Validate() != nil {
		return errors.New("not a consistent RSA private key of two primes")
	}
	return nil
}

// checkPublicKey bounds the work of a verification, and refuses keys under
// which everyone can sign, such as e = 1.
func checkPublicKey(key *rsa.PublicKey) error {
	switch {
	case key == nil || key.N == nil || key.N.Sign() <= 0:
		return errors.New("no RSA key")
	case key.N.BitLen() < minBits || key.N.BitLen() > maxBits:
		return errors.New("the RSA key must have 2048 to 8192 bits")
	case key.N.Bit(0) == 0:
		return errors.New("the RSA modulus is even")
	case key.E < 3 || key.E&1 == 0 || key.E > 1<<31-1:
		return errors.New("the RSA exponent must be odd, at least 3 and below 2^31")
	}
	return nil
}
