-- What the handler order-view answers: an order as its events tell it. What no event has told yet is NULL: the details of
-- an order whose OrderCreated is a dead letter, until an OrderUpdated tells them.
CREATE TABLE order_views (
    order_id            text        PRIMARY KEY,
    status              text        NOT NULL,
    version             bigint      NOT NULL,
    customer_id         text,
    restaurant_id       text,
    currency            text,
    total_amount        numeric,
    items               jsonb,
    notes               text,
    payment_id          text,
    cancellation_reason text,
    created_at          timestamptz NOT NULL, -- of the first event that was applied; it never changes, so pages are stable
    updated_at          timestamptz NOT NULL  -- of `version`
);
CREATE INDEX order_views_by_customer ON order_views (customer_id, created_at, order_id);
