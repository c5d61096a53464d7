"""Reads the records of a topic with confluent-kafka and does nothing with them.

Arguments: bootstrap servers, topic, group, how many records there are, how many to take at a time. Prints one JSON
object: the seconds from the assignment to the last record, and what the process has used.
"""

import json
import resource
import sys
import time

from confluent_kafka import Consumer

PATIENCE_SECONDS = 60

brokers, topic, group, records, batch = sys.argv[1:]
records, batch = int(records), int(batch)
assigned = None


def on_assign(consumer, partitions):
    global assigned
    assigned = time.monotonic()


consumer = Consumer({"bootstrap.servers": brokers, "group.id": group, "auto.offset.reset": "earliest"})
consumer.subscribe([topic], on_assign=on_assign)
seen, last = 0, time.monotonic()
while seen < records:
    taken = consumer.consume(batch, 1.0)
    for record in taken:
        if record.error():
            sys.exit(f"cannot read {topic}: {record.error()}")
    seen += len(taken)
    if taken:
        last = time.monotonic()
    elif time.monotonic() - last > PATIENCE_SECONDS:
        sys.exit(f"{seen} of {records} records, and no more for {PATIENCE_SECONDS} s")
usage = resource.getrusage(resource.RUSAGE_SELF)
print(
    json.dumps(
        {
            "seconds": last - assigned,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_rss_bytes": usage.ru_maxrss * 1024,
        }
    )
)
consumer.close()
