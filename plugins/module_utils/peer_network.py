"""A node's IPv4 addresses, and which addresses of its peers it reaches, over which of its interfaces."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SIOCGIFCONF, _SIOCGIFNETMASK, _SIOCGIFFLAGS = 0x8912, 0x891B, 0x8913
_IFF_UP, _IFF_LOOPBACK = 0x1, 0x8
_ENTRY = 40  # bytes of a struct ifreq on 64-bit Linux
_MOST_ADDRESSES = 256
AT_ONCE = 32


def interfaces(system: Path = Path("/sys/class/net")) -> list[dict[str, Any]]:
    """Every IPv4 address of an interface that is up, loopback left out.

    Returns: name, address, network (as 198.18.0.0/24) and speed_mbit (None where the driver does not say).
    """
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for name, address in _addresses(asker):
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                flags = struct.unpack("H", fcntl.ioctl(asker, _SIOCGIFFLAGS, request)[16:18])[0]
                if flags & _IFF_LOOPBACK or not flags & _IFF_UP:
                    continue
                mask = socket.inet_ntoa(fcntl.ioctl(asker, _SIOCGIFNETMASK, request)[20:24])
                network = ipaddress.ip_network(f"{address}/{mask}", strict=False)
                speed = speed_of(system / name / "speed")
                found.append({"name": name, "address": address, "network": str(network), "speed_mbit": speed})
    return found


def _addresses(asker: socket.socket) -> list[tuple[str, str]]:
    import array  # noqa: PLC0415 - needed here only

    room = array.array("B", bytes(_ENTRY * _MOST_ADDRESSES))
    asked = struct.pack("iL", len(room), room.buffer_info()[0])
    filled = struct.unpack("iL", fcntl.ioctl(asker, _SIOCGIFCONF, asked))[0]
    data = room.tobytes()[:filled]
    entries = (data[start : start + _ENTRY] for start in range(0, filled, _ENTRY))
    return [(entry[:16].split(b"\0")[0].decode(), socket.inet_ntoa(entry[20:24])) for entry in entries]


def speed_of(path: Path) -> int | None:
    """Mbit/s; a virtual interface says -1 or nothing."""
    try:
        speed = int(path.read_text())
    except (OSError, ValueError):
        return None
    return speed if speed > 0 else None


def reach(
    peers: Mapping[str, Sequence[str]], own: Sequence[Mapping[str, Any]], port: int, timeout: float
) -> dict[str, dict[str, Any]]:
    """Which addresses of the peers answer, by peer and address.

    Args:
        peers: addresses by peer.
        own: this node's `interfaces`; an address that it has itself is never a peer's.
        port: TCP port to knock at; a refusal comes from the peer too, so it counts as an answer.
        timeout: seconds for each.

    Returns: for each peer and address the interface that was used, None where nothing answered.
    """
    by_address = {interface["address"]: interface["name"] for interface in own}
    pairs = [(peer, address) for peer, addresses in peers.items() for address in addresses]
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        sources = pool.map(lambda pair: None if pair[1] in by_address else _knock(pair[1], port, timeout), pairs)
    found: dict[str, dict[str, Any]] = {peer: {} for peer in peers}
    for (peer, address), source in zip(pairs, sources):  # noqa: B905 - nodes may have Python 3.9
        found[peer][address] = by_address.get(source) if source else None
    return found


def _knock(address: str, port: int, timeout: float) -> str | None:
    """This node's address that an answer of the peer came to."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as knocking:
        knocking.settimeout(timeout)
        result = knocking.connect_ex((address, port))
        if result == 0:
            return str(knocking.getsockname()[0])
    if result != errno.ECONNREFUSED:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.connect((address, port))
        return str(asking.getsockname()[0])
