-- Follows on `attempted`, the messages' rows with the ids of their outbox rows.
INSERT INTO public.outbox (id, topic, aggregatetype, aggregateid, type, payload, headers, traceparent)
SELECT outbox_id, topic, 'message', coalesce(key, message_id::text), 'Message', payload,
       headers || jsonb_strip_nulls(jsonb_build_object(
           'message-id', message_id, 'attempt', attempt::text, 'require-ack', nullif(array_to_string(require_ack, ','), ''))),
       traceparent
FROM attempted
