-- Which events a group has applied. The row is written in the transaction that applies the event, so an event
-- that Kafka delivers again finds itself here and is dropped.
CREATE TABLE inbox (
    consumer_group text        NOT NULL,
    event_id       uuid        NOT NULL,
    applied_at     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer_group, event_id)
);

-- The pharmacy's side of an order. `version` is the last event applied; `details_version` is the last event that
-- told what was ordered (a confirmation tells a status only). Neither ever goes back.
CREATE TABLE pharmacy_orders (
    order_id        text        PRIMARY KEY,
    status          text        NOT NULL,
    version         bigint      NOT NULL,
    details_version bigint      NOT NULL, -- 0 while no details are known
    customer_id     text,
    currency        text,
    total_amount    numeric,
    items           jsonb,
    occurred_on     timestamptz NOT NULL, -- of `version`
    updated_at      timestamptz NOT NULL DEFAULT now()
);

-- What the pharmacy has to do (and be notified of): one task for each event, never two.
CREATE TABLE pharmacy_tasks (
    event_id   uuid        PRIMARY KEY,
    order_id   text        NOT NULL,
    version    bigint      NOT NULL,
    kind       text        NOT NULL,
    state      text        NOT NULL DEFAULT 'open',
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX pharmacy_tasks_order_id ON pharmacy_tasks (order_id);

-- The same for fulfillment, which cares where the order is picked up, for whom, and how much there is to carry.
CREATE TABLE fulfillment_orders (
    order_id        text        PRIMARY KEY,
    status          text        NOT NULL,
    version         bigint      NOT NULL,
    details_version bigint      NOT NULL,
    customer_id     text,
    restaurant_id   text,
    total_quantity  bigint,
    occurred_on     timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE fulfillment_tasks (
    event_id   uuid        PRIMARY KEY,
    order_id   text        NOT NULL,
    version    bigint      NOT NULL,
    kind       text        NOT NULL,
    state      text        NOT NULL DEFAULT 'open',
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX fulfillment_tasks_order_id ON fulfillment_tasks (order_id);
