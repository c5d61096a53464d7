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
    FOREACH role IN ARRAY ARRAY['orders_owner', 'order_api', 'cdc_relay'] LOOP
        IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = role) THEN
            EXECUTE format('CREATE ROLE %I', role);
        END IF;
    END LOOP;

    -- Stated in full, so that reapplying takes away what was added by hand. REPLICATION of orders_owner is
    -- left alone: postgres/local.sql gives it to developers.
    ALTER ROLE orders_owner LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS;
    ALTER ROLE order_api LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS;
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
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO order_api, cdc_relay', current_database());
    REVOKE ALL ON SCHEMA public FROM PUBLIC;
    GRANT USAGE ON SCHEMA public TO order_api, cdc_relay;
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
    updated_at    timestamptz NOT NULL
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

-- What cdc-relay publishes: Debezium's default outbox table plus headers, traceparent and created_at. Rows are
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
    created_at    timestamptz NOT NULL DEFAULT now()
);

-- Grants -----------------------------------------------------------------------------------------------------
-- Taken away first, so that this file says all there is.

REVOKE ALL ON public.orders, public.order_items, public.order_events, public.outbox
    FROM PUBLIC, order_api, cdc_relay;
GRANT SELECT, INSERT ON public.orders, public.order_items, public.order_events TO order_api;
-- The API hands rows over and never looks at them again.
GRANT INSERT ON public.outbox TO order_api;
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
