"""Fixtures and hooks for all tests: sharing out the tests to workers, event loops, and the fault suite's seed and
figures.
"""

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

from lmdaemon import log

_MEASURED = "measured"  # the key of a test's figures in its report
# No test fails because an example was slow: a busy machine may stand still for a second.
settings.register_profile(
    "busy", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=examples(100)
)
settings.load_profile("busy")
# A shell starts its background jobs with SIGINT ignored, and child processes inherit that. Tests send SIGINT to
# daemons, so it gets its usual handler back.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files whose tests run on asyncio's loop and on uvloop, because they test code that uses the internals of a loop or of
# its transports.
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


# Files whose tests all run on one worker. Each file's tests share something that is slow to make, and every further
# worker would make it again.
SHARING = {
    "tests/faults/test_cluster.py",  # three daemons and their database
    "tests/faults/test_hostile_operators.py",  # one daemon with a hundred operators, whose memory is measured
    "tests/project/test_install.py",  # two installed copies of the program
    "tests/project/test_monitoring.py",  # a daemon that has exported every kind of metric once
}


# the time-out, in seconds, of a test that waits long for other programs, or repeats something hundreds of times
LONG_S = 3600


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not DEEP:
        left = {item for item in items if is_left_to_ci(item)}
        config.hook.pytest_deselected(items=[*left])
        items[:] = [item for item in items if item not in left]
    # The long tests come first, because the workers would wait for one that starts last. Most are in these directories.
    items.sort(key=lambda item: item.path.parent.name not in ("web", "workbench"))
    for item in items:
        if FULL or item.nodeid.startswith(("tests/faults/", "tests/service/")):
            item.add_marker(pytest.mark.timeout(LONG_S))


def is_left_to_ci(item: pytest.Item) -> bool:
    """Whether `make test` leaves this test to CI (DEEP), because other tests cover nearly all that it does.

    Left to CI are tests of plain requests served by aiohttp alone (the "ordinary" way) if they run on uvloop or are
    costly; that way is tested on asyncio's loop, and uvloop with the hot way. Also left to CI are the contract tests
    with one daemon on PostgreSQL: they run with a pair of daemons.
    """
    chosen = getattr(item, "callspec", None)
    if chosen is None:
        return False
    if chosen.params.get("engine") == "postgres" and item.path.parent.name == "contract":
        # each daemon writes its own batches, so a pair does not test the batches of one daemon
        return item.path.name != "test_batches.py"
    if chosen.params.get("way") != "ordinary":
        return False
    return "uvloop" in chosen.id.split("-") or item.get_closest_marker("costly") is not None


# What collecting makes lives until the end. The garbage collector would go through it again and again, which takes an
# eighth of the time that collecting takes.
gc.disable()


def pytest_collection_finish() -> None:
    """Exempts the collected tests from garbage collection, which begins now."""
    gc.freeze()
    gc.enable()


class OneByOne(LoadScopeScheduling):
    """Gives each worker one test at a time. The tests of a file in SHARING stay together, and those files come
    first.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file in SHARING else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneByOne:
    # A scheduler of our own, because the marks of pytest-xdist (xdist_group) do nothing with pytest 9.2
    return OneByOne(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[Any]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds to the report of a test that timed out where each task waits. The stack of the loop's thread would only show
    the loop's select.
    """
    report = yield
    if call.excinfo is not None and str(call.excinfo.value).startswith("Timeout"):
        tasks = [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]
        report.sections += [(f"Stack of {task.get_name()}", "\n".join(places(task))) for task in tasks]
    return report


def places(task: "asyncio.Task[Any]") -> Iterator[str]:
    """The lines at which a task waits, from its outermost coroutine to the innermost."""
    waits: Any = task.get_coro()
    while waits is not None:
        frame = getattr(waits, "cr_frame", None) or getattr(waits, "gi_frame", None)
        if frame is not None:
            yield f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        waits = getattr(waits, "cr_await", None) or getattr(waits, "gi_yieldfrom", None)


def _uvloop() -> asyncio.AbstractEventLoop:
    uvloop = pytest.importorskip("uvloop", reason="uvloop is not installed")
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    own = {"asyncio": asyncio.new_event_loop}
    return own | {"uvloop": _uvloop} if item.path.stem in BOTH_LOOPS else own


# Files whose tests run once for each way to serve a plain request, because they test a listener from outside
BOTH_WAYS = {"test_doors", "test_listener", "test_listener_limits"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.path.stem in BOTH_WAYS:
        metafunc.parametrize("way", WAYS, indirect=True)


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """The way in which the daemons of this test serve plain requests: "hot" (past most of aiohttp) or "ordinary"."""
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
    """Random numbers that can be repeated: the seed stands in the header of the test report."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """A function `measured(kills=50, lost=0)` that notes figures for the end of the test report and for
    docs/reliability.md.
    """

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
