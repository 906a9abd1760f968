"""Subnets and addresses of labs: out of 198.18.0.0/15 (RFC 2544, for benchmarks), which no site uses."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from stepladder.lab.places import LabError

RANGE = ipaddress.IPv4Network("198.18.0.0/15")
# Docker inside the nodes has the upper half of the upper /16.
KEPT_BACK = ipaddress.IPv4Network("198.19.128.0/17")
FIRST_HOST = 11
MOST_NODES = 200
# The same server model comes with other names on another site: nothing may rely on eth0.
INTERFACES = ("eth0", "lan0", "ens3", "eno1")
STORAGE_INTERFACES = ("eth1", "san0", "ens4", "eno2")


def networks(texts: Iterable[str]) -> Iterator[ipaddress.IPv4Network]:
    """The IPv4 networks among destinations of routes and addresses; `default` and the rest are left out."""
    for text in texts:
        try:
            network = ipaddress.IPv4Network(text, strict=False)
        except ValueError:
            continue
        if network.prefixlen:
            yield network


def free_subnets(taken: Iterable[str], count: int) -> list[str]:
    """The first /24s that overlap with nothing.

    Args:
        taken: routes and addresses of the machine, subnets of other labs.
        count: how many.

    Raises:
        LabError: there are not so many.
    """
    occupied = list(networks(taken))
    found = []
    for subnet in RANGE.subnets(new_prefix=24):
        if not subnet.overlaps(KEPT_BACK) and not any(subnet.overlaps(other) for other in occupied):
            found.append(str(subnet))
            if len(found) == count:
                return found
    raise LabError(f"no /24 of {RANGE} is free: routes of this machine cover it (`ip route` lists them)")


def gateway(subnet: str) -> str:
    """The machine's own address on a lab's network."""
    return str(ipaddress.IPv4Network(subnet)[1])


def address(subnet: str, number: int) -> str:
    """The address of the node with that number, counted from 1."""
    return str(ipaddress.IPv4Network(subnet)[FIRST_HOST + number - 1])


def interface(number: int, storage: bool = False) -> str:
    """How the node with that number calls its interface."""
    names = STORAGE_INTERFACES if storage else INTERFACES
    return names[(number - 1) % len(names)]
