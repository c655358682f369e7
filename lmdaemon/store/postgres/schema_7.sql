-- Version 7: what the owner of an operator tells the other daemons of it.

ALTER TABLE owner ADD COLUMN waits_until_ms bigint;  -- service time; NULL: its ends for inactivity do not wait for touches
