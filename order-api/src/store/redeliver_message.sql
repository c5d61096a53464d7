-- A message is tried again at a person's wish: not if it waits for nobody (any more).
WITH due AS (
    SELECT message_id FROM public.messages
    WHERE message_id = $3 AND acknowledged_at IS NULL AND require_ack <> '{}'
    FOR NO KEY UPDATE
)
