ALTER TABLE sessions ADD COLUMN prev_family_hash bytea CHECK (octet_length(prev_family_hash) = 32);
COMMENT ON COLUMN sessions.prev_family_hash IS 'The family secret before the last password change: its tokens are dead, but still name the session at logout.';

-- Password reset. One row an account: a later request voids the earlier.

CREATE TABLE reset_tokens (
    tenant_id  uuid        NOT NULL,
    user_id    uuid        NOT NULL,
    token_hash bytea       NOT NULL UNIQUE CHECK (octet_length(token_hash) = 32),
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, user_id),
    FOREIGN KEY (tenant_id, user_id) REFERENCES accounts ON DELETE CASCADE
);
CREATE INDEX reset_tokens_expired ON reset_tokens (expires_at);
COMMENT ON TABLE  reset_tokens IS 'Open password resets.';
COMMENT ON COLUMN reset_tokens.tenant_id IS 'The account''s tenant.';
COMMENT ON COLUMN reset_tokens.user_id IS 'The account''s user.';
COMMENT ON COLUMN reset_tokens.token_hash IS 'SHA-256 of the token''s 256 random bits.';
COMMENT ON COLUMN reset_tokens.expires_at IS 'The token is good until then, once.';
