package auth

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// The parsers below say what is wrong without repeating the value.

func text(field *string) func(string) error {
	return func(v string) error {
		if len(v) > 255 || strings.TrimSpace(v) != v || strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r > '~' }) {
			return errors.New("must be at most 255 bytes of printable ASCII without white space around them")
		}
		*field = v
		return nil
	}
}

func secret(field *Secret, minBytes int) func(string) error {
	return func(v string) error {
		if len(v) < minBytes {
			return fmt.Errorf("must have at least %d bytes", minBytes)
		}
		*field = Secret{v}
		return nil
	}
}

func duration(field *time.Duration, low, high time.Duration) func(string) error {
	return func(v string) error {
		d, err := time.ParseDuration(v)
		if err != nil {
			return errors.New("must be a duration such as 15m or 336h")
		}
		if d < low || d > high {
			return fmt.Errorf("must be from %v to %v", low, high)
		}
		*field = d
		return nil
	}
}

func number[T int | uint32](field *T, low, high T) func(string) error {
	return func(v string) error {
		n, err := strconv.ParseUint(v, 10, 31) // no sign, no space, no underscore
		if err != nil || T(n) < low || T(n) > high {
			return fmt.Errorf("must be a whole number from %d to %d", low, high)
		}
		*field = T(n)
		return nil
	}
}

func boolean(field *bool) func(string) error {
	return func(v string) error {
		if v != "true" && v != "false" {
			return errors.New("must be true or false")
		}
		*field = v == "true"
		return nil
	}
}

func readableFile(field *string) func(string) error {
	return func(v string) error {
		f, err := os.Open(v)
		if err != nil {
			return errors.New("file cannot be opened")
		}
		*field = v
		return f.Close()
	}
}

func natsServers(field *Secret) func(string) error {
	return func(v string) error {
		for _, server := range strings.Split(v, ",") {
			if !strings.Contains(server, "://") {
				server = "nats://" + server
			}
			u, err := url.Parse(strings.TrimSpace(server))
			if err != nil || u.Hostname() == "" || u.Scheme != "nats" && u.Scheme != "tls" {
				return errors.New("must be comma-separated nats:// or tls:// servers")
			}
		}
		*field = Secret{v}
		return nil
	}
}

func trustedProxies(field *[]netip.Prefix) func(string) error {
	return func(v string) error {
		for _, s := range strings.Split(v, ",") {
			s = strings.TrimSpace(s)
			prefix, err := netip.ParsePrefix(s)
			if addr, aerr := netip.ParseAddr(s); aerr == nil {
				prefix, err = netip.PrefixFrom(addr, addr.BitLen()), nil
			}
			if err != nil || prefix.Addr().Is4In6() { // peers are compared as IPv4
				return errors.New("must be comma-separated CIDRs, IPv4 ones in IPv4 form")
			}
			*field = append(*field, prefix.Masked())
		}
		return nil
	}
}

func corsOrigins(field *[]string) func(string) error {
	return func(v string) error {
		for _, s := range strings.Split(v, ",") {
			s = strings.TrimSpace(s)
			u, err := url.Parse(s)
			if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Scheme+"://"+u.Host != s || strings.Contains(s, "*") {
				return errors.New("must be comma-separated origins such as https://app.example.com")
			}
			*field = append(*field, s)
		}
		return nil
	}
}

// resolve checks what only makes sense together and loads what files hold.
// It runs on what could be parsed, so that one start names every mistake.
func (c *Config) resolve() []error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	keys, keyErrs := newKeyRing(c.pems)
	c.Keys, c.pems = keys, nil
	errs = append(errs, keyErrs...)

	if (c.TLSCertFile == "") != (c.TLSKeyFile == "") {
		bad("TLS_CERT_FILE, TLS_KEY_FILE: set both or none")
	} else if c.TLSCertFile != "" {
		cert, err := tls.LoadX509KeyPair(c.TLSCertFile, c.TLSKeyFile)
		if err != nil {
			bad("TLS_CERT_FILE, TLS_KEY_FILE: not a matching PEM certificate and key")
		}
		c.TLSCertificate = &cert
	}
	if c.AdminToken.s != "" && c.AdminAddr == "" {
		bad("ADMIN_TOKEN: needs ADMIN_ADDR")
	}
	if c.Argon2.MemoryKiB != 0 && c.Argon2.MemoryKiB < 8*c.Argon2.Parallelism { // RFC 9106 3.1
		bad("ARGON2_PARALLELISM: at most an eighth of ARGON2_MEMORY_KIB")
	}
	need := uint64(c.MaxConcurrentHashes) * uint64(c.Argon2.MemoryKiB) * 1024
	if limit := cgroupMemoryLimit("/"); need > limit {
		bad("MAX_CONCURRENT_HASHES: that many times ARGON2_MEMORY_KIB is more than the memory limit of the control group")
	}
	if c.blocklistFile != "" {
		list, err := LoadBlocklist(c.blocklistFile)
		if err != nil {
			bad("PASSWORD_BLOCKLIST_FILE: %w", err)
		}
		c.Blocklist = list
	}
	return errs
}

// cgroupMemoryLimit is the tightest memory limit over the process's control
// group and its parents in bytes, MaxUint64 when there is none. root is "/",
// or a copy of the two trees in tests.
func cgroupMemoryLimit(root string) uint64 {
	limit := uint64(math.MaxUint64)
	self, _ := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	for line := range strings.Lines(string(self)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		base, file := "sys/fs/cgroup", "memory.max" // version 2
		if parts[1] == "memory" {
			base, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes" // version 1
		} else if parts[1] != "" {
			continue
		}
		// Inside a container the path may name a folder that is only visible
		// outside; the walk up to the mount's root finds the limit all the same.
		for dir := parts[2]; ; dir = filepath.Dir(dir) {
			b, _ := os.ReadFile(filepath.Join(root, base, dir, file))
			if n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil {
				limit = min(limit, n)
			}
			if dir == "/" || dir == "." {
				break
			}
		}
	}
	return limit
}

// WarnOfWeakness writes a line for each setting that works but that an
// operator should know of.
func WarnOfWeakness(c Config, databasePlaintext bool, log *slog.Logger) {
	var plaintext []string
	if databasePlaintext {
		plaintext = append(plaintext, "DATABASE_URL")
	}
	if c.NATSCAFile == "" && natsPlaintext(c.NATSURL.Reveal()) {
		plaintext = append(plaintext, "NATS_URL")
	}
	if len(plaintext) > 0 {
		log.Warn(logConfigPlaintext, "variables", plaintext)
	}
	if c.RegisterToken.Reveal() == "" {
		log.Warn(logConfigOpen, "variable", "REGISTER_TOKEN")
	}
}

func natsPlaintext(servers string) bool {
	for _, server := range strings.Split(servers, ",") {
		server = strings.TrimSpace(server)
		if !strings.Contains(server, "://") {
			server = "nats://" + server
		}
		u, err := url.Parse(server)
		if err != nil { // unreachable: natsServers accepted it
			continue
		}
		addr, err := netip.ParseAddr(u.Hostname())
		if u.Scheme == "nats" && u.Hostname() != "localhost" && (err != nil || !addr.IsLoopback()) {
			return true
		}
	}
	return false
}
