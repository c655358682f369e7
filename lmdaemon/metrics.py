"""Prometheus metrics: counters that the daemon's parts raise, and gauges that are read at a scrape. Only this module
uses the Prometheus library.

Names follow the Prometheus conventions: base units, `_total`, and bounded labels (operators, sinks, reasons and codes
are few; players and sessions must never be a label). The counters of an operator or sink end when it is removed from
the configuration; its gauges stay for as long as something of it is in the store.
"""

import asyncio
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmdaemon.threads import on_a_thread
from lmdaemon.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
TURN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# Few buckets, because they are kept for each operator and sink
ATTEMPT_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
COMMIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
BATCH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for every counter, which process_start_time_seconds makes superfluous

# A metric that is read at a scrape: name, help, label names, values by label values. A name in `_total` is a counter.
Reading = tuple[str, str, tuple[str, ...], Mapping[Any, float]]


def by_label(name: str, help_text: str, label: str, values: Mapping[str, float]) -> Reading:
    """A reading with one label."""
    return f"lmdaemon_{name}", help_text, (label,), {(value,): number for value, number in values.items()}


def plain(name: str, help_text: str, value: float) -> Reading:
    """A reading without labels."""
    return f"lmdaemon_{name}", help_text, (), {(): value}


class _Readings(Collector):
    def __init__(self, read: Callable[[], list[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, help_text, labels, values in self._read():
            family: Any = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(name, help_text, labels=labels)
            for label_values, value in values.items():
                metric.add_metric(label_values, value)
            yield metric


class _Process(ProcessCollector):
    """`process_…` metrics, read from /proc/self at a scrape.

    The library reads the time of boot from /proc/stat. The systemd unit hides that file (ProcSubset=pid), and without
    it the library would show none of these metrics.
    """

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class _Counter(Collector):
    """A counter that is a plain number by label values until a scrape: the library's own counter would cost a
    microsecond for each touch.

    To bound the number of series, label values are counted only if the first `bounded` of them are known (`know`). A
    call may name an operator that a reload has removed since the call began.
    """

    def __init__(self, name: str, help_text: str, labels: tuple[str, ...], bounded: int) -> None:
        self._described = (name, help_text, None, labels)
        self._bounded = bounded
        self._known: frozenset[tuple[str, ...]] = frozenset([()])
        self._values: dict[tuple[str, ...], int] = {}

    def add(self, *labels: str, amount: int = 1) -> None:
        """Raises the counter with these label values, if they are known."""
        if labels in self._values:
            self._values[labels] += amount
        elif labels[: self._bounded] in self._known:
            self._values[labels] = amount

    def values(self) -> Iterable[tuple[Any, int]]:
        """The value for each combination of label values."""
        return self._values.items()

    def know(self, known: Iterable[tuple[str, ...]], endings: Iterable[tuple[str, ...]] = ()) -> None:
        """Counts these label values from now on and forgets all others.

        For each new one, counters begin at 0: one for each of `endings`, the values of the remaining labels.
        """
        before, self._known = self._known, frozenset(known)
        if before - self._known:
            self._values = {
                labels: value for labels, value in self._values.items() if labels[: self._bounded] in self._known
            }
        new = self._known - before
        for ending in endings:
            self._values |= {(*labels, *ending): 0 for labels in new}

    def collect(self) -> Iterator[Metric]:
        metric = CounterMetricFamily(*self._described)
        for labels, value in self._values.copy().items():
            metric.add_metric(labels, value)
        yield metric


class Metrics:
    """All metrics of one daemon, in a registry of its own: two daemons in one process (in tests) share no figures."""

    def __init__(self, engine: Mapping[str, str] = MappingProxyType({})) -> None:
        """`engine`: name and version of the store's database engine."""
        self._registry = registry = CollectorRegistry()
        _Process(registry=registry)
        versions = {"version": __version__, "python": platform.python_version(), **engine}
        built = Gauge("lmdaemon_build_info", "1; its labels are the versions.", list(versions), registry=registry)
        built.labels(**versions).set(1)

        def counter(name: str, help_text: str, *labels: str, bounded: int = 1) -> _Counter:
            made = _Counter(f"lmdaemon_{name}", help_text, labels, bounded)
            registry.register(made)
            return made

        def histogram(name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"lmdaemon_{name}", help_text, labels, buckets=buckets, registry=registry)

        self._opens = counter("sessions_opened_total", "Sessions opened over the session API.", "operator")
        self._touches = counter("touches_total", "Sessions touched.", "operator")
        self._ends = counter("sessions_ended_total", "Sessions ended.", "operator", "reason")
        self._notices = counter(
            "notices_total", "Notices answered, by code; no operator if none was named.", "operator", "dialect", "code"
        )
        self._not_taken = counter(
            "notices_not_taken_total", "Requests to the endpoint that never became a notice.", "status", bounded=0
        )
        self._over_quota = counter(
            "notices_over_quota_total",
            "Notices of unknown sessions beyond unknown_per_minute: the sender was told to retry.",
            "operator",
        )
        self._api_errors = counter(
            "api_errors_total", "Requests to the private API answered with an error.", "status", bounded=0
        )
        self._attempts = counter(
            "delivery_attempts_total",
            "Attempts to hand an end to a sink.",
            *("operator", "sink", "outcome"),
            bounded=2,
        )
        self._durations = histogram(
            "delivery_attempt_duration_seconds",
            "How long attempts took, from the lookup of the name to the end of the answer.",
            ATTEMPT_BUCKETS,
            *("operator", "sink"),
        )
        self._durations_of: dict[tuple[str, str], Histogram] = {}
        self.lag = histogram(
            "expiry_lag_seconds", "Time from a session's deadline to the commit of its end.", LAG_BUCKETS
        )
        self._turn_lag = histogram(
            "event_loop_lag_seconds", "How late the event loop ran what was due, at each wake-up.", TURN_BUCKETS
        )
        self._commits = histogram(
            "store_commit_duration_seconds", "How long transactions took, their sync included.", COMMIT_BUCKETS
        )
        self._batches = histogram("store_batch_operations", "Operations in one transaction.", BATCH_BUCKETS)
        self._reloaded = Gauge(
            "lmdaemon_config_last_reload_successful", "1 if the last reload took effect.", registry=registry
        )
        self._reloaded_at = Gauge(
            "lmdaemon_config_last_reload_success_timestamp_seconds",
            "When the configuration in force was read.",
            registry=registry,
        )
        self._oldest_pending_s: Mapping[str, float] = {}
        self._scraping = asyncio.Lock()
        self.watch(self._oldest_pending)

    def totals(self) -> dict[str, tuple[int, int, int, int]]:
        """Since the start, by operator: sessions touched, ended, attempts that delivered, and those that did not."""
        touches = {operator: value for (operator,), value in self._touches.values()}
        ends: dict[str, int] = {}
        delivered: dict[str, int] = {}
        failed: dict[str, int] = {}
        for (operator, _), value in self._ends.values():
            ends[operator] = ends.get(operator, 0) + value
        for (operator, _, outcome), value in self._attempts.values():
            those = delivered if outcome == "delivered" else failed
            those[operator] = those.get(operator, 0) + value
        return {
            operator: (count, ends.get(operator, 0), delivered.get(operator, 0), failed.get(operator, 0))
            for operator, count in touches.items()
        }

    def _oldest_pending(self) -> list[Reading]:
        help_text = "Age of the oldest delivery not settled yet; absent where nothing is pending."
        return [by_label("deliveries_oldest_pending_seconds", help_text, "operator", self._oldest_pending_s)]

    def configure(self, operators: Iterable[str], lanes: Iterable[tuple[str, str]], reasons: Iterable[str]) -> None:
        """Counts these operators and lanes (operator and sink) from now on, and forgets all others.

        The counters of new ones begin at 0, those of ends at 0 for each of `reasons`, so that Prometheus sees the first
        event as an increase. Only the counters of notices appear with the first notice.
        """
        names, pairs = [(name,) for name in operators], list(lanes)
        for counter, endings in (
            (self._opens, [()]),
            (self._touches, [()]),
            (self._over_quota, [()]),
            (self._ends, [(reason,) for reason in reasons]),
        ):
            counter.know(names, endings)
        self._notices.know([*names, ("",)])
        self._attempts.know(pairs, [(outcome,) for outcome in ("delivered", "retry", "final", "hold")])
        for pair in self._durations_of.keys() - set(pairs):
            self._durations.remove(*pair)
        self._durations_of = {pair: self._durations_of.get(pair) or self._durations.labels(*pair) for pair in pairs}

    def watch(self, read: Callable[[], list[Reading]]) -> None:
        """Registers readings for every scrape. `read` is called on a thread and must not do I/O."""
        self._registry.register(_Readings(read))

    # -- called by the daemon's parts when something has happened

    def opened(self, operator: str, sessions: int = 1) -> None:
        """Sessions were opened."""
        self._opens.add(operator, amount=sessions)

    def touched(self, operator: str, sessions: int) -> None:
        """So many sessions were touched."""
        self._touches.add(operator, amount=sessions)

    def ended(self, operator: str, reason: str, sessions: int) -> None:
        """So many sessions have ended for this reason."""
        self._ends.add(operator, reason, amount=sessions)

    def answered(self, operator: str, dialect: str, code: int) -> None:
        """A notice was answered with this code; `operator` is empty where the notice did not tell it."""
        self._notices.add(operator, dialect, str(code))

    def not_taken(self, status: int) -> None:
        """A request to the endpoint was answered with this HTTP status before it was parsed."""
        self._not_taken.add(str(status))

    def over_quota(self, operator: str) -> None:
        """A notice of an unknown session was refused for `unknown_per_minute`."""
        self._over_quota.add(operator)

    def api_error(self, status: int) -> None:
        """A request to the private API was answered with this HTTP status, an error."""
        self._api_errors.add(str(status))

    def attempted(self, operator: str, sink: str, outcome: str, took_s: float) -> None:
        """An attempt has ended with this outcome, one of `retry.Verdict`."""
        self._attempts.add(operator, sink, outcome)
        durations = self._durations_of.get((operator, sink))
        if durations is not None:
            durations.observe(took_s)

    def awoke(self, late_s: float) -> None:
        """The event loop ran something `late_s` seconds after it was due."""
        self._turn_lag.observe(late_s)

    def committed(self, operations: int, took_s: float) -> None:
        """A transaction with so many operations was committed; `took_s` includes its sync."""
        self._batches.observe(operations)
        self._commits.observe(took_s)

    def reloaded(self, at_s: float | None) -> None:
        """The configuration was reloaded at `at_s` (epoch) and is in force, or the reload failed (None)."""
        self._reloaded.set(at_s is not None)
        if at_s is not None:
            self._reloaded_at.set(at_s)

    async def scrape(self, oldest_pending_s: Mapping[str, float]) -> bytes:
        """All metrics in the exposition format, `CONTENT_TYPE`.

        They are rendered on a thread, one scrape at a time: 1,000 operators take 0.2 s. `oldest_pending_s` is the age
        of the oldest pending delivery by operator.
        """
        async with self._scraping:
            self._oldest_pending_s = oldest_pending_s
            return await on_a_thread(self.text)

    def text(self) -> bytes:
        """All metrics in the exposition format, rendered on the calling thread."""
        return generate_latest(self._registry)
