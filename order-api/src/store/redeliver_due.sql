-- The messages whose time is up, as many as there are ids, that may be tried again. What another instance is at, or the one
-- who writes acknowledgements, is theirs: nobody waits for anybody, and no attempt is made twice.
WITH due AS (
    SELECT message_id FROM public.messages
    WHERE due_at <= now() AND attempt < $3
    ORDER BY due_at LIMIT cardinality($1::uuid[])
    FOR NO KEY UPDATE SKIP LOCKED
)
