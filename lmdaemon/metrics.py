"""Prometheus metrics: counters raised where things happen, gauges read at a scrape. The home of prometheus-client.

Wired up by `daemon`; `api` serves `text()`. Names follow the Prometheus conventions: base units, `_total`, bounded
labels (operators, sinks, reasons and codes are few; players and sessions are never a label). An operator or sink that
leaves the file takes its counters with it; what it has left in the store shows in the gauges until it is gone.
"""

import asyncio
import concurrent.futures.thread  # noqa: F401 - else the first scrape opens it, maybe out of file descriptors
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

from lmdaemon.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
TURN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
ATTEMPT_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # few: they are kept for each operator and sink
COMMIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
BATCH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for every counter, which process_start_time_seconds makes superfluous

# One metric read at a scrape, a counter if its name says `_total`: name, help, labels, and the values by label values.
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
    """`process_…`, read from /proc/self at a scrape. The library takes the time of boot from /proc/stat, which the unit
    hides (ProcSubset=pid), and would then show nothing at all.
    """

    def _boot_time(self) -> float:
        return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


class _Counter(Collector):
    """A counter by its label values: plain numbers until a scrape, for the library's take a microsecond at each touch.

    Those are counted whose first `bounded` labels are known, so that the number of series has a bound; a call may have
    begun before a reload that took its operator away.
    """

    def __init__(self, name: str, help_text: str, labels: tuple[str, ...], bounded: int) -> None:
        self._described = (name, help_text, None, labels)
        self._bounded = bounded
        self._known: frozenset[tuple[str, ...]] = frozenset([()])
        self._values: dict[tuple[str, ...], int] = {}

    def add(self, *labels: str, amount: int = 1) -> None:
        if labels in self._values:
            self._values[labels] += amount
        elif labels[: self._bounded] in self._known:
            self._values[labels] = amount

    def know(self, known: Iterable[tuple[str, ...]], endings: Iterable[tuple[str, ...]] = ()) -> None:
        """Forgets all others. Those that are new begin at 0, with each of these further labels."""
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
    """A registry of its own, so that two daemons in one process (the tests) do not share figures."""

    def __init__(self, engine: Mapping[str, str] = MappingProxyType({})) -> None:
        """`engine`: name and version of what the store runs on."""
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
            "notices_total", "Notices answered by code; no operator where none was told.", "operator", "dialect", "code"
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

    def _oldest_pending(self) -> list[Reading]:
        help_text = "Age of the oldest delivery not settled yet; absent where nothing is pending."
        return [by_label("deliveries_oldest_pending_seconds", help_text, "operator", self._oldest_pending_s)]

    def configure(self, operators: Iterable[str], lanes: Iterable[tuple[str, str]], reasons: Iterable[str]) -> None:
        """The operators, the lanes (operator and sink) and the reasons of ends there are from now on. Their counters
        begin at 0, so that the first of a kind is an increase.
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
        """Registers what is read at each scrape, on the thread of `scrape`; `read` must not do I/O."""
        self._registry.register(_Readings(read))

    # -- what happens

    def opened(self, operator: str) -> None:
        self._opens.add(operator)

    def touched(self, operator: str, sessions: int) -> None:
        self._touches.add(operator, amount=sessions)

    def ended(self, operator: str, reason: str, sessions: int) -> None:
        self._ends.add(operator, reason, amount=sessions)

    def answered(self, operator: str, dialect: str, code: int) -> None:
        """A notice was; `operator` is empty where it could not be told."""
        self._notices.add(operator, dialect, str(code))

    def not_taken(self, status: int) -> None:
        self._not_taken.add(str(status))

    def over_quota(self, operator: str) -> None:
        """A notice of an unknown session was one too many in its minute."""
        self._over_quota.add(operator)

    def api_error(self, status: int) -> None:
        self._api_errors.add(str(status))

    def attempted(self, operator: str, sink: str, outcome: str, took_s: float) -> None:
        self._attempts.add(operator, sink, outcome)
        durations = self._durations_of.get((operator, sink))
        if durations is not None:
            durations.observe(took_s)

    def awoke(self, late_s: float) -> None:
        """The event loop came so late to a loop whose time had come."""
        self._turn_lag.observe(late_s)

    def committed(self, operations: int, took_s: float) -> None:
        self._batches.observe(operations)
        self._commits.observe(took_s)

    def reloaded(self, at_s: float | None) -> None:
        """The configuration was read and is in force since then (epoch), or could not be (None)."""
        self._reloaded.set(at_s is not None)
        if at_s is not None:
            self._reloaded_at.set(at_s)

    async def scrape(self, oldest_pending_s: Mapping[str, float]) -> bytes:
        """The exposition format, `CONTENT_TYPE`. Rendered on a thread, one at a time: 1,000 operators take
        0.2 s. `oldest_pending_s`: age of the oldest pending delivery by operator.
        """
        async with self._scraping:
            self._oldest_pending_s = oldest_pending_s
            return await asyncio.to_thread(self.text)

    def text(self) -> bytes:
        """The exposition format, `CONTENT_TYPE`."""
        return generate_latest(self._registry)
