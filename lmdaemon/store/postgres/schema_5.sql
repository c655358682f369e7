-- Version 5: several daemons use a database at the same time. An older program believes to be alone, so it must not.

-- What a daemon tells the others in each of its transactions; NULL: it is an older program, which tells nothing.
ALTER TABLE member ADD COLUMN known_at bigint;           -- the latest time of the server that it knew of then
ALTER TABLE member ADD COLUMN next_due_ms bigint;        -- the next deadline of its operators; NULL: there is none
ALTER TABLE member ADD COLUMN address text NOT NULL DEFAULT '';  -- where its private side listens
ALTER TABLE member ADD COLUMN digest text NOT NULL DEFAULT '';   -- of its settings of all operators

-- Which daemon ends the idle sessions of an operator and delivers for it.
CREATE TABLE owner (
  operator  text COLLATE "C" PRIMARY KEY,
  member    bigint NOT NULL,         -- 0: nobody; anybody may take it
  wanted_by bigint,                  -- the daemon that asks for it, and waits until it is handed over
  epoch     bigint NOT NULL DEFAULT 1  -- counts the changes of this row
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- After a daemon was put out nothing ends for inactivity before this service time.
ALTER TABLE clock ADD COLUMN hold_until_ms bigint NOT NULL DEFAULT 0;

-- What the owner of an operator has to find out when another daemon has done it; these only grow.
ALTER TABLE figure ADD COLUMN opened bigint NOT NULL DEFAULT 0;      -- sessions opened
ALTER TABLE figure ADD COLUMN made bigint NOT NULL DEFAULT 0;        -- deliveries made, or made due again
ALTER TABLE figure ADD COLUMN touched_ms bigint NOT NULL DEFAULT 0;  -- service time of the latest touch, at most 1 s too early

-- What is due, and the next deadline, of one operator, in the place of those of the whole table.
CREATE INDEX session_due_of ON session (operator, due_ms) WHERE reason IS NULL;
CREATE INDEX session_lifetime_of ON session (operator, lifetime_at) WHERE reason IS NULL AND lifetime_at IS NOT NULL;
DROP INDEX session_due;
DROP INDEX session_lifetime;
