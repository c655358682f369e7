-- Version 2: what keeps an operator back is told with who, since when and why; a body stays provable when it is gone.

ALTER TABLE operator ADD COLUMN held_by text;              -- the name of the API token
ALTER TABLE operator ADD COLUMN held_note text;
ALTER TABLE operator ADD COLUMN held_until_at bigint;     -- released by itself then, or NULL
ALTER TABLE operator ADD COLUMN paused_at bigint;         -- when the Retry-After came that not_before_at is from
ALTER TABLE operator ADD COLUMN opened_at bigint;         -- when the breaker opened; NULL while it is closed
ALTER TABLE operator ADD COLUMN failed_at bigint;         -- the last failure, also of a time that is over
ALTER TABLE operator ADD COLUMN failed_reason text;
ALTER TABLE operator ADD COLUMN failed_detail text;
ALTER TABLE operator ADD COLUMN alike_since_at bigint;    -- since when all attempts have failed for that same reason
ALTER TABLE operator ADD COLUMN failed_before_at bigint;  -- the last failure before failing_since_at
ALTER TABLE operator ADD COLUMN urls text;                 -- JSON array: [since (wall ms), its URL without user info and query], …
ALTER TABLE delivery ADD COLUMN body_digest text;          -- SHA-256 of the body in hex; NULL for a plug-in
