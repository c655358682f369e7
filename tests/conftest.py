"""Fixtures for every test: a clock moved by hand, and for the fault suite its length, its seed and its figures."""

import asyncio
import gc
import random
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import pytest
from chance import DEEP, FULL, SEED, examples
from clocks import HandClock
from hypothesis import HealthCheck, settings
from ways import WAYS, on_the
from xdist.scheduler import LoadScopeScheduling

from lmdaemon import disk, log

_MEASURED = "measured"  # the key of a test's figures in its report
# A machine that stood still for a second is no finding
settings.register_profile(
    "busy", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=examples(100)
)
settings.load_profile("busy")
# A shell starts what runs in its background with SIGINT ignored, and every process started from there inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)


# What is tested on both loops that users have: whatever reaches into a loop or its transports
BOTH_LOOPS = {
    "test_http",
    "test_https",
    "test_listener",
    "test_doors",
    "test_console_loops",
    "test_hot",
    "test_trying",
    "test_watching",
}


# By one worker alone, for each worker would make anew what the tests of these files share
SHARING = {
    "tests/faults/test_cluster.py",  # three daemons and their database
    "tests/faults/test_hostile_operators.py",  # one daemon with a hundred operators, whose memory is looked at
    "tests/project/test_install.py",  # two installed trees
    "tests/project/test_monitoring.py",  # what a daemon exports that has seen a bit of everything
}


LONG_S = 3600  # for a test that waits for other programs for long, or repeats what it does hundreds of times


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not DEEP:
        left = {item for item in items if is_left_to_ci(item)}
        config.hook.pytest_deselected(items=[*left])
        items[:] = [item for item in items if item not in left]
    for item in items:
        if FULL or item.nodeid.startswith(("tests/faults/", "tests/service/")):
            item.add_marker(pytest.mark.timeout(LONG_S))


def is_left_to_ci(item: pytest.Item) -> bool:
    """Whether a test is of the ordinary way on uvloop, of that way and costly, or of one daemon alone on PostgreSQL.

    Each loop is tried with the other way, and the ordinary way on the other loop; and a pair of daemons does all that
    one does. What could break there alone is found by CI (DEEP).
    """
    chosen = getattr(item, "callspec", None)
    if chosen is None:
        return False
    if chosen.params.get("engine") == "postgres" and item.path.parent.name == "contract":
        return item.path.name != "test_batches.py"  # batches are each daemon's own
    if chosen.params.get("way") != "ordinary":
        return False
    return "uvloop" in chosen.id.split("-") or item.get_closest_marker("costly") is not None


def pytest_collection_finish() -> None:
    """What was collected stays to the end, so the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


class OneByOne(LoadScopeScheduling):
    """Tests go to the workers one by one, those of a file in SHARING together, and these first."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file in SHARING else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneByOne:
    # Marks of pytest-xdist (xdist_group) do nothing with pytest 9.2
    return OneByOne(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[Any]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """After a timeout, where each task stands: the stack of a thread that runs a loop ends in the loop's select."""
    report = yield
    if call.excinfo is not None and str(call.excinfo.value).startswith("Timeout"):
        tasks = [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]
        report.sections += [(f"Stack of {task.get_name()}", "\n".join(places(task))) for task in tasks]
    return report


def places(task: "asyncio.Task[Any]") -> Iterator[str]:
    """The lines at which a task waits, from the coroutine that it was made of to the innermost."""
    waits: Any = task.get_coro()
    while waits is not None:
        frame = getattr(waits, "cr_frame", None) or getattr(waits, "gi_frame", None)
        if frame is not None:
            yield f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        waits = getattr(waits, "cr_await", None) or getattr(waits, "gi_yieldfrom", None)


@pytest.fixture(autouse=True, scope="session")
def _roomy() -> None:
    """The disk of the machine that runs the tests may be nearly full, which `/health` of a sound daemon would say."""
    disk.LOW_SHARE = 0.0


def _uvloop() -> asyncio.AbstractEventLoop:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    own = {"asyncio": asyncio.new_event_loop}
    return own | {"uvloop": _uvloop} if item.path.stem in BOTH_LOOPS else own


# What is tested over both ways in which a request can be served: what tries a listener from outside
BOTH_WAYS = {"test_doors", "test_listener", "test_listener_limits"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.path.stem in BOTH_WAYS:
        metafunc.parametrize("way", WAYS, indirect=True)


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The way in which daemons of this test serve plain requests."""
    with on_the(chosen := getattr(request, "param", "hot")):
        yield chosen


@pytest.fixture(autouse=True)
def _every_line_is_the_first_of_its_kind() -> None:
    log.repeats = log.Repeats()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Chance that can be had again: the seed stands in the report's header."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measured(kills=50, lost=0)`: figures for the end of the report, and for docs/reliability.md."""

    def note(**figures: Any) -> None:
        line = f"{request.node.name}: " + ", ".join(f"{name} {value}" for name, value in figures.items())
        request.node.user_properties.append((_MEASURED, line))

    return note


def pytest_report_header() -> str:
    return f"{'deep' if DEEP else 'normal'}; faults: {'full' if FULL else 'short'} form, FAULTS_SEED={SEED}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [one for some in terminalreporter.stats.values() for one in some if isinstance(one, pytest.TestReport)]
    lines = [line for one in reports if one.when == "teardown" for key, line in one.user_properties if key == _MEASURED]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.line(line)
