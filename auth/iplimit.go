package auth

import (
	"net/netip"
	"sync"
	"time"
)

// maxLimited bounds the addresses that one ipLimiter remembers (about 6 MiB).
const maxLimited = 1 << 16

// ipLimiter is a token bucket per client address (limitKey), in this process
// only and in bounded memory. When more addresses than maxLimited are active,
// the ones whose bucket is fullest by now are forgotten first as they are met;
// forgetting only ever gives an attacker with that many addresses a few more
// tries, which the limits by e-mail and the lock still count.
type ipLimiter struct {
	perSecond float64 // refill
	burst     float64 // either being 0: no limit

	mu      sync.Mutex
	buckets map[netip.Addr]bucket
}

// bucket was filled to tokens at the time at.
type bucket struct {
	tokens float64
	at     time.Time
}

func newIPLimiter(perSecond, burst float64) *ipLimiter {
	return &ipLimiter{perSecond: perSecond, burst: burst, buckets: map[netip.Addr]bucket{}}
}

// take spends one token of the address, or tells when there will be one.
func (l *ipLimiter) take(addr netip.Addr) (ok bool, retryAfter time.Duration) {
	if l.perSecond == 0 || l.burst == 0 {
		return true, 0
	}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	tokens := l.level(addr, now)
	if tokens < 1 {
		return false, time.Duration((1 - tokens) / l.perSecond * float64(time.Second))
	}
	l.put(addr, bucket{tokens - 1, now})
	return true, 0
}

// giveBack returns a token taken for something that turned out harmless.
func (l *ipLimiter) giveBack(addr netip.Addr) {
	if l.perSecond == 0 || l.burst == 0 {
		return
	}
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, known := l.buckets[addr]; known {
		l.put(addr, bucket{min(l.burst, l.level(addr, now)+1), now})
	}
}

// level is the address's tokens now. The caller holds mu.
func (l *ipLimiter) level(addr netip.Addr, now time.Time) float64 {
	b, known := l.buckets[addr]
	if !known {
		return l.burst
	}
	return min(l.burst, b.tokens+now.Sub(b.at).Seconds()*l.perSecond)
}

// put stores the bucket, making room first: of a few entries in the map's
// random order the fullest goes. The caller holds mu.
func (l *ipLimiter) put(addr netip.Addr, b bucket) {
	if _, known := l.buckets[addr]; !known && len(l.buckets) >= maxLimited {
		var fullest netip.Addr
		most, seen := -1.0, 0
		for a := range l.buckets {
			if level := l.level(a, b.at); level > most {
				fullest, most = a, level
			}
			if seen++; seen == 8 {
				break
			}
		}
		delete(l.buckets, fullest)
	}
	if b.tokens >= l.burst {
		delete(l.buckets, addr) // a full bucket says nothing
		return
	}
	l.buckets[addr] = b
}
