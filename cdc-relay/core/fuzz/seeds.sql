-- What the corpus was seeded with: one of everything that pgoutput sends in protocol version 1, from a real server.
-- A superuser runs this in an empty database whose server has wal_level=logical; each line is a session (with columns
-- as text, or binary) and a message in hexadecimal. See examples/capture.rs.
\set ON_ERROR_STOP on
\set QUIET on
\pset tuples_only on
\pset format unaligned
SET client_min_messages = warning;
SET TimeZone = 'UTC';

CREATE TABLE outbox (
    id uuid PRIMARY KEY, aggregatetype text NOT NULL, aggregateid text NOT NULL, type text NOT NULL, payload jsonb,
    headers jsonb, traceparent text, partition int, topic text, created_at timestamptz DEFAULT '2026-01-01');
CREATE TABLE raw (id uuid, aggregatetype text, aggregateid text, type text, payload bytea);
ALTER TABLE raw REPLICA IDENTITY FULL;
CREATE TABLE wide (key int PRIMARY KEY, big text, small text);
ALTER TABLE wide ALTER big SET STORAGE EXTERNAL;
CREATE TABLE nothing ();
CREATE TABLE child (key int, parent int REFERENCES wide);
CREATE SCHEMA "odd schema";
CREATE TYPE "odd schema".mood AS ENUM ('sad', 'ä', '');
CREATE DOMAIN "odd schema".short AS varchar(20);
CREATE TYPE pair AS (a int, b text);
CREATE TABLE "odd schema"."odd ""table" (
    n serial PRIMARY KEY, m "odd schema".mood, s "odd schema".short, p pair, a int[], r int4range, f float8, g numeric,
    t timestamptz, i interval, j json, x xml, b bool, o oid, bits varbit, ip inet, doubled int GENERATED ALWAYS AS (7) STORED);
CREATE TABLE by_index (a int NOT NULL, b text);
CREATE UNIQUE INDEX by_index_key ON by_index (a);
ALTER TABLE by_index REPLICA IDENTITY USING INDEX by_index_key;
CREATE TABLE without_identity (a int, b text);
ALTER TABLE without_identity REPLICA IDENTITY NOTHING;
CREATE TABLE parted (id int, region text) PARTITION BY LIST (region);
CREATE TABLE parted_eu PARTITION OF parted FOR VALUES IN ('eu');
CREATE PUBLICATION seeds FOR ALL TABLES;
CREATE PUBLICATION seeds_root FOR TABLE parted WITH (publish_via_partition_root);
SELECT FROM pg_create_logical_replication_slot('seeds', 'pgoutput');
SELECT FROM pg_replication_origin_create('another server');

INSERT INTO outbox VALUES
    ('018f0000-0000-7000-8000-000000000001', 'order', 'o-1', 'OrderCreated', '{"total": 9.50, "ä": null}',
     '{"tenant": "a", "n": 1.5, "gone": null, "seq": "mine"}', '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01', 3, NULL),
    ('018f0000-0000-7000-8000-000000000002', 'order', 'o-1', 'OrderDeleted', NULL, NULL, NULL, NULL, 'elsewhere');
BEGIN;
INSERT INTO outbox VALUES ('018f0000-0000-7000-8000-000000000003', '', '', '', '[]');
DELETE FROM outbox WHERE aggregatetype = '';
COMMIT;
UPDATE outbox SET id = '018f0000-0000-7000-8000-000000000004' WHERE topic IS NOT NULL;
INSERT INTO raw VALUES ('018f0000-0000-7000-8000-000000000005', 'blob', 'b', 'Blob', '\x00ff5c78');
UPDATE raw SET payload = '\x' WHERE true;
DELETE FROM raw;
INSERT INTO wide SELECT 1, string_agg(md5(i::text), ''), 's' FROM generate_series(1, 100) i;
UPDATE wide SET small = 't';
UPDATE wide SET key = 2;
DELETE FROM wide;
INSERT INTO nothing DEFAULT VALUES;
INSERT INTO "odd schema"."odd ""table" VALUES (DEFAULT, 'ä', 'short', (1, 'x"y'), '{1,NULL,3}', '[1,5)', 'NaN', -1.50,
    '2026-01-01', '1 day', '{"a" : 1}', '<a/>', true, 17, B'101', '10.0.0.1/8');
