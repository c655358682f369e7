-- Version 3: which request opened a session, and which closed it.

ALTER TABLE session ADD COLUMN opened_request text;  -- the X-Request-Id of the call that opened it, if it had one
ALTER TABLE session ADD COLUMN ended_request text;   -- the same of the call that closed it
