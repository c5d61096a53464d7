-- The schema of the orders database: roles, tables, grants, publication. Its sole owner: no service migrates.
--
-- Apply it as the superuser while connected to the database (here called `orders`), as often as you like:
--     psql -v ON_ERROR_STOP=1 -f postgres/init.sql postgres://postgres@HOST:PORT/orders
-- It is reapplied at every start of the stack, while the services run, so every statement here is idempotent
-- and, when there is nothing to do, takes no lock that writers would notice. Keep it so: CREATE INDEX IF NOT
-- EXISTS and ALTER TABLE … IF NOT EXISTS lock the table before they look, so guard them with a catalog query.
-- PostgreSQL 15 to 18. No passwords are set here.

BEGIN;

-- A reapplication must never queue writers behind itself for long: it gives up instead, and is tried again.
SET LOCAL lock_timeout = '60s';
SET LOCAL client_min_messages = warning; -- "already exists, skipping" is what we expect

-- Two of us at once would race for the same catalog rows. Roles belong to the whole cluster while an advisory
-- lock belongs to one database, so we serialise on the roles' own catalog. Logins only read it and go on.
LOCK TABLE pg_catalog.pg_authid IN SHARE ROW EXCLUSIVE MODE;

-- Roles ------------------------------------------------------------------------------------------------------

DO $$
DECLARE
    role text;
BEGIN
    FOREACH role IN ARRAY ARRAY['orders_owner', 'order_api', 'order_acks', 'cdc_relay'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role) THEN
            EXECUTE format('CREATE ROLE %I', role);
        END IF;
    END LOOP;

    -- Stated in full, so that reapplying takes away what was added by hand. REPLICATION of orders_owner is
    -- left alone: postgres/local.sql gives it to developers.
    ALTER ROLE orders_owner LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS;
    ALTER ROLE order_api LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;
    ALTER ROLE order_acks LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;
    -- REPLICATION is what a walsender and slot functions ask for.
    ALTER ROLE cdc_relay LOGIN REPLICATION NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS;

    -- CREATE PUBLICATION below needs CREATE on the database, which its owner has; by the same token the owner
    -- owns the schema public (through pg_database_owner) and nobody else may create in it.
    IF (SELECT datdba FROM pg_catalog.pg_database WHERE datname = current_database()) <> 'orders_owner'::regrole
    THEN
        EXECUTE format('ALTER DATABASE %I OWNER TO orders_owner', current_database());
    END IF;

    -- By default every role of the cluster may connect and make temporary tables.
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO order_api, order_acks, cdc_relay', current_database());
    REVOKE ALL ON SCHEMA public FROM PUBLIC;
    GRANT USAGE ON SCHEMA public TO order_api, order_acks, cdc_relay;
END
$$;

-- Everything from here on belongs to orders_owner, so that neither service owns what it uses.
SET LOCAL ROLE orders_owner;

-- Tables -----------------------------------------------------------------------------------------------------
-- The API parses every value before it sends it; the checks here are the second pair of eyes for what must
-- hold whoever writes. Amounts are numeric without a scale: the API decides the scale by the currency.

-- The current state of every order.
CREATE TABLE IF NOT EXISTS public.orders (
    order_id      text        PRIMARY KEY CHECK (length(order_id) BETWEEN 1 AND 64),
    customer_id   text        NOT NULL,
    restaurant_id text        NOT NULL,
    status        text        NOT NULL
                  CHECK (status IN ('created', 'confirmed', 'preparing', 'ready', 'delivered', 'cancelled')),
    -- The version of the last event: 1 for OrderCreated, then dense.
    version       integer     NOT NULL CHECK (version >= 1),
    currency      text        NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    total_amount  numeric     NOT NULL CHECK (total_amount >= 0),
    created_at    timestamptz NOT NULL,
    updated_at    timestamptz NOT NULL,
    notes               text,
    payment_id          text,
    cancellation_reason text
);

-- The lines of every order, in the order the client gave them.
CREATE TABLE IF NOT EXISTS public.order_items (
    order_id     text    NOT NULL REFERENCES public.orders (order_id),
    line_number  integer NOT NULL CHECK (line_number >= 1),
    menu_item_id text    NOT NULL,
    name         text    NOT NULL,
    price        numeric NOT NULL CHECK (price >= 0),
    quantity     integer NOT NULL CHECK (quantity >= 1),
    PRIMARY KEY (order_id, line_number)
);

