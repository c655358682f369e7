"""The lanes that exist: made from the settings, and owned by this daemon or by another one on the database."""

from collections.abc import Iterator, Mapping

from lmdaemon.clock import Clock
from lmdaemon.config.settings import Operator, Policy, Settings
from lmdaemon.delivery.lanes import Agenda, Lane
from lmdaemon.log import safe_url
from lmdaemon.model import HTTP_SINK, PLUGIN_PREFIX, in_time
from lmdaemon.plugins import LoadedPlugin
from lmdaemon.store.contract import Store


class LaneSet:
    """The lanes by operator and sink, and what `/metrics` and `/health` tell of them. Lanes that must be looked at are
    put on the agenda.
    """

    def __init__(self, store: Store, clock: Clock, agenda: Agenda) -> None:
        self._store = store
        self._clock = clock
        self._agenda = agenda
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._sinks: set[str] = set()  # all sinks since the start, also those that were removed
        self._in_flight: dict[tuple[str, str], set[int]] = {}  # ids of deliveries, also of lanes that were removed

    def get(self, operator: str, sink: str) -> Lane | None:
        """The present lane of an operator and sink. A reload may replace it."""
        return self._lanes.get((operator, sink))

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def configure(self, settings: Settings, plugins: Mapping[str, LoadedPlugin]) -> None:
        """Takes over new settings. Lanes that stay keep their attempts; rows of lanes that were removed wait."""
        lanes: dict[tuple[str, str], Lane] = {}
        for operator in settings.operators.values():
            sinks: list[tuple[str, Policy, LoadedPlugin | None]] = []
            if operator.notify:
                sinks.append((HTTP_SINK, operator.policy, None))
            sinks += [
                (PLUGIN_PREFIX + plugin.name, plugin.settings.policy, plugin)
                for plugin in plugins.values()
                if plugin.settings.listens_to(operator.name)
            ]
            for sink, policy, plugin in sinks:
                lanes[operator.name, sink] = self._lane(operator, sink, policy, plugin)
        for key, lane in self._lanes.items():
            if lanes.get(key) is not lane:
                self._agenda.drop(lane)
        self._lanes = lanes
        self._sinks.update(sink for _, sink in lanes)

    def _lane(self, operator: Operator, sink: str, policy: Policy, plugin: LoadedPlugin | None) -> Lane:
        """The existing lane with its new settings, or a new one.

        New lanes, and those whose slots, schedule or plug-in have changed, are put on the agenda; others are not.
        """
        key = (operator.name, sink)
        lane = self._lanes.get(key)
        if lane is None:
            lane = Lane(operator, sink, policy, plugin)
            # A lane that was removed while attempts were under way may come back: these attempts still count
            lane.in_flight = self._in_flight.setdefault(key, lane.in_flight)
            self._start_over(lane)
            self._agenda.now(lane)
        elif lane.policy != policy or lane.plugin is not plugin:
            self._agenda.now(lane)
        lane.operator, lane.policy, lane.plugin = operator, policy, plugin
        if lane.own(self._store.owns(operator.name)):
            self._start_over(lane)
        url = safe_url(operator.url) if plugin is None else None
        if lane.url != url or not lane.url_since_at:
            lane.url, lane.url_since_at, lane.is_url_noted = url, self._clock.wall_ms(), False
            self._agenda.now(lane)
        return lane

    def own(self, operator: str) -> None:
        """Is called when the operator's owner has changed. Puts its lanes on the agenda if this daemon is the owner,
        else removes them.
        """
        is_owned = self._store.owns(operator)
        for sink in self._sinks:
            lane = self._lanes.get((operator, sink))
            if lane is None or not lane.own(is_owned):
                continue
            self._start_over(lane)
            if is_owned:
                self._agenda.now(lane)
            else:
                self._agenda.drop(lane)

    def start_over(self) -> None:
        """Is called after an outage of the store (Lane.start_over)."""
        for lane in self._lanes.values():
            self._start_over(lane)

    def _start_over(self, lane: Lane) -> None:
        lane.start_over(self._store.gate(lane.operator.name), self._clock.wall_ms())

    def is_under_way(self, operator: str) -> bool:
        """Whether an attempt of the operator is under way, also in a lane that was removed."""
        return any(self._in_flight.get((operator, sink)) for sink in self._sinks)

    @property
    def attempting(self) -> dict[tuple[str, str], int]:
        """The number of attempts under way, by operator and sink."""
        return {pair: lane.attempting for pair, lane in self._lanes.items()}

    @property
    def attempts_max(self) -> int:
        """The number of attempts that may be under way at the same time."""
        return sum(lane.policy.concurrency for lane in self._lanes.values())

    @property
    def overdue_s(self) -> dict[tuple[str, str], float]:
        """How long (s) the earliest due delivery has waited for a slot, by operator and sink.

        0 while hold, Retry-After or breaker stop it.
        """
        now_at = self._clock.wall_ms()
        return {pair: lane.overdue_s(self._store.gate(pair[0]), now_at) for pair, lane in self._lanes.items()}

    @property
    def behind(self) -> dict[tuple[str, str], str]:
        """Lanes (operator, sink) whose deliveries have waited for long for a slot and for nothing else, each with the
        rates at which deliveries are added and finished, in words.
        """
        now_at, now_s = self._clock.wall_ms(), self._clock.monotonic()
        found = {}
        for pair, lane in self._lanes.items():
            gate = self._store.gate(pair[0])
            if lane.pace.is_behind and (waited_s := lane.overdue_s(gate, now_at)) > 0:
                said = lane.pace_in_words(gate, now_at, now_s)
                found[pair] = f"the first has waited for a slot for {in_time(waited_s)}, {said}"
        return found
