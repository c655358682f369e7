"""The sandbox: how little it permits, why, and that everything works in it. The same for the stricter drop-in
`confined.conf`.
"""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from installed import CONFIG, DATABASE, PLUGINS, PRIVATE, REPOSITORY, UNIT, WITHIN_S, Service
from processes import wait_for

CONFINED = REPOSITORY / "systemd/confined.conf"


@pytest.fixture(params=["as shipped", "confined"])
def sandboxed(request: pytest.FixtureRequest, service: Service) -> Service:
    if request.param == "confined":
        confine(service)
        service.restart()
    return service


def confine(service: Service) -> None:
    service.rig.run("install", "-d", "/var/lib/lmdaemon-root")
    service.drop_in(CONFINED.read_text(), name="confined.conf")


def test_systemd_finds_no_fault_in_the_units(service: Service) -> None:
    done = service.rig.run("systemd-analyze", "verify", "lmdaemon.service", "lmdaemon.socket")
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(("confined", "limit"), [(False, 11), (True, 10)])
def test_the_exposure_stays_within_its_limit(service: Service, confined: bool, limit: int) -> None:
    if confined:
        confine(service)
    gate = ["systemd-analyze", "security", "--no-pager", UNIT]
    done = service.rig.run(*gate, f"--threshold={limit}", check=False)
    assert done.returncode == 0, done.stdout
    assert service.rig.run(*gate, f"--threshold={limit - 1}", check=False).returncode != 0, "tighten the limit"


def test_what_is_left_of_the_exposure_is_explained_in_the_unit(service: Service) -> None:
    shown = service.rig.run("systemd-analyze", "security", "--no-pager", UNIT).stdout
    left = re.findall(r"^✗ ([A-Za-z]+=)(?:~AF_\(?([A-Z]+))?", shown, re.MULTILINE)
    comments = "\n".join(line for line in (REPOSITORY / "systemd" / UNIT).read_text().splitlines() if line[:1] == "#")
    assert len(left) >= 5, shown
    assert [name for name, family in left if (f"AF_{family}" if family else name) not in comments] == []


def test_names_certificates_the_journal_and_a_reload_work_in_it(sandboxed: Service) -> None:
    name = f"secure-{sandboxed.pid}"
    sandboxed.open(name, "secure", idle_s=1)
    assert sandboxed.delivered(name, "secure")["attempts"] == 1
    assert [notice["port"] for notice in sandboxed.received(name)] == [9443]
    sandboxed.configure('endpoint = "/hooked"', 'endpoint = "/elsewhere"')
    sandboxed.systemctl("reload", UNIT)
    assert sandboxed.event("config.reloaded")["changed"] == "operators.hooked.endpoint"
    sandboxed.configure("[operators.acme]", "[operators.acme]\nno_such_key = 1")
    assert sandboxed.rig.run("systemctl", "reload", UNIT, check=False).returncode != 0
    assert sandboxed.serves


def test_a_backup_works_in_it_and_beside_it(sandboxed: Service) -> None:
    name = f"backed-up-{sandboxed.pid}"
    sandboxed.open(name)
    beside, inside = f"/root/{name}.sqlite3", f"/var/lib/lmdaemon/{name}.sqlite3"
    sandboxed.rig.run(
        "/opt/lmdaemon/bin/lmdaemon", "backup", beside, environment={"STATE_DIRECTORY": "/var/lib/lmdaemon"}
    )
    # A second unit with exactly the same sandbox
    backup = ["/opt/lmdaemon/bin/python", "-I", "-m", "lmdaemon", "--config", CONFIG, "backup", inside]
    unit = f"{sandboxed.systemctl('cat', UNIT)}\n[Service]\nType=oneshot\nRestart=no\nExecReload=\nExecStart=\n"
    unit += f"ExecStart={' '.join(backup)}\n[Unit]\nWants=\nPartOf=\n[Install]\nAlso=\n"
    sandboxed.rig.write("/run/systemd/system/copy.service", unit)
    sandboxed.systemctl("daemon-reload")
    sandboxed.systemctl("start", "copy")
    for copy in (beside, inside):
        path = sandboxed.rig.path(copy)
        assert path.stat().st_mode & 0o777 == 0o600
        assert name in sandboxed.rig.run("python3", "-c", ASK, copy).stdout.split()
    assert sandboxed.rig.path(f"{DATABASE}-wal").owner() == sandboxed.rig.path(DATABASE).owner()
    sandboxed.open(f"{name}-after")  # the daemon can still write


ASK = """
import sqlite3, sys
for (name,) in sqlite3.connect(sys.argv[1]).execute("SELECT session_id FROM session"):
    print(name)
"""


