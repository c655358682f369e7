"""Certificates for a simulated operator, of a made-up CA. The library trustme makes them; the extra `workbench`
installs it.
"""

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lmdaemon.workbench.script import TLS_FAULTS


def contexts(ca_file: Path, host: str) -> dict[str, ssl.SSLContext]:
    """TLS contexts by the fault that they cause; the context without a fault is under "". Writes the CA's certificate
    to `ca_file`. Raises ImportError and OSError.
    """
    import trustme

    authority = trustme.CA()
    ca_file.write_bytes(authority.cert_pem.bytes())
    names = tuple(dict.fromkeys((host, "localhost", "127.0.0.1")))
    yesterday = datetime.now(UTC) - timedelta(days=1)
    certificates = {
        "": authority.issue_cert(*names),
        "expired": authority.issue_cert(*names, not_before=yesterday - timedelta(days=30), not_after=yesterday),
        "wrong-name": authority.issue_cert("somebody-else.example"),
    }
    made = {}
    for fault in ("", *TLS_FAULTS):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        certificates.get(fault, certificates[""]).configure_cert(context)
        made[fault] = context
    return made
