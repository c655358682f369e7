"""What `/metrics` reads from the parts of the daemon at a scrape: gauges, and counters that a part keeps itself.

It runs on another thread than the event loop. So it must not do I/O or change anything, and it copies collections that
the event loop may change meanwhile.
"""

from collections.abc import Callable, Iterator, Mapping

from lmdaemon import log, retry
from lmdaemon.agreement import disagreement
from lmdaemon.clock import FREEZES, Clock
from lmdaemon.config.settings import Settings
from lmdaemon.delivery.dispatcher import Dispatcher
from lmdaemon.disk import DiskWatch
from lmdaemon.health import Health
from lmdaemon.metrics import Reading, by_label, plain
from lmdaemon.store.contract import Store
from lmdaemon.sweeper import Sweeper
from lmdaemon.web.listener import Site
from lmdaemon.web.memory import Bounds
from lmdaemon.web.sockets import Hearing


class Readings:
    """Reads the parts. `settings` returns those in force; `sites` has the listeners by name, once they listen."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        settings: Callable[[], Settings],
        sweeper: Sweeper,
        disk: DiskWatch,
        dispatcher: Dispatcher,
        health: Health,
        hearing: Hearing,
        bounds: Bounds,
        sites: Mapping[str, Site],
    ) -> None:
        self._store = store
        self._clock = clock
        self._settings = settings
        self._sweeper = sweeper
        self._disk = disk
        self._dispatcher = dispatcher
        self._health = health
        self._hearing = hearing
        self._bounds = bounds
        self._sites = sites

    def read(self) -> list[Reading]:
        """All readings, from figures that are kept in memory."""
        return [
            *self._of_operators(),
            *self._of_deliveries(),
            *self._of_the_daemon(),
            *self._of_certificates(),
            *self._of_the_store(),
            *self._of_daemons(),
        ]

    def _of_operators(self) -> Iterator[Reading]:
        """Readings of the configured operators, and of removed ones while any of their sessions or deliveries remain.
        Of several daemons on one database, only the owner of an operator has its readings, so that sums are true and
        alerts come once.
        """
        now_at = self._clock.wall_ms()
        waiting = [name for name, one in self._store.figures.copy().items() if one.live or one.pending or one.dead]
        configured = self._settings().operators
        names = sorted(name for name in {*waiting, *configured} if self._store.owns(name) or name not in configured)
        figures = {name: self._store.figures_of(name) for name in names}
        gates = {name: self._store.gate(name) for name in names}
        mass, silent = self._sweeper.alarm.of_operators(), self._sweeper.touch_alarm.silent.copy()
        ends_wait = self._sweeper.waiting.copy()
        states = {"closed": 0.0, "half-open": 1.0, "open": 2.0}
        per_operator: list[tuple[str, str, dict[str, float]]] = [
            ("sessions_live", "Sessions that are active.", {n: f.live for n, f in figures.items()}),
            ("deliveries_pending", "Deliveries not settled yet.", {n: f.pending for n, f in figures.items()}),
            ("deliveries_dead", "Deliveries given up.", {n: f.dead for n, f in figures.items()}),
            ("operator_held", "1 while sending is held.", {n: float(g.held_at is not None) for n, g in gates.items()}),
            (
                "operator_breaker_state",
                "0 closed, 1 half-open, 2 open.",
                {n: states[retry.breaker(g, now_at)] for n, g in gates.items()},
            ),
            (
                "operator_held_since_timestamp_seconds",
                "Since when sending is held; 0 while it is not.",
                {n: (g.held_at or 0) / 1000 for n, g in gates.items()},
            ),
            (
                "operator_breaker_since_timestamp_seconds",
                "Since when the breaker is not closed; 0 while it is.",
                {n: (g.opened_at or 0) / 1000 for n, g in gates.items()},
            ),
            (
                "operator_not_before_timestamp_seconds",
                "Until when a Retry-After or the breaker puts the next attempt off; 0 when neither does.",
                {n: (retry.not_before(g, now_at) or 0) / 1000 for n, g in gates.items()},
            ),
            (
                "operator_mass_expiry",
                "1 while a large part of its sessions has ended at once lately.",
                {n: float(n in mass) for n in names},
            ),
            (
                "operator_touches_stopped",
                "1 while many of its sessions are live and its touches have stopped.",
                {n: float(n in silent) for n in names},
            ),
            (
                "operator_ends_waiting",
                "1 while its ends for inactivity wait because its touches have stopped.",
                {n: float(n in ends_wait) for n in names},
            ),
        ]
        for name, help_text, values in per_operator:
            yield by_label(name, help_text, "operator", values)

    def _of_deliveries(self) -> Iterator[Reading]:
        lane = ("operator", "sink")
        overdue = "How long the earliest due delivery has waited for a free slot; 0 while its operator is kept back."
        yield "lmdaemon_deliveries_in_flight", "Attempts under way.", lane, self._dispatcher.lanes.attempting
        yield "lmdaemon_deliveries_overdue_seconds", overdue, lane, self._dispatcher.lanes.overdue_s

    def _of_the_daemon(self) -> Iterator[Reading]:
        """Readings of the daemon itself: loops, clock, log, connections."""
        frozen = {reason: float(reason in self._store.service_clock.frozen) for reason in FREEZES}
        accepting = {name: float(name not in self._hearing.deaf) for name in self._sites}
        most = {name: float(site.most) for name, site in self._sites.items()}
        connections = {name: float(site.connections) for name, site in self._sites.items()}
        turned = {
            (name, limit): float(count)
            for name, site in self._sites.items()
            for limit, count in site.turned_away.copy().items()
        }
        yield by_label("loop_late_seconds", "Time since the loop should have run.", "loop", self._health.late_s)
        yield by_label("service_clock_frozen", "1 while the clock stands still for this reason.", "reason", frozen)
        yield plain("stalled_seconds_total", "Time in stalls, not counted as service time.", self._sweeper.lost_s)
        yield plain(
            "expiry_hold_seconds",
            "For how long nothing ends for inactivity yet: the grace after a start, or a pause after a stall.",
            self._sweeper.hold_s,
        )
        yield plain(
            "mass_expiry", "1 while many sessions have ended at once lately.", float(self._sweeper.alarm.active)
        )
        yield by_label("log_events_total", "Events of these levels, written or suppressed.", "level", log.happened)
        yield plain("log_lines_suppressed_total", "Lines that were counted instead of written.", log.repeats.suppressed)
        yield by_label("http_connections", "Open connections.", "listener", connections)
        yield by_label("http_connections_max", "Connections that a listener takes.", "listener", most)
        cut = {(name, why): float(n) for name, site in self._sites.items() for why, n in site.cuts.items()}
        beyond = "Connections beyond what the listener takes, or what it takes from one address."
        yield "lmdaemon_http_connections_refused_total", beyond, ("listener", "limit"), turned
        yield "lmdaemon_http_connections_cut_total", "Connections cut.", ("listener", "reason"), cut
        held = {"strangers": self._bounds.strangers.used, "known": self._bounds.known.used}
        yield by_label("http_held_bytes", "Bytes received and not answered, or answered and not taken.", "by", held)
        yield by_label("http_accepting", "0 while a listener cannot accept connections.", "listener", accepting)

    def _of_certificates(self) -> Iterator[Reading]:
        """When certificates of listeners, and those shown to operators, expire: the first of each file counts."""
        ends = {
            tuple(key.rpartition(".")[::2]): min(one.not_after for one in pem.certificates).timestamp()
            for key, pem in self._settings().pems.items()
            if pem.certificates
        }
        own = {at: end for (at, key), end in ends.items() if key == "tls_cert_file"}
        shown = {at.removeprefix("operators."): end for (at, key), end in ends.items() if key == "client_cert_file"}
        help_text = "When a listener's certificate expires."
        yield by_label("certificate_expires_timestamp_seconds", help_text, "listener", own)
        help_text = "When the certificate that is shown to an operator expires."
        yield by_label("client_certificate_expires_timestamp_seconds", help_text, "operator", shown)
        failed = {
            (name, reason): float(count)
            for name in self._settings().tls
            for reason, count in self._sites[name].handshakes_failed.copy().items()
        }
        labels = ("listener", "reason")
        yield "lmdaemon_tls_handshakes_failed_total", "Connections whose TLS handshake failed.", labels, failed

    def _of_daemons(self) -> Iterator[Reading]:
        """Readings of the daemons on the database, this one among them."""
        members = self._health.members
        behind_ms = sum(one.lag_ms for one in members if one.is_self)
        owned = sum(self._store.owns(name) for name in self._settings().operators)
        yield plain("daemons", "Daemons on the database.", len(members))
        expelled = "Silent daemons that this one has expelled."
        yield plain("daemons_expelled_total", expelled, self._store.expulsions)
        yield plain("operators_owned", "Operators for which this daemon ends sessions and delivers.", owned)
        yield plain(
            "service_clock_behind_seconds",
            "How far its service clock is behind the furthest of all daemons; ends wait for the slowest.",
            # While no session is live, daemons rarely tell how far their clocks are
            behind_ms / 1000 if self._store.live else 0.0,
        )
        yield plain(
            "daemons_disagree", "1 while daemons differ in settings of operators.", float(bool(disagreement(members)))
        )

    def _of_the_store(self) -> Iterator[Reading]:
        store = self._store
        yield plain("store_writable", "1 while the last write succeeded.", float(store.failure is None))
        yield plain(
            "store_transaction_seconds",
            "How long the running transaction has been running; 0 between two.",
            self._health.writing_s,
        )
        yield plain("store_waiting_operations", "Operations that wait for the writer.", store.waiting)
        yield plain("store_wal_bytes", "Size of the write-ahead log at the last transaction.", store.wal_bytes)
        yield plain("store_file_bytes", "Size of the database file at the last transaction.", store.file_bytes)
        outlook = self._disk.outlook()
        if outlook is not None:
            yield plain("disk_free_bytes", "Free space on the database's file system.", outlook.room.free)
            yield plain("disk_size_bytes", "Used and free space on it together.", outlook.room.size)
            growth = outlook.growth or 0.0
            yield plain("disk_growth_bytes_per_day", "By how much free space shrinks a day; 0: unknown.", growth)
        yield by_label(
            "store_refused_operations_total",
            "Operations refused: the caller was told to retry.",
            "reason",
            store.refused,
        )
