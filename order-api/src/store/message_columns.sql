SELECT message_id, topic, key, require_ack, ack_timeout_seconds, attempt, created_at, due_at, acknowledged_at, undelivered_at,
       (SELECT coalesce(jsonb_agg(jsonb_build_object(
                   'consumerGroup', consumer_group, 'attempt', ack.attempt, 'appliedAt', applied_at, 'lsn', lsn::text)
                   ORDER BY received_at, applied_at, consumer_group), '[]')
        FROM public.message_acks AS ack WHERE ack.message_id = messages.message_id) AS acks
