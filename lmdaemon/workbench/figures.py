"""The measurements of a simulated provider: counts, broken promises with evidence, and percentiles of times.

Percentiles have three significant digits. The library HdrHistogram computes them; the extra `workbench` installs it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EVIDENCE_MAX = 20  # cases whose description is kept, for each promise; further ones are only counted
LONGEST_MS = 3_600_000
PERCENTILES = (50.0, 90.0, 99.0, 99.9)


class Times:
    """Milliseconds, as a histogram. Raises ImportError when it is made without the library."""

    def __init__(self) -> None:
        from hdrh.histogram import HdrHistogram

        self._histogram: Any = HdrHistogram(1, LONGEST_MS * 1000, 3)

    def add(self, span_s: float) -> None:
        """Counts a span of time (s). A span longer than LONGEST_MS counts as LONGEST_MS."""
        self._histogram.record_value(min(max(1, round(span_s * 1e6)), LONGEST_MS * 1000))

    def shown(self) -> dict[str, float]:
        """Milliseconds by percentile, the maximum, and how many were measured."""
        count = int(self._histogram.get_total_count())
        if not count:
            return {"count": 0}
        found = {f"p{one:g}": self._histogram.get_value_at_percentile(one) / 1000 for one in PERCENTILES}
        return {"count": count, **found, "max": self._histogram.get_max_value() / 1000}


@dataclass
class Figures:
    """What was measured. `broken` says how often each promise was broken; `evidence` has the first cases of each."""

    counts: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    times: dict[str, Times] = field(default_factory=dict)
    evidence: list[str] = field(default_factory=list)

    def timed(self, name: str, span_s: float) -> None:
        """Counts a span of time (s) under this name."""
        if name not in self.times:
            self.times[name] = Times()
        self.times[name].add(span_s)

    def broke(self, promise: str, what: str) -> None:
        """Notes that a promise was broken. `what` describes the case; the first EVIDENCE_MAX cases are kept."""
        self.broken[promise] += 1
        if self.broken[promise] <= EVIDENCE_MAX:
            self.evidence.append(f"{promise}: {what}")

    def shown(self, promises: Mapping[str, str], duration_s: float) -> dict[str, Any]:
        """The figures for a report: whether all promises were kept, what was counted, the times."""
        return {
            "good": not any(self.broken.values()),
            "durationSeconds": round(duration_s, 1),
            "counts": dict(sorted(self.counts.items())),
            "broken": {promise: self.broken[promise] for promise in promises},
            "timesMs": {name: times.shown() for name, times in sorted(self.times.items())},
            "evidence": [*self.evidence, *self._untold()],
        }

    def _untold(self) -> list[str]:
        """How many cases of each kind are not among the evidence."""
        more = {promise: count - EVIDENCE_MAX for promise, count in self.broken.items()}
        return [f"{promise}: and {count} more" for promise, count in more.items() if count > 0]
