-- For the local stack and compose only, after init.sql and by the same superuser in the same database: every
-- role gets its own name as its password. Never apply this to a server that others can reach.

BEGIN;

SET LOCAL lock_timeout = '60s';
SET LOCAL client_min_messages = warning; -- "already a member" is what we expect

-- As in init.sql: roles belong to the whole cluster, and two of us must not alter the same one at once.
LOCK TABLE pg_catalog.pg_authid IN SHARE ROW EXCLUSIVE MODE;

DO $$
BEGIN
    -- The owner of the database `consumers`; the consumers migrate that themselves.
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'consumer') THEN
        CREATE ROLE consumer;
    END IF;
    -- The relay of the outbox in `consumers`: it reads the log, and nothing else (see consumers.sql).
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = 'consumers_relay') THEN
        CREATE ROLE consumers_relay;
    END IF;
END
$$;

ALTER ROLE orders_owner PASSWORD 'orders_owner';
ALTER ROLE order_api PASSWORD 'order_api';
ALTER ROLE order_acks PASSWORD 'order_acks';
ALTER ROLE cdc_relay PASSWORD 'cdc_relay';
ALTER ROLE consumer LOGIN PASSWORD 'consumer';
ALTER ROLE consumers_relay LOGIN REPLICATION PASSWORD 'consumers_relay';

-- A developer who connects as the owner looks at slots and follows the WAL (`just wal`).
ALTER ROLE orders_owner REPLICATION;
GRANT pg_monitor TO orders_owner;

COMMIT;
