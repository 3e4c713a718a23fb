-- One relay at a time over all replicas, and what it knows of the streams.

CREATE TABLE relay (
    one         boolean     NOT NULL PRIMARY KEY DEFAULT true CHECK (one),
    holder      uuid,
    lease_until timestamptz NOT NULL DEFAULT '-infinity'
) WITH (fillfactor = 10);
INSERT INTO relay DEFAULT VALUES;
COMMENT ON TABLE  relay IS 'One row: who relays the outbox. The row is updated every second or two, hence the room.';
COMMENT ON COLUMN relay.one IS 'There is no second row.';
COMMENT ON COLUMN relay.holder IS 'The process that relays; null: nobody.';
COMMENT ON COLUMN relay.lease_until IS 'From then on any process may become the holder.';

CREATE TABLE relay_streams (
    stream       text   NOT NULL PRIMARY KEY,
    created      text   NOT NULL,
    generation   bigint NOT NULL DEFAULT 0,
    acked_seq    bigint NOT NULL DEFAULT 0,
    resend_above bigint,
    resend_after bigint,
    CHECK ((resend_above IS NULL) = (resend_after IS NULL))
) WITH (fillfactor = 10);
COMMENT ON TABLE  relay_streams IS 'One row a JetStream stream: what its acknowledgements promised. A stream that says less has lost it.';
COMMENT ON COLUMN relay_streams.stream IS 'Its name.';
COMMENT ON COLUMN relay_streams.created IS 'When JetStream says it was created, to the nanosecond: another moment, another store.';
COMMENT ON COLUMN relay_streams.generation IS 'Number of losses noticed. Acknowledgements from before a loss do not count after it.';
COMMENT ON COLUMN relay_streams.acked_seq IS 'Highest stream sequence acknowledged.';
COMMENT ON COLUMN relay_streams.resend_above IS 'Not null: a loss is being made good. Events acknowledged above this stream sequence are lost.';
COMMENT ON COLUMN relay_streams.resend_after IS 'How far that has come: outbox.seq up to here are done.';

-- Every relayed row leaves a dead version and a dead entry in outbox_unsent,
-- which each fetch walks over until vacuum takes them: vacuum at one per cent,
-- not at the default twenty.
ALTER TABLE outbox SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 10000,
                        autovacuum_vacuum_insert_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);
