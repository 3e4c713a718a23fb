package natsbus

import (
	"encoding/json"
	"errors"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/7d-solutions/identity-auth/db"
)

// subjects is the contract's table: where each type of event goes.
var subjects = map[db.EventType]string{
	db.EventRegistered:          "auth.events.user.registered",
	db.EventLoggedIn:            "auth.events.user.logged_in",
	db.EventTokenRefreshed:      "auth.events.token.refreshed",
	db.EventLoggedOut:           "auth.events.user.logged_out",
	db.EventSessionRevoked:      "auth.events.session.revoked",
	db.EventPasswordChanged:     "auth.events.user.password_changed",
	db.EventResetRequested:      "auth.events.user.password_reset_requested",
	db.EventDisabled:            "auth.events.user.disabled",
	db.EventEnabled:             "auth.events.user.enabled",
	db.EventDeleted:             "auth.events.user.deleted",
	db.EventEmailChanged:        "auth.events.user.email_changed",
	db.EventImported:            "auth.events.user.imported",
	db.EventUnlocked:            "auth.events.user.unlocked",
	db.EventClaimsChanged:       "auth.events.user.claims_changed",
	db.EventLockout:             "auth.events.security.lockout",
	db.EventReplayDetected:      "auth.events.security.refresh_replay_detected",
	db.EventPasswordResetSecret: "auth.secrets.password_reset",
}

func streamOf(t db.EventType) string {
	if t == db.EventPasswordResetSecret {
		return secretsStream
	}
	return eventsStream
}

// envelope is the payload of every message.
type envelope struct {
	EventID       db.EventID      `json:"event_id"`
	EventType     db.EventType    `json:"event_type"`
	SchemaVersion string          `json:"schema_version"`
	OccurredAt    string          `json:"occurred_at"`
	Producer      string          `json:"producer"`
	TenantID      db.TenantID     `json:"tenant_id"`
	AggregateType string          `json:"aggregate_type"`
	AggregateID   db.UserID       `json:"aggregate_id"`
	TraceID       string          `json:"trace_id"`
	CausationID   *db.EventID     `json:"causation_id"`
	Data          json.RawMessage `json:"data"`
}

// message makes the same message of the same row, whoever does and however
// often.
func (r *relayer) message(row db.OutboxRow) (*nats.Msg, error) {
	subject, ok := subjects[row.Type]
	if !ok { // a newer version's: it waits for a newer holder
		return nil, errors.New("unknown event type")
	}
	data := row.Data
	if row.Type == db.EventPasswordResetSecret {
		if r.unseal == nil {
			return nil, errors.New("no key to open the secret")
		}
		var err error
		if data, err = r.unseal(row); err != nil {
			return nil, err
		}
	}
	payload, err := json.Marshal(envelope{
		EventID: row.EventID, EventType: row.Type, SchemaVersion: "1.0.0",
		OccurredAt: row.OccurredAt.UTC().Format("2006-01-02T15:04:05.000000Z"), Producer: "identity-auth",
		TenantID: row.Tenant, AggregateType: "user", AggregateID: row.User,
		TraceID: row.TraceID, CausationID: row.CausationID, Data: data,
	})
	if err != nil {
		return nil, err // the data is not JSON
	}
	header := nats.Header{
		jetstream.MsgIDHeader:          {row.EventID.String()},
		jetstream.ExpectedStreamHeader: {streamOf(row.Type)},
	}
	if trace, ok := traceparent(row.TraceID, row.EventID); ok {
		header["traceparent"] = []string{trace}
	}
	return &nats.Msg{Subject: subject, Header: header, Data: payload}, nil
}

// traceparent continues the request's trace (W3C Trace Context 3.2). The event
// is the span: half of its id, which is not zero since it has a version.
func traceparent(traceID string, event db.EventID) (string, bool) {
	trace := strings.ToLower(strings.ReplaceAll(traceID, "-", ""))
	if len(trace) != 32 || strings.Trim(trace, "0123456789abcdef") != "" || strings.Trim(trace, "0") == "" {
		return "", false
	}
	span := strings.ReplaceAll(event.String(), "-", "")[:16]
	return "00-" + trace + "-" + span + "-01", true
}
