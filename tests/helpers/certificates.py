"""Makes certificates as a test needs them: authorities, servers and clients, valid or expired."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Files:
    """A certificate and its key, in files and as they are needed to sign others."""

    cert: Path
    key: Path
    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def end(self) -> datetime:
        return self.certificate.not_valid_after_utc


def make(
    directory: Path,
    name: str,
    signer: Files | None = None,
    *,
    authority: bool = False,
    begins: timedelta = -DAY,
    ends: timedelta = 100 * DAY,
    key_identifiers: bool = True,
    key_usage: bool = True,
) -> Files:
    """Writes NAME.crt and NAME.key (0600) to the directory, for 127.0.0.1 and localhost. Without a signer, the
    certificate is self-signed.
    """
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    signs = signer.private if signer else private
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer.certificate.subject if signer else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if not authority:
        names = [x509.IPAddress(ip_address("127.0.0.1")), x509.DNSName("localhost")]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if authority and key_usage:
        usage = dict.fromkeys(
            (
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ),
            False,
        )
        builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
    if key_identifiers:
        own = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
        issuers = x509.AuthorityKeyIdentifier.from_issuer_public_key(signs.public_key())
        builder = builder.add_extension(own, critical=False).add_extension(issuers, critical=False)
    certificate = builder.sign(signs, hashes.SHA256())
    cert, key = directory / f"{name}.crt", directory / f"{name}.key"
    cert.write_bytes(certificate.public_bytes(Encoding.PEM))
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key.chmod(0o600)
    return Files(cert, key, certificate, private)
