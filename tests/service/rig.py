"""A throwaway machine ("rig") with a real systemd as PID 1: a Debian base, an overlay over it in memory, and
systemd-nspawn.

The base is built once with debootstrap, in $LMDAEMON_RIG or /var/cache/lmdaemon-rig. Every mount is in the rig's own
mount namespace and every process in its PID namespace. So nothing of a rig remains, however the tests end. Needs root,
and Debian's packages debootstrap and systemd-container.
"""

import ast
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,make,procps,ca-certificates,curl,strace"
NEEDS = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container", "nsenter": "util-linux"}
BOOT_WITHIN_S = 120.0
BASE_WITHIN_S = 1800.0
# IPAddressDeny= is a BPF program, and has no effect without these capabilities.
FOR_BPF = ("--capability=CAP_BPF,CAP_NET_ADMIN,CAP_SYS_ADMIN,CAP_PERFMON", "--system-call-filter=bpf")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OF_NETWORK = re.compile(r"(https?|ftp|all|no)_proxy|SSL_CERT_(FILE|DIR)", re.IGNORECASE)

# The process that becomes the rig mounts the overlay. The overlay's upper directory is in memory, because the root file
# system of a container often cannot be one.
MOUNT = """
mount -t tmpfs -o mode=755 rig "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$1/upper,workdir=$1/work" "$1/root"
shift 2
for group in $1; do echo $$ >"$group/cgroup.procs"; done
shift
exec "$@"
"""


class Unavailable(Exception):  # noqa: N818 - a reason to skip
    """The reason why no rig can run on this machine."""


