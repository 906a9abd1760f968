"""The choice of the network that joins a replica's nodes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from stepladder.errors import PlanRefusedError
from stepladder.network import Seen, settle
from stepladder.request import Node


def node(name: str, address: str, **values: Any) -> Node:
    return Node(name=name, address=address, gpu="cpu", **values)


def interface(name: str, address: str, speed: int | None = None) -> dict[str, Any]:
    return {"name": name, "address": address, "network": re.sub(r"\d+$", "0/24", address), "speed_mbit": speed}


A, B = node("a", "198.18.0.1"), node("b", "198.18.0.2")
SLOW_A, SLOW_B = interface("eth0", "198.18.0.1", 1000), interface("lan7", "198.18.0.2", 1000)
FAST_A, FAST_B = interface("ib0", "198.19.0.1", 100000), interface("ens9", "198.19.0.2", 100000)
DOCKER = interface("docker0", "198.18.200.1")


def seen(a: list[dict[str, Any]], b: list[dict[str, Any]], deaf: tuple[str, ...] = ()) -> dict[str, Seen]:
    """Both nodes reach every address of the other, but those that they have themselves or that are `deaf`."""

    def reached(own: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, str | None]:
        mine = {i["address"] for i in own}
        return {i["address"]: None if i["address"] in mine or i["address"] in deaf else "any" for i in others}

    return {"a": Seen(a, {"b": reached(a, b)}), "b": Seen(b, {"a": reached(b, a)})}


@pytest.mark.parametrize(
    ("told", "a", "b", "reason"),
    [
        (
            seen([SLOW_A, DOCKER], [SLOW_B, DOCKER]),
            "eth0 198.18.0.1",
            "lan7 198.18.0.2",
            "198.18.0.0/24 is the only network that joins all nodes",
        ),
        (
            seen([SLOW_A, FAST_A], [SLOW_B, FAST_B]),
            "ib0 198.19.0.1",
            "ens9 198.19.0.2",
            "198.19.0.0/24 is the fastest network that joins all nodes (100000 Mbit/s)",
        ),
        (
            seen([SLOW_A, FAST_A], [SLOW_B, FAST_B], deaf=("198.19.0.2",)),
            "eth0 198.18.0.1",
            "lan7 198.18.0.2",
            "198.18.0.0/24 is the only network that joins all nodes",
        ),
        (
            seen(
                [{**SLOW_A, "speed_mbit": None}, {**FAST_A, "speed_mbit": None}], [SLOW_B, {**FAST_B, "speed_mbit": 1}]
            ),
            "eth0 198.18.0.1",
            "lan7 198.18.0.2",
            "198.18.0.0/24 joins all nodes and has the inventory's addresses",
        ),
        (
            seen([SLOW_A], [FAST_B]),
            "eth0 198.18.0.1",
            "ens9 198.19.0.2",
            "no network joins all nodes; its peers reach it there",
        ),
    ],
)
def test_the_fastest_network_that_all_peers_reach_is_chosen(told: dict[str, Seen], a: str, b: str, reason: str) -> None:
    first, second = settle([A, B], told)
    assert f"{first.interface} {first.address}" == a
    assert f"{second.interface} {second.address}" == b
    assert first.interface_reason == reason
    assert (first.client_address, second.client_address) == ("198.18.0.1", "198.18.0.2")


def test_what_the_inventory_declares_wins() -> None:
    told = seen([SLOW_A, FAST_A], [SLOW_B, FAST_B])
    nodes = [
        node("a", "198.18.0.1", interface="eth0"),
        node("b", "198.18.0.2", address_declared=True),
    ]
    assert [(n.interface, n.interface_reason) for n in settle(nodes, told)] == [
        ("eth0", "set in the inventory"),
        ("lan7", "set in the inventory"),
    ]


@pytest.mark.parametrize(
    ("nodes", "told", "complaint"),
    [
        (
            [node("a", "198.18.0.1", interface="eth9"), B],
            seen([SLOW_A], [SLOW_B]),
            "deployment_interface of a: eth9; its interfaces: eth0 198.18.0.1",
        ),
        (
            [A, B],
            seen([SLOW_A], [SLOW_B], deaf=("198.18.0.2",)),
            "network between b and its peers: 198.18.0.2 (lan7) is not reached from a",
        ),
        ([A, B], seen([], [SLOW_B]), "network between a and its peers: no address is not reached from b"),
    ],
)
def test_what_cannot_be_reached_is_named(nodes: list[Node], told: dict[str, Seen], complaint: str) -> None:
    with pytest.raises(PlanRefusedError) as refusal:
        settle(nodes, told)
    assert complaint in str(refusal.value)
