-- The newest event of each aggregate that a group has applied: an older one is ignored, a gap is noticed.
CREATE TABLE aggregate_versions (
    consumer_group text   NOT NULL,
    aggregate_id   text   NOT NULL,
    version        bigint NOT NULL,
    PRIMARY KEY (consumer_group, aggregate_id)
);

-- The guard lets events through in order, so the newest details are those that came last.
ALTER TABLE pharmacy_orders DROP COLUMN details_version;
ALTER TABLE fulfillment_orders DROP COLUMN details_version;

-- Which groups are paused.
CREATE TABLE consumer_groups (
    consumer_group text PRIMARY KEY,
    paused_at      timestamptz, -- NULL: it consumes
    paused_for     text         -- why, for people
);

-- The records of a group that went to a dead-letter topic, by where they were. The records themselves are there.
CREATE TABLE dead_letters (
    consumer_group text        NOT NULL,
    topic          text        NOT NULL,
    partition      integer     NOT NULL,
    record_offset  bigint      NOT NULL,
    key            bytea,
    event_type     text,                 -- the header `type`, where there is one
    written_at     timestamptz,          -- the record's timestamp
    reason         text        NOT NULL,
    error          text        NOT NULL,
    attempts       integer     NOT NULL, -- in all
    blocks_key     boolean     NOT NULL, -- later records of the key wait for it, in parked_records
    dead_at        timestamptz NOT NULL DEFAULT now(),
    dlq_partition  integer,              -- where it is in the dead-letter topic; NULL until that is acknowledged
    dlq_offset     bigint,
    redrives       integer     NOT NULL DEFAULT 0,
    redriven_at    timestamptz,          -- the last time
    settled_at     timestamptz,          -- NULL: open
    outcome        text CHECK (outcome IN ('applied', 'discarded')),
    PRIMARY KEY (consumer_group, topic, partition, record_offset),
    CHECK ((settled_at IS NULL) = (outcome IS NULL))
);
CREATE INDEX dead_letters_blocking ON dead_letters (consumer_group, key) WHERE blocks_key AND settled_at IS NULL;
CREATE INDEX dead_letters_open ON dead_letters (consumer_group, dead_at) WHERE settled_at IS NULL;

-- Whole records that wait behind a dead letter of their key.
CREATE TABLE parked_records (
    consumer_group text        NOT NULL,
    topic          text        NOT NULL,
    partition      integer     NOT NULL,
    record_offset  bigint      NOT NULL,
    key            bytea       NOT NULL,
    value          bytea,
    header_names   text[],     -- NULL where one is not UTF-8
    header_values  bytea[],
    written_at     timestamptz,
    parked_at      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer_group, topic, partition, record_offset)
);
CREATE INDEX parked_records_key ON parked_records (consumer_group, key, topic, partition, record_offset);