-- The event store: what happened to every order, immutable (nobody but the owner may update or delete). The
-- primary key makes two writers of one version impossible.
CREATE TABLE IF NOT EXISTS public.order_events (
    order_id    text        NOT NULL REFERENCES public.orders (order_id),
    version     integer     NOT NULL CHECK (version >= 1),
    event_id    uuid        NOT NULL UNIQUE,
    event_type  text        NOT NULL,
    payload     jsonb       NOT NULL,
    occurred_at timestamptz NOT NULL,
    PRIMARY KEY (order_id, version)
);

-- What cdc-relay publishes: Debezium's default outbox table plus headers, traceparent, created_at and topic. Rows are
-- inserted in the transaction of the change they tell of. The id is the event's id (UUIDv7, so the index grows
-- at its end).
CREATE TABLE IF NOT EXISTS public.outbox (
    id            uuid        PRIMARY KEY,
    aggregatetype text        NOT NULL,
    aggregateid   text        NOT NULL,
    type          text        NOT NULL,
    payload       jsonb,
    headers       jsonb,
    traceparent   text,
    created_at    timestamptz NOT NULL DEFAULT now(),
    -- Where it goes, if not where the relay's configuration says.
    topic         text
);

-- Messages of any kind that clients sent through the outbox, and how far each has come.
CREATE TABLE IF NOT EXISTS public.messages (
    message_id          uuid        PRIMARY KEY,
    topic               text        NOT NULL,
    key                 text,
    payload             jsonb       NOT NULL,
    -- The client's own, a JSON object of texts.
    headers             jsonb       NOT NULL,
    traceparent         text,
    -- The consumer groups that have to acknowledge it; none: nothing is waited for.
    require_ack         text[]      NOT NULL,
    ack_timeout_seconds integer     NOT NULL CHECK (ack_timeout_seconds >= 1),
    -- How often it is in the outbox: 1, then one more with each redelivery.
    attempt             integer     NOT NULL CHECK (attempt >= 1),
    created_at          timestamptz NOT NULL DEFAULT now(),
    -- When the present attempt is over; NULL: nothing is waited for (any more).
    due_at              timestamptz,
    -- When the last group had acknowledged it.
    acknowledged_at     timestamptz,
    -- When it was given up.
    undelivered_at      timestamptz
);

-- Who has acknowledged which message, written by the consumer's handler `acks`.
CREATE TABLE IF NOT EXISTS public.message_acks (
    message_id     uuid        NOT NULL REFERENCES public.messages (message_id),
    consumer_group text        NOT NULL,
    -- Of the first acknowledgement that arrived.
    attempt        integer     NOT NULL CHECK (attempt >= 1),
    applied_at     timestamptz NOT NULL,
    -- The commit LSN of the attempt, as the record's header told it.
    lsn            pg_lsn,
    received_at    timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (message_id, consumer_group)
);

-- Which acknowledgements have been taken in: the inbox of the handler `acks`, as every consumer has one.
CREATE TABLE IF NOT EXISTS public.inbox (
    consumer_group text        NOT NULL,
    event_id       uuid        NOT NULL,
    applied_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer_group, event_id)
);

-- The group of the handler `acks`, which can be paused, and its dead letters: as every consumer has them (consumer/migrations).
CREATE TABLE IF NOT EXISTS public.consumer_groups (
    consumer_group text PRIMARY KEY,
    paused_at      timestamptz,
    paused_for     text
);
CREATE TABLE IF NOT EXISTS public.dead_letters (
    consumer_group text        NOT NULL,
    topic          text        NOT NULL,
    partition      integer     NOT NULL,
    record_offset  bigint      NOT NULL,
    key            bytea,
    event_type     text,
    written_at     timestamptz,
    reason         text        NOT NULL,
    error          text        NOT NULL,
    attempts       integer     NOT NULL,
    blocks_key     boolean     NOT NULL,
    dead_at        timestamptz NOT NULL DEFAULT now(),
    dlq_partition  integer,
    dlq_offset     bigint,
    redrives       integer     NOT NULL DEFAULT 0,
    redriven_at    timestamptz,
    settled_at     timestamptz,
    outcome        text CHECK (outcome IN ('applied', 'discarded')),
    PRIMARY KEY (consumer_group, topic, partition, record_offset),
    CHECK ((settled_at IS NULL) = (outcome IS NULL))
);

-- Answers to requests with an Idempotency-Key, written in the transaction of the work they tell of.
CREATE TABLE IF NOT EXISTS public.idempotency_keys (
    -- The name of the client's token; empty where none is asked for.
    client       text        NOT NULL,
    key          text        NOT NULL,
    -- SHA-256 of method, path and body.
    fingerprint  bytea       NOT NULL,
    status       smallint    NOT NULL,
    location     text,
    etag         text,
    body         text        NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (client, key)
);

