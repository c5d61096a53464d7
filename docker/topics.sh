#!/usr/bin/env bash
# Makes the topics of contracts/topics.txt (name, partitions, key=value…) that are missing. A topic that exists
# with another number of partitions is an error: its keys live in those partitions.
set -euo pipefail

file=${TOPICS:-/contracts/topics.txt}
kafka_topics() {
    "${KAFKA_TOPICS:-/opt/kafka/bin/kafka-topics.sh}" --bootstrap-server "$BOOTSTRAP_SERVERS" "$@"
}

while read -r -u 3 name partitions settings; do
    configs=()
    for setting in $settings; do
        configs+=(--config "$setting")
    done
    # Its input is not ours.
    kafka_topics --create --if-not-exists --topic "$name" --partitions "$partitions" \
        --replication-factor "$REPLICATION_FACTOR" ${configs[@]+"${configs[@]}"} </dev/null
    described=$(kafka_topics --describe --topic "$name" </dev/null)
    if [[ $described != *"PartitionCount: $partitions"[[:space:]]* ]]; then
        echo "$name has another number of partitions than the $partitions of $file:"
        echo "$described"
        exit 1
    fi
done 3< <(sed 's/#.*//; /^[[:space:]]*$/d' "$file")
echo "the topics of $file are there"