UPDATE "odd schema"."odd ""table" SET m = '' WHERE true;
INSERT INTO by_index VALUES (1, 'b');
UPDATE by_index SET a = 2;
DELETE FROM by_index;
INSERT INTO without_identity VALUES (1, NULL);
INSERT INTO parted VALUES (1, 'eu');
-- Relations that change between two rows of one transaction, and between two transactions.
BEGIN;
INSERT INTO outbox VALUES ('018f0000-0000-7000-8000-000000000006', 'order', 'o-2', 'A', '{}');
ALTER TABLE outbox ADD COLUMN tenant text;
INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, tenant)
    VALUES ('018f0000-0000-7000-8000-000000000007', 'order', 'o-2', 'B', '{}', 'eu');
ALTER TABLE outbox DROP COLUMN topic;
INSERT INTO outbox (id, aggregatetype, aggregateid, type) VALUES ('018f0000-0000-7000-8000-000000000008', 'order', 'o-2', 'C');
COMMIT;
TRUNCATE nothing;
TRUNCATE wide, child CASCADE;
TRUNCATE "odd schema"."odd ""table" RESTART IDENTITY;
TRUNCATE raw, by_index RESTART IDENTITY CASCADE;
SELECT FROM pg_logical_emit_message(false, 'outbox', 'at once');
BEGIN;
SELECT FROM pg_logical_emit_message(true, 'outbox', '{"id": "1", "aggregatetype": "order", "aggregateid": "o-3", "type": "T", "payload": {}}');
SELECT FROM pg_logical_emit_message(true, '', ''::bytea);
SELECT FROM pg_logical_emit_message(false, 'another', 'inside');
SELECT FROM pg_logical_emit_message(true, 'outbox', '\x00ff'::bytea);
SAVEPOINT a;
INSERT INTO outbox (id, aggregatetype, aggregateid, type) VALUES ('018f0000-0000-7000-8000-00000000000a', 'order', 'o-3', 'Undone');
ROLLBACK TO a;
INSERT INTO outbox (id, aggregatetype, aggregateid, type) VALUES ('018f0000-0000-7000-8000-00000000000b', 'order', 'o-3', 'Kept');
COMMIT;
SELECT FROM pg_replication_origin_session_setup('another server');
BEGIN;
SELECT FROM pg_replication_origin_xact_setup('0/FFFFFFF0', '2026-01-01');
INSERT INTO outbox (id, aggregatetype, aggregateid, type) VALUES ('018f0000-0000-7000-8000-00000000000c', 'order', 'o-4', 'From there');
COMMIT;
SELECT FROM pg_replication_origin_session_reset();
-- Last, because nothing can be made of it: a column that the relay needs is gone.
ALTER TABLE outbox RENAME COLUMN payload TO body;
INSERT INTO outbox (id, aggregatetype, aggregateid, type) VALUES ('018f0000-0000-7000-8000-000000000009', 'order', 'o-2', 'D');

SELECT 'text', encode(data, 'hex') FROM pg_logical_slot_peek_binary_changes('seeds', NULL, NULL,
    'proto_version', '1', 'publication_names', 'seeds,seeds_root', 'messages', 'true', 'binary', 'false');
SELECT 'binary', encode(data, 'hex') FROM pg_logical_slot_peek_binary_changes('seeds', NULL, NULL,
    'proto_version', '1', 'publication_names', 'seeds', 'messages', 'true', 'binary', 'true');

SELECT FROM pg_drop_replication_slot('seeds');
SELECT FROM pg_replication_origin_drop('another server');
