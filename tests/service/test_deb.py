"""The Debian package on a machine of its own: built there, installed, upgraded under load, removed, purged.

Before that, `make install` on the same machine, because the two must not disturb each other.
"""

import json
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from installed import CONFIG, DATABASE, PRIVATE, REPOSITORY, SOURCE, UNIT, WITHIN_S, Service
from processes import wait_for
from rig import Rig

from lmdaemon import __version__

UNITS = ("lmdaemon.service", "lmdaemon.socket")
OURS = """
[operators.acme]
provider_id = "acme"
endpoint = "/acme"
"""
NEXT = "9.0.0"


@pytest.fixture(scope="module")
def machine(bare: Rig) -> Service:
    bare.copy(REPOSITORY, SOURCE)
    return Service(bare)


@pytest.fixture(scope="module")
def packages(machine: Service) -> tuple[str, str]:
    """The package of this version and one of a higher version with other default settings, built in the rig with its
    own Python.
    """
    first = build(machine)
    version = machine.rig.path(f"{SOURCE}/lmdaemon/version.py")
    version.write_text(version.read_text().replace(__version__, NEXT))
    shipped = machine.rig.path(f"{SOURCE}/config.toml")
    shipped.write_text(shipped.read_text().replace("# lmdaemon's settings", "# lmdaemon's own settings"))
    return first, build(machine)


def build(machine: Service) -> str:
    said = machine.rig.run("make", "--no-print-directory", "-C", SOURCE, "deb", network=True, timeout=1800)
    return f"{SOURCE}/{said.stdout.strip()}"


def dpkg(machine: Service, *words: str) -> str:
    """Runs dpkg. There is no terminal to answer questions at, so a question makes it fail."""
    done = machine.rig.run("dpkg", *words, environment={"DEBIAN_FRONTEND": "noninteractive"}, timeout=600)
    return done.stdout + done.stderr


def states(machine: Service) -> list[str]:
    return machine.systemctl("is-active", *UNITS, check=False).split()


def below(machine: Service, *places: str) -> list[str]:
    """Files of lmdaemon in these places, some of which may not exist."""
    said = machine.rig.run("find", *places, "-path", "*lmdaemon*", "!", "-type", "d", check=False).stdout
    return sorted(said.splitlines())


def everywhere(machine: Service) -> list[str]:
    return below(
        machine, "/opt/lmdaemon", "/usr/lib/systemd", "/usr/lib/sysusers.d", "/usr/bin", "/usr/local", "/etc/systemd"
    )


def owner(machine: Service, path: str) -> str:
    return machine.rig.run("stat", "--format=%U:%G %a", path).stdout.strip()


# -- make install


def test_two_commands_install_and_start_it(machine: Service) -> None:
    machine.rig.run("make", "-C", SOURCE, "install", network=True, timeout=1800)
    machine.systemctl("enable", "--now", UNIT)
    machine.wait_until_serving()
    assert owner(machine, CONFIG) == "root:lmdaemon 640"
    assert owner(machine, "/etc/lmdaemon/credentials") == "root:root 700"
    assert owner(machine, DATABASE) == "lmdaemon:lmdaemon 600"


def test_a_second_make_install_changes_unedited_older_settings_alone(machine: Service) -> None:
    def seen() -> str:
        sums = "find /opt/lmdaemon /usr/lib/systemd /etc/lmdaemon -type f ! -name '*.pyc' -exec sha256sum {} + | sort"
        return machine.rig.run("sh", "-c", f"{sums}; stat -c '%n %U:%G %a' /etc/lmdaemon/*").stdout

    before, pid = seen(), machine.pid
    for path in (CONFIG, "/opt/lmdaemon/share/doc/lmdaemon/config.toml"):
        machine.rig.path(path).write_text("# what an older version shipped\n")
    said = machine.rig.run("make", "-C", SOURCE, "install", network=True, timeout=1800).stdout
    assert seen() == before
    assert machine.pid == pid
    assert machine.serves
    assert "systemctl try-restart lmdaemon" in said


