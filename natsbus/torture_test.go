//go:build torture

package natsbus_test

import (
	"testing"
	"time"
)

// The contract's own numbers: go test -tags torture -run Torture ./natsbus
func TestTorture(t *testing.T) { natsKilled(t, time.Minute) }
