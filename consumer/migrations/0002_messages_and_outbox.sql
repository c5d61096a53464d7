-- Generic messages: what the handler `messages` has applied, once for each group. `attempt` is the delivery that was
-- applied; `headers` are all of the record's, as a JSON object of texts.
CREATE TABLE messages_applied (
    consumer_group text        NOT NULL,
    message_id     uuid        NOT NULL,
    topic          text        NOT NULL,
    key            text,
    payload        jsonb       NOT NULL,
    headers        jsonb       NOT NULL,
    attempt        integer     NOT NULL,
    applied_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer_group, message_id)
);

-- What the consumers publish, in the transaction of what it tells of: Debezium's default outbox table plus headers,
-- traceparent, created_at and topic. A row is deleted in the transaction that inserts it, so the table stays empty.
CREATE TABLE outbox (
    id            uuid        PRIMARY KEY,
    aggregatetype text        NOT NULL,
    aggregateid   text        NOT NULL,
    type          text        NOT NULL,
    payload       jsonb,
    headers       jsonb,
    traceparent   text,
    created_at    timestamptz NOT NULL DEFAULT now(),
    topic         text
);

-- What a cdc-relay reads the outbox by. Here and not by `cdc-relay init`, because only the table's owner can make it.
CREATE PUBLICATION consumers_relay FOR TABLE outbox WITH (publish = 'insert');