def test_make_install_writes_nothing_where_another_user_could_put_links(machine: Service) -> None:
    for place in ("/etc/lmdaemon", "/opt/lmdaemon"):
        machine.rig.run("chown", "nobody", place)
        done = machine.rig.run("make", "-C", SOURCE, "install", check=False)
        machine.rig.run("chown", "root", place)
        assert done.returncode != 0
        assert f"{place}: must be root's own directory" in done.stderr


def test_the_package_refuses_to_lie_over_make_install(machine: Service, packages: tuple[str, str]) -> None:
    done = machine.rig.run("dpkg", "--install", packages[0], check=False)
    assert done.returncode != 0
    assert "make uninstall first" in done.stderr
    assert machine.serves
    machine.rig.run("dpkg", "--purge", "lmdaemon", check=False)


def test_make_uninstall_stops_it_and_leaves_settings_and_state(machine: Service) -> None:
    said = machine.rig.run("make", "-C", SOURCE, "uninstall").stdout
    assert states(machine) == ["inactive", "inactive"]
    assert everywhere(machine) == []
    assert not machine.rig.path("/opt/lmdaemon").exists()
    assert machine.rig.path(CONFIG).exists()
    assert machine.rig.path(DATABASE).exists()
    assert "/etc/lmdaemon" in said
    assert "/var/lib/lmdaemon" in said
    machine.rig.run("sh", "-c", "rm -r /etc/lmdaemon /var/lib/lmdaemon && userdel lmdaemon")


# -- the package


def test_two_builds_of_the_same_tree_are_the_same_bytes(machine: Service, packages: tuple[str, str]) -> None:
    first = machine.rig.run("sha256sum", packages[1]).stdout
    assert machine.rig.run("sha256sum", build(machine)).stdout == first


def test_a_fresh_package_serves_and_delivers_and_answers_to_root(machine: Service, packages: tuple[str, str]) -> None:
    dpkg(machine, "--install", packages[0])
    machine.wait_until_serving()
    assert machine.systemctl("is-enabled", *UNITS).split() == ["enabled", "enabled"]
    assert owner(machine, CONFIG) == "root:lmdaemon 640"
    assert owner(machine, "/etc/lmdaemon/credentials") == "root:root 700"
    assert owner(machine, "/var/lib/lmdaemon") == "lmdaemon:lmdaemon 700"
    machine.open("s-1", "demo")
    machine.close("s-1", "demo")
    machine.delivered("s-1", "demo")
    # In a root shell, in any directory: the command finds settings, daemon and database.
    assert "demo" in machine.rig.run("lmdaemon", "status").stdout
    assert "integrity ok" in machine.rig.run("lmdaemon", "backup", "/root/copy.sqlite3").stdout
    assert stat.S_IMODE(machine.rig.path("/root/copy.sqlite3").stat().st_mode) == 0o600
    assert dpkg(machine, "--verify", "lmdaemon") == ""


def test_an_upgrade_under_load_refuses_nobody_and_keeps_all(
    machine: Service, packages: tuple[str, str], measured: Callable[..., None]
) -> None:
    """Kept are sessions and edited settings."""
    rig = machine.rig
    edited = rig.path(CONFIG).read_text() + OURS
    rig.path(CONFIG).write_text(edited)
    machine.systemctl("reload", UNIT)
    machine.open("before", "demo")
    pid = machine.pid
    rig.write("/run/load.py", Path(__file__).with_name("load.py").read_text())
    rig.path("/run/load-on").touch()
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(rig.run, "python3", "/run/load.py", PRIVATE, "/run/load-on", timeout=900)
        try:
            wait_for(lambda: machine.call("GET", f"{PRIVATE}/v1/operators/acme/sessions/load-0-50")[0] == 200, WITHIN_S)
            # The options that unattended-upgrades and similar programs give dpkg for a settings file that both sides
            # have changed
            dpkg(machine, "--force-confdef", "--force-confold", "--install", packages[1])
            machine.wait_until_serving()
        finally:
            rig.path("/run/load-on").unlink()
        result = json.loads(load.result().stdout)
    assert result["failed"] == []
    measured(acknowledged=len(result["opened"]), failed=0)
    assert machine.pid != pid
    assert NEXT in rig.run("lmdaemon", "version").stdout
    assert machine.session("before", "demo")["state"] == "active"
    status, page = machine.call("GET", f"{PRIVATE}/v1/operators")
    assert status == 200
    (acme,) = (operator for operator in page["items"] if operator["operator"] == "acme")
    assert acme["live"] == len(result["opened"]) > 50
    assert rig.path(CONFIG).read_text() == edited
    assert owner(machine, CONFIG) == "root:lmdaemon 640"
    assert "own settings" in rig.path(f"{CONFIG}.dpkg-dist").read_text()


