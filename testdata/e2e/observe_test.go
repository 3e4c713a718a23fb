package e2e

import (
	"encoding/json"
	"testing"
	"time"
)

// wrongLine tells what is wrong with the form of a log line.
func wrongLine(line string) string {
	var m map[string]any
	if err := json.Unmarshal([]byte(line), &m); err != nil {
		return "no JSON object"
	}
	stamp, _ := m["time"].(string)
	if at, err := time.Parse(time.RFC3339Nano, stamp); err != nil || stamp[len(stamp)-1] != 'Z' || time.Since(at).Abs() > time.Hour {
		return "time is not now in RFC 3339, UTC"
	}
	return ""
}

// lineOf waits for the line of an event with a trace id: a line may come after
// the answer it tells of.
func lineOf(t *testing.T, s *service, event, trace string) (line map[string]any) {
	t.Helper()
	eventually(t, "a line "+event+" of "+trace, 5*time.Second, func() bool {
		for _, m := range s.logged(event) {
			if m["trace_id"] == trace {
				line = m
			}
		}
		return line != nil
	})
	return line
}
