-- Version 6: what a daemon asks the one that owns an operator to do.

CREATE TABLE asked (
  id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  operator text COLLATE "C" NOT NULL,
  what     text NOT NULL,    -- 'probe': try its next delivery now; 'release_ends': let its ends wait no longer
  asked_at bigint NOT NULL,  -- by the server's clock (wall ms)
  answer   text              -- NULL: it was not done yet
);
