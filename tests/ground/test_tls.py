"""TLS: every Python version verifies the same certificates, and certificates are read as OpenSSL reads them."""

import asyncio
import os
import re
import socket
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import DAY, Files, make
from hypothesis import given
from hypothesis import strategies as st

from lmdaemon import tls


async def handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Makes a real connection to 127.0.0.1 and sends a byte each way, because in TLS 1.3 a refusal comes after the
    handshake.

    Raises the client's exception.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(1))
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server)
    async with listening, asyncio.timeout(10):
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        try:
            writer.write(b"x")
            if await reader.read(1) != b"x":
                raise ConnectionResetError
        finally:
            writer.close()


class TestTheSystemsCertificates:
    """Contexts that are made while the daemon's modules are imported read them when they are used."""

    @pytest.fixture
    def system(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
        """The only authority that the system trusts."""
        ca = make(tmp_path, "system", authority=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca.cert))
        monkeypatch.setenv("SSL_CERT_DIR", os.devnull)
        return ca

    @pytest.fixture
    def context(self, system: Files) -> ssl.SSLContext:
        with tls.system_certificates_unread():
            made = ssl.create_default_context()
        assert made.cert_store_stats()["x509_ca"] == 0
        return made

    async def test_they_are_read_at_the_first_connection(
        self, tmp_path: Path, system: Files, context: ssl.SSLContext
    ) -> None:
        leaf = make(tmp_path, "leaf", system)
        for _ in range(2):
            await handshake(tls.server_context(leaf.cert, leaf.key), context)
        assert context.cert_store_stats()["x509_ca"] == 1

    async def test_a_server_of_another_authority_is_refused(self, tmp_path: Path, context: ssl.SSLContext) -> None:
        leaf = make(tmp_path, "leaf", make(tmp_path, "another", authority=True))
        with pytest.raises(ssl.SSLCertVerificationError):
            await handshake(tls.server_context(leaf.cert, leaf.key), context)

    def test_a_plain_socket_reads_them_too(self, context: ssl.SSLContext) -> None:
        with socket.socket() as plain, context.wrap_socket(plain, server_hostname="localhost"):
            assert context.cert_store_stats()["x509_ca"] == 1

    def test_contexts_that_are_made_later_read_them_at_once(self, system: Files) -> None:
        with pytest.raises(ImportError), tls.system_certificates_unread():
            raise ImportError
        assert ssl.create_default_context().cert_store_stats()["x509_ca"] == 1


class TestVerifying:
    async def test_a_leaf_without_key_identifiers_is_taken(self, tmp_path: Path) -> None:
        ca = make(tmp_path, "ca", authority=True)
        leaf = make(tmp_path, "leaf", ca, key_identifiers=False)
        await handshake(tls.server_context(leaf.cert, leaf.key), tls.client_context(ca.cert, None, None))

    async def test_an_authority_without_key_usage_is_taken(self, tmp_path: Path) -> None:
        ca = make(tmp_path, "ca", authority=True, key_usage=False)
        leaf = make(tmp_path, "leaf", ca)
        await handshake(tls.server_context(leaf.cert, leaf.key), tls.client_context(ca.cert, None, None))

    async def test_an_intermediate_alone_is_a_trust_anchor(self, tmp_path: Path) -> None:
        root = make(tmp_path, "root", authority=True)
        between = make(tmp_path, "between", root, authority=True)
        leaf = make(tmp_path, "leaf", between)
        await handshake(tls.server_context(leaf.cert, leaf.key), tls.client_context(between.cert, None, None))

    async def test_clients_are_verified_by_the_same_rules(self, tmp_path: Path) -> None:
        root = make(tmp_path, "root", authority=True, key_usage=False)
        between = make(tmp_path, "between", root, authority=True, key_usage=False)
        server, client = make(tmp_path, "server", root), make(tmp_path, "client", between, key_identifiers=False)
        listening = tls.server_context(server.cert, server.key, between.cert)
        await handshake(listening, tls.client_context(root.cert, client.cert, client.key))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await handshake(listening, tls.client_context(root.cert, None, None))

    @pytest.mark.parametrize("why", ["another authority", "expired", "another name", "an authority that has expired"])
    async def test_what_must_not_verify_does_not(self, tmp_path: Path, why: str) -> None:
        ca = make(tmp_path, "ca", authority=True, ends=-DAY / 2 if "authority that" in why else 100 * DAY)
        leaf = make(tmp_path, "leaf", ca, ends=-DAY / 2 if why == "expired" else 100 * DAY)
        if why == "another name":
            leaf = make(tmp_path, "leaf", ca, authority=True)  # this certificate names no host
        trusted = make(tmp_path, "other", authority=True) if why == "another authority" else ca
        with pytest.raises(ssl.SSLCertVerificationError):
            await handshake(tls.server_context(leaf.cert, leaf.key), tls.client_context(trusted.cert, None, None))

    def test_the_systems_authorities_follow_the_same_rules(self) -> None:
        context = tls.client_context(None, None, None)
        assert context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
        assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


