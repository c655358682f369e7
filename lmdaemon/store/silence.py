"""When the touches of an operator count as stopped: the one rule for what is told and for what waits. No SQL, no clock.

Times are service time in milliseconds, so nothing that keeps the daemon from hearing touches counts as silence.
"""

MANY_SESSIONS = 100  # with fewer live sessions a silence says little: their players may simply have left
SILENT_SHARE = 0.5  # of the idle time; a heartbeat comes every third of it, so at least one of each session is missing


def stopped(touched_ms: int | None, now_ms: int, idle_ms: int, live: int) -> bool:
    """Whether touches of an operator with `live` sessions have stopped, the latest having come at `touched_ms`.

    Where none has come since the start (None) none can have stopped: some operators' sessions are never touched.
    """
    return touched_ms is not None and live >= MANY_SESSIONS and now_ms - touched_ms >= idle_ms * SILENT_SHARE
