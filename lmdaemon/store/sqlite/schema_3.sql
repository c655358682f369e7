-- Version 3: what keeps an operator back is told with who, since when and why; a body stays provable when it is gone.

ALTER TABLE operator ADD COLUMN held_by TEXT;              -- the name of the API token
ALTER TABLE operator ADD COLUMN held_note TEXT;
ALTER TABLE operator ADD COLUMN held_until_at INTEGER;     -- released by itself then, or NULL
ALTER TABLE operator ADD COLUMN paused_at INTEGER;         -- when the Retry-After came that not_before_at is from
ALTER TABLE operator ADD COLUMN opened_at INTEGER;         -- when the breaker opened; NULL while it is closed
ALTER TABLE operator ADD COLUMN failed_at INTEGER;         -- the last failure, also of a time that is over
ALTER TABLE operator ADD COLUMN failed_reason TEXT;
ALTER TABLE operator ADD COLUMN failed_detail TEXT;
ALTER TABLE operator ADD COLUMN alike_since_at INTEGER;    -- since when all attempts have failed for that same reason
ALTER TABLE operator ADD COLUMN failed_before_at INTEGER;  -- the last failure before failing_since_at
ALTER TABLE operator ADD COLUMN urls TEXT;                 -- JSON array: [since (wall ms), its URL without user info and query], …
ALTER TABLE delivery ADD COLUMN body_digest TEXT;          -- SHA-256 of the body in hex; NULL for a plug-in
