-- Follows on `due`, the messages that are tried again, of which there are at most as many as outbox rows' ids in $1. An
-- attempt waits twice as long as the one before, at most $2 seconds.
, numbered AS (
    SELECT message_id, row_number() OVER () AS number FROM due
), attempted AS (
    UPDATE public.messages
    SET attempt = attempt + 1, undelivered_at = NULL,
        due_at = now() + make_interval(secs => least(ack_timeout_seconds * power(2, least(attempt, 30)), $2::float8))
    FROM numbered JOIN unnest($1::uuid[]) WITH ORDINALITY AS fresh (outbox_id, number) USING (number)
    WHERE messages.message_id = numbered.message_id
    RETURNING messages.*, outbox_id
)
