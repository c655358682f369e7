"""Plug-ins: refused when broken, given every end at least once, asked about notices, and unable to harm the daemon."""

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from clocks import HandClock
from support import SUCCESS, Serving, hear, scripted_operator, serving, until
from wires import TOKEN, WIRES, notify, open_session, operator, query, sessions, write_secrets

from lmdaemon import Notice, SessionEnded, plugins
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Plugin, Policy
from lmdaemon.plugins import PluginFailed

NOW = datetime(2026, 1, 2, tzinfo=UTC)
EVENT = SessionEnded("msg_1", "acme", "lm", "s", "p", TOKEN, "reported", NOW, NOW, NOW, {}, {})
NOTICE = Notice("acme", "v4", "lm", "s", "p", TOKEN)

EXAMINED = """
import sys
from lmdaemon import plugins
from lmdaemon.config.findings import ConfigError
from lmdaemon.config.settings import Plugin, Policy
sys.path += {path}
try:
    use = "no_such_module:hook"
    plugins.examine(Plugin(name="x", use=use, operators=None, policy=Policy(1, (), 1, 1), options={{}}))
except ConfigError as error:
    print(error)
"""

# What a hook may raise besides an Exception. Without care, each would end the event loop or be taken for a cancellation
# by the daemon itself.
RAISED = [
    "RuntimeError('tok-s3cret')",
    "SystemExit(3)",
    "KeyboardInterrupt()",
    "asyncio.CancelledError()",
    "GeneratorExit()",
    "StopIteration()",
    "BaseExceptionGroup('tok-s3cret', [SystemExit()])",
    "type('Odd', (BaseException,), {'__str__': lambda self: 1 / 0})()",
]


@pytest.fixture
async def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[[str], str]]:
    """A function that writes a plug-in's module, with a list `LOG` and an event `RELEASE`, and returns the module's
    name.
    """
    monkeypatch.syspath_prepend(tmp_path)
    names = []

    def write(source: str) -> str:
        names.append(f"hook_{uuid4().hex}")
        prelude = "import asyncio\nfrom lmdaemon import Refuse\nLOG = []\nRELEASE = asyncio.Event()\n"
        (tmp_path / f"{names[-1]}.py").write_text(prelude + source)
        return names[-1]

    yield write
    for name in names:
        if name in sys.modules:
            # Hooks that ignore their cancellation would keep the loop running
            sys.modules.pop(name).__dict__.get("RELEASE", asyncio.Event()).set()


@pytest.fixture(autouse=True)
def secrets(tmp_path: Path) -> None:
    write_secrets(tmp_path)


def module(name: str) -> Any:
    return sys.modules[name]


def settings(use: str, timeout_s: float = 10, concurrency: int = 4, **options: Any) -> Plugin:
    policy = Policy(timeout_s, (5.0,), 3600.0, concurrency)
    return Plugin(name="x", use=use, operators=None, policy=policy, options=options)


