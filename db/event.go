package db

import (
	"context"
	"encoding/json"
	"time"

	"github.com/jackc/pgx/v5"
)

// EventType is one of the contract's event types (spec section 6).
type EventType string

// The event types that this package writes.
const (
	EventRegistered     EventType = "auth.user.registered"
	EventLoggedIn       EventType = "auth.user.logged_in"
	EventTokenRefreshed EventType = "auth.token.refreshed"
	EventSessionRevoked EventType = "auth.session.revoked"
	EventLockout        EventType = "auth.lockout"
	EventReplayDetected EventType = "security.refresh_replay_detected"
)

// EventTypes lists them, for metrics that exist at 0 from the start.
var EventTypes = []EventType{EventRegistered, EventLoggedIn, EventTokenRefreshed, EventSessionRevoked, EventLockout, EventReplayDetected}

// Origin is where a change came from. It is told in events and kept with
// sessions; the texts have been cut and cleaned by the caller.
type Origin struct {
	ClientIP  string
	UserAgent string
	TraceID   string
}

// subject is the account an event tells of: the event's aggregate.
type subject struct {
	tenant TenantID
	user   UserID
}

// insertEvents is the one way into the outbox. It follows a CTE or takes its
// row from parameters; seq is taken when the row is written, hence under the
// row lock of the change, so events of one session are numbered in the order
// of their commits.
const insertEvents = `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, causation_id, data) `

// addEvent writes one event in the transaction of its change.
func addEvent(ctx context.Context, tx pgx.Tx, t EventType, about subject, origin Origin, data map[string]any) error {
	data["user_id"] = about.user
	body, err := json.Marshal(data)
	if err != nil { // unreachable: strings, numbers and times
		return err
	}
	_, err = tx.Exec(ctx, insertEvents+`VALUES ($1, $2, $3, $4, NULL, $5)`,
		t, about.tenant, about.user, origin.TraceID, body)
	return err
}

// eventTime is how times stand in event data: RFC 3339 in UTC. SQL that
// builds data uses eventTimeSQL for the same form.
func eventTime(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000000Z") }

const eventTimeSQL = `'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'`
