"""Reads an order's event as any other team's consumer would: confluent-kafka, nothing of ours.

read_event.py BROKERS ORDER_ID
"""

import json
import re
import sys
import uuid

from confluent_kafka import Consumer


def main(brokers: str, order_id: str) -> None:
    consumer = Consumer(
        {"bootstrap.servers": brokers, "group.id": f"ci-{uuid.uuid4()}", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe(["order-events"])
    while True:
        record = consumer.poll(1.0)
        if record is None:
            continue
        if record.error():
            sys.exit(f"Kafka: {record.error()}")
        if record.key().decode() == order_id:
            break
    consumer.close()

    headers = {name: value.decode() for name, value in record.headers()}
    event = json.loads(record.value())
    print(record.topic(), record.partition(), record.offset(), record.key(), headers, event)
    assert headers["id"] == event["eventId"] == str(uuid.UUID(headers["id"])), "id"
    assert headers["type"] == event["eventType"] == "OrderCreated", "type"
    assert headers["aggregatetype"] == "order", "aggregatetype"
    assert re.fullmatch(r"[0-9A-F]+/[0-9A-F]+", headers["lsn"]), "lsn"
    assert headers["seq"].isdigit(), "seq"
    assert event["aggregateId"] == order_id and event["version"] == 1, "body"
    assert event["totalAmount"] == "20.75", "totalAmount"


if __name__ == "__main__":
    main(*sys.argv[1:])
