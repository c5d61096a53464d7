# Shorthands for developers. All but up, test and the like look at the stack that runs (.stack/endpoints.json).
# Needed besides what the README names: curl for `order`, kcat for `tail`, psql for `psql` and `wal`,
# pg_recvlogical for `wal` (Debian: apt-get install kcat postgresql-client).

set positional-arguments

# Of a stack elsewhere (`just up --dir DIR`): STACK_ENDPOINTS=DIR/endpoints.json just order
endpoints := env("STACK_ENDPOINTS", ".stack/endpoints.json")

[private]
default:
    @just --list --unsorted

# Start the whole system; Ctrl-C stops it. `just up --detach --scale pharmacy=3`
up *args:
    cargo xtask up "$@"

# Stop it
down *args:
    cargo xtask down "$@"

# Each process, its port, health and lag
status *args:
    cargo xtask status "$@"

# The same system in containers, with three brokers
compose-up *args:
    docker compose up --build "$@"

# Post an order and print the answer
[no-exit-message]
order:
    #!/usr/bin/env bash
    set -euo pipefail
    url=$(just _endpoint order_api)
    echo "POST $url/api/orders"
    curl --silent --show-error --include --header 'content-type: application/json' --data @- \
        "$url/api/orders" <<'JSON'
    {
      "customerId": "customer-1",
      "restaurantId": "restaurant-1",
      "items": [
        {"menuItemId": "margherita", "name": "Pizza Margherita", "price": "9.50", "quantity": 2},
        {"menuItemId": "water", "name": "Water", "price": "1.75", "quantity": 1}
      ]
    }
    JSON
    echo

# Follow a topic from its last records on, with keys and headers; Ctrl-C ends it
[no-exit-message]
tail topic="order-events" *args:
    #!/usr/bin/env bash
    set -euo pipefail
    brokers=$(just _endpoint kafka)
    shift || true
    exec kcat -b "$brokers" -C -q -u -o -10 -t "{{ topic }}" \
        -f '%t/%p@%o key=%k\n  %h\n  %s\n' "$@"

# Follow what Postgres decodes from its WAL, on a slot of our own; Ctrl-C ends it
[no-exit-message]
wal *args:
    #!/usr/bin/env bash
    set -euo pipefail
    url=$(just _endpoint postgres)
    slot=just_wal_$$
    # Those of runs that could not clean up. A slot in use is somebody else's.
    psql "$url" --no-psqlrc --quiet --tuples-only --output=/dev/null --command="
        SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
        WHERE slot_name LIKE 'just\_wal\_%' AND NOT active"
    # A slot that nobody reads holds the server's WAL for ever, so it goes with us, whichever way. WAIT: the
    # server may take a moment to notice that the reader has gone.
    watcher=
    drop() {
        trap '' INT TERM HUP
        [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
        psql "$url?replication=database" --no-psqlrc --quiet --command="DROP_REPLICATION_SLOT $slot WAIT"
    }
    pg_recvlogical --dbname="$url" --slot="$slot" --plugin=test_decoding --create-slot
    trap drop EXIT
    echo "following the WAL of the orders database by the slot $slot" >&2
    # One column a line. In the background, because bash answers a signal only when what it waits for has ended.
    pg_recvlogical --dbname="$url" --slot="$slot" --start --file=- --no-loop --fsync-interval=0 \
        --option=skip-empty-xacts=1 --option=include-timestamp=1 "$@" \
        > >(exec sed --unbuffered --regexp-extended 's/ ([a-z_]+\[[a-z ]+\]:)/\n    \1/g') &
    reader=$!
    stopped=
    trap 'stopped=yes; kill -INT "$reader" 2>/dev/null || true' INT TERM HUP
    # A terminal that is closed may tell nobody but its first process.
    if { : </dev/tty; } 2>/dev/null; then
        while sleep 1; do { : </dev/tty; } 2>/dev/null || kill -TERM $$; done &
        watcher=$!
    fi
    status=0
    wait "$reader" || status=$?
    if [[ -n $stopped ]]; then
        wait "$reader" || true
        exit 0
    fi
    exit "$status"

# A SQL shell on the orders database
[no-exit-message]
psql *args:
    #!/usr/bin/env bash
    set -euo pipefail
    url=$(just _endpoint postgres)
    exec psql "$url" "$@"

# All tests; starts the servers they need
test *args:
    cargo xtask test "$@"

# The relay beside Debezium Server and its limits, the API, the consumer: all of it, or one scenario, `just bench drain --workload single`
bench *args:
    cargo xtask bench "$@"

# Everything is killed, stopped and cut off at random, and nothing may be lost: `just chaos --kills 300`
chaos *args:
    cargo xtask chaos "$@"

# The relay's tests that depend on the version of Postgres, on the older ones; 18 has them all
test-versions *versions="15 16 17":
    #!/usr/bin/env bash
    set -euo pipefail
    for version in {{ versions }}; do
        cargo xtask test --postgres "$version" -p cdc-relay --test it -- \
            check:: delivery:: failover:: hosts:: idle:: init:: log:: position:: privileges:: shapes shutdown:: tls:: killed takes_over cuts publication
    done

# Format everything
fmt:
    cargo fmt --all
    cargo fmt --manifest-path cdc-relay/core/fuzz/Cargo.toml
    just --fmt --unstable

# What CI says about the sources
lint:
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets -- -D warnings

# All that CI does
ci:
    .ci/run

# A value of endpoints.json, which has one key a line: sed does, nothing needs installing
[no-exit-message]
[private]
_endpoint key:
    #!/usr/bin/env bash
    set -euo pipefail
    value=$(sed -n 's/^  "{{ key }}": "\(.*\)",\{0,1\}$/\1/p' "{{ endpoints }}" 2>/dev/null || true)
    if [[ -z $value ]]; then
        echo "no stack with {{ key }} is running: start it with \`just up\`" >&2
        exit 1
    fi
    echo "$value"