def test_an_upgrade_asks_nothing_where_the_shipped_settings_are_the_same(
    machine: Service, packages: tuple[str, str]
) -> None:
    edited = machine.rig.path(CONFIG).read_text()
    dpkg(machine, "--install", packages[1])
    machine.wait_until_serving()
    assert machine.rig.path(CONFIG).read_text() == edited


def test_what_was_stopped_or_disabled_stays_so_over_an_upgrade(machine: Service, packages: tuple[str, str]) -> None:
    machine.systemctl("stop", *UNITS)
    dpkg(machine, "--install", packages[1])
    assert states(machine) == ["inactive", "inactive"]
    machine.systemctl("disable", *UNITS)
    dpkg(machine, "--install", packages[1])
    assert states(machine) == ["inactive", "inactive"]
    assert machine.systemctl("is-enabled", *UNITS, check=False).split() == ["disabled", "disabled"]
    machine.systemctl("enable", "--now", *UNITS)
    machine.wait_until_serving()


def test_the_runbooks_restore_brings_back_what_the_backup_had(machine: Service) -> None:
    machine.rig.run("lmdaemon", "backup", "/root/before.sqlite3")
    machine.open("after", "demo")
    section = (REPOSITORY / "docs" / "operating.md").read_text().partition("### Restoring")[2]
    commands = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert commands
    machine.rig.run("sh", "-euc", commands[1])
    machine.wait_until_serving()
    assert machine.session("before", "demo")["state"] == "active"
    assert machine.call("GET", f"{PRIVATE}/v1/operators/demo/sessions/after")[0] == 404
    machine.open("again", "demo")
    assert owner(machine, DATABASE) == "lmdaemon:lmdaemon 600"


def test_removal_stops_it_and_says_where_settings_and_state_are(machine: Service) -> None:
    said = dpkg(machine, "--remove", "lmdaemon")
    assert states(machine) == ["inactive", "inactive"]
    assert [path for path in everywhere(machine) if not path.startswith("/etc/")] == []
    assert machine.rig.path(CONFIG).read_text().endswith(OURS)
    assert machine.rig.path(DATABASE).exists()
    assert re.search("kept /etc/lmdaemon .* and /var/lib/lmdaemon .* dpkg --purge lmdaemon removes them", said)


def test_installed_again_it_goes_on_with_what_was_kept(machine: Service, packages: tuple[str, str]) -> None:
    dpkg(machine, "--install", packages[1])
    machine.wait_until_serving()
    assert machine.session("before", "demo")["state"] == "active"
    assert machine.rig.path(CONFIG).read_text().endswith(OURS)


def test_a_purge_leaves_nothing(machine: Service) -> None:
    machine.rig.write("/etc/lmdaemon/credentials/api.tokens", "secret")
    dpkg(machine, "--purge", "lmdaemon")
    assert states(machine) == ["inactive", "inactive"]
    assert everywhere(machine) == []
    assert not machine.rig.path("/etc/lmdaemon").exists()
    assert not machine.rig.path("/var/lib/lmdaemon").exists()
    assert below(machine, "/var/lib/systemd") == []
    assert "lmdaemon" not in machine.rig.run("dpkg-query", "--show", check=False).stdout