-- Every instance of every service, by its last heartbeat.
CREATE TABLE IF NOT EXISTS public.instances (
    instance_id  text        PRIMARY KEY CHECK (length(instance_id) BETWEEN 1 AND 64),
    service      text        NOT NULL,
    version      text        NOT NULL,
    started_at   timestamptz NOT NULL,
    state        text        NOT NULL,
    heartbeat_at timestamptz NOT NULL DEFAULT now()
);

-- What tables that were made by an earlier version of this file lack, and the indexes.
DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('orders', 'notes'), ('orders', 'payment_id'), ('orders', 'cancellation_reason'), ('outbox', 'topic')
        ) AS column_of (table_name, column_name)
        WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_attribute
                          WHERE attrelid = ('public.' || column_of.table_name)::regclass
                            AND attname = column_of.column_name AND NOT attisdropped)
    LOOP
        EXECUTE format('ALTER TABLE public.%I ADD COLUMN %I text', wanted.table_name, wanted.column_name);
    END LOOP;

    FOR wanted IN
        SELECT * FROM (VALUES
            -- The list of orders, newest first: all, a customer's, those of a status.
            ('orders_by_time', 'orders (created_at, order_id)'),
            ('orders_by_customer', 'orders (customer_id, created_at, order_id)'),
            ('orders_by_status', 'orders (status, created_at, order_id)'),
            ('messages_due', 'messages (due_at) WHERE due_at IS NOT NULL'),
            ('messages_acknowledged', 'messages (message_id) WHERE acknowledged_at IS NOT NULL'),
            ('messages_undelivered', 'messages (undelivered_at, message_id) WHERE undelivered_at IS NOT NULL'),
            ('idempotency_keys_by_time', 'idempotency_keys (created_at)'),
            ('inbox_by_time', 'inbox (applied_at)'),
            ('dead_letters_open', 'dead_letters (consumer_group, dead_at) WHERE settled_at IS NULL')
        ) AS index_on (index_name, definition)
        WHERE to_regclass('public.' || index_on.index_name) IS NULL
    LOOP
        EXECUTE format('CREATE INDEX %I ON public.%s', wanted.index_name, wanted.definition);
    END LOOP;
END
$$;

-- Grants -----------------------------------------------------------------------------------------------------
-- Taken away first, so that this file says all there is.

REVOKE ALL ON public.orders, public.order_items, public.order_events, public.outbox, public.messages,
    public.message_acks, public.inbox, public.consumer_groups, public.dead_letters, public.idempotency_keys,
    public.instances
    FROM PUBLIC, order_api, order_acks, cdc_relay;
GRANT SELECT, INSERT ON public.orders, public.order_items, public.order_events TO order_api;
GRANT UPDATE (status, version, total_amount, notes, payment_id, cancellation_reason, updated_at)
    ON public.orders TO order_api;
GRANT UPDATE (menu_item_id, name, price, quantity), DELETE ON public.order_items TO order_api;
GRANT SELECT, INSERT, UPDATE (attempt, due_at, undelivered_at) ON public.messages TO order_api;
GRANT SELECT ON public.message_acks TO order_api;
GRANT SELECT, INSERT, DELETE ON public.idempotency_keys TO order_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON public.instances TO order_api;
-- The API hands rows over and never looks at them again.
GRANT INSERT ON public.outbox TO order_api;
-- The handler `acks` writes acknowledgements, and what follows from them.
GRANT SELECT, INSERT ON public.inbox, public.message_acks TO order_acks;
GRANT SELECT, INSERT, UPDATE ON public.consumer_groups, public.dead_letters TO order_acks;
GRANT SELECT, UPDATE (due_at, acknowledged_at, undelivered_at) ON public.messages TO order_acks;
-- Logical replication needs no privilege on the table; looking at it (checks, snapshots) does.
GRANT SELECT ON public.outbox TO cdc_relay;

-- Publication ------------------------------------------------------------------------------------------------
-- Inserts only: updates and deletes of outbox rows (clean-up) are nobody's business, and published ones would
-- cost the walsender work. It has to exist before the slot: a slot decodes with the catalog of its own past.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = 'cdc_relay') THEN
        CREATE PUBLICATION cdc_relay FOR TABLE public.outbox WITH (publish = 'insert');
    END IF;
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_publication_tables
                   WHERE pubname = 'cdc_relay' AND schemaname = 'public' AND tablename = 'outbox') THEN
        ALTER PUBLICATION cdc_relay ADD TABLE public.outbox;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_publication WHERE pubname = 'cdc_relay'
               AND (NOT pubinsert OR pubupdate OR pubdelete OR pubtruncate)) THEN
        ALTER PUBLICATION cdc_relay SET (publish = 'insert');
    END IF;
END
$$;

COMMIT;