def plugin(name: str, use: str, **keys: Any) -> str:
    """The table `[plugins.NAME]`; `options` become a table of their own."""
    options = keys.pop("options", {})
    lines = [f"use = {json.dumps(use)}"] + [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    lines += [f"[plugins.{name}.options]"] + [f"{key} = {json.dumps(value)}" for key, value in options.items()]
    return f"\n[plugins.{name}]\n" + "\n".join(lines) + "\n"


def delivery_row(tmp_path: Path, sink: str, columns: str = "state") -> tuple[Any, ...]:
    (row,) = query(tmp_path, f"SELECT {columns} FROM delivery WHERE sink = ?", sink)
    return row


async def settled(tmp_path: Path, sink: str, state: str, count: int = 1) -> None:
    sql = "SELECT count(*) FROM delivery WHERE sink = ? AND state = ?"
    await until(lambda: query(tmp_path, sql, sink, state) == [(count,)])


JOURNAL = """
class Hook:
    def __init__(self, options):
        self.name = options["name"]
        self.options = options
        LOG.append(("made", self.name))
    async def start(self):
        await asyncio.sleep(0)
        LOG.append(("started", self.name))
    async def stop(self):
        await asyncio.sleep(0)
        LOG.append(("stopped", self.name))
    async def session_ended(self, event):
        LOG.append((self.name, event))
"""
ENDED = "async def session_ended(self, e): pass"
QUICK = '[delivery]\nschedule = ["10ms", "10ms", "10ms", "10ms", "10ms", "10ms", "10ms", "10ms", "10ms", "10ms"]\n'


class TestLoading:
    @pytest.mark.parametrize(
        "source",
        [
            "class Hook:\n def __init__(self, o): LOG.append('called')",
            "class Hook:\n def __init__(self, o): LOG.append('called')\n def session_ended(self, e): pass",
            f"class Hook:\n {ENDED}\n def __init__(self, o): LOG.append('called')\n def check(self, n): pass",
            "class Meta(type):\n def __call__(self, *a): LOG.append('called')\nclass Hook(metaclass=Meta): pass",
            "def Hook(options): LOG.append('called')",
            "class Kind:\n def __call__(self, o): LOG.append('called')\nHook = Kind()",
        ],
    )
    def test_what_is_no_plugin_is_refused_without_being_called(
        self, written: Callable[[str], str], source: str
    ) -> None:
        name = written(source)
        with pytest.raises(ConfigError, match="must "):
            plugins.load(settings(f"{name}:Hook"))
        assert module(name).LOG == []

    def test_hooks_of_an_instance_are_looked_at_too(self, written: Callable[[str], str]) -> None:
        name = written(f"class Hook:\n {ENDED}\n def __init__(self, o): self.session_ended = print")
        with pytest.raises(ConfigError, match="must have an async method session_ended"):
            plugins.load(settings(f"{name}:Hook"))

    @pytest.mark.parametrize(
        ("source", "attribute", "finding"),
        [
            ("", "hook", "cannot be imported: AttributeError: "),
            ("class Outer: pass", "Outer.hook", "cannot be imported: AttributeError: "),
            ("def (", "hook", "cannot be imported: SyntaxError: "),
            ("import no_such_module_at_all", "hook", "cannot be imported: ModuleNotFoundError: "),
            ("raise RuntimeError('broken')", "hook", "cannot be imported: RuntimeError at "),
            ("raise SystemExit(3)", "hook", "cannot be imported: SystemExit at "),
            ("raise KeyboardInterrupt", "hook", "cannot be imported: KeyboardInterrupt at "),
            ("raise asyncio.CancelledError", "hook", "cannot be imported: CancelledError at "),
            ("hook = 5", "hook", "must be an async function or a class"),
            ("def hook(event): pass", "hook", "must be an async function or a class"),
            ("hook = lambda event: asyncio.sleep(0)", "hook", "must be an async function or a class"),
            (f"class Hook:\n {ENDED}", "Hook", "cannot be made: TypeError: "),
            (
                f"class Hook:\n def __init__(self, o): raise SystemExit(4)\n {ENDED}",
                "Hook",
                "cannot be made: SystemExit at ",
            ),
            (
                f"class Hook:\n def __init__(self, o): raise KeyboardInterrupt\n {ENDED}",
                "Hook",
                "cannot be made: KeyboardInterrupt at ",
            ),
            (
                f"class Hook:\n def __init__(self, o): pass\n {ENDED}\n @property\n def check(self): raise SystemExit",
                "Hook",
                "check must be async",
            ),
            (
                (
                    "class Meta(type):\n @property\n def check(cls): raise KeyError('odd')\n"
                    f"class Hook(metaclass=Meta):\n {ENDED}"
                ),
                "Hook",
                "cannot be imported: KeyError: 'odd'",
            ),
            (
                (
                    "class Hook:\n def __init__(self, o): pass\n async def session_ended(self, e): pass\n"
                    " def __getattr__(self, name): raise SystemExit"
                ),
                "Hook",
                "cannot be made: SystemExit at ",
            ),
            (f"class Hook:\n def __init__(self, o): o['url']\n {ENDED}", "Hook", "cannot be made: KeyError: 'url'"),
            ("class Hook:\n def __init__(self, o): pass", "Hook", "must have an async method session_ended(event)"),
            (
                "class Hook:\n def __init__(self, o): pass\n def session_ended(self, e): pass",
                "Hook",
                "must have an async method session_ended(event)",
            ),
        ]
        + [
            (
                (
                    "class Hook:\n def __init__(self, o): pass\n async def session_ended(self, e): pass\n"
                    f" def {name}(self, *a): pass"
                ),
                "Hook",
                f"{name} must be async",
            )
            for name in ("start", "stop", "check")
        ],
    )
    async def test_what_cannot_be_used_stops_the_start_and_is_named(
        self, tmp_path: Path, written: Callable[[str], str], source: str, attribute: str, finding: str
    ) -> None:
        name, journal = written(source), written(JOURNAL)
        toml = operator() + plugin("good", f"{journal}:Hook", options={"name": "good"})
        with pytest.raises(ConfigError) as raised:
            async with serving(tmp_path, toml + plugin("broken", f"{name}:{attribute}")):
                pytest.fail("it was started")
        (found,) = raised.value.findings
        assert found.startswith(f"plugins.broken.use: {finding}")
        assert found.endswith(f"(got '{name}:{attribute}')")
        assert ("started", "good") not in module(journal).LOG  # no plug-in is started before all are loaded

    @pytest.mark.parametrize(
        ("source", "failed", "line"),
        [
            ("raise RuntimeError('cannot log in with s3cret')", "cannot be imported: RuntimeError", 5),
            (f"class Hook:\n def __init__(self, o):\n  int('s3cret')\n {ENDED}", "cannot be made: ValueError", 7),
            (
                (
                    "class Hook:\n def __init__(self, o): pass\n async def session_ended(self, e): pass\n"
                    " async def start(self):\n  raise OSError('s3cret')"
                ),
                "start() failed: OSError",
                9,
            ),
        ],
    )
    async def test_a_start_that_fails_says_where_but_not_what_may_be_a_secret(
        self, tmp_path: Path, written: Callable[[str], str], source: str, failed: str, line: int
    ) -> None:
        name = written(source)
        with pytest.raises(ConfigError) as raised:
            async with serving(tmp_path, operator() + plugin("broken", f"{name}:Hook")):
                pytest.fail("it was started")
        (found,) = raised.value.findings
        assert f"{failed} at {name}.py:{line}" in found
        assert "s3cret" not in found

    async def test_a_module_that_is_not_there_stops_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"plugins\.x\.use: cannot be imported: ModuleNotFoundError"):
            async with serving(tmp_path, operator() + plugin("x", "no_such_module_at_all:hook")):
                pytest.fail("it was started")

    @pytest.mark.parametrize(
        ("isolated", "places"), [(False, "the directories of $PYTHONPATH"), (True, "/usr/local/lib/lmdaemon")]
    )
    def test_a_module_that_is_not_there_is_told_with_its_places(self, isolated: bool, places: str) -> None:
        """As the service runs: isolated, with the directory for plug-ins on the path."""
        source = EXAMINED.format(path=["/usr/local/lib/lmdaemon"] if isolated else [])
        command = [sys.executable, *(["-I"] if isolated else []), "-c", source]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert shown == (
            "plugins.x.use: cannot be imported: ModuleNotFoundError: No module named 'no_such_module'; modules are "
            f"looked for in {places}, the Python environment {sys.prefix} (got 'no_such_module:hook')\n"
        )

    @pytest.mark.parametrize(
        ("source", "attribute"),
        [
            ("async def hook(event): LOG.append(event)", "hook"),
            ("class Outer:\n @staticmethod\n async def hook(event): LOG.append(event)", "Outer.hook"),
            ("class Kind:\n async def __call__(self, event): LOG.append(event)\nhook = Kind()", "hook"),
            ("class Kind:\n async def on_end(self, event): LOG.append(event)\nhook = Kind()", "hook.on_end"),
            (
                "class Hook:\n def __init__(self, o): pass\n async def session_ended(self, event): LOG.append(event)",
                "Hook",
            ),
        ],
    )
    async def test_a_function_and_a_class_are_called_with_the_event(
        self, tmp_path: Path, written: Callable[[str], str], source: str, attribute: str
    ) -> None:
        name = written(source)
        async with serving(tmp_path, operator() + plugin("x", f"{name}:{attribute}")) as s:
            await notify(s)
            await settled(tmp_path, "plugin:x", "delivered")
        assert [event.session_id for event in module(name).LOG] == ["s"]

    async def test_a_class_is_made_once_with_its_options_and_cannot_change_ours(
        self, written: Callable[[str], str]
    ) -> None:
        name = written(
            "class Hook:\n"
            " def __init__(self, options):\n"
            "  LOG.append(repr(options)); options['inner']['list'].append(3); options['url'] = ''\n"
            " async def session_ended(self, event): pass"
        )
        given = settings(f"{name}:Hook", url="http://x", inner={"list": [1, 2]})
        plugins.load(given)
        assert module(name).LOG == ["{'url': 'http://x', 'inner': {'list': [1, 2]}}"]
        assert given.options == {"url": "http://x", "inner": {"list": [1, 2]}}


