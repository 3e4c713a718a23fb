-- ANALYZE reads 300 rows for each point of the largest statistics target and
-- holds one snapshot while it does, during which no old version of a session
-- can be pruned. Every query of the outbox walks seq or outbox_unsent, or names
-- an account: none needs a histogram. A tenth of the sample, and of data none.
ALTER TABLE outbox
    ALTER COLUMN seq          SET STATISTICS 10,
    ALTER COLUMN event_id     SET STATISTICS 10,
    ALTER COLUMN event_type   SET STATISTICS 10,
    ALTER COLUMN tenant_id    SET STATISTICS 10,
    ALTER COLUMN user_id      SET STATISTICS 10,
    ALTER COLUMN trace_id     SET STATISTICS 10,
    ALTER COLUMN causation_id SET STATISTICS 10,
    ALTER COLUMN occurred_at  SET STATISTICS 10,
    ALTER COLUMN data         SET STATISTICS 0,
    ALTER COLUMN sent_at      SET STATISTICS 10,
    ALTER COLUMN stream_seq   SET STATISTICS 10,
    ALTER COLUMN transient    SET STATISTICS 10;
