"""Reads the files of certificates and keys that the configuration names, for listeners and for operators, and checks
that OpenSSL can use them.
"""

import ssl
from contextlib import suppress

from lmdaemon import tls
from lmdaemon.config.findings import Findings
from lmdaemon.config.secrets import SecretFiles
from lmdaemon.config.settings import ApiTable, OperatorTable, ServerTable, Tls
from lmdaemon.tls import Certificate, Pem, Profile

TlsFiles = tuple[Pem | None, Pem | None, Pem | None]  # CAs to trust, the daemon's certificate, its key


class Certificates:
    """Reads and checks files of certificates and private keys. `pems` has every file that was read, by key path."""

    def __init__(self, files: SecretFiles, findings: Findings) -> None:
        self._files = files
        self._findings = findings
        self._profiles: dict[TlsFiles, Profile] = {}
        self.pems: dict[str, Pem] = {}

    def certificates(self, name: str, at: str, *, latest: bool = False) -> Pem | None:
        """Reads a file of certificates. If it cannot be used, records an error and returns None.

        `latest` is for a file of CAs, in which one valid certificate suffices: only the one that expires last is kept,
        so that no warning is given about the others.
        """
        content = self._files.read(name, at) if name else None
        if content is None:
            return None
        path = self._files.beside(name)
        if not tls.holds_certificate(content):
            self._findings.error(at, f"must hold a certificate in PEM form ({path})")
            return None
        found: list[Certificate] = []
        with suppress(ValueError):  # what is wrong with the certificate is reported later, when OpenSSL loads the file
            found = tls.certificates(content)
        if latest:
            found = sorted(found, key=lambda one: one.not_after)[-1:]
        pem = self.pems[at] = Pem(path, tls.digest(content), tuple(found))
        return pem

    def private_key(self, name: str, at: str) -> Pem | None:
        """Reads a file with a private key. If it cannot be used, records an error and returns None."""
        content = self._files.read(name, at, secret=True) if name else None
        if content is None:
            return None
        path = self._files.beside(name)
        if not tls.holds_private_key(content):
            self._findings.error(at, f"must hold a private key in PEM form, without a passphrase ({path})")
            return None
        pem = self.pems[at] = Pem(path, tls.digest(content))
        return pem

    # -- towards operators

    def of_operator(self, table: OperatorTable, at: str) -> TlsFiles:
        """The files that an operator names, read and checked; None for a file that is not named or cannot be used."""
        if bool(table.client_cert_file) != bool(table.client_key_file):
            self._findings.error(f"{at}.client_cert_file", "and client_key_file must be given together")
        return (
            self.certificates(table.ca_file, f"{at}.ca_file", latest=True),
            self.certificates(table.client_cert_file, f"{at}.client_cert_file"),
            self.private_key(table.client_key_file, f"{at}.client_key_file"),
        )

    def profile(self, table: OperatorTable, files: TlsFiles, at: str, *, used: bool) -> Profile:
        """The TLS profile of these files. If the operator names any, or if the profile will be `used`, OpenSSL loads
        them first, and what it refuses is recorded as an error. Otherwise nothing is loaded, because loading the
        system's CAs takes 20 ms.
        """
        profile = self._profiles.setdefault(files, Profile(*files))
        ca, cert, key = files
        named = (table.ca_file, table.client_cert_file, table.client_key_file)
        whole = [bool(name) for name in named] == [file is not None for file in files] and bool(cert) == bool(key)
        if whole and (used or any(named)):
            # The CA is loaded alone first, because OpenSSL's error does not say which file it is about
            if ca is not None and cert is not None:
                alone: TlsFiles = (ca, None, None)
                self._check_usable(self._profiles.setdefault(alone, Profile(*alone)), f"{at}.ca_file")
            if self._findings.sound(at, "ca_file"):
                self._check_usable(profile, f"{at}.client_cert_file" if cert else f"{at}.ca_file", cert)
        return profile

    def _check_usable(self, profile: Profile, at: str, cert: Pem | None = None) -> None:
        try:
            _ = profile.context
        except OSError as error:  # ssl.SSLError is an OSError
            self._findings.error(at if cert is None else _blamed(error, cert, at), tls.unusable(error))

    # -- of listeners

    def of_listener(self, table: ServerTable | ApiTable, at: str) -> Tls | None:
        """The TLS settings of a listener; None when it speaks no TLS, or its certificate cannot be read."""
        error = self._findings.error
        if bool(table.tls_cert_file) != bool(table.tls_key_file):
            error(f"{at}.tls_cert_file", "and tls_key_file must be given together")
        elif table.client_ca_file and not table.tls_cert_file:
            error(f"{at}.client_ca_file", "needs tls_cert_file: only over TLS a client can show a certificate")
        cert = self.certificates(table.tls_cert_file, f"{at}.tls_cert_file")
        key = self.private_key(table.tls_key_file, f"{at}.tls_key_file")
        ca = self.certificates(table.client_ca_file, f"{at}.client_ca_file", latest=True)
        if cert is None or not table.tls_key_file:
            return None
        context = None
        if key is not None and (ca is not None or not table.client_ca_file):
            context = self._server_context(cert, key, ca, f"{at}.tls_cert_file")
        return Tls(cert, context)

    def _server_context(self, cert: Pem, key: Pem, ca: Pem | None, at: str) -> ssl.SSLContext | None:
        try:
            context = tls.server_context(cert.path, key.path, ca and ca.path)
            if not cert.certificates:
                self._findings.error(at, f"has a certificate that cannot be read ({cert.path})")
        except OSError as error:  # ssl.SSLError is an OSError
            upside_down = "; it begins with an issuer's certificate: the server's own must come first"
            hint = upside_down if tls.starts_with_issuer(cert.certificates) else ""
            if ca is not None and not tls.readable(ca.path):
                self._findings.error(at.replace("tls_cert", "client_ca"), tls.unusable(error))
            else:
                self._findings.error(_blamed(error, cert, at), tls.unusable(error) + hint)
            return None
        if out_of_order := tls.out_of_order(cert.certificates):
            self._findings.warn(at, f"{out_of_order}: {cert.path}")
        return context


def _blamed(error: OSError, cert: Pem, at: str) -> str:
    """The key path to name in an error about a certificate and its private key: that of the private key if a file is
    damaged and the certificate can be read, else that of the certificate (`at`).
    """
    is_key = tls.damaged(error) and tls.readable(cert.path)
    return at.removesuffix("cert_file") + "key_file" if is_key else at
