"""Fingerprints of OpenPGP keys, on keys made for it and on damage."""

from __future__ import annotations

import base64
import hashlib

import pytest
from ansible_collections.stepladder.core.plugins.module_utils import openpgp

# A version 4 public key packet of no use: version, time, algorithm 1 (RSA), two small numbers.
BODY = b"\x04" + bytes.fromhex("5f000000") + b"\x01" + b"\x00\x08\xc5" + b"\x00\x02\x03"
OTHER = b"\x04" + bytes.fromhex("5f000001") + b"\x01" + b"\x00\x08\xc7" + b"\x00\x02\x03"


def old(kind: int, body: bytes) -> bytes:
    return bytes([0x80 | kind << 2, len(body)]) + body


def new(kind: int, body: bytes) -> bytes:
    return bytes([0xC0 | kind, len(body)]) + body


def fingerprint(body: bytes) -> str:
    """RFC 9580 section 5.5.4.2: SHA-1 of 0x99, the length in two octets, and the body."""
    return hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).hexdigest().upper()


def armoured(blob: bytes, header: str = "Version: GnuPG v2\n") -> bytes:
    text = base64.encodebytes(blob).decode()
    return f"-----BEGIN PGP PUBLIC KEY BLOCK-----\n{header}\n{text}=abcd\n-----END PGP PUBLIC KEY BLOCK-----\n".encode()


KEYS = {
    "old header": (old(6, BODY), [fingerprint(BODY)]),
    "new header": (new(6, BODY), [fingerprint(BODY)]),
    "subkeys and names do not count": (old(6, BODY) + new(13, b"name") + old(14, OTHER), [fingerprint(BODY)]),
    "two keys in one file": (old(6, BODY) + new(6, OTHER), [fingerprint(BODY), fingerprint(OTHER)]),
    "armoured": (armoured(old(6, BODY)), [fingerprint(BODY)]),
    "armoured without headers": (armoured(old(6, BODY), ""), [fingerprint(BODY)]),
    "two armoured blocks": (armoured(old(6, BODY)) + armoured(old(6, OTHER)), [fingerprint(BODY), fingerprint(OTHER)]),
    "lines end as on Windows": (armoured(old(6, BODY)).replace(b"\n", b"\r\n"), [fingerprint(BODY)]),
}


@pytest.mark.parametrize(("key", "expected"), KEYS.values(), ids=KEYS)
def test_fingerprints_of_primary_keys(key: bytes, expected: list[str]) -> None:
    assert openpgp.primary_fingerprints(key) == expected


BROKEN = {
    "nothing": (b"", "there is no OpenPGP public key in it"),
    "a page of a proxy": (b"<html>login</html>", "it is no OpenPGP file"),
    "cut off": (old(6, BODY)[:-1], "it is cut off"),
    "cut off in the header": (old(6, BODY)[:1], "it is cut off"),
    "only a subkey": (old(14, BODY), "there is no OpenPGP public key in it"),
    "version 3": (old(6, b"\x03" + BODY[1:]), "a key of version 3 is not supported"),
    "damaged armour": (armoured(old(6, BODY)).replace(b"\n\n", b"\n\n!", 1), "its armour is damaged"),
}


@pytest.mark.parametrize(("key", "message"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_key_is_told(key: bytes, message: str) -> None:
    with pytest.raises(openpgp.BadKeyError, match=message):
        openpgp.primary_fingerprints(key)


def test_fingerprints_are_compared_as_people_write_them() -> None:
    assert openpgp.normalised("eb69 3b30:35cd") == "EB693B3035CD"
