-- Version 4: which request opened a session, and which closed it.

ALTER TABLE session ADD COLUMN opened_request TEXT;  -- the X-Request-Id of the call that opened it, if it had one
ALTER TABLE session ADD COLUMN ended_request TEXT;   -- the same of the call that closed it
