package auth

import (
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/7d-solutions/identity-auth/db"
)

// clientText makes text of a client fit for logs, events and the session
// list: at most limit bytes, cut on a code-point border, and everything that
// is not printable (controls, line separators, bidirectional overrides,
// invalid UTF-8) replaced by U+FFFD, so that it cannot forge or hide a line.
func clientText(s string, limit int) string {
	if len(s) > limit {
		cut := limit
		for cut > 0 && !utf8.RuneStart(s[cut]) {
			cut--
		}
		s = s[:cut]
	}
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return utf8.RuneError
		}
		return r
	}, s)
	for len(s) > limit { // replacements are longer than what they replace
		_, last := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-last]
	}
	return s
}

const maxUserAgent = 256 // bytes of a User-Agent that are kept

// clientAddr finds the client. From a trusted peer it is the rightmost
// X-Forwarded-For entry that is not a trusted proxy itself: entries left of it
// were written by whoever sent the request. An entry that is no address ends
// the walk at the last address believed. forged tells that a private peer that
// is not trusted sent the header: most likely a proxy missing from
// TRUSTED_PROXIES.
func clientAddr(peer netip.Addr, forwarded []string, trusted []netip.Prefix) (addr netip.Addr, forged bool) {
	isTrusted := func(a netip.Addr) bool {
		for _, p := range trusted {
			if p.Contains(a) {
				return true
			}
		}
		return false
	}
	if len(forwarded) == 0 {
		return peer, false
	}
	if !isTrusted(peer) {
		return peer, peer.IsPrivate() || peer.IsLoopback()
	}
	entries := strings.Split(strings.Join(forwarded, ","), ",")
	addr = peer
	for i := len(entries) - 1; i >= 0 && isTrusted(addr); i-- {
		entry := strings.TrimSpace(entries[i])
		next, err := netip.ParseAddr(entry)
		if ap, perr := netip.ParseAddrPort(entry); perr == nil { // some proxies add the port
			next, err = ap.Addr(), nil
		}
		if err != nil {
			break
		}
		addr = next.Unmap().WithZone("")
	}
	return addr, false
}

// limitKey is the address by which a client is limited: an IPv6 client owns
// its /64.
func limitKey(a netip.Addr) netip.Addr {
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return a
}

// traceID picks the trace id of a request: the trace-id of a valid W3C
// traceparent, else a UUID from X-Trace-Id, else a fresh UUID.
func traceID(traceparent, xTraceID string) string {
	if id, ok := parseTraceparent(traceparent); ok {
		return id
	}
	if db.ValidUUID(xTraceID) {
		return strings.ToLower(xTraceID)
	}
	return db.NewUUID()
}

// parseTraceparent reads the trace-id of a traceparent header (W3C Trace
// Context, section 3.2): version 00 exactly; a higher version may have more
// fields behind a dash; version ff and ids of zeros are invalid.
func parseTraceparent(s string) (traceID string, ok bool) {
	const length = len("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
	if len(s) < length || len(s) > 512 || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return "", false
	}
	version, id, parent, flags := s[:2], s[3:35], s[36:52], s[53:55]
	if !isLowerHex(version) || !isLowerHex(id) || !isLowerHex(parent) || !isLowerHex(flags) || version == "ff" {
		return "", false
	}
	if len(s) > length && (version == "00" || s[length] != '-') {
		return "", false
	}
	if strings.Trim(id, "0") == "" || strings.Trim(parent, "0") == "" {
		return "", false
	}
	return id, true
}

func isLowerHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}
