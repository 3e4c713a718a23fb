package auth

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"
)

func TestIPLimiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newIPLimiter(2, 3)
		a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
		for range 3 {
			if ok, _ := l.take(a); !ok {
				t.Fatal("refused within the burst")
			}
		}
		if ok, wait := l.take(a); ok || wait != 500*time.Millisecond {
			t.Errorf("got %v, %v; want a wait of 500ms", ok, wait)
		}
		if ok, _ := l.take(b); !ok {
			t.Error("another address is refused")
		}
		time.Sleep(500 * time.Millisecond)
		if ok, _ := l.take(a); !ok {
			t.Error("refused after the wait")
		}
		l.giveBack(a)
		if ok, _ := l.take(a); !ok {
			t.Error("refused after a token was given back")
		}
		time.Sleep(time.Hour)
		l.giveBack(a)
		if len(l.buckets) != 1 {
			t.Errorf("%d buckets, want 1: a full bucket says nothing", len(l.buckets))
		}
		if ok, _ := newIPLimiter(0, 1).take(a); !ok {
			t.Error("0 does not turn it off")
		}
	})
}

func TestIPLimiterIsBounded(t *testing.T) {
	l := newIPLimiter(0.001, 2)
	attacker := netip.MustParseAddr("192.0.2.1")
	l.take(attacker)
	l.take(attacker)
	for i := range 3 * maxLimited {
		l.take(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	if len(l.buckets) > maxLimited {
		t.Errorf("%d buckets, want at most %d", len(l.buckets), maxLimited)
	}
	if ok, _ := l.take(attacker); ok {
		t.Error("the emptiest bucket was forgotten first")
	}
}
