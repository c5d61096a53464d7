-- The next event of an order: its row and its lines as they are then, the event, its outbox row and, for a request with an
-- Idempotency-Key, the answer. Nothing happens (no row is inserted) when the order is not at the version before it any more.
-- $17 to $20 are NULL when the lines stay as they are.
WITH changed AS (
    UPDATE public.orders
    SET version = $10, status = $11, total_amount = $12, notes = $13, payment_id = $14, cancellation_reason = $15,
        updated_at = $16
    WHERE order_id = $8 AND version = $9
    RETURNING order_id
), lines AS (
    INSERT INTO public.order_items (order_id, line_number, menu_item_id, name, price, quantity)
    SELECT order_id, line_number, menu_item_id, name, price, quantity
    FROM changed, unnest($17::text[], $18::text[], $19::numeric[], $20::integer[])
                  WITH ORDINALITY AS line (menu_item_id, name, price, quantity, line_number)
    ON CONFLICT (order_id, line_number) DO UPDATE
    SET menu_item_id = excluded.menu_item_id, name = excluded.name, price = excluded.price, quantity = excluded.quantity
), surplus AS (
    DELETE FROM public.order_items USING changed
    WHERE order_items.order_id = changed.order_id AND line_number > cardinality($17)
), new_event AS (
    INSERT INTO public.order_events (order_id, version, event_id, event_type, payload, occurred_at)
    SELECT order_id, $10, $21, $22, $23, $16 FROM changed
), remembered AS (
    INSERT INTO public.idempotency_keys (client, key, fingerprint, status, location, etag, body)
    SELECT $1::text, $2::text, $3::bytea, $4::smallint, $5::text, $6::text, $7::text FROM changed WHERE $2 IS NOT NULL
)
INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload, traceparent)
SELECT $21, 'order', order_id, $22, $23, $24 FROM changed