class Rig:
    """A booted machine: `with Rig(suite) as rig:`. Raises Unavailable if it does not boot; since nothing of lmdaemon is
    in it yet, lmdaemon cannot be the cause.
    """

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self._leader = 0
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._stack = stack
            self._boot(base(self.suite))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def root(self) -> Path:
        """The rig's file tree, as a path on this machine."""
        return Path(f"/proc/{self._leader}/root")

    def path(self, inside: str) -> Path:
        """A file inside the rig as a path on this machine: `path("/etc/hosts")`. Absolute symbolic links inside lead to
        the wrong place.
        """
        return self.root / inside.lstrip("/")

    def write(self, inside: str, text: str, mode: int = 0o644) -> None:
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def run(
        self,
        *command: str,
        check: bool = True,
        network: bool = False,
        environment: Mapping[str, str] | None = None,
        timeout: float = 300,
        **options: Any,
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a command inside as root. With `network` it uses this machine's network, instead of the rig's own, which
        is only a loopback. A command that fails raises an error with its output, unless `check` is false.
        """
        namespaces = ["-m", "-u", "-i", "-p", *(() if network else ("-n",))]
        variables = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"} | (_of_network() if network else {})
        variables |= environment or {}
        whole = ["nsenter", "-t", str(self._leader), *namespaces, "--", "env", "-i"]
        whole += [*(f"{name}={value}" for name, value in variables.items()), *command]
        options = {"stdin": subprocess.DEVNULL} | options if "input" not in options else options
        done = subprocess.run(whole, capture_output=True, text=True, timeout=timeout, check=False, **options)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def copy(self, source: Path, inside: str) -> None:
        """Copies a source tree as a clone would have it: the files that git knows, with their present content."""
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=source,
                                capture_output=True, text=True, check=True).stdout  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (source / name).is_file():
                target = self.path(inside) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source / name, target)

    # -- boot

    def _boot(self, below: Path) -> None:
        directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="lmdaemon-rig-"))
        groups = self._stack.enter_context(_cgroups(Path(directory).name))
        pip, binds = _pip_settings()
        console = self._stack.enter_context((Path(directory) / "console").open("w+b"))
        nspawn = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--directory", f"{directory}/root"]
        nspawn += ["--machine=rig", "--boot", "--private-network", "--link-journal=no"]
        nspawn += ["--resolv-conf=off", "--timezone=off", *FOR_BPF, *(f"--bind-ro={path}" for path in binds)]
        # A session of its own, so that Ctrl-C reaches only the tests. With pdeathsig, it ends with the tests, even if
        # they are killed. A PID namespace around nspawn: the kernel ends all its processes when its first process ends.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child",
                   "--mount-proc", "sh", "-euc", MOUNT, "rig"]  # fmt: skip
        command += [directory, str(below), " ".join(map(str, groups)), *nspawn]
        self._nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                                        start_new_session=True,
                                        env=os.environ | {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"})  # fmt: skip
        self._stack.callback(self._end, self._nspawn)
        deadline = time.monotonic() + BOOT_WITHIN_S
        while not self._booted():
            if self._nspawn.poll() is not None or time.monotonic() > deadline:
                console.seek(0)
                said = console.read().decode(errors="replace").strip()
                raise Unavailable(f"no systemd boots here: {said[-500:] or 'it says nothing'}")
            time.sleep(0.05)
        self.write("/etc/pip.conf", pip)
        with contextlib.suppress(OSError):
            self.write("/etc/resolv.conf", Path("/etc/resolv.conf").read_text())

    def _booted(self) -> bool:
        assert self._nspawn is not None
        with contextlib.suppress(OSError):
            for pid in [below for child in _children(self._nspawn.pid) for below in _children(child)]:
                if Path(f"/proc/{pid}/comm").read_text().strip() == "systemd":
                    self._leader = pid
                    state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
                    return state in ("running", "degraded")
        return False

    def _end(self, nspawn: "subprocess.Popen[bytes]") -> None:
        """Kills PID 1 and with it everything in its PID namespace. nspawn then ends by itself."""
        if nspawn.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._leader or nspawn.pid, signal.SIGKILL)
        try:
            nspawn.wait(30)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait()


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def base(suite: str) -> Path:
    """A Debian system with what a rig needs. It is built once and never changed afterwards. Raises Unavailable."""
    _check()
    cache = Path(os.environ.get("LMDAEMON_RIG") or "/var/cache/lmdaemon-rig")
    done = cache / f"{suite}-{hashlib.sha256(PACKAGES.encode()).hexdigest()[:8]}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            building = cache / f"{done.name}.building"
            shutil.rmtree(building, ignore_errors=True)
            _debootstrap(suite, building)
            building.rename(done)
    return done


def _check() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Unavailable("needs Linux and root")
    for command, package in NEEDS.items():
        if shutil.which(command, path=PATH) is None:
            raise Unavailable(f"needs {command} (Debian's package {package})")


def _debootstrap(suite: str, target: Path) -> None:
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite, str(target), *_mirror()]
    log = target.with_suffix(".log")
    with log.open("w") as output:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False,
                                  env=os.environ | {"PATH": PATH}, timeout=BASE_WITHIN_S)  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Unavailable(f"debootstrap took longer than {BASE_WITHIN_S:g} s, see {log}") from None
    if done.returncode:
        last = log.read_text().strip().rpartition("\n")[2]
        raise Unavailable(f"debootstrap failed, see {log}: {last}")
    shutil.rmtree(target / "var/cache/apt/archives", ignore_errors=True)
    # Debootstrap's variant "minbase" has none
    (target / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
    (target / "etc/hostname").write_text("rig\n")
    (target / "etc/machine-id").write_text("")


def _mirror() -> list[str]:
    """The server from which this machine gets its Debian packages. Empty if the machine is no Debian; debootstrap then
    uses its default.
    """
    if shutil.which("apt-get") is None:
        return []
    listing = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(SUITE)", "Origin: Debian", "Created-By: Packages"]
    said = subprocess.run(listing, capture_output=True, text=True, check=False).stdout
    found = [line.split()[0] for line in said.splitlines() if re.fullmatch(r"\S+ (old)*stable|\S+ testing", line)]
    return found[:1]


def _pip_settings() -> tuple[str, list[str]]:
    """This machine's pip settings as one pip.conf for the rig, and the paths that they name, which must be visible in
    the rig.
    """
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    tables: dict[str, list[str]] = {}
    paths: set[str] = set()
    for line in said.stdout.splitlines():
        key, _, shown = line.partition("=")
        section, _, name = key.rpartition(".")
        value = str(ast.literal_eval(shown))
        tables.setdefault(section.replace(":env:", "global"), []).append(f"{name} = " + "\n  ".join(value.split()))
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # The pages of a package index name files in other directories beside it
                paths.add(str(path.parent if word.startswith("file://") else path))
    sections = (f"[{section}]\n" + "\n".join(dict.fromkeys(lines)) for section, lines in tables.items())
    return "\n".join(sections) + "\n", sorted(paths - {"/"})


def _of_network() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if OF_NETWORK.fullmatch(name)}


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    """Makes a control group for the rig in every hierarchy that systemd may use, because two rigs must not share
    one.
    """
    places = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")
    groups = [Path(place) / name for place in places if Path(place, "cgroup.procs").exists()]
    with contextlib.suppress(OSError):  # if it is read-only, nspawn reports it
        for group in groups:
            group.mkdir()
    try:
        yield [group for group in groups if group.exists()]
    finally:
        for group in groups:
            for below in sorted(group.rglob("*"), reverse=True):
                if below.is_dir():
                    _retry(below.rmdir)
            _retry(group.rmdir)


def _retry(remove: Callable[[], None]) -> None:
    """Repeats the removal, because a group is busy until the last of its processes is reaped."""
    for _ in range(100):
        try:
            return remove()
        except FileNotFoundError:
            return None
        except OSError:
            time.sleep(0.05)
    return None
