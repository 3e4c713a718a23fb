//go:build torture

package e2e

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// TestTortureFaults is TestFaults for a minute each on twenty seeds, with the
// faults in an order that the seed draws, and some of them two at a time.
// FAULT_SEED repeats one run.
func TestTortureFaults(t *testing.T) {
	runs := 20
	if os.Getenv("FAULT_SEED") != "" {
		runs = 1
	}
	for range runs {
		seed := faultSeed(t)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := newFaultRun(t, seed)
			r.begin()
			end := time.Now().Add(time.Minute)
			for time.Now().Before(end) {
				for _, i := range r.rng.Perm(len(faults)) {
					if time.Now().After(end) {
						break
					}
					now := []fault{faults[i]}
					if also := faults[r.rng.IntN(len(faults))]; r.rng.IntN(3) > 0 && also.together(now[0]) {
						now = append(now, also)
					}
					r.pass(now...)
				}
			}
			r.finish()
		})
	}
}

// together tells whether two faults may overlap. A relay that was stopped, with
// the store lost meanwhile, may publish one message out of order: package
// natsbus says so.
func (f fault) together(g fault) bool {
	return f.nats != g.nats && !(f.name == "replica stopped" && g.name == storeDeleted)
}
