-- For the local stack and compose only, after local.sql and by the same superuser, in the database `consumers`: who may
-- connect. Its tables, and the publication of its outbox, are the consumers' own migrations.

BEGIN;

SET LOCAL lock_timeout = '60s';

-- By default every role of the cluster may, and a role that may replicate could read the log of any database it may
-- connect to.
REVOKE ALL ON DATABASE consumers FROM PUBLIC;
GRANT CONNECT ON DATABASE consumers TO consumers_relay;

COMMIT;
