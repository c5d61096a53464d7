-- A new order: its row, its lines (which keep their order by their number), its event, its outbox row and, for a request
-- with an Idempotency-Key, the answer. All of it or nothing, in one round trip.
WITH new_order AS (
    INSERT INTO public.orders (order_id, customer_id, restaurant_id, status, version, currency, total_amount,
                               created_at, updated_at, notes)
    VALUES ($8, $9, $10, 'created', 1, $11, $12, $13, $13, $14)
), new_items AS (
    INSERT INTO public.order_items (order_id, line_number, menu_item_id, name, price, quantity)
    SELECT $8, line_number, menu_item_id, name, price, quantity
    FROM unnest($15::text[], $16::text[], $17::numeric[], $18::integer[])
         WITH ORDINALITY AS line (menu_item_id, name, price, quantity, line_number)
), new_event AS (
    INSERT INTO public.order_events (order_id, version, event_id, event_type, payload, occurred_at)
    VALUES ($8, 1, $19, 'OrderCreated', $20, $13)
), remembered AS (
    INSERT INTO public.idempotency_keys (client, key, fingerprint, status, location, etag, body)
    SELECT $1::text, $2::text, $3::bytea, $4::smallint, $5::text, $6::text, $7::text WHERE $2 IS NOT NULL
)
INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload, traceparent)
VALUES ($19, 'order', $8, 'OrderCreated', $20, $21)
