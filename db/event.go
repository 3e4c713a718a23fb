package db

import (
	"context"
	"encoding/json"

	"github.com/jackc/pgx/v5"
)

// EventType is one of the contract's event types (spec section 6).
type EventType string

// The event types that this package writes.
const (
	EventRegistered      EventType = "auth.user.registered"
	EventLoggedIn        EventType = "auth.user.logged_in"
	EventTokenRefreshed  EventType = "auth.token.refreshed"
	EventLoggedOut       EventType = "auth.user.logged_out"
	EventSessionRevoked  EventType = "auth.session.revoked"
	EventPasswordChanged EventType = "auth.user.password_changed"
	EventResetRequested  EventType = "auth.user.password_reset_requested"
	EventDisabled        EventType = "auth.user.disabled"
	EventEnabled         EventType = "auth.user.enabled"
	EventDeleted         EventType = "auth.user.deleted"
	EventEmailChanged    EventType = "auth.user.email_changed"
	EventImported        EventType = "auth.user.imported"
	EventUnlocked        EventType = "auth.user.unlocked"
	EventClaimsChanged   EventType = "auth.user.claims_changed"
	EventLockout         EventType = "auth.lockout"
	EventReplayDetected  EventType = "security.refresh_replay_detected"
)

// EventTypes lists them and the reset secret, for metrics that exist at 0 from
// the start.
var EventTypes = []EventType{
	EventRegistered, EventLoggedIn, EventTokenRefreshed, EventLoggedOut, EventSessionRevoked,
	EventPasswordChanged, EventResetRequested, EventDisabled, EventEnabled, EventDeleted, EventEmailChanged, EventImported,
	EventUnlocked, EventClaimsChanged, EventLockout, EventReplayDetected, EventPasswordResetSecret,
}

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

// insertTransient is insertEvents for rows that are deleted with their
// acknowledgement.
const insertTransient = `INSERT INTO outbox (event_type, tenant_id, user_id, trace_id, data, transient) `

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