def test_no_shell_can_be_run_in_it(sandboxed: Service) -> None:
    sandboxed.rig.path("/run/lmdaemon/shell").touch()
    name = f"shell-{sandboxed.pid}"
    sandboxed.open(name, "hooked")
    sandboxed.close(name, "hooked")
    sandboxed.delivered(name, "hooked")
    assert sandboxed.rig.path("/run/lmdaemon/refused").read_text() in ("PermissionError", "FileNotFoundError")


def test_confined_it_sees_nothing_but_what_is_named(service: Service) -> None:
    confine(service)
    service.rig.write("/srv/not-for-it", "")
    service.restart()
    look = "cd $0 && ls -d * usr/* usr/bin/* var/* var/lib/*"
    seen = set(service.rig.run("sh", "-c", look, f"/proc/{service.pid}/root").stdout.split())
    mounted = {"bin", "dev", "etc", "lib", "lib64", "opt", "proc", "root", "run", "sys", "tmp", "usr", "var"}
    # bin is a link to usr/bin, which systemd makes by itself at a reload
    under = {"usr/bin", "usr/lib", "usr/lib64", "usr/local", "usr/share", "usr/bin/python3", "usr/bin/kill"}
    assert seen - mounted - under == {"var/lib", "var/tmp", "var/lib/lmdaemon"}
    assert service.rig.run("ls", "/srv").stdout.split() == ["not-for-it"]
    assert service.systemctl("show", "--property=RootDirectory", "--value", UNIT) == "/var/lib/lmdaemon-root"


def test_a_listener_may_be_a_unix_socket(service: Service) -> None:
    service.configure("[sessions]", '[api]\nlisten = "unix:/run/lmdaemon/api.sock"\n[sessions]')
    service.systemctl("restart", UNIT)
    over = ("--unix-socket", "/run/lmdaemon/api.sock")
    wait_for(lambda: service.call("GET", "http://unix/v1/operators", None, *over)[0] == 200, WITHIN_S)


def test_credentials_are_for_the_daemon_alone_and_change_at_a_restart(service: Service) -> None:
    rig = service.rig

    def asked_with(token: str) -> int:
        return service.call("GET", f"{PRIVATE}/v1/operators", None, "--header", f"Authorization: Bearer {token}")[0]

    rig.write("/etc/lmdaemon/credentials/api.tokens", "first-token-7\n", 0o600)
    service.drop_in("[Service]\nLoadCredential=api.tokens:/etc/lmdaemon/credentials/api.tokens\n")
    service.configure("[sessions]", '[api]\ntoken_file = "api.tokens"\n[sessions]')
    service.restart()
    assert (asked_with("first-token-7"), asked_with("other")) == (200, 401)
    rig.write("/etc/lmdaemon/credentials/api.tokens", "second-token-8\n", 0o600)
    service.systemctl("reload", UNIT)  # check-config cannot read credentials, and does not need them
    service.event("config.reloaded")
    service.restart()
    assert (asked_with("first-token-7"), asked_with("second-token-8")) == (401, 200)
    service.configure('restart_grace = "0s"', "restart_grace = 5")
    assert rig.run("systemctl", "reload", UNIT, check=False).returncode != 0
    service.configure("restart_grace = 5", 'restart_grace = "0s"')
    service.configure('token_file = "api.tokens"', 'token_file = "misspelt"')
    service.systemctl("reload", UNIT)  # only the daemon can find this error
    assert "api.token_file: cannot be read" in service.event("config.reload_failed")["finding"]
    assert asked_with("second-token-8") == 200
    assert "token-" not in service.said()


def test_no_core_is_written_that_would_have_tokens_in_it(service: Service) -> None:
    assert (service.show("LimitCORE"), service.show("LimitCORESoft")) == ("0", "0")
    limits = service.rig.path(f"/proc/{service.pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.MULTILINE)


def test_uvloop_works_in_it_too(service: Service, tmp_path: Path) -> None:
    version = service.rig.run("python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    wheel = ["--no-deps", "--only-binary=:all:", f"--python-version={version}", f"--dest={tmp_path}", "uvloop"]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wheel], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("uvloop-*"))) as packed:
        packed.extractall(service.rig.path(PLUGINS))
    service.restart()
    assert "/uvloop/loop." in service.rig.path(f"/proc/{service.pid}/maps").read_text()
    service.open("with-uvloop", idle_s=1)
    service.delivered("with-uvloop")
    service.rig.run("rm", "-r", f"{PLUGINS}/uvloop")
    service.restart()
