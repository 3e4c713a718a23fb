-- All times that decide anything are PostgreSQL's (clock_timestamp()).
-- fillfactor leaves room for HOT updates: no index names a column that an
-- ordinary login or refresh changes.

CREATE FUNCTION event_time(t timestamptz) RETURNS text LANGUAGE sql STABLE
RETURN to_char(t AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');
COMMENT ON FUNCTION event_time IS 'How times stand in event data: RFC 3339 in UTC.';

CREATE TABLE accounts (
    tenant_id           uuid        NOT NULL,
    user_id             uuid        NOT NULL,
    email               text        NOT NULL CHECK (email <> '' AND octet_length(email) <= 254),
    password_hash       text        NOT NULL,
    claims              json        NOT NULL DEFAULT '{}' CHECK (json_typeof(claims) = 'object'),
    failed_logins       integer     NOT NULL DEFAULT 0 CHECK (failed_logins >= 0),
    created_at          timestamptz NOT NULL DEFAULT clock_timestamp(),
    password_changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    disabled_at         timestamptz,
    PRIMARY KEY (tenant_id, user_id),
    UNIQUE (tenant_id, email)
) WITH (fillfactor = 85);
COMMENT ON TABLE  accounts IS 'One person in one tenant; the same e-mail in two tenants is two accounts.';
COMMENT ON COLUMN accounts.tenant_id IS 'Chosen by the caller of register.';
COMMENT ON COLUMN accounts.user_id IS 'Chosen by the caller of register; the sub of access tokens.';
COMMENT ON COLUMN accounts.email IS 'ASCII addr-spec in lower case.';
COMMENT ON COLUMN accounts.password_hash IS 'PHC string.';
COMMENT ON COLUMN accounts.claims IS 'Members of the access token''s top level, set by operators; json keeps the bytes that were checked, jsonb would write numbers out.';
COMMENT ON COLUMN accounts.failed_logins IS 'Wrong guesses since the last good login; told in auth.user.logged_in.';
COMMENT ON COLUMN accounts.created_at IS 'When the account was registered or imported.';
COMMENT ON COLUMN accounts.password_changed_at IS 'When the person last chose a password; a rehash does not count.';
COMMENT ON COLUMN accounts.disabled_at IS 'Not null: no login, and no session of this account is live.';

CREATE TABLE sessions (
    id             uuid        NOT NULL PRIMARY KEY,
    tenant_id      uuid        NOT NULL,
    user_id        uuid        NOT NULL,
    family_hash    bytea       NOT NULL CHECK (octet_length(family_hash) = 32),
    step_hash      bytea       NOT NULL CHECK (octet_length(step_hash) = 32),
    prev_step_hash bytea       CHECK (octet_length(prev_step_hash) = 32),
    step_seed      bytea       CHECK (octet_length(step_seed) = 32),
    generation     bigint      NOT NULL DEFAULT 0 CHECK (generation >= 0),
    outcome        text        NOT NULL DEFAULT 'begun',
    created_at     timestamptz NOT NULL,
    used_at        timestamptz NOT NULL,
    expires_at     timestamptz NOT NULL,
    ends_at        timestamptz NOT NULL,
    expires_day    date        GENERATED ALWAYS AS ((expires_at AT TIME ZONE 'UTC')::date) STORED,
    revoked_at     timestamptz,
    revoked_reason text        CHECK (revoked_reason IN ('logout', 'user', 'logout_all', 'password_change', 'password_reset', 'replay', 'limit', 'disabled', 'admin')),
    window_start   timestamptz NOT NULL,
    window_count   integer     NOT NULL DEFAULT 0,
    client_ip      text        NOT NULL CHECK (octet_length(client_ip) <= 64),
    user_agent     text        NOT NULL CHECK (octet_length(user_agent) <= 1024),
    FOREIGN KEY (tenant_id, user_id) REFERENCES accounts ON DELETE CASCADE,
    CHECK (expires_at <= ends_at),
    CHECK ((revoked_at IS NULL) = (revoked_reason IS NULL))
) WITH (fillfactor = 70);
CREATE INDEX sessions_live ON sessions (tenant_id, user_id) WHERE revoked_at IS NULL;
CREATE INDEX sessions_account ON sessions (tenant_id, user_id);
CREATE INDEX sessions_ended ON sessions (expires_day);
COMMENT ON TABLE  sessions IS 'One row a login, however often it is refreshed.';
COMMENT ON COLUMN sessions.id IS 'The sid of access tokens, the first part of refresh tokens.';
COMMENT ON COLUMN sessions.tenant_id IS 'The account''s tenant.';
COMMENT ON COLUMN sessions.user_id IS 'The account''s user.';
COMMENT ON COLUMN sessions.family_hash IS 'SHA-256 of the secret that all refresh tokens of this session share.';
COMMENT ON COLUMN sessions.step_hash IS 'SHA-256 of the current refresh token''s own secret.';
COMMENT ON COLUMN sessions.prev_step_hash IS 'SHA-256 of the secret spent last.';
COMMENT ON COLUMN sessions.step_seed IS 'With REFRESH_REUSE_GRACE: the current step secret is HMAC-SHA-256(spent step secret, this).';
COMMENT ON COLUMN sessions.generation IS 'Number of rotations.';
COMMENT ON COLUMN sessions.outcome IS 'What the last presentation of a token came to. Kept only so that the one deciding UPDATE can return it.';
COMMENT ON COLUMN sessions.created_at IS 'The login: auth_time.';
COMMENT ON COLUMN sessions.used_at IS 'The last rotation.';
COMMENT ON COLUMN sessions.expires_at IS 'When the session stops by itself, or the moment of its revocation.';
COMMENT ON COLUMN sessions.ends_at IS 'created_at + SESSION_MAX_AGE; expires_at never passes it.';
COMMENT ON COLUMN sessions.expires_day IS 'Day of expires_at (UTC), indexed for pruning: it changes once a day, not with every refresh, so refreshes stay HOT.';
COMMENT ON COLUMN sessions.revoked_at IS 'Not null: no token of this session is ever good again.';
COMMENT ON COLUMN sessions.revoked_reason IS 'Told in auth.session.revoked.';
COMMENT ON COLUMN sessions.window_start IS 'REFRESH_PER_MIN_PER_TOKEN: start of the current minute.';
COMMENT ON COLUMN sessions.window_count IS 'REFRESH_PER_MIN_PER_TOKEN: rotations in that minute.';
COMMENT ON COLUMN sessions.client_ip IS 'Client address of the last rotation.';
COMMENT ON COLUMN sessions.user_agent IS 'User-Agent of the last rotation, cut to 256 bytes.';

CREATE TABLE guards (
    key          bytea         NOT NULL PRIMARY KEY CHECK (octet_length(key) = 32),
    outcome      text          NOT NULL,
    window_start timestamptz   NOT NULL,
    window_count integer       NOT NULL,
    ticket       timestamptz   NOT NULL,
    pending      timestamptz[] NOT NULL DEFAULT '{}',
    failed       timestamptz[] NOT NULL DEFAULT '{}',
    locked_until timestamptz   NOT NULL DEFAULT '-infinity',
    touched_at   timestamptz   NOT NULL
) WITH (fillfactor = 60);
CREATE INDEX guards_touched ON guards (touched_at);
COMMENT ON TABLE  guards IS 'Login limit and lock of one (tenant, e-mail), whether or not an account exists. Rows that say nothing any more are pruned.';
COMMENT ON COLUMN guards.key IS 'SHA-256 of tenant and e-mail: invented addresses are not kept in clear.';
COMMENT ON COLUMN guards.outcome IS 'What the last statement on this row decided. Kept only so that the one deciding statement can return it.';
COMMENT ON COLUMN guards.window_start IS 'LOGIN_PER_MIN_PER_EMAIL: start of the current minute.';
COMMENT ON COLUMN guards.window_count IS 'LOGIN_PER_MIN_PER_EMAIL: logins in that minute.';
COMMENT ON COLUMN guards.ticket IS 'The last guess reserved. A guess is named by its moment, made unique within the row by at least 1 microsecond.';
COMMENT ON COLUMN guards.pending IS 'Guesses whose hash may be under way. One older than the reservation time is a failure: its owner died.';
COMMENT ON COLUMN guards.failed IS 'Guesses that were wrong, not older than LOCKOUT_DURATION.';
COMMENT ON COLUMN guards.locked_until IS 'No guess is reserved before.';
COMMENT ON COLUMN guards.touched_at IS 'Last statement on this row.';

CREATE TABLE rate_windows (
    key          bytea       NOT NULL PRIMARY KEY CHECK (octet_length(key) = 32),
    window_start timestamptz NOT NULL,
    window_count integer     NOT NULL,
    window_ends  timestamptz NOT NULL
) WITH (fillfactor = 60);
CREATE INDEX rate_windows_over ON rate_windows (window_ends);
COMMENT ON TABLE  rate_windows IS 'Counts of register and forgot-password by e-mail. Rows whose window is over are pruned.';
COMMENT ON COLUMN rate_windows.key IS 'SHA-256 of scope, tenant and e-mail.';
COMMENT ON COLUMN rate_windows.window_start IS 'The first call of the window.';
COMMENT ON COLUMN rate_windows.window_count IS 'Calls in the window, one past the limit at most.';
COMMENT ON COLUMN rate_windows.window_ends IS 'From then on the row says nothing.';

CREATE TABLE outbox (
    seq          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id     uuid        NOT NULL DEFAULT gen_random_uuid(),
    event_type   text        NOT NULL,
    tenant_id    uuid        NOT NULL,
    user_id      uuid        NOT NULL,
    trace_id     text        NOT NULL,
    causation_id uuid,
    occurred_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    data         jsonb       NOT NULL,
    sent_at      timestamptz,
    stream_seq   bigint
);
CREATE INDEX outbox_unsent ON outbox (seq) WHERE sent_at IS NULL;
COMMENT ON TABLE  outbox IS 'Events, written in the transaction of the change they tell of, and relayed to JetStream.';
COMMENT ON COLUMN outbox.seq IS 'Order of writing. It becomes visible out of order; only ''sent_at IS NULL'' finds what is to be sent.';
COMMENT ON COLUMN outbox.event_id IS 'Nats-Msg-Id: consumers and the stream deduplicate by it.';
COMMENT ON COLUMN outbox.event_type IS 'One of the contract''s event types; decides the subject.';
COMMENT ON COLUMN outbox.tenant_id IS 'The account''s tenant.';
COMMENT ON COLUMN outbox.user_id IS 'The account''s user: aggregate_id, and the relay''s lane.';
COMMENT ON COLUMN outbox.trace_id IS 'Trace id of the request that made the change.';
COMMENT ON COLUMN outbox.causation_id IS 'The event of the same transaction that this one follows from.';
COMMENT ON COLUMN outbox.occurred_at IS 'When the change was made.';
COMMENT ON COLUMN outbox.data IS 'The event''s data member.';
COMMENT ON COLUMN outbox.sent_at IS 'When JetStream acknowledged it.';
COMMENT ON COLUMN outbox.stream_seq IS 'Its sequence in the stream, from the acknowledgement.';
