"""Fingerprints of OpenPGP public keys, so that a repository's key can be told before anything is written.

Standard library only: this runs on the node, under any Python from 3.9 on, and a bare server has no gpg.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator

PUBLIC_KEY, PUBLIC_SUBKEY = 6, 14  # packet types, RFC 9580 section 5
_ARMOUR = re.compile(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL)


class BadKeyError(ValueError):
    """What was given is no OpenPGP public key."""


def is_armoured(key: bytes) -> bool:
    """Whether a key is text between BEGIN and END lines; apt tells the two forms apart by the file's ending."""
    return _ARMOUR.search(key) is not None


def primary_fingerprints(key: bytes) -> list[str]:
    """The fingerprints of all primary keys, in capitals without blanks.

    Args:
        key: a file of one or more public keys, armoured or not.

    Raises:
        BadKeyError: there is none in it.
    """
    found = [_fingerprint(body) for blob in _blobs(key) for kind, body in _packets(blob) if kind == PUBLIC_KEY]
    if not found:
        raise BadKeyError("there is no OpenPGP public key in it")
    return found


def normalised(fingerprint: str) -> str:
    """A fingerprint as people write it, in capitals without blanks and colons."""
    return re.sub(r"[\s:]", "", fingerprint).upper().removeprefix("0X")


def _blobs(key: bytes) -> list[bytes]:
    blocks = _ARMOUR.findall(key)
    if not blocks:
        return [key]
    blobs = []
    for block in blocks:
        _, _, body = block.replace(b"\r", b"").rpartition(b"\n\n")  # armour headers end with an empty line
        lines = [line for line in body.split(b"\n") if line and not line.startswith(b"=")]  # "=" begins the checksum
        try:
            blobs.append(base64.b64decode(b"".join(lines), validate=True))
        except binascii.Error as error:
            raise BadKeyError(f"its armour is damaged: {error}") from error
    return blobs


def _packets(blob: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each packet (RFC 9580 section 4.2)."""
    place = 0
    while place < len(blob):
        head = blob[place]
        if not head & 0x80:
            raise BadKeyError("it is no OpenPGP file")
        place += 1
        try:
            kind, size, place = _new_header(head, blob, place) if head & 0x40 else _old_header(head, blob, place)
        except IndexError:
            raise BadKeyError("it is cut off") from None
        if place + size > len(blob):
            raise BadKeyError("it is cut off")
        yield kind, blob[place : place + size]
        place += size


def _new_header(head: int, blob: bytes, place: int) -> tuple[int, int, int]:
    first = blob[place]
    if first < 192:
        return head & 0x3F, first, place + 1
    if first < 224:
        return head & 0x3F, ((first - 192) << 8) + blob[place + 1] + 192, place + 2
    if first == 255:
        return head & 0x3F, int.from_bytes(blob[place + 1 : place + 5], "big"), place + 5
    raise BadKeyError("a key in parts of unknown length is not supported")


def _old_header(head: int, blob: bytes, place: int) -> tuple[int, int, int]:
    width = {0: 1, 1: 2, 2: 4}.get(head & 3)
    if width is None:
        raise BadKeyError("a key of unknown length is not supported")
    if place + width > len(blob):
        raise IndexError
    return (head >> 2) & 0x0F, int.from_bytes(blob[place : place + width], "big"), place + width


def _fingerprint(body: bytes) -> str:
    """Of a public key packet: SHA-1 for version 4, SHA-256 for version 6 (RFC 9580 section 5.5.4)."""
    if body[:1] == b"\x04":
        framed = b"\x99" + len(body).to_bytes(2, "big") + body
        return hashlib.sha1(framed).hexdigest().upper()  # noqa: S324 - the format defines it so
    if body[:1] == b"\x06":
        return hashlib.sha256(b"\x9b" + len(body).to_bytes(4, "big") + body).hexdigest().upper()
    raise BadKeyError(f"a key of version {body[0] if body else '?'} is not supported")
