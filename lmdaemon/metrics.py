"""Prometheus metrics: counters raised where things happen, gauges read at a scrape. The home of prometheus-client.

Wired up by `daemon`; `api` serves `text()`. Names follow the Prometheus conventions: base units, `_total`, bounded
labels (operators, reasons and codes are few; players and sessions are never a label).
"""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lmdaemon.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)

# One row of gauges: name, help, labels, and the values by label values.
Reading = tuple[str, str, tuple[str, ...], dict[tuple[str, ...], float]]


class _Readings(Collector):
    def __init__(self, read: Callable[[], list[Reading]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        for name, help_text, labels, values in self._read():
            family = GaugeMetricFamily(name, help_text, labels=labels)
            for label_values, value in values.items():
                family.add_metric(label_values, value)
            yield family


class Metrics:
    """A registry of its own, so that two daemons in one process (the tests) do not share figures."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        Gauge("lmdaemon_build_info", "Version of the daemon.", ["version"], registry=registry).labels(__version__).set(
            1
        )
        self.ends = Counter(
            "lmdaemon_sessions_ended_total", "Sessions ended.", ["operator", "reason"], registry=registry
        )
        self.touches = Counter("lmdaemon_touches_total", "Sessions touched.", ["operator"], registry=registry)
        self.notices = Counter(
            "lmdaemon_notices_total", "SessionExpired requests answered.", ["dialect", "code"], registry=registry
        )
        self.attempts = Counter(
            "lmdaemon_delivery_attempts_total",
            "Attempts to hand an end to a sink.",
            ["operator", "sink", "outcome"],
            registry=registry,
        )
        self.lag = Histogram(
            "lmdaemon_expiry_lag_seconds",
            "Time from a session's deadline to its recorded end.",
            registry=registry,
            buckets=LAG_BUCKETS,
        )
        self.reloads = Gauge(
            "lmdaemon_config_last_reload_successful", "Whether the last reload took effect.", registry=registry
        )
        self.reloads.set(1)
        self.oldest_pending = Gauge(
            "lmdaemon_deliveries_oldest_pending_seconds",
            "Age of the oldest delivery not settled yet; absent where nothing is pending.",
            ["operator"],
            registry=registry,
        )

    def watch(self, read: Callable[[], list[Reading]]) -> None:
        """Registers gauges that are read at each scrape; `read` must not do I/O."""
        self._registry.register(_Readings(read))

    def note_oldest_pending(self, ages_s: Mapping[str, float]) -> None:
        """Takes the place of what was noted before; ages in seconds by operator."""
        self.oldest_pending.clear()
        for operator, age_s in ages_s.items():
            self.oldest_pending.labels(operator).set(age_s)

    def text(self) -> bytes:
        """The exposition format, `CONTENT_TYPE`."""
        return generate_latest(self._registry)
