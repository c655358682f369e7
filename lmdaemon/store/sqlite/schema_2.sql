-- Version 2: every filter of the lists has an index.

-- Deliveries of an operator's sink in a state, newest first: the id rides along. It takes the place of one without the
-- sink, so that a delivery that is made or settled still writes as many index entries.
CREATE INDEX delivery_lane ON delivery (operator, sink, state);
DROP INDEX delivery_state;
-- Those that died since a time.
CREATE INDEX delivery_dead ON delivery (operator, settled_at) WHERE state = 'dead';
