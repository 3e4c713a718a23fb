-- Operating accounts.

ALTER TABLE outbox ADD COLUMN transient boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN outbox.transient IS 'Deleted with its acknowledgement: nothing of a deleted person stays behind.';
CREATE INDEX outbox_account ON outbox (user_id);
