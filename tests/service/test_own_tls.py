"""The daemon's own TLS inside the sandbox: its files, a key as a credential, a port below 1024, and renewal."""

import pytest
from installed import UNIT, Service
from processes import wait_for

FILES = "/etc/lmdaemon/tls"
KEY = "/etc/lmdaemon/credentials/tls.key"
TLS = f'[server]\ntls_cert_file = "{FILES}/own.pem"\ntls_key_file = "{{key}}"\n[sessions]'


def renew(service: Service, key: str) -> None:
    """Writes a new certificate for localhost, with a new key."""
    service.rig.run("install", "-d", "-m", "750", "-g", "lmdaemon", FILES)
    new = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "100", "-subj", "/CN=localhost")
    service.rig.run(*new, "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", f"{FILES}/own.pem")
    service.rig.run("chmod", "640", key, f"{FILES}/own.pem")
    service.rig.run("chgrp", "lmdaemon", f"{FILES}/own.pem")


def answers(service: Service, port: int) -> bool:
    """Whether the daemon shows the certificate that is in the file now."""
    url = f"https://localhost:{port}/health"
    return service.call("GET", url, None, "--cacert", f"{FILES}/own.pem")[0] == 200


def test_files_that_the_group_can_read_are_renewed_at_a_reload(service: Service) -> None:
    renew(service, f"{FILES}/own.key")
    service.rig.run("chgrp", "lmdaemon", f"{FILES}/own.key")
    service.configure("[sessions]", TLS.format(key=f"{FILES}/own.key"))
    service.systemctl("reload", UNIT)
    wait_for(lambda: answers(service, 8080))
    pid = service.pid
    renew(service, f"{FILES}/own.key")
    service.rig.run("chgrp", "lmdaemon", f"{FILES}/own.key")
    assert not answers(service, 8080)
    service.systemctl("reload", UNIT)
    wait_for(lambda: answers(service, 8080))
    assert service.events("config.reloaded")[-1]["changed"] == "server.tls_cert_file,server.tls_key_file"
    assert service.pid == pid
    assert [one for one in service.events("config.warned") if one["finding"].startswith("server.")] == []


def test_a_key_as_a_credential_and_port_443_through_the_socket(service: Service) -> None:
    renew(service, KEY)
    service.drop_in(f"[Service]\nLoadCredential=tls.key:{KEY}\n")
    service.drop_in(
        "[Socket]\nListenStream=\nListenStream=127.0.0.1:443\nListenStream=127.0.0.1:8081\n", "lmdaemon.socket"
    )
    service.configure("[sessions]", TLS.format(key="tls.key").replace("[server]", '[server]\nlisten = "127.0.0.1:443"'))
    service.systemctl("stop", "lmdaemon.socket")
    service.systemctl("start", "lmdaemon.socket", UNIT)
    wait_for(lambda: answers(service, 443))
    renew(service, KEY)
    service.systemctl("restart", UNIT)
    wait_for(lambda: answers(service, 443))


@pytest.fixture(autouse=True)
def _none_is_left(service: Service) -> None:
    """Removes the certificates of the test before."""
    service.rig.run("rm", "-rf", FILES, KEY)
