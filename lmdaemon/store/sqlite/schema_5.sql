-- Version 5: a dead delivery that nobody wants any more can be discarded.

ALTER TABLE delivery ADD COLUMN discarded TEXT;  -- JSON object: at, by, note; such a delivery no longer counts as dead
