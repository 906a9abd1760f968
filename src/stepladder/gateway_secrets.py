"""The gateway's certificate and API keys, judged on the controller before anything is touched."""

from __future__ import annotations

import hashlib
import re
import ssl
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

from stepladder.errors import StepladderError

KEY_LINE = re.compile(r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._@-]{0,63})\s+(?P<key>\S+)$")
# HAProxy compares unsalted SHA-256: a key has to be too long to be guessed, 128 bits in any usual alphabet.
SHORTEST_KEY = 24
EXPIRES_SOON = timedelta(days=14)
SHAPE = "one key a line, 'NAME KEY'; make one with: openssl rand -hex 32"


class GatewayFileError(StepladderError):
    """A certificate or key file that cannot be used."""


def keys_map(text: str, place: str) -> str:
    """HAProxy's map from each key's SHA-256 to its name; the keys themselves stay here.

    Args:
        text: of the file: one key a line, 'NAME KEY'; blank lines and those that begin with '#' are left out.
        place: the file, for messages.

    Raises:
        GatewayFileError: with every line that is wrong, by its number and never with what is in it.
    """
    faults: list[str] = []
    names: dict[str, int] = {}
    hashes: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = KEY_LINE.match(line.strip())
        if not match:
            faults.append(f"line {number} is not 'NAME KEY'")
            continue
        name, key = match["name"], match["key"]
        digest = hashlib.sha256(key.encode()).hexdigest()
        if len(key) < SHORTEST_KEY:
            faults.append(f"the key of {name} has {len(key)} characters, it needs {SHORTEST_KEY}")
        if name in names:
            faults.append(f"the name {name} stands in lines {names[name]} and {number}")
        if digest in hashes:
            faults.append(f"lines {hashes[digest]} and {number} have the same key")
        names.setdefault(name, number)
        hashes.setdefault(digest, number)
    if not names and not faults:
        faults.append("there is no key in it")
    if faults:
        raise GatewayFileError("\n".join([f"gateway_api_keys_file {place}: {'; '.join(faults)}.", f"  Put in {SHAPE}"]))
    lines = [f"{digest} {name}" for digest, name in zip(hashes, names, strict=True)]
    return "\n".join(sorted(lines)) + "\n"


def certificate_pem(certificate: str, private_key: str, now: datetime | None = None) -> tuple[str, str]:
    """Both in one PEM, as HAProxy reads it, and a warning where the certificate ends soon.

    The two meet in a TLS handshake with each other in memory: what a client would find wrong is found here.

    Raises:
        GatewayFileError: they do not belong together, cannot be read, or the certificate has ended.
    """
    try:
        server = _server_context(certificate, private_key)
    except ssl.SSLError as error:
        if "MISMATCH" in (error.reason or ""):
            text = "gateway_private_key_file does not belong to gateway_certificate_file: its public key is another. "
            text += "Nothing was changed. Give the key that the certificate was made for, the certificate first."
            raise GatewayFileError(text) from None
        reason = (error.reason or str(error)).lower().replace("_", " ")
        text = f"gateway_certificate_file and gateway_private_key_file cannot be read as PEM: {reason}. "
        text += "The key may have no password; vault protects it. Nothing was changed."
        raise GatewayFileError(text) from None
    ends = _end_of(server, certificate)
    left = ends - (now or datetime.now(UTC))
    warning = f"The gateway's certificate ends on {ends:%Y-%m-%d}, in {left.days} days." if left < EXPIRES_SOON else ""
    return f"{certificate.strip()}\n{private_key.strip()}\n", warning


def _server_context(certificate: str, private_key: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:  # 0700; OpenSSL reads files only
        files = Path(folder, "certificate"), Path(folder, "key")
        for path, text in zip(files, (certificate, private_key), strict=True):
            path.write_text(text)
        # Asked for a password it would wait at the terminal.
        context.load_cert_chain(*files, password=lambda: "")
    return context


def _end_of(server: ssl.SSLContext, certificate: str) -> datetime:
    """When the certificate ends, as the client of a handshake in memory sees it."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    # Trusts the certificate itself, whoever signed it. Python tells a client what it says only where it is trusted.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cadata=certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                text = f"Clients would refuse the certificate in gateway_certificate_file: {error.verify_message}."
                raise GatewayFileError(f"{text} Nothing was changed.") from None
    found = ends[0].getpeercert() or {}
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)
