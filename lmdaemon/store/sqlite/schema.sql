-- The database of lmdaemon, version 1 (PRAGMA user_version). A change of it is a migration in file.py, never an edit
-- of what older files were made with.
--
-- Wall times (…_at) are milliseconds since the epoch, UTC. Service times (…_ms) are milliseconds of the service clock,
-- which stands still while the daemon cannot hear touches. A session is active while its reason is NULL.

CREATE TABLE session (
  id          INTEGER PRIMARY KEY,  -- order of opening: pages run along it
  operator    TEXT NOT NULL,        -- name of [operators.NAME]
  session_id  TEXT NOT NULL,        -- as issued by provider or operator, opaque
  player_id   TEXT NOT NULL,
  token       TEXT,                 -- secret, never shown; once nothing can need it, a salted hash of it (0x1F, salt, hash)
  attributes  TEXT,                 -- JSON object given at opening
  extra       TEXT,                 -- JSON object: fields of the notice that no dialect knows
  idle_ms     INTEGER NOT NULL,     -- service time without a touch after which the session ends
  opened_at   INTEGER NOT NULL,
  seen_ms     INTEGER NOT NULL,     -- service time of the last touch: what idleness is measured from
  seen_at     INTEGER NOT NULL,     -- the same as wall time, for people
  due_ms      INTEGER NOT NULL,     -- when the sweeper looks at it next; a touch leaves it alone
  lifetime_at INTEGER,              -- wall time of the longest life, or NULL
  ended_at    INTEGER,
  reason      TEXT CHECK (reason IN ('inactivity', 'max_lifetime', 'closed', 'reported')),
  UNIQUE (operator, session_id)
);
-- What is due, and the next deadline, without looking at anything else.
CREATE INDEX session_due ON session (due_ms) WHERE reason IS NULL;
CREATE INDEX session_lifetime ON session (lifetime_at) WHERE reason IS NULL AND lifetime_at IS NOT NULL;
-- Pages, newest first: the id rides along in every index entry.
CREATE INDEX session_active ON session (operator) WHERE reason IS NULL;
CREATE INDEX session_ended ON session (operator) WHERE reason IS NOT NULL;
CREATE INDEX session_player ON session (operator, player_id);
-- What is old enough to be pruned.
CREATE INDEX session_ended_at ON session (ended_at) WHERE ended_at IS NOT NULL;

-- One row per end and sink, made in the transaction of the end. This table is the queue.
CREATE TABLE delivery (
  id           INTEGER PRIMARY KEY,
  nonce        TEXT NOT NULL,       -- the public id is msg_<id>_<nonce>
  session      INTEGER NOT NULL REFERENCES session (id),
  operator     TEXT NOT NULL,
  sink         TEXT NOT NULL,       -- 'http' or 'plugin:<name>'
  state        TEXT NOT NULL CHECK (state IN ('pending', 'delivered', 'dead')),
  created_at   INTEGER NOT NULL,
  due_at       INTEGER NOT NULL,    -- not to be tried before
  settled_at   INTEGER,
  attempts     INTEGER NOT NULL DEFAULT 0,
  step         INTEGER NOT NULL DEFAULT 0,  -- place in the schedule; a retry by hand starts it again
  aged_from_at INTEGER NOT NULL,    -- where max_age counts from
  held_base_ms INTEGER NOT NULL,    -- the operator's held_total_ms at that time: holds do not age a delivery
  last_status  INTEGER,             -- HTTP status of the last attempt
  last_code    NUMERIC,             -- its `error`
  last_error   TEXT,                -- reason in a word or two
  history      TEXT NOT NULL DEFAULT '[]',  -- JSON array of the latest attempts
  body         BLOB NOT NULL,       -- what is sent, byte for byte, at every attempt; empty for a plug-in, and once delivered
  UNIQUE (session, sink)            -- an end has one delivery per sink, whatever happens
);
CREATE INDEX delivery_due ON delivery (operator, sink, due_at) WHERE state = 'pending';
CREATE INDEX delivery_state ON delivery (operator, state);

-- What is known of an operator besides its configuration: figures kept up in every transaction, so that nobody ever
-- counts rows, and what holds its URL back (see model.Gate).
CREATE TABLE operator (
  name             TEXT PRIMARY KEY,
  live             INTEGER NOT NULL DEFAULT 0,
  pending          INTEGER NOT NULL DEFAULT 0,
  dead             INTEGER NOT NULL DEFAULT 0,
  held_at          INTEGER,
  held_reason      TEXT,
  held_total_ms    INTEGER NOT NULL DEFAULT 0,
  failures         INTEGER NOT NULL DEFAULT 0,
  failing_since_at INTEGER,
  pause_ms         INTEGER NOT NULL DEFAULT 0,
  probe_at         INTEGER NOT NULL DEFAULT 0,
  not_before_at    INTEGER NOT NULL DEFAULT 0,
  paced_until_at   INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;

-- The service clock as of the last transaction: one row.
CREATE TABLE clock (
  id         INTEGER PRIMARY KEY CHECK (id = 1),
  service_ms INTEGER NOT NULL,
  wall_at    INTEGER NOT NULL       -- when that was, to count the downtime if the configuration asks for it
);
INSERT INTO clock VALUES (1, 0, 0);
