"""Reads committed records as any other team's consumer would (confluent-kafka, nothing of ours) while the relay is
killed twenty times, and sees the id of every committed row exactly once.

each_id_once.py POSTGRES BROKERS RELAY: a superuser's connection string, and the relay's program
"""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter

from confluent_kafka import Consumer
from confluent_kafka.admin import AdminClient, NewTopic

KILLS = 20
PARTITIONS = 3
KEYS = 10
# How long anything is waited for. Seconds.
PATIENCE = 120

TABLE = """
CREATE TABLE outbox (id uuid PRIMARY KEY, aggregatetype text, aggregateid text, type text, payload jsonb, partition int);
CREATE PUBLICATION cdc_relay FOR TABLE outbox WITH (publish = 'insert');
"""
# Transactions of one to twenty rows, some of them rolled back.
ROWS = f"""
DO $$ BEGIN FOR n IN 1..20 LOOP
    INSERT INTO outbox SELECT gen_random_uuid(), '{{kind}}', 'k' || (n + i) % {KEYS}, 'Written', '{{{{}}}}'
    FROM generate_series(1, n) i;
    IF n % 7 = 0 THEN ROLLBACK; ELSE COMMIT; END IF;
END LOOP; END $$
"""
# Behind everything else, one row in each partition.
LAST = """
INSERT INTO outbox SELECT gen_random_uuid(), '{kind}', 'last', 'Last', '{{}}', p FROM generate_series(0, {last}) p
"""


def sql(url: str, statement: str) -> str:
    command = ["psql", url, "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def await_that(what: str, condition) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            sys.exit(f"waited {PATIENCE} s in vain: {what}")
        time.sleep(0.02)


class Reader(threading.Thread):
    """Counts each id it sees, until the last record of every partition."""

    def __init__(self, brokers: str, topic: str):
        super().__init__(daemon=True)
        self.seen: Counter[str] = Counter()
        self.ended: set[int] = set()
        self.failed = ""
        self.consumer = Consumer(
            {
                "bootstrap.servers": brokers,
                "group.id": f"ci-{uuid.uuid4()}",
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
            }
        )
        self.consumer.subscribe([topic])

    def run(self) -> None:
        while len(self.ended) < PARTITIONS and not self.failed:
            record = self.consumer.poll(0.1)
            if record is None:
                continue
            if record.error():
                self.failed = str(record.error())
                continue
            headers = dict(record.headers())
            self.seen[headers["id"].decode()] += 1
            if headers["type"] == b"Last":
                self.ended.add(record.partition())
        self.consumer.close()


def write(url: str, kind: str, stop: threading.Event) -> None:
    while not stop.is_set():
        sql(url, ROWS.format(kind=kind))


def main(postgres: str, brokers: str, relay: str) -> None:
    name = f"each_id_once_{uuid.uuid4().hex[:12]}"
    topic = f"outbox.event.{name}"
    sql(postgres, f"CREATE DATABASE {name}")
    url = f"{postgres.rsplit('/', 1)[0]}/{name}"
    sql(url, TABLE)
    new = NewTopic(topic, num_partitions=PARTITIONS, replication_factor=1)
    admin = AdminClient({"bootstrap.servers": brokers})
    for made in admin.create_topics([new]).values():
        made.result(PATIENCE)
    environment = os.environ | {
        "CDC_RELAY_KAFKA__DELIVERY": "exactly-once",
        "CDC_RELAY_POSTGRES__URL": url,
        "CDC_RELAY_POSTGRES__SLOT": name,
        "CDC_RELAY_KAFKA__BROKERS": brokers,
        "CDC_RELAY_HTTP__LISTEN": "127.0.0.1:0",
        "CDC_RELAY_LOG__LEVEL": "warn",
    }
    subprocess.run([relay, "init"], env=environment, check=True)
    reader = Reader(brokers, topic)
    reader.start()
    stop = threading.Event()
    writer = threading.Thread(target=write, args=(url, name, stop), daemon=True)
    writer.start()
    process = None
    try:
        for kills_left in range(KILLS, -1, -1):
            before = reader.seen.total()
            process = subprocess.Popen([relay, "run"], env=environment)
            await_that("more records", lambda before=before: reader.failed or reader.seen.total() > before)
            if kills_left:
                process.kill()
                process.wait()
        stop.set()
        writer.join(PATIENCE)
        sql(url, LAST.format(kind=name, last=PARTITIONS - 1))
        reader.join(PATIENCE)
        process.terminate()
        process.wait(PATIENCE)
    finally:
        if process is not None:
            process.kill()
            process.wait()
    if reader.failed or reader.is_alive():
        sys.exit(f"not all was read: {reader.failed or 'the last records did not come'}")
    committed = set(sql(url, "SELECT id FROM outbox").split())
    repeated = {key: count for key, count in reader.seen.items() if count > 1}
    missing, foreign = committed - set(reader.seen), set(reader.seen) - committed
    sql(postgres, f"SELECT pg_drop_replication_slot('{name}')")
    sql(postgres, f"DROP DATABASE {name}")
    print(f"{len(committed)} rows, {KILLS} kills: {len(missing)} missing, {len(repeated)} repeated, {len(foreign)} foreign")
    if missing or repeated or foreign:
        sys.exit("not every id was seen once")


if __name__ == "__main__":
    main(*sys.argv[1:])
