-- A new message: its row, its outbox row (below) and, for a request with an Idempotency-Key, the answer. All of it or
-- nothing, in one round trip.
WITH remembered AS (
    INSERT INTO public.idempotency_keys (client, key, fingerprint, status, location, etag, body)
    SELECT $1::text, $2::text, $3::bytea, $4::smallint, $5::text, $6::text, $7::text WHERE $2 IS NOT NULL
), attempted AS (
    INSERT INTO public.messages (message_id, topic, key, payload, headers, traceparent, require_ack,
                                 ack_timeout_seconds, attempt, created_at, due_at)
    VALUES ($8, $9, $10, $11::text::jsonb, $12, $13, $14, $15, 1, $16, $17)
    RETURNING messages.*, $18::uuid AS outbox_id
)