FAILING_STARTS = [f"raise {raised}" for raised in RAISED] + [
    "raise Refuse('retry')",
    "await asyncio.sleep(3600)",
    "try: await asyncio.sleep(3600)\n  except BaseException: await RELEASE.wait()",
]


class TestStartAndStop:
    @pytest.mark.parametrize("body", FAILING_STARTS)
    async def test_a_start_that_fails_or_hangs_stops_the_daemon(
        self, tmp_path: Path, written: Callable[[str], str], body: str
    ) -> None:
        """The plug-ins that have already started are stopped."""
        journal = written(JOURNAL)
        broken = written(
            "class Hook:\n"
            " def __init__(self, options): pass\n"
            f" async def start(self):\n  {body}\n"
            " async def session_ended(self, event): pass"
        )
        toml = operator() + "".join(
            plugin(name, f"{journal}:Hook", options={"name": name}) for name in ("first", "second")
        )
        toml += plugin("broken", f"{broken}:Hook", timeout="50ms")
        toml += plugin("last", f"{journal}:Hook", options={"name": "last"})
        with pytest.raises(ConfigError, match=r"^plugins\.broken: start\(\) failed: \w+( at [\w.]+:\d+)?$"):
            async with serving(tmp_path, toml):
                pytest.fail("it was started")
        module(broken).RELEASE.set()
        assert [
            *(("made", name) for name in ("first", "second", "last")),
            *(("started", name) for name in ("first", "second")),
            *(("stopped", name) for name in ("second", "first")),
        ] == module(journal).LOG

    async def test_plugins_start_in_order_and_stop_in_reverse(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        name = written(JOURNAL)
        toml = operator() + "".join(plugin(one, f"{name}:Hook", options={"name": one}) for one in ("b", "a", "c"))
        async with serving(tmp_path, toml):
            assert module(name).LOG[3:] == [("started", "b"), ("started", "a"), ("started", "c")]
        assert module(name).LOG[6:] == [("stopped", "c"), ("stopped", "a"), ("stopped", "b")]

    async def test_a_call_under_way_is_finished_before_stop(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        name = written(
            "class Hook:\n"
            " def __init__(self, options): pass\n"
            " async def stop(self): LOG.append('stopped')\n"
            " async def session_ended(self, event):\n"
            "  LOG.append('began'); await RELEASE.wait(); LOG.append('done')"
        )
        async with serving(tmp_path, operator() + plugin("x", f"{name}:Hook")) as s:
            await notify(s)
            await until(lambda: module(name).LOG)
            with hear() as events:
                s.daemon.stop()
                await until(lambda: any(event.name == "delivery.draining" for event in events))
            module(name).RELEASE.set()
        assert module(name).LOG == ["began", "done", "stopped"]
        assert delivery_row(tmp_path, "plugin:x") == ("delivered",)

    @pytest.mark.parametrize("body", FAILING_STARTS)
    async def test_a_stop_that_fails_or_hangs_keeps_nobody_from_stopping(
        self, tmp_path: Path, written: Callable[[str], str], body: str
    ) -> None:
        journal = written(JOURNAL)
        broken = written(
            "class Hook:\n"
            " def __init__(self, options): pass\n"
            f" async def stop(self):\n  {body}\n"
            " async def session_ended(self, event): pass"
        )
        toml = operator() + plugin("first", f"{journal}:Hook", options={"name": "first"})
        toml += plugin("broken", f"{broken}:Hook", timeout="50ms")
        with hear() as events:
            async with serving(tmp_path, toml):
                pass
        module(broken).RELEASE.set()
        assert module(journal).LOG[-1] == ("stopped", "first")
        (failed,) = [event.facts for event in events if event.name == "plugin.stop_failed"]
        assert failed["plugin"] == "broken"
        assert "tok-s3cret" not in repr(events)


class TestContained:
    @pytest.mark.parametrize("raised", [*RAISED, "Refuse('retry', 'tok-s3cret')"])
    async def test_whatever_a_hook_raises_is_a_failure_without_its_text(
        self, written: Callable[[str], str], raised: str
    ) -> None:
        loaded = plugins.load(settings(f"{written(f'async def hook(event): raise {raised}')}:hook"))
        with pytest.raises(PluginFailed) as failed:
            await loaded.session_ended(EVENT)
        assert "tok-s3cret" not in str(failed.value)
        assert str(failed.value)

    @pytest.mark.parametrize("signature", ["", "event, more", "*, event"])
    async def test_a_hook_that_cannot_be_called_is_a_failure(
        self, written: Callable[[str], str], signature: str
    ) -> None:
        loaded = plugins.load(settings(f"{written(f'async def hook({signature}): pass')}:hook"))
        with pytest.raises(PluginFailed, match="TypeError"):
            await loaded.session_ended(EVENT)

    async def test_a_hook_that_hangs_is_cancelled_and_may_clean_up(self, written: Callable[[str], str]) -> None:
        name = written(
            "async def hook(event):\n"
            " try: await asyncio.sleep(3600)\n"
            " finally:\n  await asyncio.sleep(0)\n  LOG.append('cleaned up')"
        )
        loaded = plugins.load(settings(f"{name}:hook", timeout_s=0.02))
        with pytest.raises(PluginFailed, match="timeout"):
            await loaded.session_ended(EVENT)
        assert (module(name).LOG, loaded.stray) == (["cleaned up"], 0)

    async def test_a_hook_that_ignores_its_cancellation_is_left_behind(self, written: Callable[[str], str]) -> None:
        """The hook is counted as `stray` until it ends."""
        name = written(STUBBORN)
        freed: list[int] = []
        loaded = plugins.load(settings(f"{name}:hook", timeout_s=0.02), lambda: freed.append(loaded.stray))
        with pytest.raises(PluginFailed, match="timeout"):
            await loaded.session_ended(EVENT)
        assert (loaded.stray, freed) == (1, [])
        module(name).RELEASE.set()
        await until(lambda: freed)
        assert freed == [0]

    async def test_cancelling_the_caller_cancels_the_hook(self, written: Callable[[str], str]) -> None:
        name = written(
            "async def hook(event):\n"
            " LOG.append('began')\n"
            " try: await asyncio.sleep(3600)\n"
            " except asyncio.CancelledError: LOG.append('cancelled')"
        )
        calling = asyncio.create_task(plugins.load(settings(f"{name}:hook")).session_ended(EVENT))
        await until(lambda: module(name).LOG)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        await until(lambda: module(name).LOG == ["began", "cancelled"])


STUBBORN = """
running = most = 0
async def hook(event):
    global running, most
    running += 1
    most = max(most, running)
    while not RELEASE.is_set():
        try:
            await RELEASE.wait()
        except asyncio.CancelledError:
            pass
    running -= 1
"""


class TestDelivery:
    async def test_an_event_tells_all_that_is_known_and_hides_its_token(
        self, tmp_path: Path, written: Callable[[str], str], clock: HandClock
    ) -> None:
        name = written("async def hook(event): LOG.append(event)")
        opened_at = clock.wall / 1000
        async with serving(tmp_path, operator() + plugin("x", f"{name}:hook"), clock) as s:
            opening = {"playerId": "p", "token": TOKEN, "attributes": {"table": 7, "deep": [{"a": None}]}}
            async with s.client.put(f"{s.api}/v1/operators/acme/sessions/s", json=opening) as response:
                assert response.status == 201
            clock.advance(1)
            async with s.client.post(f"{s.api}/v1/operators/acme/sessions/s/touch") as response:
                assert response.status == 204
            clock.advance(1)
            assert (await notify(s, provider="LuckyMonaco", extra={"lobby": "x", "n": [1]})).json == SUCCESS
            await settled(tmp_path, "plugin:x", "delivered")
            async with s.client.get(f"{s.api}/v1/operators/acme/sessions/s") as response:
                (shown,) = (await response.json())["deliveries"]
        (event,) = module(name).LOG
        assert dataclasses.asdict(event) == {
            "id": shown["id"],
            "operator": "acme",
            "provider_id": "luckymonaco",  # as in the configuration, in whatever case the peer writes it
            "session_id": "s",
            "player_id": "p",
            "token": TOKEN,
            "reason": "reported",
            "opened_at": datetime.fromtimestamp(opened_at, UTC),
            "last_seen_at": datetime.fromtimestamp(opened_at + 1, UTC),
            "ended_at": datetime.fromtimestamp(opened_at + 2, UTC),
            "attributes": {"table": 7, "deep": [{"a": None}]},
            "extra": {"lobby": "x", "n": [1]},
        }
        assert TOKEN not in repr(event)
        assert "session_id='s'" in repr(event)
        with pytest.raises(dataclasses.FrozenInstanceError):
            event.player_id = "q"

    async def test_an_event_of_a_dialect_without_token_has_none(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        name = written("async def hook(event): LOG.append(event)")
        async with serving(tmp_path, operator("v1") + plugin("x", f"{name}:hook")) as s:
            await notify(s, WIRES["v1"])
            await settled(tmp_path, "plugin:x", "delivered")
        (event,) = module(name).LOG
        assert (event.token, event.attributes, event.extra) == (None, {}, {})

    async def test_a_plugin_hears_of_its_operators_only(self, tmp_path: Path, written: Callable[[str], str]) -> None:
        name = written("async def mine(event): LOG.append(event.operator)\nasync def every(event): pass")
        toml = operator() + operator(name="other", provider_id="two")
        toml += plugin("mine", f"{name}:mine", operators=["other"]) + plugin("every", f"{name}:every")
        async with serving(tmp_path, toml) as s:
            for provider in ("luckymonaco", "two"):
                assert (await notify(s, provider=provider)).json == SUCCESS
            await settled(tmp_path, "plugin:every", "delivered", 2)
            await settled(tmp_path, "plugin:mine", "delivered")
        assert module(name).LOG == ["other"]

    async def test_a_failure_of_any_kind_is_retried_with_the_same_event(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        """The call is repeated with the same event until it succeeds."""
        failures = [*RAISED, "Refuse('final')"]
        name = written(
            f"FAILURES = [lambda: {', lambda: '.join(failures)}]\n"
            "async def hook(event):\n"
            " LOG.append(event)\n"
            " if len(LOG) <= len(FAILURES): raise FAILURES[len(LOG) - 1]()"
        )
        async with serving(tmp_path, QUICK + operator() + plugin("x", f"{name}:hook")) as s:
            assert (await notify(s)).json == SUCCESS
            await settled(tmp_path, "plugin:x", "delivered")
        seen = module(name).LOG
        assert len(seen) == len(failures) + 1
        assert all(event == seen[0] for event in seen)
        attempts, history = delivery_row(tmp_path, "plugin:x", "attempts, history")
        assert attempts == len(seen)
        assert "tok-s3cret" not in history

    async def test_the_wait_after_a_failure_is_that_of_the_schedule(
        self, tmp_path: Path, written: Callable[[str], str], clock: HandClock
    ) -> None:
        name = written("async def hook(event):\n LOG.append(event.id)\n raise RuntimeError")
        toml = '[delivery]\nschedule = ["5s", "1h"]\n' + operator() + plugin("x", f"{name}:hook")
        async with serving(tmp_path, toml, clock) as s:
            await notify(s)
            for attempt, wait_s in ((1, 5), (2, 3600)):
                await until(lambda attempt=attempt: delivery_row(tmp_path, "plugin:x", "attempts") == (attempt,))
                await until(lambda: s.dispatcher.in_flight == 0)
                (due_at,) = delivery_row(tmp_path, "plugin:x", "due_at")
                assert 0.8 * wait_s <= (due_at - clock.wall) / 1000 <= 1.2 * wait_s
                clock.advance(1.2 * wait_s + 0.001)
                s.dispatcher.wake()
            await settled(tmp_path, "plugin:x", "dead")
        assert len(module(name).LOG) == 3
        assert len(set(module(name).LOG)) == 1

    async def test_it_is_dead_when_the_schedule_is_used_up_and_can_be_replayed(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        name = written(
            "async def hook(event):\n LOG.append(event.id)\n if not RELEASE.is_set(): raise ValueError('tok-s3cret')"
        )
        toml = '[delivery]\nschedule = ["10ms", "10ms"]\n' + operator() + plugin("x", f"{name}:hook")
        async with serving(tmp_path, toml) as s:
            await notify(s)
            await settled(tmp_path, "plugin:x", "dead")
            row = delivery_row(tmp_path, "plugin:x", "attempts, last_error")
            assert row == (3, "ValueError")
            module(name).RELEASE.set()
            async with s.client.post(f"{s.api}/v1/deliveries/{module(name).LOG[0]}/retry") as response:
                assert response.status == 202
            await settled(tmp_path, "plugin:x", "delivered")
        assert len(module(name).LOG) == 4
        assert len(set(module(name).LOG)) == 1

    async def test_what_was_not_delivered_is_delivered_after_a_restart(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        broken, whole = (
            written(f"async def hook(event):\n LOG.append(event)\n {body}") for body in ("raise OSError", "pass")
        )
        schedule = '[delivery]\nschedule = ["500ms", "1h"]\n'
        async with serving(tmp_path, schedule + operator() + plugin("x", f"{broken}:hook")) as s:
            await notify(s)
            await until(lambda: delivery_row(tmp_path, "plugin:x", "attempts") == (1,))
        async with serving(tmp_path, schedule + operator() + plugin("x", f"{whole}:hook")):
            await settled(tmp_path, "plugin:x", "delivered")
        assert module(whole).LOG[0] == module(broken).LOG[0]


HOSTILE = {
    "hangs": "await RELEASE.wait()",
    "ignores cancellation": STUBBORN.partition("async def hook(event):\n    global running, most\n")[2],
    **{f"raises {raised.partition('(')[0]}": f"raise {raised}" for raised in RAISED},
}


class TestIsolation:
    @pytest.mark.parametrize("kind", HOSTILE)
    async def test_a_hostile_plugin_delays_no_other_sink_and_no_answer(
        self, tmp_path: Path, written: Callable[[str], str], kind: str
    ) -> None:
        body = HOSTILE[kind]
        if "\n" in body:
            bad = written(f"running = most = 0\nasync def hook(event):\n    global running, most\n{body}")
        else:
            bad = written(f"async def hook(event):\n    {body}")
        good = written("async def hook(event): LOG.append(event.session_id)")
        async with scripted_operator() as peer:
            url = {"notify": True, "url": peer.url, "allow_private_network": True}
            toml = operator(**url) + plugin("bad", f"{bad}:hook", timeout="50ms") + plugin("good", f"{good}:hook")
            async with serving(tmp_path, toml) as s:
                for number in range(20):
                    assert (await notify(s, session=str(number))).json == SUCCESS
                await settled(tmp_path, "plugin:good", "delivered", 20)
                await settled(tmp_path, "http", "delivered", 20)
                await settled(tmp_path, "plugin:bad", "pending", 20)
                async with s.client.get(s.server + "/health") as response:
                    assert response.status == 200
                module(bad).RELEASE.set()
        assert sorted(module(good).LOG, key=int) == [str(number) for number in range(20)]

    async def test_threads_that_hang_delay_no_work_of_the_daemon(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        """The plug-in occupies every thread of asyncio.to_thread."""
        name = written("""
import threading
FREE, OCCUPIED = threading.Event(), []

def occupy():
    OCCUPIED.append(1)
    FREE.wait()

async def hook(event):
    await asyncio.gather(*(asyncio.to_thread(occupy) for _ in range(1000)))
""")
        toml = operator() + plugin("x", f"{name}:hook", timeout="50ms")
        async with serving(tmp_path, toml) as s, asyncio.timeout(60):
            await notify(s)
            try:
                await until(lambda: query(tmp_path, "SELECT attempts FROM delivery") == [(1,)])
                assert module(name).OCCUPIED
                for path in ("metrics", "v1/config", "openapi.json"):
                    async with s.client.get(f"{s.api}/{path}") as response:
                        assert response.status == 200
                many = {"sessions": [{"sessionId": "s-1", "playerId": "p-1", "token": TOKEN}]}
                async with s.client.post(s.api + "/v1/operators/acme/sessions", json=many) as response:
                    assert response.status == 200
                assert await TestReload.reload(s, operator()) is None
            finally:
                module(name).FREE.set()

    async def test_calls_that_ignore_cancellation_never_exceed_the_concurrency(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        name = written(STUBBORN)
        toml = QUICK + operator() + plugin("x", f"{name}:hook", timeout="20ms", concurrency=2)
        async with serving(tmp_path, toml) as s:
            for number in range(6):
                await notify(s, session=str(number))
            await until(lambda: query(tmp_path, "SELECT sum(attempts) FROM delivery") == [(2,)])
            await until(lambda: s.dispatcher.in_flight == 0)
            await s.dispatcher.once()  # four deliveries are due, and both slots are taken
            assert (s.dispatcher.in_flight, s.plugins["x"].stray, module(name).most) == (0, 2, 2)
            module(name).RELEASE.set()  # the hooks end after all, and the other deliveries are made
            await settled(tmp_path, "plugin:x", "delivered", 6)
            assert module(name).most == 2

    async def test_no_more_calls_run_at_once_than_the_concurrency(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        name = written(STUBBORN)
        async with serving(tmp_path, operator() + plugin("x", f"{name}:hook", concurrency=3)) as s:
            await asyncio.gather(*(notify(s, session=str(number)) for number in range(10)))
            await until(lambda: module(name).running == 3)
            assert s.dispatcher.in_flight == 3
            module(name).RELEASE.set()
            await settled(tmp_path, "plugin:x", "delivered", 10)
        assert module(name).most == 3


CODES: dict[str, dict[str, int]] = {
    name: {
        meaning: wire.codes.get(meaning, wire.codes["bad_parameters"])
        for meaning in ("bad_parameters", "bad_token", "bad_hash", "unknown_session", "player_mismatch", "retry")
    }
    for name, wire in WIRES.items()
}
for later in ("v4.01", "v4.02", "v1"):
    CODES[later] |= {"bad_token": 54, "final": 999}
for early in ("v4", "pragmatic", "old"):
    CODES[early]["final"] = 120


def checking(body: str) -> str:
    """The source of a plug-in whose `check` appends the notice to LOG and then runs `body`."""
    lines = "\n".join(f"        {line}" for line in body.splitlines())
    return (
        "class Hook:\n"
        "    def __init__(self, options): self.options = options\n"
        "    async def session_ended(self, event): pass\n"
        f"    async def check(self, notice):\n        LOG.append(notice)\n{lines}\n"
    )


class TestCheck:
    @pytest.mark.parametrize("name", WIRES)
    async def test_a_refusal_is_answered_with_its_dialects_code(
        self, tmp_path: Path, written: Callable[[str], str], name: str
    ) -> None:
        hook = written(checking("raise Refuse(notice.session_id, 'because of ✓')"))
        async with serving(tmp_path, operator(name) + plugin("x", f"{hook}:Hook")) as s:
            for meaning, code in CODES[name].items():
                answer = await notify(s, WIRES[name], session=meaning)
                assert (answer.status, answer.json) == (200, {"error": code, "description": "because of ✓"})
            assert sessions(tmp_path) == []

    @pytest.mark.parametrize(
        "body",
        [
            *(f"raise {raised}" for raised in RAISED),
            "await RELEASE.wait()",
            "raise Refuse('no_such_meaning')",
            "error = Refuse('retry'); error.meaning = ['odd']; raise error",
            "error = Refuse('retry'); del error.description; raise error",
            "raise Refuse('retry', type('Odd', (), {'__str__': lambda self: (_ for _ in ()).throw(SystemExit)})())",
            "raise type('Mine', (Refuse,), {'__init__': lambda self: None})()",
        ],
    )
    async def test_a_check_that_fails_or_hangs_answers_retry(
        self, tmp_path: Path, written: Callable[[str], str], body: str
    ) -> None:
        hook = written(checking(body))
        with hear() as events:
            toml = operator("v4", "v1", "pragmatic") + plugin("x", f"{hook}:Hook", timeout="20ms")
            async with serving(tmp_path, toml) as s:
                answers = {name: await notify(s, WIRES[name]) for name in ("v4", "v1", "pragmatic")}
                codes = {name: (answer.status, answer.error) for name, answer in answers.items()}
                assert codes == {"v4": (200, 100), "v1": (200, 998), "pragmatic": (200, 100)}
                assert sessions(tmp_path) == []
        assert "tok-s3cret" not in repr([answer.body for answer in answers.values()]) + repr(events)
        failed = [event.facts for event in events if event.name == "plugin.check_failed"]
        assert [(facts["plugin"], facts["operator"]) for facts in failed] == [("x", "acme")] * 3

    @pytest.mark.parametrize("description", ["'\\ud800 lone'", "None", "5", "object"])
    async def test_a_refusal_is_answered_whatever_its_description(
        self, tmp_path: Path, written: Callable[[str], str], description: str
    ) -> None:
        hook = written(checking(f"raise Refuse('bad_token', {description})"))
        async with serving(tmp_path, operator("v1") + plugin("x", f"{hook}:Hook")) as s:
            answer = await notify(s, WIRES["v1"])
            assert (answer.status, answer.error) == (200, 54)

    async def test_a_notice_tells_all_that_was_received_and_hides_its_token(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        hook = written(checking("pass"))
        toml = operator("v4", "v4.01") + plugin("x", f"{hook}:Hook")
        async with serving(tmp_path, toml) as s:
            await notify(s, provider="LuckyMonaco", session="a", extra={"lobby": ["x"]})
            await notify(s, WIRES["v4.01"], session="b")
        with_token, without = module(hook).LOG
        assert with_token == Notice("acme", "v4", "LuckyMonaco", "a", "p", TOKEN, None, {"lobby": ["x"]})
        assert without == Notice("acme", "v4.01", "luckymonaco", "b", "p", None, "0" * 32, {})
        assert TOKEN not in repr(with_token)

    async def test_a_repeat_is_not_asked_about_again(self, tmp_path: Path, written: Callable[[str], str]) -> None:
        hook = written(checking("if len(LOG) > 1: raise Refuse('final')"))
        async with serving(tmp_path, operator() + plugin("x", f"{hook}:Hook")) as s:
            for _ in range(3):
                assert (await notify(s)).json == SUCCESS
            assert len(module(hook).LOG) == 1
            # The store refuses another player before the plug-in's refusal counts
            assert (await notify(s, player="another")).error == 7
            assert (await notify(s, session="new")).error == 120

    async def test_what_was_refused_is_asked_about_again(self, tmp_path: Path, written: Callable[[str], str]) -> None:
        hook = written(checking("if len(LOG) == 1: raise Refuse('retry')"))
        async with serving(tmp_path, operator() + plugin("x", f"{hook}:Hook")) as s:
            assert [(await notify(s)).error for _ in range(3)] == [100, 0, 0]
            assert len(module(hook).LOG) == 2

    async def test_an_open_session_is_asked_about_and_stays_open_when_refused(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        hook = written(checking("raise Refuse('bad_parameters')"))
        async with serving(tmp_path, operator() + plugin("x", f"{hook}:Hook")) as s:
            await open_session(s)
            assert (await notify(s)).error == 7
            assert sessions(tmp_path) == [("acme", "s", "p", None)]

    async def test_only_authenticated_notices_of_its_operators_are_shown(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        hook = written(checking("pass"))
        toml = operator(token_check="partner") + operator("pragmatic", name="hashed", provider_id="two")
        toml += operator(name="other", provider_id="three")
        toml += plugin("x", f"{hook}:Hook", operators=["acme", "hashed"])
        async with serving(tmp_path, toml) as s:
            assert (await notify(s, token="wrong")).error == 7
            assert (await notify(s, WIRES["pragmatic"], provider="two", hash="0")).error == 5
            assert (await notify(s, provider="three")).json == SUCCESS
            assert module(hook).LOG == []
            assert (await notify(s)).json == SUCCESS
            assert (await notify(s, WIRES["pragmatic"], provider="two")).json == SUCCESS
            assert [notice.operator for notice in module(hook).LOG] == ["acme", "hashed"]

    async def test_the_first_refusal_of_several_plugins_stands(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        hooks = [written(checking(body)) for body in ("pass", "raise Refuse('final', 'second')", "pass")]
        toml = operator() + "".join(plugin(f"x{number}", f"{hook}:Hook") for number, hook in enumerate(hooks))
        async with serving(tmp_path, toml) as s:
            assert (await notify(s)).json == {"error": 120, "description": "second"}
        assert [len(module(hook).LOG) for hook in hooks] == [1, 1, 0]

    async def test_what_is_kept_is_what_was_received_whatever_a_check_does_with_it(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        hook = written(checking("notice.extra.clear(); notice.extra['x'] = object()"))
        async with serving(tmp_path, operator() + plugin("x", f"{hook}:Hook")) as s:
            assert (await notify(s, extra={"lobby": 1})).json == SUCCESS
            assert query(tmp_path, "SELECT extra FROM session") == [('{"lobby":1}',)]

    async def test_a_check_that_hangs_delays_only_its_own_operators(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        hook = written(checking("await RELEASE.wait()"))
        toml = operator() + operator(name="other", provider_id="two") + plugin("x", f"{hook}:Hook", operators=["acme"])
        async with serving(tmp_path, toml) as s:
            asked = asyncio.create_task(notify(s))
            await until(lambda: module(hook).LOG)
            assert (await notify(s, provider="two")).json == SUCCESS
            assert not asked.done()
            module(hook).RELEASE.set()
            assert (await asked).json == SUCCESS

    async def test_checks_that_ignore_their_cancellation_do_not_pile_up(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        stubborn = "while not RELEASE.is_set():\n    try: await RELEASE.wait()\n    except BaseException: pass"
        hook = written(checking(stubborn))
        toml = operator() + plugin("x", f"{hook}:Hook", timeout="20ms", concurrency=2)
        async with serving(tmp_path, toml) as s:
            for number in range(6):
                assert (await notify(s, session=str(number))).error == 100
            assert len(module(hook).LOG) == 2
            module(hook).RELEASE.set()
            await until(lambda: s.plugins["x"].stray == 0)
            assert (await notify(s)).json == SUCCESS


class TestReload:
    @staticmethod
    async def reload(s: Serving, toml: str) -> str | None:
        """Writes other operators and plug-ins to the file and reloads. Returns the error, if any."""
        path = s.daemon.settings.file
        lines = path.read_text().partition("\n[operators.")[0]
        path.write_text(lines + toml)
        with hear():
            await s.daemon.reload_once()
        return s.parts.reloader.error

    async def test_a_reload_replaces_the_instances_of_changed_plugins_alone(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        name = written(JOURNAL)

        def toml(second: str, timeout: str) -> str:
            first = plugin("first", f"{name}:Hook", timeout=timeout, options={"name": "first"})
            return operator() + first + plugin("second", f"{name}:Hook", options={"name": second})

        async with serving(tmp_path, toml("old", "10s")) as s:
            before = dict(s.plugins)
            log = module(name).LOG
            log.clear()
            assert await self.reload(s, toml("new", "7s")) is None
            assert log == [("made", "new"), ("started", "new"), ("stopped", "old")]
            assert s.plugins["first"] is before["first"]
            assert s.plugins["first"].settings.policy.timeout_s == 7
            assert s.plugins["second"] is not before["second"]
            await notify(s)
            for sink in ("first", "second"):
                await settled(tmp_path, f"plugin:{sink}", "delivered")
            assert {entry[0] for entry in log[3:]} == {"first", "new"}
        assert log[-2:] == [("stopped", "new"), ("stopped", "first")]

    async def test_a_plugin_that_goes_is_stopped_and_one_that_comes_is_started(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        name = written(JOURNAL)
        gone, come = (operator() + plugin(one, f"{name}:Hook", options={"name": one}) for one in ("gone", "come"))
        async with serving(tmp_path, gone) as s:
            assert await self.reload(s, come) is None
            assert module(name).LOG[2:] == [("made", "come"), ("started", "come"), ("stopped", "gone")]
            await notify(s)
            await settled(tmp_path, "plugin:come", "delivered")
            assert query(tmp_path, "SELECT DISTINCT sink FROM delivery") == [("plugin:come",)]

    @pytest.mark.parametrize("broken", ["no_such_module_at_all:hook", "interrupts", "start"])
    async def test_a_broken_plugin_is_refused_and_nothing_changes(
        self, tmp_path: Path, written: Callable[[str], str], broken: str
    ) -> None:
        name = written(JOURNAL)
        fails = written(
            "class Hook:\n def __init__(self, o): pass\n async def session_ended(self, e): pass\n"
            " async def start(self): raise SystemExit"
        )
        interrupts = written("raise KeyboardInterrupt")
        use = {"start": f"{fails}:Hook", "interrupts": f"{interrupts}:Hook"}.get(broken, broken)
        old = operator() + plugin("x", f"{name}:Hook", timeout="10s", options={"name": "old"})
        new = operator(provider_id="changed") + plugin("x", f"{name}:Hook", timeout="7s", options={"name": "old"})
        new += plugin("fresh", f"{name}:Hook", options={"name": "fresh"}) + plugin("broken", use)
        async with serving(tmp_path, old) as s:
            before = (s.daemon.settings, dict(s.plugins), s.plugins["x"].settings)
            found = await self.reload(s, new)
            assert found is not None
            assert found.startswith(f"{s.daemon.settings.file}: plugins.broken")
            assert (s.daemon.settings, s.plugins, s.plugins["x"].settings) == before
            log = module(name).LOG
            assert ("stopped", "old") not in log
            assert log.count(("started", "fresh")) == log.count(("stopped", "fresh"))
            assert (await notify(s)).json == SUCCESS  # the old provider_id is still in force
            await settled(tmp_path, "plugin:x", "delivered")
            async with s.client.get(s.server + "/health") as response:
                assert await response.json(content_type=None) == {"status": "warn"}
            assert await self.reload(s, old) is None

    async def test_checks_are_those_of_the_settings_in_force(
        self, tmp_path: Path, written: Callable[[str], str]
    ) -> None:
        hook = written(checking("raise Refuse('final')"))
        async with serving(tmp_path, operator() + plugin("x", f"{hook}:Hook")) as s:
            assert (await notify(s)).error == 120
            assert await self.reload(s, operator()) is None
            assert (await notify(s)).json == SUCCESS