class TestUnusable:
    def reason(self, *files: Path | None) -> str:
        with pytest.raises(OSError) as caught:  # noqa: PT011 - what it says is looked at by the caller
            tls.client_context(*files)  # type: ignore[arg-type]
        return tls.unusable(caught.value)

    def test_a_certificate_of_another_key_is_said_in_words(self, tmp_path: Path) -> None:
        one, other = make(tmp_path, "one"), make(tmp_path, "other")
        assert self.reason(None, one.cert, other.key) == "does not fit its key"

    def test_what_openssl_says_is_told_without_places_in_python(self, tmp_path: Path) -> None:
        (tmp_path / "empty").touch()
        assert self.reason(tmp_path / "empty", None, None) == ("cannot be used for TLS: no certificate or crl found")
        assert self.reason(tmp_path / "none", None, None) == "cannot be used for TLS: No such file or directory"


class TestReading:
    def read(self, files: Files) -> tls.Certificate:
        (found,) = tls.certificates(files.cert.read_bytes())
        return found

    def test_dates_and_name_are_those_that_openssl_reads(self, tmp_path: Path) -> None:
        # Dates after 2049 are encoded as another type
        for name, ends in (("short", 2 * DAY), ("beyond 2050", 50 * 366 * DAY)):
            files = make(tmp_path, name, ends=ends)
            told = ssl._ssl._test_decode_cert(str(files.cert))  # type: ignore[attr-defined]
            found = self.read(files)
            assert found.name == name
            assert found.not_before.timestamp() == ssl.cert_time_to_seconds(told["notBefore"])
            assert found.not_after.timestamp() == ssl.cert_time_to_seconds(told["notAfter"])

    def test_every_certificate_of_the_systems_store_is_read(self) -> None:
        store = ssl.get_default_verify_paths().cafile
        if store is None:
            pytest.skip("this system has no file of certificates")
        found = tls.certificates(Path(store).read_bytes())
        known = ssl.create_default_context(cafile=store).get_ca_certs()
        dates = {(one.not_before.timestamp(), one.not_after.timestamp()) for one in found}
        assert dates == {
            (ssl.cert_time_to_seconds(str(one["notBefore"])), ssl.cert_time_to_seconds(str(one["notAfter"])))
            for one in known
        }

    def test_a_chain_is_read_in_its_order_whatever_stands_between(self, tmp_path: Path) -> None:
        ca = make(tmp_path, "ca", authority=True)
        leaf = make(tmp_path, "leaf", ca)
        text = b"# \xc3\xa9\n" + leaf.cert.read_bytes() + leaf.key.read_bytes() + ca.cert.read_bytes()
        assert [one.name for one in tls.certificates(text)] == ["leaf", "ca"]
        assert tls.certificates(leaf.key.read_bytes()) == []

    def test_damage_is_an_error(self, tmp_path: Path) -> None:
        content = make(tmp_path, "one").cert.read_bytes()
        lines = content.splitlines(keepends=True)
        with pytest.raises(ValueError, match="ends before its end"):
            tls.certificates(b"".join(lines[:3] + lines[-1:]))

    @given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
    def test_no_bytes_break_it_otherwise(self, noise: bytes, at: int, value: int) -> None:
        damaged = bytearray(DER)
        damaged[at % len(damaged)] = value
        for der in (noise, bytes(damaged)):
            try:
                tls.certificates(ssl.DER_cert_to_PEM_cert(der).encode())
            except ValueError:
                continue

    @pytest.mark.parametrize(
        ("begins", "ends", "said"),
        [
            (-30 * DAY, 22 * DAY, None),
            (-30 * DAY, 20 * DAY, r"expires on {end} \(one\)"),
            (-30 * DAY, -DAY, r"has expired on {end} \(one\)"),
            (DAY, 30 * DAY, r"is not valid before .* \(one\)"),
        ],
    )
    def test_what_ends_soon_is_said_with_its_day(
        self, tmp_path: Path, begins: timedelta, ends: timedelta, said: str | None
    ) -> None:
        files = make(tmp_path, "one", begins=begins, ends=ends)
        found = tls.ends_soon(self.read(files), datetime.now(UTC))
        if said is None:
            assert found is None
        else:
            assert re.fullmatch(said.format(end=files.end.strftime("%Y-%m-%d %H:%M UTC")), str(found))


DER = ssl.PEM_cert_to_DER_cert("""-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIUYYwTHeT0vLiSaBvaux61QKK1LI8wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjQwMzQ3NTZaGA8yMTI2MTAzMTAzNDc1
NlowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABC5g
nOP4ciyKSpavS9Okjb0cD3vSgGFT7+4jRPV0GcYXWPg2Wc6hQ57B10h9+/utwzGi
J9fe2CrSfhmZo0tS1aWjUzBRMB0GA1UdDgQWBBQBpdnLIOyepSwLNMqzfzIRdIvf
FDAfBgNVHSMEGDAWgBQBpdnLIOyepSwLNMqzfzIRdIvfFDAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCIQD0mR3l79YetimBKXOTMaY69JA3xQo8rPN9
QFMXAVYJkgIgcVoQpoIcD0qfYRLwc41h6WfEYTN9vjjwY5JEihGDTPA=
-----END CERTIFICATE-----
""")
