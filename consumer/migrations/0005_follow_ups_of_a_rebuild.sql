-- Applied by a rebuild that was ahead of the live consumers: what follows from the event has not been published yet, and is
-- once the event comes to them.
ALTER TABLE inbox ADD COLUMN follow_ups_due boolean NOT NULL DEFAULT false;
